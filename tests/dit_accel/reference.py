"""FLUX's and PixArt's cached forward, slow and readable: every token computed, then all but the selected ones thrown away,
token by token in plain loops. Written from the equations; shares nothing with the engine but diffusers' modules."""

from __future__ import annotations

import math

import torch
from diffusers.models.embeddings import apply_rotary_emb

from dit_accel import TokenMergeConfig


class Cache:
    """Caches, ages and counters of a batch of pictures."""

    def __init__(self, config, grid, steps=None, halves=False) -> None:
        self.config, self.grid, self.steps, self.halves = config, grid, steps, halves
        self.step, self.next_full = -1, 0
        self.features, self.ages, self.inputs, self.seen = {}, {}, {}, {}
        self.history = {}  # of every computation, (step, features) at full steps
        self.generator = torch.Generator().manual_seed(config.seed)

    def begin(self, lengths: list[int]) -> None:
        """`lengths`: tokens of every token-wise computation in the order of the model."""
        self.step += 1
        c, s = self.config, self.step
        self.full = s >= self.next_full
        if self.full and s + 1 < c.warmup_steps:
            self.next_full = s + 1
        elif self.full:
            w = c.interval_spread
            self.next_full = s + (round(c.interval / (1 - w + 2 * w * s / self.steps)) if w else c.interval)
        else:
            self.noise = list(torch.rand(sum(lengths), generator=self.generator).split(lengths))

    def whole(self, name, compute):
        """Attention: computed on full steps, reused or forecast on partial ones."""
        if self.full:
            self.remember(name, compute())
        return self.predict(name)

    def remember(self, name, features):
        self.features[name] = features
        self.history.setdefault(name, []).append((self.step, features))

    def predict(self, name):
        if self.config.fill == "reuse":
            return self.features[name]
        if isinstance(self.features[name], tuple):
            return tuple(
                taylor([(s, f[i]) for s, f in self.history[name]], self.step, self.config.forecast_order)
                for i in range(len(self.features[name]))
            )
        return taylor(self.history[name], self.step, self.config.forecast_order)

    def tokenwise(self, name, every_token, inputs, stream, layer, text=0):
        """every_token [B, N, C]: what a full step would give. Keeps the others' old or forecast rows."""
        c, (batch, n) = self.config, every_token.shape[:2]
        if self.full:
            self.remember(name, every_token.clone())
            self.ages[name], self.inputs[name] = [[0] * n for _ in range(batch)], inputs.clone()
            return every_token.clone()
        noise = self.noise.pop(0)
        candidates, always = list(range(n)), []
        if c.text_tokens != "select" and stream == "text":
            candidates, always = [], list(range(n)) if c.text_tokens == "full" else []
        if c.text_tokens != "select" and stream == "joint":
            candidates, always = list(range(text, n)), list(range(text)) if c.text_tokens == "full" else []
        share = min(max((1 - c.cache_ratio) * self.factor(stream, layer), 0.0), 1.0)
        k = math.floor(share * len(candidates) + 1e-6)
        totals = []
        for b in range(batch):
            if not candidates or not k:
                continue
            rows = {i: r for r, i in enumerate(candidates)}
            seen = {key: [value[b][i] for i in candidates] for key, value in self.seen.get((name, "seen"), {}).items()}
            score = SCORES[c.selector](
                tokens=inputs[b][candidates], noise=[float(noise[i]) for i in candidates], seen=seen, k=k,
                last=self.inputs[name][b][candidates], grid=self.grid, stream=stream,
                text=sum(i < text for i in candidates) if stream == "joint" else 0,
            )  # fmt: skip
            length = math.sqrt(sum(s**2 for s in score))
            total = [score[rows[i]] / length + c.age_weight * self.ages[name][b][i] / c.interval for i in candidates]
            if c.spatial_bonus and stream != "text":
                start = sum(i < text for i in candidates) if stream == "joint" else 0
                for tile in tiles(self.grid, c.spatial_tile):
                    best = max(tile, key=lambda p: total[start + p])
                    total[start + best] *= 1 + c.spatial_bonus
            totals.append(total)
        if self.halves and totals:
            half = batch // 2
            totals = 2 * [[(x + y) / 2 for x, y in zip(totals[b], totals[half + b], strict=True)] for b in range(half)]
        output = self.predict(name).clone()
        for b in range(batch):
            ranked = sorted(range(len(candidates)), key=lambda r: -totals[b][r])[:k] if totals else []
            chosen = always + [candidates[r] for r in ranked]
            for i in range(n):
                self.ages[name][b][i] += 1
                if i in chosen:
                    output[b, i], self.ages[name][b][i] = every_token[b, i], 0
                    self.inputs[name][b, i] = inputs[b, i]
        if c.fill == "reuse":
            self.features[name] = output
        return output

    def factor(self, stream, layer):
        if self.config.ratio_schedule == "constant":
            return 1.0
        if stream in ("image", "text"):
            return (1.5 - layer / 27) * 0.4
        if stream == "joint":
            return (1.5 - layer / 27) * 1.6
        return (1.9 - 1.8 * self.step / self.steps) * (1.6 - 1.2 * layer / 27) * (0.6 if stream == "cross-attention" else 1.6)


