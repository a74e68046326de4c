"""PixArt: self-attention, cross-attention to the text and feed-forward; guidance halves share a batch."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0

from dit_accel.families import feed_forward
from dit_accel.importance import attention_received, query_stride
from dit_accel.schedule import Mode
from dit_accel.state import Run, Site, Take

TRANSFORMER = PixArtTransformer2DModel


class PixArtTokenCacheAttnProcessor:
    """Computes attention through the processor it wraps, for the queries that its site asks for.

    In self-attention the site reuses the output whole on partial steps; in cross-attention it selects queries, which see
    the whole text.

    Args:
        inner: the processor that was there.
        site: where the output is remembered; without one the inner processor is called and nothing else.
        scored: the sites that select tokens by the attention received here.
    """

    def __init__(self, inner: Any = None, site: Site | None = None, scored: tuple[Site, ...] = ()) -> None:
        self.inner = inner or AttnProcessor2_0()
        self.site, self.scored = site, scored

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> Any:
        def compute(tokens: torch.Tensor, take: Take) -> Any:
            return self.inner(attn, tokens, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)

        if self.site is None:
            return compute(hidden_states, lambda tokens: tokens)
        output = self.site(hidden_states, compute)
        if self.site.mode is Mode.FULL and any(site.selector.needs_attention for site in self.scored):
            stride = query_stride(hidden_states.shape[1])
            query = attn.to_q(hidden_states[:, ::stride]).unflatten(-1, (attn.heads, -1))
            key = attn.to_k(hidden_states).unflatten(-1, (attn.heads, -1))
            if attn.norm_q is not None:
                query = attn.norm_q(query)
            if attn.norm_k is not None:
                key = attn.norm_k(key)
            received = attention_received(query, key)
            for site in self.scored:
                site.memory.received = received
        return output


def attach(transformer: PixArtTransformer2DModel, run: Run) -> None:
    for layer, block in enumerate(transformer.transformer_blocks):
        attention, cross, ff = (run.add(layer, stream) for stream in ("attention", "cross-attention", "feed-forward"))
        feed_forward.attach(block.ff, ff, f"transformer_blocks.{layer}.ff")
        block.attn1.set_processor(PixArtTokenCacheAttnProcessor(block.attn1.processor, attention, (cross, ff)))
        block.attn2.set_processor(PixArtTokenCacheAttnProcessor(block.attn2.processor, cross))


def detach(transformer: PixArtTransformer2DModel) -> None:
    for block in transformer.transformer_blocks:
        for attn in (block.attn1, block.attn2):
            if isinstance(attn.processor, PixArtTokenCacheAttnProcessor):
                attn.set_processor(attn.processor.inner)
        feed_forward.detach(block.ff)
