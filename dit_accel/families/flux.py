"""FLUX: double blocks with an image and a text stream, then single blocks over the joint sequence, text first."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux

from dit_accel.families import blocks
from dit_accel.families.attention import (
    Listening,
    MergedKeys,
    Rotary,
    TokenCacheAttnProcessor,
    TokenMergeAttnProcessor,
    key_and_value_observations,
    rotating_norms,
    unwrapped,
)
from dit_accel.importance import attention_received, query_stride, sample
from dit_accel.merge_site import MergeSite
from dit_accel.site import Site, Take
from dit_accel.state import Run

TRANSFORMER = FluxTransformer2DModel
OBSERVATIONS = frozenset({"keys", "values", "key_norms", "value_norms", "attention", "last_tokens"})
TIMESTEP_SCALE = 1000  # scheduler timesteps per unit of the transformer's
BATCHED_GUIDANCE = False  # FLUX pipelines call twice for true guidance


class FluxTokenCacheAttnProcessor(TokenCacheAttnProcessor):
    """Computes attention through the processor it wraps on full steps and reuses the output whole on partial ones.

    `scored` are the sites that select tokens of its block: (image, text) in a double block, (joint,) in a single one.
    """

    default_inner = transformer_flux.FluxAttnProcessor

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        ip_hidden_states: Any = None,
        ip_adapter_masks: Any = None,
    ) -> Any:
        extra = self.wanted(ip_hidden_states=ip_hidden_states, ip_adapter_masks=ip_adapter_masks)

        needs = self.observing
        source = Listening(attn) if needs else attn

        def compute(tokens: torch.Tensor, take: Take) -> Any:
            return self.inner(source, tokens, encoder_hidden_states, attention_mask, image_rotary_emb, **extra)

        if self.site is None:
            return compute(hidden_states, lambda tokens: tokens)
        output = self.site(hidden_states, compute)
        if needs:
            start = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
            seen = self._observe(source, start, image_rotary_emb, needs)
            for site in self.scored:
                part = slice(0, start) if site.stream == "text" else slice(start, None)
                site.memory.observed = {name: value[:, part] for name, value in seen.items()}
        return output

    def _observe(self, attn: Listening, text: int, rotary: Rotary | None, needs: frozenset[str]) -> dict[str, torch.Tensor]:
        """What the selector needs, of the joint sequence, which in a double block starts with `text` tokens."""

        def heads(which: int, norm: bool = False, stride: int = 1) -> torch.Tensor:
            image = attn.projection(which)
            if stride > 1:
                image = image[:, sample(image.shape[1], stride, image.device)]
            if norm:
                image = (attn.norm_q, attn.norm_k)[which](image)
            if not text:
                return image
            words = attn.projection(which, text=True)
            if stride > 1:
                words = words[:, sample(text, stride, words.device)]
            if norm:
                words = (attn.norm_added_q, attn.norm_added_k)[which](words)
            return torch.cat([words, image], dim=1)

        seen = key_and_value_observations(heads, needs)
        if "attention" in needs:
            key = heads(1, norm=True)
            image = key.shape[1] - text
            stride = query_stride(text + image, self.scored[0].config.query_share)
            query = heads(0, norm=True, stride=stride)
            if rotary is not None:
                places = sample(image, stride, key.device) + text
                places = torch.cat([sample(text, stride, key.device), places]) if text else places
                query = apply_rotary_emb(query, (rotary[0][places], rotary[1][places]), sequence_dim=1)
                key = apply_rotary_emb(key, rotary, sequence_dim=1)
            seen["attention"] = attention_received(query, key)
        return seen


class FluxTokenMergeAttnProcessor(TokenMergeAttnProcessor):
    """Computes attention of all text tokens and merged image tokens, each at its destination's rotary position.

    The wrapped processor takes one table of positions, so pictures of a batch, which merge differently, go one by one.
    """

    default_inner = transformer_flux.FluxAttnProcessor

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        ip_hidden_states: Any = None,
        ip_adapter_masks: Any = None,
    ) -> Any:
        extra = self.wanted(ip_hidden_states=ip_hidden_states, ip_adapter_masks=ip_adapter_masks)
        site, double = self.merging, encoder_hidden_states is not None
        if site is None or not site.count or not site.config.merge_attention:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **extra)
        text = encoder_hidden_states.shape[1] if encoder_hidden_states is not None else 0
        start = 0 if double else site.text  # of the image in hidden_states
        site.see(hidden_states[:, start:])
        merged, length, keep = site.merge(hidden_states, start), text + hidden_states.shape[1], site.config.keep_queries
        mask = attention_mask[(None,) * (4 - attention_mask.ndim)] if attention_mask is not None else None
        mask = site.mask(mask, hidden_states, text + start, length, queries=not keep)
        mask = mask[:, None] if mask is not None and mask.ndim == 3 else mask
        rows = site.places(text + start, length)
        if keep:
            if "ip_hidden_states" in extra:
                raise RuntimeError("keep_queries cannot be combined with an IP-Adapter on FLUX; leave keep_queries off.")
            norms = rotating_norms(attn, image_rotary_emb, rows, text) if image_rotary_emb is not None else {}
            output = self.inner(MergedKeys(attn, merged, norms), hidden_states, encoder_hidden_states, mask, None)
        elif image_rotary_emb is None or len(rows) == 1:
            rotary = tuple(table[rows[0]] for table in image_rotary_emb) if image_rotary_emb is not None else None
            output = self.inner(attn, merged, encoder_hidden_states, mask, rotary, **extra)
        else:
            output = self._one_by_one(attn, merged, encoder_hidden_states, mask, image_rotary_emb, rows, extra)
        if isinstance(attn, Listening):
            attn.change(
                lambda tokens: site.unmerge(tokens, start), ("to_k", "to_v") if keep else ("to_q", "to_k", "to_v", "to_qkv")
            )
        if keep:
            return output
        if double:
            return tuple(part if i == 1 else site.unmerge(part) for i, part in enumerate(output))
        return site.unmerge(output, start)

    def _one_by_one(
        self, attn: Any, merged: torch.Tensor, text: Any, mask: Any, rotary: Rotary, rows: torch.Tensor, extra: dict[str, Any]
    ) -> Any:
        outputs, sources = [], []
        for b, own in enumerate(rows):
            mine = slice(b, b + 1)
            sources.append(Listening(attn.attn) if isinstance(attn, Listening) else attn)
            adapters = [states[mine] for states in extra.get("ip_hidden_states", ())]
            given = merged[mine], None if text is None else text[mine], None if mask is None else mask[mine]
            own_extra = {**extra, "ip_hidden_states": adapters} if adapters else extra
            outputs.append(self.inner(sources[-1], *given, (rotary[0][own], rotary[1][own]), **own_extra))
        if isinstance(attn, Listening):
            attn.heard = {name: torch.cat([source.heard[name] for source in sources]) for name in sources[0].heard}
        if text is None:
            return torch.cat(outputs)
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def double_block(
    block: Any,
    sites: tuple[Site, ...],
    merging: MergeSite,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: Rotary | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The double block with the feed-forward of both streams, and the norms before it, computed token by token."""
    attention_site, image_site, text_site = sites
    attention = attention_site.recall(hidden_states)
    # Of a remembered attention only the gates, shifts and scales are missing: they belong to the timestep, not to a token.
    given = slice(None) if attention is None else slice(1)
    image, *image_modulation = block.norm1(hidden_states[:, given], emb=temb)
    text, *text_modulation = block.norm1_context(encoder_hidden_states[:, given], emb=temb)
    if attention is None:
        extra = joint_attention_kwargs or {}
        attention = block.attn(hidden_states=image, encoder_hidden_states=text, image_rotary_emb=image_rotary_emb, **extra)
    feed = functools.partial(merging.mlp, block.ff)
    hidden = _rest(image_site, hidden_states, attention[0], image_modulation, block.norm2, feed)
    if len(attention) == 3:  # of an IP-Adapter
        hidden = hidden + attention[2]
    text = _rest(text_site, encoder_hidden_states, attention[1], text_modulation, block.norm2_context, block.ff_context)
    return text.clip(-65504, 65504) if text.dtype == torch.float16 else text, hidden


