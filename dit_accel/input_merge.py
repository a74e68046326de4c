"""Full steps on fewer tokens: the transformer sees means over cells of the picture, which are a sample of a smaller one.

At a step, latents are alpha * picture + sigma * noise. Their mean over a cell of f x f has as much of the mean picture and an f-th
of the noise; scaled, it is what the transformer expects of a picture of an f-th of the side at a lower noise level. The picture
that it predicts there, enlarged, and the latents make up the output for the scheduler, whose latents stay whole: low resolution
first, as in MrFlow (arXiv 2607.01642), with the stock pipeline. Where positions come as numbers (FLUX), cells that need detail
early may keep their tokens: the sequence then has whole and merged tokens, and all are told the step's own time.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from dit_accel import spaces, store, which
from dit_accel.clock import ARGUMENTS, Moment
from dit_accel.config import OutputCacheConfig
from dit_accel.families.rows import Family
from dit_accel.packed import Packed
from dit_accel.plan import Todo
from dit_accel.steps import Memory
from dit_accel.tokens import refuse_unobserved

PACKED = ("FluxTransformer2DModel",)  # latents in rows of 2 x 2 places, with ids of the rows' places
UNKNOWN = ((0.5, 0.5),), "flow_prediction"  # levels, where only work is counted


@dataclass(frozen=True)
class InputMerge:
    """What one call sees of the picture.

    Attributes:
        moment: where it lies, with the levels of its steps.
        side: of a cell, in latents.
        grid: rows and columns of tokens.
        packed: whether latents are rows of 2 x 2 places.
        names: of the transformer's arguments, in order.
        cells: numbers of the cells whose tokens stay whole, and of the others; None: none stays.
    """

    moment: Moment
    side: int
    grid: tuple[int, int]
    packed: bool
    names: tuple[str, ...] = ()
    cells: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def levels(self) -> tuple[float, float]:
        return (self.moment.levels or UNKNOWN[0])[self.moment.step if self.moment.levels else 0]

    @property
    def smaller(self) -> tuple[float, float]:
        """alpha and sigma of the small picture."""
        alpha, sigma = self.levels[0], self.levels[1] / self.side
        scale = alpha + sigma if self.flow else math.hypot(alpha, sigma)
        return alpha / scale, sigma / scale

    @property
    def flow(self) -> bool:
        return (self.moment.predicts or UNKNOWN[1]) in ("flow_prediction", "reversed")

    @property
    def time(self) -> float:
        """As the transformer is told that of the small picture."""
        moment, sigma = self.moment, self.smaller[1]
        if not moment.levels:
            return moment.time
        if self.flow:
            own = 1000 * moment.levels[moment.step][1]
            told = min(ARGUMENTS, key=lambda argument: abs(argument(own) - moment.time))
            return told(1000 * sigma)
        ratios = [math.log(alpha / sigma) for alpha, sigma in moment.levels]
        return float(np.interp(math.log(self.smaller[0] / sigma), ratios, moment.times))

    def shrink(self, nest: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the call for the small picture; ValueError for those that it cannot have."""
        kwargs = {**dict(zip(self.names, nest[0], strict=False)), **nest[1]}
        if given := [name for name, value in kwargs.items() if name.startswith("controlnet") and value is not None]:
            raise ValueError(f"{given[0]} belongs to all tokens, and a step of merged_steps has fewer: leave one of them out.")
        (name, latents), *_ = ((n, kwargs[n]) for n in ("hidden_states", "x") if n in kwargs)
        changed: dict[str, Any] = {name: self.scale * self.pooled(latents)}
        if self.cells is not None:
            whole, rest = self.rows_of(self.cells[0]), self.rows_of(self.cells[1])
            ids = kwargs["img_ids"]
            means = ids[..., rest, :].unflatten(-2, (-1, self.side**2)).mean(-2)
            changed = {
                name: torch.cat([latents[:, whole], changed[name][:, self.cells[1]]], 1),
                "img_ids": torch.cat([ids[..., whole, :], means], -2),
            }
            return (), {**kwargs, **changed}
        for told in ("timestep", "t"):
            if isinstance(old := kwargs.get(told), torch.Tensor):
                if old.ndim > 1:
                    raise ValueError("Every token has a time of its own here, which merged_steps cannot give it: leave it out.")
                changed[told] = torch.full_like(old, self.time, dtype=old.dtype if old.is_floating_point() else torch.float32)
        if self.packed:
            ids, (height, width) = kwargs["img_ids"], self.grid
            places = ids.unflatten(-2, (height, width))[..., : height // self.side, : width // self.side, :]
            changed["img_ids"] = places.flatten(-3, -2)
        return (), {**kwargs, **changed}

    @property
    def scale(self) -> float:
        return self.smaller[0] / self.levels[0]

    def enlarge(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The output that the scheduler gets of what came out for the small picture."""
        predicts = spaces.IMPLIED[self.moment.predicts or UNKNOWN[1]]
        latents = latents[-len(output) :]
        if self.cells is not None:
            count = len(self.cells[0]) * self.side**2
            pooled = self.pooled(latents)
            rest = spaces.implied(output[:, count:], self.scale * pooled[:, self.cells[1]], predicts(*self.smaller))
            small = torch.zeros_like(pooled, dtype=rest.dtype).index_copy(1, self.cells[1], rest)
            made = spaces.output_of(self.spread(small), latents, predicts(*self.levels))
            return made.index_copy(1, self.rows_of(self.cells[0]), output[:, :count].to(made.dtype))
        small = spaces.implied(output, self.scale * self.pooled(latents), predicts(*self.smaller))
        return spaces.output_of(self.spread(small), latents, predicts(*self.levels))

    def pooled(self, latents: torch.Tensor) -> torch.Tensor:
        picture = self._places(latents, self.grid)
        return self._rows(F.avg_pool2d(picture.flatten(1, -3), self.side).unflatten(1, picture.shape[1:-2]))

    def keeping(self, count: int, config: OutputCacheConfig, known: Known, latents: Any) -> InputMerge:
        """With so many cells whole, by what is known of the picture."""
        return replace(self, cells=cells_to_keep(config, known, latents, self.grid, count, self.moment.step)) if count else self

    def by_token(self, seen: torch.Tensor) -> torch.Tensor:
        """Of numbers for the tokens of this call, [B, S], one for every token of the picture, [B, N]: as of its cell's."""
        whole, merged = self.cells or (None, torch.arange(seen.shape[1], device=seen.device))
        rows = [self.rows_of(cells) for cells in (whole, merged) if cells is not None]
        count = seen.shape[1] - len(merged)
        values = torch.cat([seen[:, :count], seen[:, count:].repeat_interleave(self.side**2, 1)], 1)
        return torch.empty_like(values).index_copy(1, torch.cat(rows), values)

    def rows_of(self, cells: torch.Tensor) -> torch.Tensor:
        """Numbers of the tokens of cells, cell by cell."""
        width, inside = self.grid[1] // self.side, torch.arange(self.side, device=cells.device)
        down, across = (cells // width)[:, None, None] * self.side, (cells % width)[:, None, None] * self.side
        return ((down + inside[:, None]) * self.grid[1] + across + inside).flatten()

    def spread(self, picture: torch.Tensor) -> torch.Tensor:
        """Every place of a small picture as a cell of the large one."""
        height, width = self.grid
        places = self._places(picture, (height // self.side, width // self.side))
        return self._rows(places.repeat_interleave(self.side, -2).repeat_interleave(self.side, -1))

    def _places(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[B, C, ..., H, W] of latents in whichever layout."""
        if not self.packed:
            return latents
        parts: torch.Tensor = latents.unflatten(1, grid).unflatten(-1, (-1, 2, 2))  # [B, h, w, C, 2, 2]
        return torch.flatten(parts.permute(0, 3, 1, 4, 2, 5).flatten(4, 5), 2, 3)

    def _rows(self, places: torch.Tensor) -> torch.Tensor:
        """The inverse of `_places`."""
        if not self.packed:
            return places
        parts: torch.Tensor = places.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, h, 2, w, 2]
        return torch.flatten(parts.permute(0, 2, 4, 1, 3, 5).flatten(3, 5), 1, 2)


@dataclass
class Known:
    """What full steps of a guidance branch showed of the picture, for the selector of the cells that stay whole.

    Attributes:
        pictures: that the last two of them implied, newest first; times: theirs.
        memory: what of their attention is observed, token by token.
    """

    pictures: list[list[Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    def enough(self, config: OutputCacheConfig) -> bool:
        """Whether cells can be chosen: to tell what changed takes two pictures."""
        return len(self.pictures) > ("last_tokens" in which.get(config.selector).needs)

    def remember(self, moment: Moment, merge: InputMerge | None, output: torch.Tensor, latents: torch.Tensor) -> None:
        """A full step, merged or not, whose output for the scheduler this is."""
        picture = spaces.implied(output, latents, spaces.IMPLIED[moment.predicts](*moment.levels[moment.step]))
        store.push(self.pictures, self.times, moment.time, [picture], 1)
        if merge is not None:
            self.memory.observed = {name: merge.by_token(seen) for name, seen in self.memory.observed.items()}


def cells_to_keep(
    config: OutputCacheConfig, known: Known, latents: torch.Tensor, grid: tuple[int, int], count: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of so many cells whose tokens score highest on average, in all of the batch, and of the others; both ascending.

    The last picture takes the place of a layer's tokens, and the one before of those when they were last computed.

    Args:
        latents: [B, N, C], in place of pictures for a copy that counts FLOPs, which knows none.
        grid: rows and columns of the tokens.
    """
    side, (height, width), selector = config.merged_side, grid, which.get(config.selector)
    noise = torch.rand(1, height * width, generator=torch.Generator().manual_seed(100_003 * config.seed + step))
    ages = torch.zeros(1, height * width, device=latents.device)
    where = SimpleNamespace(layer=0, stream="image", step=step)
    tokens, last = [*(picture for (picture,) in known.pictures), latents, latents][:2]
    observed = dict.fromkeys(selector.needs, ages) | known.memory.observed
    if "last_tokens" in selector.needs:
        observed["last_tokens"] = last
    context = which.SelectionContext(tokens, ages, store.sent(noise, tokens.device), count * side**2, grid, 0, where, observed)
    scores = which.scored(selector, config.selector, context, len(tokens)).float().mean(0)
    order = F.avg_pool2d(scores.view(1, height, width), side).flatten().argsort(descending=True)
    return order[:count].sort().values, order[count:].sort().values


def observer(config: OutputCacheConfig, transformer: Any, family: Family | None) -> Packed | None:
    """What looks at attention for the selector of cells, if that needs it.

    Raises:
        TypeError, ValueError: if this transformer cannot have whole tokens beside merged ones, or not by this selector.
    """
    if not config.merged_keep:
        return None
    name = type(transformer).__name__
    if name not in PACKED or family is None:
        raise TypeError(f"The positions of {name} do not allow merged tokens beside whole ones: leave merged_keep out.")
    needs = refuse_unobserved(config.selector, "of cells")
    return Packed(transformer, family, needs=needs) if needs else None


def prepare(run: Any, transformer: Any, latents: Any, grid: tuple[int, int, int], side: int) -> None:
    """Note at the start of a run how its latents come and how many tokens a merged step leaves out.

    Args:
        run: an `engine.Run`.
        grid: frames, rows and columns of tokens.

    Raises:
        ValueError: if this transformer's latents cannot be merged.
    """
    name, (frames, height, width) = type(transformer).__name__, grid
    packed = name in PACKED
    sides = latents.shape[-2:] if isinstance(latents, torch.Tensor) and latents.ndim > 3 else (1, 0)
    if not packed and (sides[0] % height or sides[0] * width != sides[1] * height):
        raise ValueError(f"The latents of {name} do not come as a picture, so merged_steps cannot merge their cells; leave it out.")
    if height % side or width % side:
        raise ValueError(
            f"merged_steps merges cells of {side} x {side} tokens, which do not divide {height} x {width}; choose another size."
        )
    run.packed, run.merged = packed, frames * height * width * (side**2 - 1) // side**2


def known(moment: Moment, asking: str) -> Moment:
    """The moment, if its noise levels are known; ValueError otherwise, with the option that asks for them."""
    if not moment.levels or moment.predicts not in spaces.IMPLIED:
        raise ValueError(
            f"{asking} needs a scheduler that tells the noise of every step; call the pipeline that dit_accel.apply was given, or "
            "leave it out."
        )
    signs = [moment.times[-1] - moment.times[0], moment.levels[-1][1] - moment.levels[0][1]]
    turned = moment.predicts == "flow_prediction" and signs[0] * signs[1] < 0  # Z-Image, Lumina 2
    return replace(moment, predicts="reversed" if turned else moment.predicts)


def of(config: OutputCacheConfig, transformer: Any, run: Any, moment: Moment) -> InputMerge:
    """What a merged step of this run sees."""
    names = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
    return InputMerge(moment, config.merged_side, run.grid, run.packed, names)


def todo(merge: InputMerge, latents: torch.Tensor) -> Todo:
    """How a call is answered of which nothing is remembered."""

    def then(output: Any) -> Any:
        leaves, spec = tree_flatten(output)
        return tree_unflatten([merge.enlarge(leaves[0], latents), *leaves[1:]], spec)

    return Todo(change=torch.compiler.disable(merge.shrink), then=then)
