"""What the attention processors of all families share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb

from dit_accel.merge_site import MergeSite
from dit_accel.site import Site
from dit_accel.when import Mode

Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and sines of every position, [S, D]
MERGED_QUERIES, MERGED_KEYS = ("to_q",), ("to_k", "to_v")  # projections
MERGED = (*MERGED_QUERIES, *MERGED_KEYS, "to_qkv")


class WrappingAttnProcessor:
    """Computes attention through the processor it wraps."""

    default_inner: type

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner or self.default_inner()
        self.accepted = frozenset(inspect.signature(self.inner.__call__).parameters)

    def wanted(self, **given: Any) -> dict[str, Any]:
        """Those of the arguments that the wrapped processor takes."""
        return {name: value for name, value in given.items() if value is not None and name in self.accepted}

    # diffusers sets the attention backend on the processor it finds.
    @property
    def _attention_backend(self) -> Any:
        return self.inner._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.inner._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.inner._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.inner._parallel_config = config


def unwrapped(processor: Any) -> Any:
    """The processor that was there before ours."""
    while isinstance(processor, WrappingAttnProcessor):
        processor = processor.inner
    return processor


class TokenCacheAttnProcessor(WrappingAttnProcessor):
    """Computes attention through the processor it wraps and remembers the output.

    Args:
        inner: the processor that was there.
        site: where the output is remembered; without one the inner processor is called and nothing else.
        scored: the sites that select tokens by what is observed here.
    """

    def __init__(self, inner: Any = None, site: Site | None = None, scored: tuple[Site, ...] = ()) -> None:
        super().__init__(inner)
        self.site, self.scored = site, scored

    @property
    def observing(self) -> frozenset[str]:
        """What has to be observed in this call."""
        if self.site is None or self.site.mode is not Mode.FULL or not self.scored:
            return frozenset()
        return self.scored[0].selector.needs - {"last_tokens"}


class TokenMergeAttnProcessor(WrappingAttnProcessor):
    """Computes attention through the processor it wraps, of merged tokens, and gives every token what its group gets.

    Args:
        inner: the processor that was there.
        merging: the layer's; without one the inner processor is called and nothing else.
    """

    def __init__(self, inner: Any = None, merging: MergeSite | None = None) -> None:
        super().__init__(inner)
        self.merging = merging


class MergedKeys:
    """An attention module as its processor sees it, whose keys and values are those of other tokens than its queries.

    Args:
        attn: the module.
        tokens: what keys and values are made from, [B, M, C].
        norms: by name, what takes the place of the module's norms.
    """

    fused_projections = False  # the separate ones are always there

    def __init__(self, attn: Any, tokens: torch.Tensor, norms: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> None:
        self.attn, self.tokens, self.norms = attn, tokens, norms

    def __getattr__(self, name: str) -> Any:
        return self.norms.get(name) or getattr(self.attn, name)

    def to_k(self, _: torch.Tensor) -> torch.Tensor:
        keys: torch.Tensor = self.attn.to_k(self.tokens)
        return keys

    def to_v(self, _: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self.attn.to_v(self.tokens)
        return values

    def to_kv(self, _: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.to_k(self.tokens), self.to_v(self.tokens)], dim=-1)


def rotating_norms(attn: Any, rotary: Rotary, rows: torch.Tensor, text: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The norms of queries and keys, followed by their rotation: for a processor that could only rotate both alike.

    Args:
        rotary: tables of the whole sequence, [S, D].
        rows: the positions of merged keys, [B, S'].
        text: tokens in front that have norms of their own.
    """

    def rotating(norm: Any, places: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        tables = (rotary[0][places.flatten()], rotary[1][places.flatten()])
        # The whole batch as one sequence: diffusers' rotation takes one table.
        return lambda heads: apply_rotary_emb(norm(heads).flatten(0, 1)[None], tables, sequence_dim=1).reshape(heads.shape)

    every = torch.arange(len(rotary[0]), device=rows.device).expand(len(rows), -1)
    norms = {"norm_q": rotating(attn.norm_q, every[:, text:]), "norm_k": rotating(attn.norm_k, rows[:, text:])}
    if text:
        for name in ("norm_added_q", "norm_added_k"):
            norms[name] = rotating(getattr(attn, name), every[:, :text])
    return norms


class Listening:
    """An attention module as its processor sees it, which keeps what the projections return: observing costs none of its own.

    Args:
        attn: the module.
        known: projections by name that are not to be computed again.
    """

    SEPARATE = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))  # of the image, of the text
    FUSED = ("to_qkv", "to_added_qkv", "to_kv")
    PROJECTIONS = frozenset((*SEPARATE[0], *SEPARATE[1], *FUSED))

    def __init__(self, attn: Any, known: dict[str, torch.Tensor] | None = None) -> None:
        self.attn, self.heard = attn, dict(known or {})

    def __getattr__(self, name: str) -> Any:
        part = getattr(self.attn, name)
        if name not in self.PROJECTIONS:
            return part

        def project(*args: Any, **kwargs: Any) -> Any:
            if name not in self.heard:
                self.heard[name] = part(*args, **kwargs)
            return self.heard[name]

        return project

    def change(self, what: Callable[[torch.Tensor], torch.Tensor], names: Iterable[str]) -> None:
        """Replace what these projections have returned."""
        self.heard.update({name: what(self.heard[name]) for name in names if name in self.heard})

    def projection(self, which: int, text: bool = False) -> torch.Tensor:
        """Query (0), key (1) or value (2) of all tokens of the image or of the text, [B, N, H, D], before norms.

        Raises:
            RuntimeError: if the processor never asked for it.
        """
        if (name := self.SEPARATE[text][which]) in self.heard:
            projected = self.heard[name]
        elif (name := self.FUSED[text]) in self.heard:
            projected = self.heard[name].chunk(3, dim=-1)[which]
        elif "to_kv" in self.heard and which > 0:
            projected = self.heard["to_kv"].chunk(2, dim=-1)[which - 1]
        else:
            raise RuntimeError(
                f"{type(unwrapped(self.attn.processor)).__name__} does not use diffusers' projections, so there is nothing to "
                "observe for this selector; choose another one, such as random."
            )
        heads: torch.Tensor = projected.unflatten(-1, (self.attn.heads, -1))
        return heads


def key_and_value_observations(project: Callable[[int], torch.Tensor], needs: frozenset[str]) -> dict[str, torch.Tensor]:
    """What is asked of keys and values alone; project(1) gives the keys and project(2) the values, [B, N, H, D]."""
    seen = {}
    for which, name in ((1, "key"), (2, "value")):
        if needs & {f"{name}s", f"{name}_norms"}:
            heads = project(which)
            if f"{name}s" in needs:
                seen[f"{name}s"] = heads.contiguous()  # of fused projections, this part only
            if f"{name}_norms" in needs:
                seen[f"{name}_norms"] = heads.float().norm(dim=-1).mean(dim=-1)
    return seen
