"""FLUX at module scope: double blocks with an image and a text stream, then single blocks over the joint sequence, text first."""

import functools
from typing import Any

import torch
from diffusers.models.transformers import transformer_flux

from dit_accel.families.blocks import Blocks, add_gated
from dit_accel.merge_site import MergeSite
from dit_accel.sites import Site, Take

Given = dict[str, Any]
OBSERVATIONS = frozenset({"keys", "values", "key_norms", "value_norms", "attention", "last_tokens"})
LARGEST = 65504  # of float16


def double_block(block: Any, sites: tuple[Any, ...], merging: MergeSite, given: Given) -> tuple[torch.Tensor, torch.Tensor]:
    """Both feed-forwards, and the norms before them, token by token."""
    (attention_site, image_site, text_site), hidden, text = sites, given["hidden_states"], given["encoder_hidden_states"]
    attention = attention_site.recall(hidden)
    unseen = attention is not None and text_site.unseen
    # Of a remembered attention only the gates, shifts and scales are missing: they belong to the timestep, not to a token.
    some = slice(None) if attention is None else slice(1)
    image, *modulation = block.norm1(hidden[:, some], emb=given["temb"])
    words, *text_modulation = (text,) if unseen else block.norm1_context(text[:, some], emb=given["temb"])
    if attention is None:
        attention = block.attn(hidden_states=image, encoder_hidden_states=words, **_attention_arguments(given))
    hidden = _rest(image_site, hidden, attention[0], modulation, block.norm2, functools.partial(merging.mlp, block.ff))
    if len(attention) == 3:  # of an IP-Adapter
        hidden = hidden + attention[2]
    if unseen:
        return text, hidden
    text = _rest(text_site, text, attention[1], text_modulation, block.norm2_context, block.ff_context)
    return text.clip(-LARGEST, LARGEST) if text.dtype == torch.float16 else text, hidden


def _attention_arguments(given: Given) -> Given:
    return {"image_rotary_emb": given.get("image_rotary_emb"), **(given.get("joint_attention_kwargs") or {})}


def _rest(site: Site, hidden: torch.Tensor, attention: torch.Tensor, modulation: Any, norm: Any, ff: Any) -> torch.Tensor:
    """One stream of a double block from its attention on."""
    gate, shift, scale, ff_gate = (part[:, None] for part in modulation)
    hidden = add_gated(site, hidden, gate, attention)
    return add_gated(site, hidden, ff_gate, site(hidden, lambda tokens, take: ff(norm(tokens) * (1 + scale) + shift)))


def single_block(block: Any, sites: tuple[Any, ...], merging: MergeSite, given: Given) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, the MLP and the output projection token by token."""
    (attention_site, site), text = sites, given["encoder_hidden_states"].shape[1]
    hidden = torch.cat([given["encoder_hidden_states"], given["hidden_states"]], dim=1)
    # Once for all tokens: it belongs to the timestep.
    shift, scale, gate = (part[:, None] for part in block.norm.linear(block.norm.silu(given["temb"])).chunk(3, dim=1))

    def compute(tokens: torch.Tensor, take: Take) -> torch.Tensor:
        normed = block.norm.norm(tokens) * (1 + scale) + shift
        attention = attention_site.recall(tokens)
        if attention is None:
            attention = block.attn(hidden_states=normed, **_attention_arguments(given))
        return merging.mlp(rest, normed, take(attention), start=text)

    def rest(normed: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = block.proj_out(torch.cat([attention, block.act_mlp(block.proj_mlp(normed))], dim=2))
        return output

    hidden = add_gated(site, hidden, gate, site(hidden, compute))
    if hidden.dtype == torch.float16:
        hidden = hidden.clip(-LARGEST, LARGEST)
    return hidden[:, :text], hidden[:, text:]


BLOCKS = {
    "transformer_blocks": Blocks(transformer_flux.FluxTransformerBlock, double_block, ("image", "text"), {"attn": None}),
    "single_transformer_blocks": Blocks(transformer_flux.FluxSingleTransformerBlock, single_block, ("joint",), {"attn": None}),
}
