"""Packed steps: the stock forward of every block runs over the selected tokens alone.

Only mixers, through which tokens see each other, are replaced: they return what they returned at the last full step ("reuse"), or
compute the selected queries against the kept keys and values, in which the selected rows are refreshed ("fresh"). At the head, the
rows that were not selected come from past outputs. What runs between the blocks sees zeros in the usual shape: whatever it adds to
them, such as a ControlNet's residuals, is added to the selected tokens.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.hooks import ModelHook

from dit_accel import fresh, hook
from dit_accel.families.rows import Family, Stack
from dit_accel.steps import Block, Full, Index, Look, Memory, Partial

HOOK = "dit_accel_packed"


class _Part(ModelHook):  # type: ignore[misc]
    """Of a mixer or an idle module."""

    def __init__(self, packed: Packed, block: Block, name: str) -> None:
        super().__init__()
        self.packed, self.stack, self.key = packed, block.stack, (block.place, name)
        self.name = f"{name} of block {block.place} of {packed.family.transformer}"

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        call, forward = self.packed.call, self.fn_ref.original_forward
        if call is None:
            return forward(*args, **kwargs)
        carry_out = call.idle if self.key[1] in self.stack.idle else call.mix
        return carry_out(self, module, forward, args, kwargs)


class During(contextlib.AbstractContextManager[None]):
    """Inside, a call is carried out. No generator, which torch.compile refuses wherever it meets one."""

    def __init__(self, packed: Packed, call: Look | Partial) -> None:
        self.packed, self.call = packed, call

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __enter__(self) -> None:
        self.packed.call = self.call

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __exit__(self, error: Any, *_: Any) -> None:
        self.packed.call = None
        if error is None:
            self.call.end()


class Packed:
    """Packed steps of a transformer of this family, whose attention is "reuse"d or "fresh"; ValueError if it cannot be.

    `needs` are what is observed of attention on full steps for the selector: attention, key_norms, value_norms.
    """

    def __init__(self, transformer: Any, family: Family, attention: str = "reuse", needs: frozenset[str] = frozenset()) -> None:
        if attention not in ("reuse", "fresh"):
            raise ValueError(f"attention must be 'reuse' or 'fresh', not {attention!r}.")
        if family.stale_only and (attention == "fresh" or needs):
            what, otherwise = ("computed afresh", fresh.STALE) if attention == "fresh" else ("looked at", fresh.UNSEEN)
            raise ValueError(f"Attention of {family.transformer} cannot be {what}: {family.stale_only}; {otherwise}.")
        self.transformer, self.family, self.attention, self.needs = transformer, family, attention, needs
        self.call: Look | Partial | None = None
        self.last = sum(len(getattr(transformer, stack.blocks)) for stack in family.stacks) - 1
        self._undo: list[Any] = []

    def full(
        self, memory: Memory, tokens: int, time: float, most: int = 2, pictures: int = 0
    ) -> contextlib.AbstractContextManager[None]:
        """Inside, the transformer's call computes everything, bit by bit as stock, and is remembered.

        Args:
            tokens: how many can be selected, `Family.count`.
            time: of this step; a second output at the same time, of a solver such as Heun's, replaces the first.
            most: how many outputs to keep besides this one.
            pictures: how many of the batch partial steps will go on with, the last ones; 0 for all.
        """
        memory.begin(tokens, pictures)
        return During(self, Full(self.family, self.attention, self.needs, memory, time, most))

    def look(self, memory: Memory, tokens: int) -> contextlib.AbstractContextManager[None]:
        """Inside, the transformer's call is stock, of so many tokens; what is observed of its attention is remembered alone."""
        memory.begin(tokens, 0)
        return During(self, Look(self.needs, memory))

    def partial(self, memory: Memory, index: Index, weights: Sequence[float]) -> contextlib.AbstractContextManager[None]:
        """Inside, the transformer's call computes the selected tokens; nothing is read from the device.

        Args:
            memory: of the same branch.
            index: of the selected tokens, ascending, [k] or [B, k]; or what makes it of the tokens that enter the first block.
            weights: of the past outputs, newest first, that make up the rows that are not selected.
        """
        return During(self, Partial(self.family, self.attention, self.last, memory, index, weights))

    def attach(self) -> None:
        """Hook into blocks, their parts and the head; outside of `full` and `partial` that changes nothing."""
        for block, module in blocks_of(self.transformer, self.family):
            before = functools.partial(self._before, block)
            self._undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            self._undo.append(module.register_forward_hook(functools.partial(self._after, block)).remove)
            for name, part in parts(module, block.stack.mixers + block.stack.idle):
                self._carry_out(part, block, name)
        if rotary := self.family.rotary:
            self._carry_out(getattr(self.transformer, rotary), Block(-1, Stack("", (), idle=(rotary,)), ()), rotary)
        head = self.transformer.get_submodule(self.family.head)
        for module in head.values() if isinstance(head, torch.nn.ModuleDict) else (head,):
            self._undo.append(module.register_forward_hook(self._head).remove)
        self._renew()

    def _carry_out(self, part: Any, block: Block, name: str) -> None:
        self._undo.append(functools.partial(hook.unregister, part, HOOK))
        hook.register(part, _Part(self, block, name), HOOK)

    def detach(self) -> None:
        """The inverse of `attach`."""
        while self._undo:
            self._undo.pop()()
        self._renew()

    def _renew(self) -> None:
        """Diffusers remembers which modules have hooks."""
        if registry := getattr(self.transformer, "_diffusers_hook", None):
            registry.invalidate_child_registries_cache()

    def _before(self, block: Block, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.call and self.call.before(block, {**dict(zip(block.names, args, strict=False)), **kwargs})

    def _after(self, block: Block, module: Any, args: Any, output: Any) -> Any:
        return self.call and self.call.after(block, output)

    def _head(self, module: Any, args: Any, output: Any) -> Any:
        return self.call and self.call.head(output)


def blocks_of(transformer: Any, family: Family) -> Iterator[tuple[Block, Any]]:
    """All blocks in the order in which they run."""
    modules = [(stack, module) for stack in family.stacks for module in getattr(transformer, stack.blocks)]
    for place, (stack, module) in enumerate(modules):
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        yield Block(place, stack, tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)), module


def parts(block: Any, names: Sequence[str]) -> list[tuple[str, Any]]:
    """The submodules of these names that this block has."""
    return [(name, module) for name in names if (module := getattr(block, name, None)) is not None]