class Merge:
    """Token merging without any merged token: a group is a set of copies of its mean, all at one place, that share one vote."""

    def __init__(self, config, grid, halves=False) -> None:
        self.config, self.grid, self.halves = config, grid, halves
        self.generator = torch.Generator().manual_seed(config.seed)
        self.made = {}  # by group of layers: the step, and for every picture the place that each token goes to

    def begin(self, cache, layer, tokens):
        """tokens [B, N, C] entering this layer."""
        every = self.config.rematch_every
        steps, layers = (every, every) if isinstance(every, int) else every
        self.active = cache.full and cache.step >= self.config.warmup_steps
        if not self.active:
            return
        group = layer // layers
        if group not in self.made or cache.step - self.made[group][0] >= steps:
            self.made[group] = cache.step, self.match(tokens)
        self.heads = self.made[group][1]

    def match(self, tokens):
        (height, width), (right, down) = self.grid, self.config.stride
        noise = torch.rand((height // down) * (width // right), generator=self.generator) if self.config.randomize else None
        into = []
        for r in range(height // down):
            for c in range(width // right):
                n = int(noise[len(into)] * down * right) if noise is not None else 0
                into.append((r * down + n // right) * width + c * right + n % right)
        count, heads = int(height * width * self.config.ratio), []
        pictures = tokens[:, : height * width]
        for b in range(len(pictures)):
            twins = [b % (len(pictures) // 2), b % (len(pictures) // 2) + len(pictures) // 2] if self.halves else [b]
            best = {}
            for i in range(height * width):
                if i not in into:
                    alike = lambda j, i=i: sum(cosine(pictures[t][i], pictures[t][j]) for t in twins)
                    best[i] = max((alike(j), j) for j in into)
            away = sorted(best, key=lambda i: -best[i][0])[:count]
            heads.append([best[i][1] if i in away else i for i in range(tokens.shape[1])])
        return torch.tensor(heads)

    def mixed(self, x, start=0):
        """Every token of x [B, S, C] replaced by the mean of its group; the image begins at `start`."""
        if not self.active:
            return x
        out = x.clone()
        for b, heads in enumerate(self.heads):
            for i, head in enumerate(heads):
                out[b, start + i] = x[b, start:][heads == head].mean(dim=0)
        return out

    def queries(self, x, start=0):
        return x if self.config.keep_queries or not self.config.merge_attention else self.mixed(x, start)

    def keys(self, x, start=0):
        return self.mixed(x, start) if self.config.merge_attention else x

    def attend(self, query, key, value, rope=None, start=0):
        """[B, S, H, D] each, of queries(x) and keys(x) -> [B, S, H D]."""
        outputs = []
        for b in range(len(query)):
            own = torch.arange(query.shape[1])
            head, votes = own.clone(), torch.zeros(query.shape[1])
            if self.active and self.config.merge_attention:
                head[start:] = self.heads[b] + start
                if not self.config.proportional_attention:
                    votes = -torch.log((head[:, None] == head[None]).sum(1))
            q, k, v = query[b : b + 1], key[b : b + 1], value[b : b + 1]
            if rope is not None:
                place = own if self.config.keep_queries else head
                q = apply_rotary_emb(q, (rope[0][place], rope[1][place]), sequence_dim=1)
                k = apply_rotary_emb(k, (rope[0][head], rope[1][head]), sequence_dim=1)
            logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1]) + votes
            outputs.append(torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2))
        return torch.cat(outputs)

    def mlp(self, x, start=0):
        return self.mixed(x, start) if self.config.merge_mlp else x


class MergeNothing(Merge):
    def __init__(self) -> None:
        self.active, self.config = False, TokenMergeConfig(ratio=0)

    def begin(self, cache, layer, tokens):
        pass


def taylor(history, step, order):
    """Expansion around the last of (step, features), derivatives by backward differences, computed anew."""

    def derivative(i, last):
        if i == 0:
            return history[last][1]
        return (derivative(i - 1, last) - derivative(i - 1, last - 1)) / (history[last][0] - history[last - 1][0])

    last = len(history) - 1
    distance = step - history[last][0]
    return sum(derivative(i, last) * distance**i / math.factorial(i) for i in range(min(order, last) + 1))


def tiles(grid, side):
    height, width = grid
    for top in range(0, height, side):
        for left in range(0, width, side):
            yield [y * width + x for y in range(top, min(top + side, height)) for x in range(left, min(left + side, width))]


def cosine(x, y):
    return float(x.double() @ y.double() / (x.double().norm() * y.double().norm()))


def best_noise(noise, k):
    return sorted(range(len(noise)), key=lambda i: -noise[i])[: max(1, round(k / 10))]


def similarity(tokens, noise, k, **_):
    base = best_noise(noise, k)
    return [2.0 if i in base else max(cosine(x, tokens[j]) for j in base) for i, x in enumerate(tokens)]


def diverse(tokens, noise, k, **_):
    chosen = best_noise(noise, k)
    head_start = 3.0 * (1 + math.ceil(math.log2(max(2, k))))
    score = {i: head_start for i in chosen}
    near = lambda i: max(cosine(tokens[i], tokens[j]) for j in chosen)
    while len(chosen) < k:
        head_start -= 3
        rest = sorted((i for i in range(len(tokens)) if i not in score), key=near)
        fresh = rest[: min(len(chosen), k - len(chosen))]
        score.update({i: head_start + 1 - near(i) for i in fresh})
        chosen = chosen + fresh
    return [score[i] if i in score else 1 - near(i) for i in range(len(tokens))]


def stratified(tokens, noise, k, grid, stream, text, **_):
    n, share = len(tokens), k / len(tokens)
    strip = max(1, round(1 / share))
    strips = lambda start, end: [list(range(i, min(i + strip, end))) for i in range(start, end, strip)]
    if stream == "text":
        groups = strips(0, n)
    else:
        square = tiles(grid, max(1, round(math.sqrt(1 / share))))
        groups = strips(0, text) + [[text + p for p in tile] for tile in square]
    score = [0.0] * n
    for group in groups:
        start = math.fmod(31 * sum(noise[i] for i in group), 1)
        for rank, i in enumerate(sorted(group, key=lambda i: -noise[i])):
            score[i] = 1 - (rank + start) / len(group)
    return score


def variance(tokens, grid, stream, text, **_):
    n = len(tokens)
    groups = [list(range(n))] if stream == "text" else [list(range(text)), *([text + p for p in tile] for tile in tiles(grid, 2))]
    score = [0.0] * n
    for group in groups:
        for i in group:
            mean = sum(tokens[j].double() for j in group) / len(group)
            score[i] = float(((tokens[i].double() - mean) ** 2).mean())
    return score


SCORES = {
    "random": lambda noise, **_: noise,
    "attention": lambda seen, **_: seen["received"],
    "k-norm": lambda seen, **_: seen["k"],
    "v-norm": lambda seen, **_: seen["v"],
    "cross-entropy": lambda seen, **_: seen["entropy"],
    "drift": lambda tokens, last, **_: [1 - cosine(x, y) for x, y in zip(tokens, last, strict=True)],
    "similarity": similarity,
    "diverse": diverse,
    "stratified": stratified,
    "variance": variance,
}


def softmax_map(query, key):
    """[B, N, H, D] x [B, M, H, D] -> the whole attention map [B, H, N, M]."""
    return torch.einsum("bqhd,bkhd->bhqk", query, key).div(math.sqrt(query.shape[-1])).softmax(-1)


def lists(**seen):
    return {name: value.tolist() for name, value in seen.items()}


def norms(heads):
    return heads.pow(2).sum(-1).sqrt().mean(-1)


def flux_forward(model, cache: Cache, hidden, text, pooled, timestep, img_ids, txt_ids, merge=None):
    """hidden [B, N, C], text [B, T, C], as FluxTransformer2DModel.forward."""
    n, t, merge = hidden.shape[1], text.shape[1], merge or MergeNothing()
    double = len(model.transformer_blocks)
    cache.begin([n, t] * double + [n + t] * len(model.single_transformer_blocks))
    hidden, text = model.x_embedder(hidden), model.context_embedder(text)
    temb = model.time_text_embed(timestep * 1000, pooled)
    rope = model.pos_embed(torch.cat([txt_ids, img_ids]))
    split = lambda x: x.unflatten(-1, (model.config.num_attention_heads, -1))

    def observe(q, k, v, raw_k):
        received = softmax_map(*(apply_rotary_emb(x, rope, sequence_dim=1) for x in (q, k))).mean(dim=(1, 2))
        return {"received": received, "k": norms(raw_k), "v": norms(v)}

    for i, block in enumerate(model.transformer_blocks):
        a = block.attn
        merge.begin(cache, i, hidden)
        x, gate, shift, scale, gate_mlp = block.norm1(hidden, emb=temb)
        y, c_gate, c_shift, c_scale, c_gate_mlp = block.norm1_context(text, emb=temb)
        raw = torch.cat([split(a.add_k_proj(y)), split(a.to_k(merge.keys(x)))], 1)
        query = torch.cat([a.norm_added_q(split(a.add_q_proj(y))), a.norm_q(split(a.to_q(merge.queries(x))))], 1)
        key = torch.cat([a.norm_added_k(raw[:, :t]), a.norm_k(raw[:, t:])], 1)
        value = torch.cat([split(a.add_v_proj(y)), split(a.to_v(merge.keys(x)))], 1)

        def joint_attention(a=a, query=query, key=key, value=value):
            out = merge.attend(query, key, value, rope, t)
            return a.to_out[0](out[:, t:]), a.to_add_out(out[:, :t])

        image_out, text_out = cache.whole((i, "attention"), joint_attention)
        if cache.full:
            seen = observe(query, key, value, raw)
            cache.seen[(i, "image"), "seen"] = lists(**{name: value[:, t:] for name, value in seen.items()})
            cache.seen[(i, "text"), "seen"] = lists(**{name: value[:, :t] for name, value in seen.items()})
        hidden = hidden + gate[:, None] * image_out
        inputs = block.norm2(hidden) * (1 + scale[:, None]) + shift[:, None]
        every = block.ff(merge.mlp(inputs))
        hidden = hidden + gate_mlp[:, None] * cache.tokenwise((i, "image"), every, hidden, "image", i)
        text = text + c_gate[:, None] * text_out
        inputs = block.norm2_context(text) * (1 + c_scale[:, None]) + c_shift[:, None]
        text = text + c_gate_mlp[:, None] * cache.tokenwise((i, "text"), block.ff_context(inputs), text, "text", i)
    joint = torch.cat([text, hidden], 1)
    for i, block in enumerate(model.single_transformer_blocks):
        a = block.attn
        merge.begin(cache, double + i, joint[:, t:])
        x, gate = block.norm(joint, emb=temb)
        query, raw = a.norm_q(split(a.to_q(merge.queries(x, t)))), split(a.to_k(merge.keys(x, t)))
        key, value = a.norm_k(raw), split(a.to_v(merge.keys(x, t)))
        attention = cache.whole((i, "single"), lambda: merge.attend(query, key, value, rope, t))
        if cache.full:
            cache.seen[(i, "joint"), "seen"] = lists(**observe(query, key, value, raw))
        both = torch.cat([merge.mlp(attention, t), block.act_mlp(block.proj_mlp(merge.mlp(x, t)))], 2)
        joint = joint + gate[:, None] * cache.tokenwise((i, "joint"), block.proj_out(both), joint, "joint", i, text=t)
    return model.proj_out(model.norm_out(joint[:, t:], temb))


def pixart_forward(model, cache: Cache, latents, text, mask, timestep, merge=None):
    """latents [B, C, H, W], text [B, T, C], mask [B, T], as PixArtTransformer2DModel.forward."""
    p, merge = model.config.patch_size, merge or MergeNothing()
    batch, height, width = len(latents), latents.shape[2] // p, latents.shape[3] // p
    cache.begin([height * width] * 2 * len(model.transformer_blocks))
    bias = (1 - mask.to(latents.dtype))[:, None] * -10000.0
    x = model.pos_embed(latents)
    emb, embedded = model.adaln_single(timestep, {"resolution": None, "aspect_ratio": None}, batch_size=batch, hidden_dtype=x.dtype)
    text = model.caption_projection(text)
    split = lambda x: x.unflatten(-1, (model.config.num_attention_heads, -1))
    for i, block in enumerate(model.transformer_blocks):
        s1, c1, g1, s2, c2, g2 = (block.scale_shift_table[None] + emb.reshape(batch, 6, -1)).chunk(6, dim=1)
        merge.begin(cache, i, x)
        a, normed = block.attn1, block.norm1(x) * (1 + c1) + s1
        query, key, value = (
            split(p(x)) for p, x in ((a.to_q, merge.queries(normed)), (a.to_k, merge.keys(normed)), (a.to_v, merge.keys(normed)))
        )
        x = x + g1 * cache.whole((i, "self"), lambda: a.to_out[0](merge.attend(query, key, value)))
        asking = merge.mixed(x) if merge.config.merge_cross_attention else x
        if cache.full:
            received = softmax_map(query, key).mean(dim=(1, 2))
            seen = lists(received=received, k=norms(key), v=norms(value))
            cache.seen[(i, "cross"), "seen"] = cache.seen[(i, "ff"), "seen"] = seen
        if cache.config.selector == "cross-entropy":
            logits = torch.einsum("bqhd,bkhd->bhqk", split(block.attn2.to_q(asking)), split(block.attn2.to_k(text)))
            maps = (logits / math.sqrt(key.shape[-1]) + bias[:, None]).double().softmax(-1)
            maps = maps.mean(1)
            if cache.halves:
                maps = torch.cat([(maps[: batch // 2] + maps[batch // 2 :]) / 2] * 2)
            entropy = [[1 - sum(c * math.log(c + 1e-7) for c in row) for row in rows] for rows in maps.tolist()]
            if cache.full:
                seen["entropy"] = entropy
        cross = block.attn2(asking, encoder_hidden_states=text, attention_mask=bias)
        x = x + cache.tokenwise((i, "cross"), cross, x, "cross-attention", i)
        if cache.config.selector == "cross-entropy":  # the rows of the tokens just computed are renewed
            known = cache.seen[(i, "cross"), "seen"]["entropy"]
            for b, ages in enumerate(cache.ages[(i, "cross")]):
                known[b] = [new if age == 0 else old for new, old, age in zip(entropy[b], known[b], ages, strict=True)]
        inputs = block.norm2(x) * (1 + c2) + s2
        x = x + g2 * cache.tokenwise((i, "ff"), block.ff(merge.mlp(inputs)), x, "feed-forward", i)
    shift, scale = (model.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
    x = model.proj_out(model.norm_out(x) * (1 + scale) + shift)
    x = x.reshape(batch, height, width, p, p, model.out_channels)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(batch, model.out_channels, height * p, width * p)
