"""The attention processor of module scope: remembers, observes and merges what the processor that was there computes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from dit_accel import fresh, store
from dit_accel.importance import attention_entropy, attention_from_a_sample, norms
from dit_accel.merge_site import MergeSite
from dit_accel.sites import Cached, Site
from dit_accel.when import Mode

Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and sines of every position, [S, D]
KEYS = ("to_k", "to_v")
ADDED = ("ip_hidden_states", "ip_adapter_masks", "image_rotary_emb")  # to what all processors take


def _of_inner(name: str) -> Any:
    return property(lambda self: getattr(self.inner, name), lambda self, value: setattr(self.inner, name, value))


class TokenAttnProcessor:
    """Computes attention through the processor it wraps, `inner`, whose output the site remembers, if there is one.

    `scored` are the sites that select tokens by what is observed here; `joint`: text and image make one sequence, [text, image].
    """

    def __init__(
        self,
        inner: Any = None,  # FLUX's IP-Adapter makes processors of the class that it finds
        site: Cached | None = None,
        merging: MergeSite | None = None,
        scored: tuple[Site, ...] = (),
        joint: bool = False,
    ) -> None:
        self.inner, self.site, self.merging, self.scored, self.joint = inner or FluxAttnProcessor(), site, merging, scored, joint
        self.accepted = frozenset(inspect.signature(self.inner.__call__).parameters)

    # diffusers sets these on the processor it finds.
    _attention_backend, _parallel_config = _of_inner("_attention_backend"), _of_inner("_parallel_config")

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
        added = zip(ADDED, (ip_hidden_states, ip_adapter_masks, image_rotary_emb), strict=True)
        extra = {name: value for name, value in added if value is not None and name in self.accepted}
        if self.site is None:
            return self._attend(self.inner, attn, hidden_states, encoder_hidden_states, attention_mask, extra)
        crossing = isinstance(self.site, Site) and self.site.mode is not Mode.PLAIN
        full, seen = self.site.mode is Mode.FULL, self.scored[0].memory.observed if self.scored else {}
        needs = self.scored[0].selector.needs - {"last_tokens"} if self.scored and full else frozenset()
        needs = needs & {"entropy"} if crossing else needs - {"entropy"}
        renew = crossing and not full and "entropy" in seen
        source = Listening(attn, self.site.memory.text if crossing else None) if needs or crossing else attn
        mapped = "entropy" if crossing else "attention"
        maps: list[torch.Tensor] = []
        inner = functools.partial(self._looking, maps, crossing) if renew or mapped in needs else self.inner
        output = self.site(
            hidden_states,
            lambda tokens, take: self._attend(inner, source, tokens, encoder_hidden_states, attention_mask, extra, maps),
        )
        if crossing and full:  # the text is the same on every step
            self.site.memory.text = {name: heard for name, heard in source.heard.items() if name != "to_q"}
        if needs:
            text = 0 if encoder_hidden_states is None or not self.joint else encoder_hidden_states.shape[1]
            found = key_and_value_observations(functools.partial(source.projection, text=text > 0), needs)
            if maps:
                found[mapped] = maps[0]
            for site in self.scored:
                part = slice(0, text) if site.stream == "text" else slice(text, None)
                site.memory.observed = {**site.memory.observed, **{name: value[:, part] for name, value in found.items()}}
        elif renew and maps and (rows := self.scored[0].selected) is not None:
            # Of the tokens just computed; all sites of the block share what is observed.
            store.put(seen["entropy"][..., None], rows, maps[0][..., None])
        return output

    def _looking(self, maps: list[torch.Tensor], crossing: bool, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """`inner`, whose attention map is looked at on the way: what each token receives, or its entropy where it is crossing."""

        def look(given: fresh.Given) -> None:
            query, key = given["query"].transpose(1, 2), given["key"].transpose(1, 2)
            if crossing:
                maps.append(attention_entropy(query, key, given.get("attn_mask"), self.scored[0].now.halves))
            else:
                maps.append(attention_from_a_sample(query, key, self.scored[0].config.query_share))

        with fresh.Attention(type(self.inner).__name__, look, fresh.UNSEEN):
            return self.inner(attn, *args, **kwargs)

    def _attend(
        self,
        inner: Callable[..., Any],
        attn: Any,
        tokens: torch.Tensor,
        other: torch.Tensor | None,
        mask: Any,
        extra: dict[str, Any],
        maps: list[torch.Tensor] | None = None,
    ) -> Any:
        """Attention of these tokens, merged if it is this step's turn; so is what `maps` was given on the way."""
        site, crossing = self.merging, other is not None and not self.joint
        if site is None or not site.count or not (site.config.merge_cross_attention if crossing else site.config.merge_attention):
            return inner(attn, tokens, other, mask, **extra)
        double = other is not None and self.joint
        text = other.shape[1] if other is not None and double else 0
        start = site.text if self.joint and not double else 0  # of the image in the tokens
        site.see(tokens[:, start:])
        merged, length, keep = site.merge(tokens, start), text + tokens.shape[1], site.config.keep_queries and not crossing
        if mask is not None and self.joint:
            mask = mask[(None,) * (4 - mask.ndim)]
        mask = site.mask(mask, tokens, text + start, length, queries=not keep, keys=not crossing)
        mask = mask[:, None] if mask is not None and mask.ndim == 3 and self.joint else mask
        rotary = extra.pop("image_rotary_emb", None) if self.joint else None
        rows = site.places(text + start, length) if rotary is not None else None
        if keep:
            if "ip_hidden_states" in extra:
                raise RuntimeError("keep_queries cannot be combined with an IP-Adapter on FLUX; leave keep_queries off.")
            norms = rotating_norms(attn, rotary, rows, text) if rotary is not None and rows is not None else {}
            output = inner(MergedKeys(attn, merged, norms), tokens, other if self.joint else merged, mask)
        elif rotary is None or rows is None:
            output = inner(attn, merged, other, mask, **extra)
        else:  # each at its destination's position: processors take one table of them, so pictures of a batch go one by one
            sources = [Listening(attn.attn) if isinstance(attn, Listening) else attn for _ in rows]
            extra["image_rotary_emb"] = fresh.PerPicture((rotary[0][own], rotary[1][own]) for own in rows)
            output = fresh.picture_by_picture(
                lambda place, *args, **more: inner(sources[place], *args, **more), len(rows), (merged, other, mask), extra
            )
            if isinstance(attn, Listening):
                attn.heard = {name: torch.cat([source.heard[name] for source in sources]) for name in sources[0].heard}
        if isinstance(attn, Listening):
            names = KEYS if keep else ("to_q",) if crossing else ("to_q", *KEYS, "to_qkv")
            attn.heard |= {name: site.unmerge(attn.heard[name], start) for name in names if name in attn.heard}
        if maps:
            maps[:] = [site.unmerge(torch.cat(maps)[..., None], text + start)[..., 0]]
        if keep:
            return output
        if double:
            return tuple(part if i == 1 else site.unmerge(part) for i, part in enumerate(output))
        return site.unmerge(output, start)


