"""PixArt at module scope: self-attention, cross-attention to the text and feed-forward; guidance halves share a batch."""

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock

from dit_accel import which
from dit_accel.families.blocks import Blocks, add_gated
from dit_accel.merge_site import MergeSite

OBSERVATIONS = frozenset(which.OBSERVATIONS)


def token_wise_block(block: Any, sites: tuple[Any, ...], merging: MergeSite, given: dict[str, Any]) -> torch.Tensor:
    """The feed-forward, and the norm before it, token by token; attention's processors do the rest."""
    (attention_site, _, site), extra = sites, given.get("cross_attention_kwargs") or {}
    hidden = given["hidden_states"].contiguous()  # the patch embedding leaves it transposed, which slows every step after it
    modulation = block.scale_shift_table[None] + given["timestep"].reshape(len(hidden), 6, -1)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.chunk(6, dim=1)
    attention = attention_site.recall(hidden)
    if attention is None:
        attention = block.attn1(block.norm1(hidden) * (1 + scale) + shift, attention_mask=given.get("attention_mask"), **extra)
    hidden = add_gated(site, hidden, gate, attention)
    text, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
    hidden = hidden + block.attn2(hidden, encoder_hidden_states=text, attention_mask=mask, **extra)
    features = site(hidden, lambda tokens, take: merging.mlp(block.ff, block.norm2(tokens) * (1 + ff_scale) + ff_shift))
    return add_gated(site, hidden, ff_gate, features)


BLOCKS = {
    "transformer_blocks": Blocks(
        BasicTransformerBlock, token_wise_block, ("cross-attention", "feed-forward"), {"attn1": None, "attn2": "cross-attention"}
    )
}
