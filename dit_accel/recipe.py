"""Recipes: settings that were searched for one model at one speed, with what was measured of them.

A file of recipes is data (JSON): those that ship lie in recipes/; one's own, written by `dit-accel tune`, in the folder that the
environment variable DIT_ACCEL_RECIPES names (~/.cache/dit-accel/recipes by default), and they come first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.config import OutputCacheConfig, each
from dit_accel.how import unit

SHIPPED = Path(__file__).parent / "recipes"
NEAR = 0.01  # noise levels that differ by less are the same
# Without a recipe: how large a forecast's error may be, by the speed-up by FLOPs that it brought on the embedded models, geometric
# mean of both (benchmarks/starting.py tolerances); with the last one they come to 3.2 and 3.7x.
TOLERANCES = {1.0: 1e-12, 1.5: 0.054, 2.0: 0.104, 3.0: 0.49, 4.0: 0.8, 6.0: 0.8}


@dataclass(frozen=True)
class Recipe:
    """Settings for one model at one speed.

    Attributes:
        model: what it was made for.
        transformer: class of the transformer, and values of its configuration, that a model has to have for it.
        speedup: how many times sooner denoising ends, at least.
        levels: noise levels of all steps, from 1, which is noise, down.
        config: what to do on these steps.
        measured: speed-up by `flops` and by `seconds`; `psnr`, `ssim` and `score` as mean, lower and upper end of a 95 %
            interval; on what, when and where. None if nothing was.
    """

    model: str
    transformer: Mapping[str, Any]
    speedup: float
    levels: tuple[float, ...]
    config: OutputCacheConfig
    measured: Mapping[str, Any] | None = None

    @property
    def psnr(self) -> tuple[float, float, float]:
        """Mean, lower and upper end of the interval, in dB; minus infinity where nothing was measured."""
        mean, low, high = (self.measured or {}).get("psnr", [-np.inf] * 3)
        return mean, low, high

    def fits(self, transformer: Any) -> bool:
        """Whether it was made for a transformer like this one."""
        given = {"class": type(transformer).__name__, **getattr(transformer, "config", {})}
        return all(given.get(name) == value for name, value in self.transformer.items())

    def of(self, steps: int) -> OutputCacheConfig:
        """The settings for so many steps of the same scheduler."""
        if (own := self.config.sampler_steps) is not None:
            return self.config if steps == len(self.levels) else self._with_steps(own, steps)
        places = np.arange(steps) / steps, np.arange(len(self.levels) + 1) / len(self.levels)
        return self.at([float(level) for level in np.interp(*places, [*self.levels, 0.0])])

    def at(self, times: Sequence[float]) -> OutputCacheConfig:
        """The settings for a run of other steps, given by the times that the transformer is told.

        As large a share of them is full, at noise levels that are spread as the recipe's.
        """
        levels = levels_of(times)
        if not levels or (len(levels) == len(self.levels) and np.allclose(levels, self.levels, atol=NEAR)):
            return self.config
        return self._spread(self.levels, levels)

    def _with_steps(self, own: int | tuple[float, ...], steps: int) -> OutputCacheConfig:
        """The settings for a pipeline that is asked for so many steps, as large a share of which the run has."""
        shares = tuple(i / own for i in range(own)) if isinstance(own, int) else own
        count = max(1, round(len(shares) * steps / len(self.levels)))
        places = np.interp(np.arange(count) / count, np.linspace(0, 1, len(shares) + 1), [*shares, 1.0])
        some, others = ([1 - i / n for i in range(n)] for n in (len(shares), count))
        return replace(self._spread(some, others), sampler_steps=count if isinstance(own, int) else tuple(map(float, places)))

    def _spread(self, own: Sequence[float], levels: Sequence[float]) -> OutputCacheConfig:
        """The settings for steps of other noise levels than its own."""
        config, old = self.config, self.config.full_steps or (0,)
        count = min(max(1, round(len(old) * len(levels) / len(own))), len(levels))
        shares = np.arange(count) / count
        wanted = np.interp(shares, np.linspace(0, 1, len(old) + 1), [*(own[step] for step in old), 0.0])
        steps = [0]
        for i, level in enumerate(wanted[1:], start=1):
            nearest = int(np.abs(np.array(levels) - level).argmin())
            steps.append(min(max(nearest, steps[-1] + 1), len(levels) - count + i))
        before = [int(share * len(old)) for share in shares]  # the recipe's full step that each takes the place of
        order, damping, correct, lead = (
            tuple(each(values)[min(i, len(each(values)) - 1)] for i in before)
            for values in (config.order, config.damping, config.correct, config.lead)
        )

        def those(chosen: Any) -> Any:
            """Of the full steps those that take the place of chosen ones."""
            return tuple(s for s, i in zip(steps, before, strict=True) if old[i] in chosen) if isinstance(chosen, tuple) else chosen

        weights: dict[str, Any] = {"order": order, "damping": damping, "correct": correct, "lead": lead}
        return replace(
            config,
            full_steps=tuple(steps),
            guidance_steps=those(config.guidance_steps),
            merged_steps=those(config.merged_steps),
            **weights,
        )

    def __str__(self) -> str:
        made = f"recipe of {self.model} for {self.speedup:g}x"
        if self.measured is None:
            return f"{made}, not measured on this model: see `dit-accel tune`"
        mean, low, high = self.psnr
        return f"{made}: {self.measured['seconds']:.2f}x measured, PSNR {mean:.1f} dB ({low:.1f} to {high:.1f})"


def levels_of(times: Sequence[float]) -> tuple[float, ...]:
    """Noise levels, from 1 down, of the times that a transformer is told: these, thousand times these, or 1 less these."""
    most = unit(times)
    rising = len(times) > 1 and times[0] < times[-1]
    return tuple(1 - time / most if rising else time / most for time in times)


def read(path: str | os.PathLike[str]) -> tuple[Recipe, ...]:
    """The recipes of a file.

    Raises:
        ValueError: if it holds none.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return tuple(
            Recipe(
                content["model"],
                content["transformer"],
                one["speedup"],
                tuple(content["levels"]),
                OutputCacheConfig.from_dict(one["config"]),
                {**content["measured"], **one["measured"]} if one.get("measured") else None,
            )
            for one in content["recipes"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} holds no recipes ({error!r}); `dit-accel tune` writes such files.") from error


def own_folder() -> Path:
    """Where one's own recipes lie."""
    return Path(os.environ.get("DIT_ACCEL_RECIPES") or Path.home() / ".cache/dit-accel/recipes")


def recipes(model: Any) -> tuple[Recipe, ...]:
    """The recipes that were made for a model like this one, the slowest first. One's own stand in for those that ship.

    Args:
        model: a pipeline of diffusers or its transformer.

    Raises:
        TypeError: for a model that is not supported.
        ValueError: for a file that holds no recipes.
    """
    from dit_accel.apply import transformers_of

    (transformer, *_) = transformers_of(model)
    for folder in (own_folder(), SHIPPED):
        found = [one for path in sorted(folder.glob("*.json")) for one in read(path) if one.fits(transformer)]
        if found:
            return tuple(sorted(found, key=lambda one: one.speedup))
    return ()


def choose(model: Any, speedup: float | None, min_psnr: float | None) -> Recipe | OutputCacheConfig:
    """The closest recipe that is at least so fast; or the fastest one that is, at the lower end of its interval, so close.

    Raises:
        ValueError: if there is none, with what there is.
    """
    found = recipes(model)
    if min_psnr is not None:
        if close := [one for one in found if one.psnr[1] >= min_psnr]:
            return close[-1]
        best = f"the closest one has {max(one.psnr[1] for one in found):.1f}" if found else "there is none at all"
        raise ValueError(f"No recipe has a PSNR of at least {min_psnr:g} dB on this model: {best}. See `dit-accel tune`.")
    assert speedup is not None
    if not 1 <= speedup <= (most := max([one.speedup for one in found] or [*TOLERANCES])):
        raise ValueError(f"speedup must lie between 1 and {most:g} for this model, not {speedup:g}. See `dit-accel tune`.")
    if enough := [one for one in found if one.speedup >= speedup]:
        return max(enough, key=lambda one: (one.psnr[0], -one.speedup))
    tolerance = float(np.interp(speedup, [*TOLERANCES], [*TOLERANCES.values()]))
    return OutputCacheConfig(interval=longest_interval(speedup), tolerance=tolerance)


def longest_interval(speedup: float) -> int:
    """Without a recipe: the longest interval of steps allowed."""
    return round(2 * speedup)
