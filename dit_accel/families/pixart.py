"""PixArt: self-attention, cross-attention to the text and feed-forward; guidance halves share a batch."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models import attention as diffusers_attention
from diffusers.models.attention_processor import AttnProcessor2_0

from dit_accel import fill, which
from dit_accel.families import blocks
from dit_accel.families.attention import (
    MERGED,
    MERGED_KEYS,
    MERGED_QUERIES,
    Listening,
    MergedKeys,
    TokenCacheAttnProcessor,
    TokenMergeAttnProcessor,
    key_and_value_observations,
    unwrapped,
)
from dit_accel.importance import attention_entropy, attention_received, query_stride, sample
from dit_accel.merge_site import MergeSite
from dit_accel.site import Site, Take
from dit_accel.state import Run
from dit_accel.when import Mode

TRANSFORMER = PixArtTransformer2DModel
OBSERVATIONS = frozenset(which.OBSERVATIONS)
TIMESTEP_SCALE = 1
BATCHED_GUIDANCE = True


class PixArtTokenCacheAttnProcessor(TokenCacheAttnProcessor):
    """Computes attention through the processor it wraps, for the queries that its site asks for.

    In self-attention the site reuses the output whole on partial steps; in cross-attention it selects queries, which see
    the whole text; the text's keys and values are the same on every step and kept from the full one. `scored` are both sites
    that select tokens of the block.
    """

    default_inner = AttnProcessor2_0

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> Any:
        crossing = self.site is not None and self.site.stream == "cross-attention" and self.site.mode is not Mode.PLAIN
        needs = self.observing & (frozenset({"entropy"}) if crossing else OBSERVATIONS - {"entropy"})
        source = Listening(attn, self.site.memory.text if crossing and self.site else None) if needs or crossing else attn
        again = crossing and self.scored and "entropy" in self.scored[0].memory.observed

        def compute(tokens: torch.Tensor, take: Take) -> Any:
            return self.inner(source, tokens, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)

        if self.site is None:
            return compute(hidden_states, lambda tokens: tokens)
        output = self.site(hidden_states, compute)
        if crossing and self.site.mode is Mode.FULL:
            self.site.memory.text = {name: heard for name, heard in source.heard.items() if name != "to_q"}
        if needs:
            seen = self._observe(source, attention_mask, needs)
            for site in self.scored:
                site.memory.observed = {**site.memory.observed, **seen}
        elif again and "to_q" in source.heard:  # both sites share the observation
            assert self.site is not None and self.site.selected is not None
            seen = self._observe(source, attention_mask, frozenset({"entropy"}))
            fill.put(self.scored[0].memory.observed["entropy"][..., None], self.site.selected, seen["entropy"][..., None])
        return output

    def _observe(self, attn: Listening, mask: torch.Tensor | None, needs: frozenset[str]) -> dict[str, torch.Tensor]:
        def heads(which: int, norm: bool = False, stride: int = 1) -> torch.Tensor:
            projected = attn.projection(which)
            if stride > 1:
                projected = projected[:, sample(projected.shape[1], stride, projected.device)]
            layer = (attn.norm_q, attn.norm_k)[which] if norm else None
            return layer(projected) if layer is not None else projected

        seen = key_and_value_observations(heads, needs)
        if "attention" in needs:
            stride = query_stride(attn.projection(0).shape[1], self.scored[0].config.query_share)
            seen["attention"] = attention_received(heads(0, norm=True, stride=stride), heads(1, norm=True))
        if "entropy" in needs:
            seen["entropy"] = attention_entropy(heads(0, norm=True), heads(1, norm=True), mask, self.scored[0].halves)
        return seen


class PixArtTokenMergeAttnProcessor(TokenMergeAttnProcessor):
    """Computes self-attention of merged tokens, or cross-attention of merged queries; positions are in the tokens already."""

    default_inner = AttnProcessor2_0

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> Any:
        site, crossing = self.merging, encoder_hidden_states is not None
        asked = site is not None and (site.config.merge_cross_attention if crossing else site.config.merge_attention)
        if site is None or not site.count or not asked:
            return self.inner(attn, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
        site.see(hidden_states)
        merged, keep = site.merge(hidden_states), site.config.keep_queries and not crossing
        mask = site.mask(attention_mask, hidden_states, 0, hidden_states.shape[1], queries=not keep, keys=not crossing)
        if keep:
            output = self.inner(MergedKeys(attn, merged, {}), hidden_states, encoder_hidden_states=merged, attention_mask=mask)
        else:
            output = self.inner(attn, merged, encoder_hidden_states=encoder_hidden_states, attention_mask=mask)
        if isinstance(attn, Listening):
            attn.change(site.unmerge, MERGED_KEYS if keep else MERGED_QUERIES if crossing else MERGED)
        return output if keep else site.unmerge(output)


def token_wise_block(
    block: Any,
    sites: tuple[Site, ...],
    merging: MergeSite,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    timestep: torch.Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Any = None,
    added_cond_kwargs: Any = None,
) -> torch.Tensor:
    """The block with its feed-forward, and the norm before it, computed token by token; attention's processors do the rest."""
    (attention_site, site), extra = sites, cross_attention_kwargs or {}
    hidden = hidden_states.contiguous()  # the patch embedding leaves it transposed, which slows every step after it
    assert timestep is not None
    modulation = block.scale_shift_table[None] + timestep.reshape(len(hidden), 6, -1)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.chunk(6, dim=1)
    attention = attention_site.recall(hidden)
    if attention is None:
        attention = block.attn1(block.norm1(hidden) * (1 + scale) + shift, attention_mask=attention_mask, **extra)
    hidden = blocks.add_gated(site, hidden, gate, attention)
    hidden = hidden + block.attn2(
        hidden, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **extra
    )
    features = site(hidden, lambda tokens, take: merging.mlp(block.ff, block.norm2(tokens) * (1 + ff_scale) + ff_shift))
    return blocks.add_gated(site, hidden, ff_gate, features)


def grid(given: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the picture in tokens."""
    patch = given["self"].config.patch_size
    return given["hidden_states"].shape[-2] // patch, given["hidden_states"].shape[-1] // patch


def attach(transformer: PixArtTransformer2DModel, run: Run, processors_only: bool) -> dict[str, Any]:
    processors = {}
    for layer, block in enumerate(transformer.transformer_blocks):
        name = f"transformer_blocks.{layer}"
        attention, cross, merging = run.add(layer, "attention"), run.add(layer, "cross-attention"), run.add_merging()
        rest: tuple[Site, ...] = ()
        if not processors_only:
            rest = (run.add(layer, "feed-forward"),)
            blocks.attach(block, diffusers_attention.BasicTransformerBlock, token_wise_block, (attention, *rest), merging, name)
        for part, site in (("attn1", attention), ("attn2", cross)):
            attn = getattr(block, part)
            processor = attn.processor
            if run.merge is not None and (site is attention or run.merge.merge_cross_attention):
                processor = PixArtTokenMergeAttnProcessor(processor, merging)
            if run.caches:
                processor = PixArtTokenCacheAttnProcessor(processor, site, (cross, *rest))
            processors[f"{name}.{part}.processor"] = processor
            run.attached.append((attn, processor, (attention, *rest, merging) if site is attention else (cross,)))
    return processors


def detach(transformer: PixArtTransformer2DModel) -> None:
    for block in transformer.transformer_blocks:
        for attn in (block.attn1, block.attn2):
            if (inner := unwrapped(attn.processor)) is not attn.processor:
                attn.set_processor(inner)
        blocks.detach(block)
