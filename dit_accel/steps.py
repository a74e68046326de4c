"""What a packed step does at every block, mixer and head, and what it remembers of a guidance branch."""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_accel import fresh, store
from dit_accel.families.rows import Family, Stack
from dit_accel.store import put, take

Index = torch.Tensor | Callable[[torch.Tensor], torch.Tensor]
Forward = Callable[..., Any]


@dataclass
class Memory:
    """What one guidance branch remembers; tensors keep their addresses while their shapes stay the same."""

    tokens: int = 0  # N, how many can be selected
    pictures: int = 0  # of the batch that are remembered, the last ones; 0 for all
    times: list[float] = field(default_factory=list)  # of the full steps remembered, newest first
    outputs: list[list[Any]] = field(default_factory=list)  # the head's rows at these, each [B, N, C]
    features: dict[Any, tuple[Any, ...]] = field(default_factory=dict)  # by mixer, or "entered" the first block
    observed: dict[str, torch.Tensor] = field(default_factory=dict)  # for the selector, [B, N], mean over the mixers
    inference: bool = False

    def keep(self, key: Any, *values: torch.Tensor | None) -> None:
        """Remember what the last full step computed, in place where that is possible."""
        kept = []
        for old, value in zip((*self.features.get(key, ()), *[None] * len(values)), values, strict=False):
            new = None if value is None else value[-self.pictures :]
            if old is None or new is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
                kept.append(None if new is None else new.detach().clone())
            else:
                kept.append(old.copy_(new.detach()))
        self.features[key] = tuple(kept)

    def begin(self, tokens: int, pictures: int) -> None:
        """A full step; what was remembered in inference mode cannot be written to outside of it."""
        if self.inference != torch.is_inference_mode_enabled():
            self.times, self.outputs, self.features = [], [], {}
        self.tokens, self.pictures, self.inference = tokens, pictures, torch.is_inference_mode_enabled()


@dataclass(frozen=True)
class Block:
    """A block: its place among all blocks, its stack, and the names of its arguments."""

    place: int
    stack: Stack
    names: tuple[str, ...]