def _rest(site: Site, hidden: torch.Tensor, attention: torch.Tensor, modulation: Any, norm: Any, ff: Any) -> torch.Tensor:
    """One stream of a double block from its attention on."""
    gate, shift, scale, ff_gate = (part[:, None] for part in modulation)
    hidden = blocks.add_gated(site, hidden, gate, attention)
    return blocks.add_gated(site, hidden, ff_gate, site(hidden, lambda tokens, take: ff(norm(tokens) * (1 + scale) + shift)))


def single_block(
    block: Any,
    sites: tuple[Site, ...],
    merging: MergeSite,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: Rotary | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The single block with its norm, MLP and output projection computed token by token."""
    attention_site, site = sites
    text = encoder_hidden_states.shape[1]
    hidden = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    # Once for all tokens: it belongs to the timestep.
    shift, scale, gate = (part[:, None] for part in block.norm.linear(block.norm.silu(temb)).chunk(3, dim=1))

    def compute(tokens: torch.Tensor, take: Take) -> torch.Tensor:
        normed = block.norm.norm(tokens) * (1 + scale) + shift
        attention = attention_site.recall(tokens)
        if attention is None:
            attention = block.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        return merging.mlp(rest, normed, take(attention), start=text)

    def rest(normed: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = block.proj_out(torch.cat([attention, block.act_mlp(block.proj_mlp(normed))], dim=2))
        return output

    hidden = blocks.add_gated(site, hidden, gate, site(hidden, compute))
    if hidden.dtype == torch.float16:
        hidden = hidden.clip(-65504, 65504)
    return hidden[:, :text], hidden[:, text:]


def grid(given: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the picture in tokens, from the position ids; tokens of a reference picture (Kontext) follow it."""
    ids = given["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    if ids.is_meta:
        return 1, len(ids)
    picture = ids[ids[:, 0] == ids[0, 0]]
    height, width = (len(picture[:, axis].unique()) for axis in (1, 2))
    return (height, width) if height * width == len(picture) else (1, len(ids))


BLOCKS = {
    "transformer_blocks": (transformer_flux.FluxTransformerBlock, double_block, ("image", "text")),
    "single_transformer_blocks": (transformer_flux.FluxSingleTransformerBlock, single_block, ("joint",)),
}


def attach(transformer: FluxTransformer2DModel, run: Run, processors_only: bool) -> dict[str, Any]:
    if run.merge is not None and run.merge.merge_cross_attention:
        raise ValueError("FLUX has no cross-attention; leave merge_cross_attention off.")
    processors = {}
    for name, (kind, compute, streams) in BLOCKS.items():
        for layer, block in enumerate(getattr(transformer, name)):
            attention, merging = run.add(layer, "attention"), run.add_merging()
            scored: tuple[Site, ...] = ()
            if not processors_only:
                scored = tuple(run.add(layer, stream) for stream in streams)
                blocks.attach(block, kind, compute, (attention, *scored), merging, f"{name}.{layer}")
            processor = block.attn.processor
            if run.merge is not None:
                processor = FluxTokenMergeAttnProcessor(processor, merging)
            if run.caches:
                processor = FluxTokenCacheAttnProcessor(processor, attention, scored)
            processors[f"{name}.{layer}.attn.processor"] = processor
            run.attached.append((block.attn, processor, (attention, *scored, merging)))
    return processors


def detach(transformer: FluxTransformer2DModel) -> None:
    for block in (block for name in BLOCKS for block in getattr(transformer, name)):
        if (inner := unwrapped(block.attn.processor)) is not block.attn.processor:
            block.attn.set_processor(inner)
        blocks.detach(block)
