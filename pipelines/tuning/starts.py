"""Where a search starts: full steps evenly spaced, dense at the start or at both ends, and on the shortest path along a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dit_accel.recipe import levels_of


def trajectory(pipe: Any, run: Callable[[], Any]) -> tuple[list[np.ndarray], list[float]]:
    """What a pipeline's transformer returns on every step of an uncached run, and the noise levels of the steps."""
    outputs: dict[int, list[np.ndarray]] = {}

    def keep(module: Any, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output.sample
        outputs.setdefault(pipe.scheduler.step_index or 0, []).append(first.float().cpu().numpy().ravel())

    handle = pipe.transformer.register_forward_hook(keep)
    try:
        run()
    finally:
        handle.remove()
    levels = levels_of(pipe.scheduler.timesteps.tolist())
    return [np.concatenate(outputs[step]) for step in sorted(outputs)], [*levels[: len(outputs)], 0.0]


def shortest_path(outputs: list[np.ndarray], levels: list[float], count: int) -> tuple[int, ...]:
    """The full steps between which a line through the outputs of both ends is least off, as MeanCache (arXiv 2601.19961) and
    DPCache (arXiv 2602.22654) choose them by what a repeated output costs; after the last one its output is repeated."""
    steps = len(outputs)
    off = np.full((steps, steps + 1), np.inf)
    for i in range(steps):
        for j in range(i + 1, steps + 1):
            total = 0.0
            for k in range(i + 1, j):
                share = (levels[i] - levels[k]) / (levels[i] - levels[j]) if j < steps else 0.0
                line = outputs[i] + share * (outputs[j] - outputs[i]) if j < steps else outputs[i]
                total = total + (levels[k] - levels[k + 1]) * (outputs[k] - line)
            off[i, j] = float(np.linalg.norm(total)) if j > i + 1 else 0.0
    best, back = np.full((count + 1, steps + 1), np.inf), np.zeros((count + 1, steps + 1), int)
    best[0, 0] = 0.0
    for n in range(1, count + 1):
        through = best[n - 1, :steps, None] + off
        best[n], back[n] = through.min(0), through.argmin(0)
    path, at = [], steps
    for n in range(count, 0, -1):
        at = int(back[n, at])
        path.append(at)
    return tuple(reversed(path))


def spaced(steps: int, count: int, shape: Callable[[float], float]) -> tuple[int, ...]:
    """`count` of the steps, at these shares of the run, each later than the one before."""
    chosen: list[int] = []
    for i in range(count):
        wanted = round(steps * shape(i / count))
        chosen.append(min(max(wanted, chosen[-1] + 1 if chosen else 0), steps - count + i))
    return tuple(chosen)


def schedules(steps: int, count: int, outputs: list[np.ndarray], levels: list[float]) -> Iterator[tuple[int, ...]]:
    """Where a search starts: evenly spaced, dense at the start, dense at both ends, and the shortest path."""
    yield spaced(steps, count, lambda share: share)
    for power in (1.5, 2.0, 2.5):
        yield spaced(steps, count, lambda share, power=power: share**power)
    for power in (1.5, 2.0):
        yield spaced(steps, count, lambda share, power=power: share**power / (share**power + (1 - share) ** power))
    yield shortest_path(outputs, levels, count)