class Look:
    """A full step whose attention is looked at for a selector."""

    def __init__(self, needs: frozenset[str], memory: Memory) -> None:
        self.needs, self.memory = needs, memory
        self.seen: dict[str, list[torch.Tensor]] = {name: [] for name in needs}  # mixer by mixer

    def end(self) -> None:
        """Remember the mean over the mixers."""
        self.memory.observed = {name: torch.stack(seen).mean(dim=0) for name, seen in self.seen.items()}

    def before(self, block: Block, given: dict[str, Any]) -> None:
        """Blocks get what they are given."""

    def after(self, block: Block, output: Any) -> None:
        """The output stays as it is."""

    def look(self, given: fresh.Given, text_last: bool) -> None:
        for name, seen in self.seen.items():
            seen.append(self._image(fresh.observed(given, name), text_last)[-self.memory.pictures :])

    def _image(self, sequence: torch.Tensor, text_last: bool) -> torch.Tensor:
        """What is not text of [B, S, ...]."""
        return sequence[:, : self.memory.tokens] if text_last else sequence[:, -self.memory.tokens :]

    def mix(self, hook: Any, mixer: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with fresh.Attention(hook.name, lambda given: self.look(given, hook.stack.text_last), fresh.UNSEEN):
            return forward(*args, **kwargs)

    def idle(self, hook: Any, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*args, **kwargs)

    def head(self, output: torch.Tensor) -> None:
        """It too."""


class Full(Look):
    """A full step: the stock forward, remembered."""

    def __init__(self, family: Family, attention: str, needs: frozenset[str], memory: Memory, time: float, most: int) -> None:
        super().__init__(needs, memory)
        self.family, self.fresh, self.time, self.most = family, attention == "fresh", time, most
        self.rows: Any = None  # of the head

    def end(self) -> None:
        """Remember the output; outside of any compiled graph, which would hold for this one time alone."""
        super().end()
        if self.rows is not None:
            store.push(self.memory.outputs, self.memory.times, self.time, [self.rows[-self.memory.pictures :]], self.most)

    def before(self, block: Block, given: dict[str, Any]) -> None:
        for name in block.stack.refused:
            if given.get(name) is not None:
                raise ValueError(f"With {name}, no tokens of {self.family.transformer} can be selected; leave it out.")
        if block.place == 0:
            tokens, count = given[block.stack.tokens], self.memory.tokens
            if tokens.shape[1] < count or (tokens.shape[1] > count and not block.stack.joint):
                raise ValueError(f"{tokens.shape[1]} tokens entered {self.family.transformer}'s blocks; {count} were announced.")
            self.memory.keep("entered", self._image(tokens, block.stack.text_last))

    def mix(self, hook: Any, mixer: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def look(given: fresh.Given) -> None:
            if self.fresh:
                self.memory.keep(hook.key, *fresh.remembered(given))
            self.look(given, hook.stack.text_last)

        looking = self.fresh or self.needs
        with fresh.Attention(hook.name, look, fresh.UNSEEN if self.needs else fresh.STALE) if looking else nullcontext():
            if hook.stack.fused is None or self.fresh:
                output = kept = forward(*args, **kwargs)
            else:
                output, kept = hook.stack.fused(mixer, forward, args, kwargs, None)
        if not self.fresh:
            self.memory.keep(hook.key, *_listed(kept))
        return output

    def idle(self, hook: Any, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Of what is made of text, nothing has to be remembered but what it is."""
        output = forward(*args, **kwargs)
        self.memory.keep(hook.key, *(v[:, :0] if v.ndim > 2 else v for v in _listed(output)))
        return output

    def head(self, output: torch.Tensor) -> None:
        self.rows = output.flatten(1, -2)
        if (count := self.rows.shape[1]) < self.memory.tokens:
            raise ValueError(f"Only {count} of {self.memory.tokens} tokens of {self.family.transformer} reach its output.")


class Partial:
    """A partial step; `x` and `words` are the selected tokens and the kept text on their way through the blocks."""

    def __init__(self, family: Family, attention: str, last: int, memory: Memory, index: Index, weights: Sequence[float]) -> None:
        self.family, self.fresh, self.last, self.memory, self.count = family, attention == "fresh", last, memory, len(weights)
        # Made here: a compiled graph would hold for these weights alone.
        known = 0 < self.count <= len(memory.outputs)
        self.forecast = store.combined(memory.outputs, weights)[0] if known else None
        self.index: Any = index
        self.x: Any = None
        self.words: Any = None
        self.left: Any = None  # what the last block left in place of the tokens
        self.shape, self.text_shape = torch.Size(), torch.Size()  # of tokens and text around the blocks
        self.whole = self.fresh  # whether text is computed; nobody looks at it while attention is reused
        self.finished = False
        self._zeros: dict[Any, torch.Tensor] = {}
        self._rows: dict[Any, torch.Tensor] = {}

    def end(self) -> None:
        """Nothing has to be remembered."""

    def kept(self, text: int) -> int:
        return text if self.whole else min(self.family.least_text, text)

    def rows(self, length: int) -> torch.Tensor:
        """Rows of the selected tokens, and of the kept text, in a sequence with or without text."""
        if length not in self._rows:
            count, text, index = self.memory.tokens, length - self.memory.tokens, self.index
            last, words = self.family.stacks[0].text_last, self.kept(text)
            rows = index if last or not text else index + text
            if words:
                kept = torch.arange(words, device=index.device).expand(*index.shape[:-1], -1)
                rows = torch.cat([index, kept + count] if last else [kept, rows], dim=-1)
            self._rows[length] = rows
        return self._rows[length]

    def zeros(self, shape: torch.Size) -> torch.Tensor:
        """They take no memory; writing to them in place raises."""
        if shape not in self._zeros:
            self._zeros[shape] = self.x.new_zeros(()).expand(shape)
        return self._zeros[shape]

    def before(self, block: Block, given: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        stack, tokens, text = block.stack, given[block.stack.tokens], given.get(block.stack.text or "")
        if self.x is None:
            if (entered := self.memory.features.get("entered")) is None or len(entered[0]) != len(tokens):
                raise RuntimeError("This branch has no full step of a batch of this size behind it; compute one first.")
            if callable(self.index):
                count = self.memory.tokens
                self.index = self.index(tokens[:, :count] if stack.text_last else tokens[:, -count:])
            self.whole = self.whole or self.index.shape[-1] == self.memory.tokens
            self.x = take(tokens, self.rows(tokens.shape[1]))
            self.words = None if text is None else text[:, : self.kept(text.shape[1])]
        elif tokens is not self.left:
            if tokens.shape[1] != self.shape[1]:  # the streams have been joined
                self.x = torch.cat([self.x, self.words] if stack.text_last else [self.words, self.x], dim=1)
            self.x = self.x + take(tokens, self.rows(tokens.shape[1]))
        self.shape, self.text_shape = tokens.shape, torch.Size() if text is None else text.shape
        given[stack.tokens] = self.x
        if text is not None and stack.text is not None:
            given[stack.text] = self.words
        for name in stack.per_token:
            value = given.get(name)
            if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[1] == tokens.shape[1] > 1:
                given[name] = take(value, self.rows(tokens.shape[1]))
        for name in stack.positions if self.fresh else stack.masks:
            given[name] = self._positions(given.get(name)) if self.fresh else None
        return (), given

    def _positions(self, table: Any) -> Any:
        count, text = self.memory.tokens, self.text_shape[1] if self.text_shape else 0
        if text == count:
            raise ValueError("There are as many text tokens as others, so their positions look alike; set attention='reuse'.")
        select = functools.partial(fresh.positions, lengths={count, count + text, self.shape[1]})
        if self.index.ndim == 1:
            return select(table, rows=self.rows)
        batch = len(self.index)

        def own(place: int) -> Any:
            return select(fresh.picture(table, place, batch), rows=lambda length: self.rows(length)[place])

        return fresh.PerPicture(map(own, range(batch)))

    def after(self, block: Block, output: Any) -> Any:
        parts = dict(zip(block.stack.returns, _listed(output), strict=False))
        self.x = parts["tokens"]
        if parts.get("text") is not None:
            self.words, parts["text"] = parts["text"], self.zeros(self.text_shape)
        self.finished = block.place == self.last
        self.left = self.zeros(self.shape)
        if self.finished:
            self.left = put(self.x.new_zeros(self.shape), self.rows(self.shape[1]), self.x)
        parts["tokens"] = self.left
        return tuple(parts.values()) if isinstance(output, tuple) else self.left

    def mix(self, hook: Any, mixer: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (kept := self.memory.features.get(hook.key)) is None:
            raise RuntimeError(f"{hook.name} did not run at this branch's last full step; compute one first.")
        if self.fresh:
            return self._attend(hook.name, kept, forward, args, kwargs)
        recalled = [value if value is None else take(value, self.rows(value.shape[1])) for value in kept[:1] + kept[2:]]
        if len(kept) > 1:
            recalled.insert(1, None if kept[1] is None else kept[1][:, : self.kept(kept[1].shape[1])])
        if hook.stack.fused is not None:
            return hook.stack.fused(mixer, forward, args, kwargs, recalled[0])
        return recalled[0] if len(recalled) == 1 else tuple(recalled)

    def idle(self, hook: Any, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kept = self.memory.features.get(hook.key, ())
        if self.whole or not kept:
            return forward(*args, **kwargs)
        return kept[0] if len(kept) == 1 else kept

    def _attend(self, name: str, kept: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Fresh attention, picture by picture where each has positions of its own."""
        rows = self.rows(kept[0].shape[-2])
        if not any(isinstance(value, fresh.PerPicture) for value in (*args, *kwargs.values())):
            with fresh.Attention(name, lambda given: fresh.refresh(given, kept, rows)):
                return forward(*args, **kwargs)

        def own(place: int, *args: Any, **kwargs: Any) -> Any:
            with fresh.Attention(name, lambda given: fresh.refresh(given, fresh.picture(kept, place, len(rows)), rows[place])):
                return forward(*args, **kwargs)

        return fresh.picture_by_picture(own, len(rows), args, kwargs)

    def head(self, output: torch.Tensor) -> torch.Tensor:
        if not self.finished:
            raise RuntimeError(f"The last block of {self.family.transformer} was skipped, and the tokens with it; let it run.")
        if self.forecast is None:
            raise ValueError(f"There are {self.count} weights for {len(self.memory.outputs)} outputs; give one to each.")
        found = output.flatten(1, -2)
        rows = self.rows(found.shape[1])
        return put(self.forecast, rows, take(found, rows)).view_as(output)


def _listed(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)
