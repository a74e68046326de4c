"""FLUX's and PixArt's cached forward, slow and readable: one picture at a time, every token computed, then all but the
selected ones thrown away. Written from the equations; shares nothing with the engine but diffusers' modules."""

from __future__ import annotations

import math

import torch
from diffusers.models.embeddings import apply_rotary_emb


class Cache:
    """One picture's caches, ages and counters."""

    def __init__(self, config) -> None:
        self.config, self.step = config, -1
        self.features, self.ages, self.received = {}, {}, {}
        self.generator = torch.Generator().manual_seed(config.seed)

    def begin(self, lengths: list[int]) -> None:
        """`lengths`: tokens of every token-wise computation in the order of the model."""
        self.step += 1
        c, since = self.config, self.step - self.config.warmup_steps + 1
        self.full = since <= 0 or since % c.interval == 0
        if not self.full:
            self.noise = list(torch.rand(sum(lengths), generator=self.generator).split(lengths))

    def whole(self, name, compute):
        """Attention: computed on full steps, reused on partial ones."""
        if self.full:
            self.features[name] = compute()
        return self.features[name]

    def tokenwise(self, name, every_token, kind: str, text: int = 0, received=None):
        """every_token [N, C]: what a full step would give. Keeps the old rows except those selected."""
        n, c = len(every_token), self.config
        if self.full:
            self.features[name], self.ages[name] = every_token.clone(), [0] * n
            return self.features[name]
        noise = self.noise.pop(0)
        share, candidates, always = 1 - c.cache_ratio, list(range(n)), []
        if c.text_tokens != "select" and kind == "text":
            candidates, always = [], list(range(n)) if c.text_tokens == "full" else []
        if c.text_tokens != "select" and kind == "joint":
            candidates, always = list(range(text, n)), list(range(text)) if c.text_tokens == "full" else []
        score = (noise if c.selector == "random" else received).tolist()
        length = math.sqrt(sum(s**2 for s in score))
        total = [score[i] / length + c.age_weight * self.ages[name][i] / c.interval for i in range(n)]
        k = math.floor(share * len(candidates) + 1e-6)
        chosen = always + sorted(candidates, key=lambda i: -total[i])[:k]
        for i in range(n):
            self.ages[name][i] += 1
            if i in chosen:
                self.features[name][i], self.ages[name][i] = every_token[i], 0
        return self.features[name]


def softmax_map_received(query, key):
    """query, key [N, H, D] -> [N], from the whole attention map."""
    maps = torch.einsum("qhd,khd->hqk", query, key).div(math.sqrt(query.shape[-1])).softmax(-1)
    return maps.mean(dim=(0, 1))


def flux_forward(model, cache: Cache, hidden, text, pooled, timestep, img_ids, txt_ids):
    """One picture: hidden [1, N, C], text [1, T, C], as FluxTransformer2DModel.forward."""
    n, t = hidden.shape[1], text.shape[1]
    cache.begin([n, t] * len(model.transformer_blocks) + [n + t] * len(model.single_transformer_blocks))
    hidden, text = model.x_embedder(hidden), model.context_embedder(text)
    temb = model.time_text_embed(timestep * 1000, pooled)
    rope = model.pos_embed(torch.cat([txt_ids, img_ids]))

    def heads(attn, q, k):
        q, k = (apply_rotary_emb(x, rope, sequence_dim=1)[0] for x in (q, k))
        return softmax_map_received(q, k)

    for i, block in enumerate(model.transformer_blocks):
        a = block.attn
        x, gate, shift, scale, gate_mlp = block.norm1(hidden, emb=temb)
        y, c_gate, c_shift, c_scale, c_gate_mlp = block.norm1_context(text, emb=temb)
        image_out, text_out = cache.whole((i, "attention"), lambda: a(x, y, image_rotary_emb=rope))
        if cache.full:
            split = lambda z: z.unflatten(-1, (a.heads, -1))
            q = torch.cat([a.norm_added_q(split(a.add_q_proj(y))), a.norm_q(split(a.to_q(x)))], 1)
            k = torch.cat([a.norm_added_k(split(a.add_k_proj(y))), a.norm_k(split(a.to_k(x)))], 1)
            cache.received[i] = heads(a, q, k)
        hidden = hidden + gate[:, None] * image_out
        ff = block.ff(block.norm2(hidden) * (1 + scale[:, None]) + shift[:, None])[0]
        hidden = hidden + gate_mlp[:, None] * cache.tokenwise((i, "image"), ff, "image", received=cache.received[i][t:])
        text = text + c_gate[:, None] * text_out
        ff = block.ff_context(block.norm2_context(text) * (1 + c_scale[:, None]) + c_shift[:, None])[0]
        text = text + c_gate_mlp[:, None] * cache.tokenwise((i, "text"), ff, "text", received=cache.received[i][:t])
    joint = torch.cat([text, hidden], 1)
    for i, block in enumerate(model.single_transformer_blocks):
        a = block.attn
        x, gate = block.norm(joint, emb=temb)
        attention = cache.whole((i, "single"), lambda: a(x, image_rotary_emb=rope))
        if cache.full:
            split = lambda z: z.unflatten(-1, (a.heads, -1))
            cache.received["single", i] = heads(a, a.norm_q(split(a.to_q(x))), a.norm_k(split(a.to_k(x))))
        out = block.proj_out(torch.cat([attention, block.act_mlp(block.proj_mlp(x))], 2))[0]
        received = cache.received["single", i]
        joint = joint + gate[:, None] * cache.tokenwise((i, "joint"), out, "joint", text=t, received=received)
    return model.proj_out(model.norm_out(joint[:, t:], temb))


def pixart_forward(model, cache: Cache, latents, text, mask, timestep):
    """One picture: latents [1, C, H, W], text [1, T, C], mask [1, T], as PixArtTransformer2DModel.forward."""
    p = model.config.patch_size
    height, width = latents.shape[2] // p, latents.shape[3] // p
    n = height * width
    cache.begin([n, n] * len(model.transformer_blocks))
    bias = (1 - mask.to(latents.dtype))[:, None] * -10000.0
    x = model.pos_embed(latents)
    emb, embedded = model.adaln_single(timestep, {"resolution": None, "aspect_ratio": None}, batch_size=1, hidden_dtype=x.dtype)
    text = model.caption_projection(text)
    for i, block in enumerate(model.transformer_blocks):
        s1, c1, g1, s2, c2, g2 = (block.scale_shift_table[None] + emb.reshape(1, 6, -1)).chunk(6, dim=1)
        normed = block.norm1(x) * (1 + c1) + s1
        x = x + g1 * cache.whole((i, "self"), lambda: block.attn1(normed))
        if cache.full:
            q, k = (w(normed).unflatten(-1, (block.attn1.heads, -1))[0] for w in (block.attn1.to_q, block.attn1.to_k))
            cache.received[i] = softmax_map_received(q, k)
        cross = block.attn2(x, encoder_hidden_states=text, attention_mask=bias)[0]
        x = x + cache.tokenwise((i, "cross"), cross, "image", received=cache.received[i])
        ff = block.ff(block.norm2(x) * (1 + c2) + s2)[0]
        x = x + g2 * cache.tokenwise((i, "ff"), ff, "image", received=cache.received[i])
    shift, scale = (model.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
    x = model.proj_out(model.norm_out(x) * (1 + scale) + shift)
    x = x.reshape(1, height, width, p, p, model.out_channels)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(1, model.out_channels, height * p, width * p)