def unwrapped(processor: Any) -> Any:
    """The processor that was there before ours."""
    return processor.inner if isinstance(processor, TokenAttnProcessor) else processor


class MergedKeys:
    """An attention module as its processor sees it: keys and values are those of other tokens, [B, M, C]; norms by name."""

    fused_projections = False  # the separate ones are always there

    def __init__(self, attn: Any, tokens: torch.Tensor, norms: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> None:
        self.attn, self.tokens, self.norms = attn, tokens, norms

    def __getattr__(self, name: str) -> Any:
        return self.norms.get(name) or getattr(self.attn, name)

    def to_k(self, _: torch.Tensor) -> Any:
        return self.attn.to_k(self.tokens)

    def to_v(self, _: torch.Tensor) -> Any:
        return self.attn.to_v(self.tokens)

    def to_kv(self, _: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.attn.to_k(self.tokens), self.attn.to_v(self.tokens)], dim=-1)


def rotating_norms(attn: Any, rotary: Rotary, rows: torch.Tensor, text: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Norms of queries and keys, followed by their rotation, of keys at `rows` [B, S']; `text` tokens in front have their own."""

    def rotating(name: str, places: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        norm, tables = getattr(attn, name), (rotary[0][places.flatten()], rotary[1][places.flatten()])
        # The whole batch as one sequence: diffusers' rotation takes one table.
        return lambda heads: apply_rotary_emb(norm(heads).flatten(0, 1)[None], tables, sequence_dim=1).reshape(heads.shape)

    every = torch.arange(len(rotary[0]), device=rows.device).expand(len(rows), -1)
    places = {"norm_q": every[:, text:], "norm_k": rows[:, text:]}
    if text:
        places |= {"norm_added_q": every[:, :text], "norm_added_k": every[:, :text]}
    return {name: rotating(name, own) for name, own in places.items()}


class Listening:
    """An attention module as its processor sees it, which keeps what projections return; those `known` are not computed again."""

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

    def projection(self, which: int, text: bool = False) -> torch.Tensor:
        """Query (0), key (1) or value (2), [B, N, H, D], before norms, with those of text in front; RuntimeError if never made."""
        found = []
        for words in (True, False) if text else (False,):
            if (name := self.SEPARATE[words][which]) in self.heard:
                found.append(self.heard[name])
            elif (name := self.FUSED[words]) in self.heard:
                found.append(self.heard[name].chunk(3, dim=-1)[which])
            elif "to_kv" in self.heard and which > 0:
                found.append(self.heard["to_kv"].chunk(2, dim=-1)[which - 1])
            else:
                raise RuntimeError(
                    f"{type(unwrapped(self.attn.processor)).__name__} does not use diffusers' projections, so there is nothing to "
                    "observe for this selector; choose another one, such as random."
                )
        heads: torch.Tensor = (torch.cat(found, dim=1) if text else found[0]).unflatten(-1, (self.attn.heads, -1))
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
                seen[f"{name}_norms"] = norms(heads)
    return seen
