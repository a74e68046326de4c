"""FLUX: double blocks with an image and a text stream, then single blocks over the joint sequence, text first."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux

from dit_accel.families import feed_forward
from dit_accel.importance import attention_received, query_stride
from dit_accel.schedule import Mode
from dit_accel.state import Run, Site, Take

TRANSFORMER = FluxTransformer2DModel


class FluxTokenCacheAttnProcessor:
    """Computes attention through the processor it wraps on full steps and reuses the output whole on partial ones.

    Args:
        inner: the processor that was there.
        site: where the output is remembered; without one the inner processor is called and nothing else.
        scored: the sites that select tokens of this block: (image, text) in a double block, (joint,) in a single one.
    """

    def __init__(self, inner: Any = None, site: Site | None = None, scored: tuple[Site, ...] = ()) -> None:
        self.inner = inner or transformer_flux.FluxAttnProcessor()
        self.site, self.scored = site, scored

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        def compute(tokens: torch.Tensor, take: Take) -> Any:
            return self.inner(attn, tokens, encoder_hidden_states, attention_mask, image_rotary_emb)

        if self.site is None:
            return compute(hidden_states, lambda tokens: tokens)
        output = self.site(hidden_states, compute)
        if self.site.mode is Mode.FULL and any(site.selector.needs_attention for site in self.scored):
            received = self._received(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
            if encoder_hidden_states is None:
                self.scored[0].memory.received = received
            else:
                image, text = self.scored
                text_length = encoder_hidden_states.shape[1]
                text.memory.received, image.memory.received = received[:, :text_length], received[:, text_length:]
        return output

    def _received(
        self,
        attn: Any,
        hidden: torch.Tensor,
        text: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Attention received, [B, T + N]: all keys, every stride-th token of either stream as a query."""
        total = hidden.shape[1] + (text.shape[1] if text is not None else 0)
        stride = query_stride(total)

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.view(*x.shape[:-1], -1, attn.head_dim)

        query, key = attn.norm_q(heads(attn.to_q(hidden[:, ::stride]))), attn.norm_k(heads(attn.to_k(hidden)))
        places = torch.arange(0, hidden.shape[1], stride, device=hidden.device)
        if text is not None:
            text_query = attn.norm_added_q(heads(attn.add_q_proj(text[:, ::stride])))
            text_key = attn.norm_added_k(heads(attn.add_k_proj(text)))
            query, key = torch.cat([text_query, query], dim=1), torch.cat([text_key, key], dim=1)
            text_places = torch.arange(0, text.shape[1], stride, device=hidden.device)
            places = torch.cat([text_places, places + text.shape[1]])
        if rotary is not None:
            query = apply_rotary_emb(query, (rotary[0][places], rotary[1][places]), sequence_dim=1)
            key = apply_rotary_emb(key, rotary, sequence_dim=1)
        return attention_received(query, key)


class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):  # type: ignore[misc]  # the name is kept: diffusers matches it
    """The single block with its norm, MLP and output projection computed token by token."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        site: Site | None = self.__dict__.get("_dit_accel_site")
        if site is None or site.mode is Mode.PLAIN or not isinstance(self.attn.processor, FluxTokenCacheAttnProcessor):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)  # type: ignore[no-any-return]
        text_length = encoder_hidden_states.shape[1]
        hidden = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        gate: torch.Tensor | None = None

        def compute(tokens: torch.Tensor, take: Take) -> torch.Tensor:
            nonlocal gate
            normed, gate = self.norm(tokens, emb=temb)
            mlp = self.act_mlp(self.proj_mlp(normed))
            # On a partial step the processor returns the remembered attention of all tokens, whatever it is given.
            attention = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
            output: torch.Tensor = self.proj_out(torch.cat([take(attention), mlp], dim=2))
            return output

        output = site(hidden, compute)
        if gate is None:  # nothing was computed; the gate belongs to the timestep, not to a token
            gate = self.norm(hidden[:, :1], emb=temb)[1]
        assert gate is not None
        hidden = hidden + gate.unsqueeze(1) * output
        if hidden.dtype == torch.float16:
            hidden = hidden.clip(-65504, 65504)
        return hidden[:, :text_length], hidden[:, text_length:]


def attach(transformer: FluxTransformer2DModel, run: Run) -> None:
    for layer, block in enumerate(transformer.transformer_blocks):
        attention, image, text = (run.add(layer, stream) for stream in ("attention", "image", "text"))
        feed_forward.attach(block.ff, image, f"transformer_blocks.{layer}.ff")
        feed_forward.attach(block.ff_context, text, f"transformer_blocks.{layer}.ff_context")
        block.attn.set_processor(FluxTokenCacheAttnProcessor(block.attn.processor, attention, (image, text)))
    for layer, block in enumerate(transformer.single_transformer_blocks):
        name = f"single_transformer_blocks.{layer}"
        if type(block) is not transformer_flux.FluxSingleTransformerBlock:
            raise TypeError(f"{name} is a {type(block).__name__}, not diffusers' FluxSingleTransformerBlock.")
        if "forward" in vars(block):
            raise TypeError(f"{name}.forward is wrapped, by offloading for example. Call dit_accel.apply before enabling it.")
        attention, joint = run.add(layer, "attention"), run.add(layer, "joint")
        block.__class__, block._dit_accel_site = FluxSingleTransformerBlock, joint
        block.attn.set_processor(FluxTokenCacheAttnProcessor(block.attn.processor, attention, (joint,)))


def detach(transformer: FluxTransformer2DModel) -> None:
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        if isinstance(block.attn.processor, FluxTokenCacheAttnProcessor):
            block.attn.set_processor(block.attn.processor.inner)
        if isinstance(block, FluxSingleTransformerBlock):
            del block._dit_accel_site
            block.__class__ = transformer_flux.FluxSingleTransformerBlock
    for block in transformer.transformer_blocks:
        feed_forward.detach(block.ff)
        feed_forward.detach(block.ff_context)
