"""FLUX: double blocks with an image and a text stream, then single blocks over the joint sequence, text first."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux

from dit_accel.families import blocks
from dit_accel.families.attention import Listening, TokenCacheAttnProcessor, key_and_value_observations
from dit_accel.importance import attention_received, query_stride, sample
from dit_accel.schedule import Mode
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
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        ip_hidden_states: Any = None,
        ip_adapter_masks: Any = None,
    ) -> Any:
        extra = {"ip_hidden_states": ip_hidden_states, "ip_adapter_masks": ip_adapter_masks}
        extra = {name: value for name, value in extra.items() if value is not None and name in self.accepted}

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

    def _observe(
        self, attn: Listening, text: int, rotary: tuple[torch.Tensor, torch.Tensor] | None, needs: frozenset[str]
    ) -> dict[str, torch.Tensor]:
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


class FluxTransformerBlock(transformer_flux.FluxTransformerBlock):  # type: ignore[misc]  # the name is kept: diffusers matches it
    """The double block with the feed-forward of both streams, and the norms before it, computed token by token."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sites: tuple[Site, Site] | None = self.__dict__.get("_dit_accel_sites")
        if sites is None or sites[0].mode is Mode.PLAIN:
            # Not super(): a wrapper put around this method may outlive the class on this instance.
            base = transformer_flux.FluxTransformerBlock.forward
            return base(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)  # type: ignore[no-any-return]
        # On a partial step the processor returns the remembered attention of all tokens, whatever it is given; the gates,
        # shifts and scales belong to the timestep, not to a token.
        given = slice(1) if sites[0].mode is Mode.PARTIAL else slice(None)
        image, *image_modulation = self.norm1(hidden_states[:, given], emb=temb)
        text, *text_modulation = self.norm1_context(encoder_hidden_states[:, given], emb=temb)
        attention = self.attn(
            hidden_states=image, encoder_hidden_states=text, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
        )
        hidden = self._rest(sites[0], hidden_states, attention[0], image_modulation, self.norm2, self.ff)
        if len(attention) == 3:  # of an IP-Adapter
            hidden = hidden + attention[2]
        text = self._rest(sites[1], encoder_hidden_states, attention[1], text_modulation, self.norm2_context, self.ff_context)
        return text.clip(-65504, 65504) if text.dtype == torch.float16 else text, hidden

    @staticmethod
    def _rest(site: Site, hidden: torch.Tensor, attention: torch.Tensor, modulation: Any, norm: Any, ff: Any) -> torch.Tensor:
        """One stream from its attention on."""
        gate, shift, scale, ff_gate = (part[:, None] for part in modulation)
        hidden = blocks.add_gated(site, hidden, gate, attention)
        return blocks.add_gated(site, hidden, ff_gate, site(hidden, lambda tokens, take: ff(norm(tokens) * (1 + scale) + shift)))


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
        sites: tuple[Site] | None = self.__dict__.get("_dit_accel_sites")
        if sites is None or sites[0].mode is Mode.PLAIN:
            base = transformer_flux.FluxSingleTransformerBlock.forward
            return base(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)  # type: ignore[no-any-return]
        text_length = encoder_hidden_states.shape[1]
        hidden = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        gate: torch.Tensor | None = None

        def compute(tokens: torch.Tensor, take: Take) -> torch.Tensor:
            nonlocal gate
            normed, gate = self.norm(tokens, emb=temb)
            mlp = self.act_mlp(self.proj_mlp(normed))
            attention = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
            output: torch.Tensor = self.proj_out(torch.cat([take(attention), mlp], dim=2))
            return output

        output = sites[0](hidden, compute)
        if gate is None:  # nothing was computed; the gate belongs to the timestep, not to a token
            gate = self.norm(hidden[:, :1], emb=temb)[1]
        assert gate is not None
        hidden = blocks.add_gated(sites[0], hidden, gate[:, None], output)
        if hidden.dtype == torch.float16:
            hidden = hidden.clip(-65504, 65504)
        return hidden[:, :text_length], hidden[:, text_length:]


def grid(given: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the picture in tokens, from the position ids; tokens of a reference picture (Kontext) follow it."""
    ids = given["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    if ids.is_meta:
        return 1, len(ids)
    picture = ids[ids[:, 0] == ids[0, 0]]
    height, width = (len(picture[:, axis].unique()) for axis in (1, 2))
    return (height, width) if height * width == len(picture) else (1, len(ids))


def attach(transformer: FluxTransformer2DModel, run: Run, processors_only: bool) -> dict[str, FluxTokenCacheAttnProcessor]:
    processors = {}
    no_sites: tuple[Site, ...] = ()
    for layer, block in enumerate(transformer.transformer_blocks):
        name = f"transformer_blocks.{layer}"
        attention, scored = run.add(layer, "attention"), no_sites
        if not processors_only:
            scored = run.add(layer, "image"), run.add(layer, "text")
            blocks.attach(block, FluxTransformerBlock, scored, name)
        processor = processors[f"{name}.attn.processor"] = FluxTokenCacheAttnProcessor(block.attn.processor, attention, scored)
        run.attached.append((block.attn, processor, (attention, *scored)))
    for layer, block in enumerate(transformer.single_transformer_blocks):
        name = f"single_transformer_blocks.{layer}"
        attention, scored = run.add(layer, "attention"), no_sites
        if not processors_only:
            scored = (run.add(layer, "joint"),)
            blocks.attach(block, FluxSingleTransformerBlock, scored, name)
        processor = processors[f"{name}.attn.processor"] = FluxTokenCacheAttnProcessor(block.attn.processor, attention, scored)
        run.attached.append((block.attn, processor, (attention, *scored)))
    return processors


def detach(transformer: FluxTransformer2DModel) -> None:
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        if isinstance(block.attn.processor, FluxTokenCacheAttnProcessor):
            block.attn.set_processor(block.attn.processor.inner)
        blocks.detach(block)
