"""What the user asks for: frozen, validated, and converted to plain dicts and back."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dit_accel import how, when
from dit_accel.how import MOST
from dit_accel.merge_config import TokenMergeConfig as TokenMergeConfig
from dit_accel.names import look_up
from dit_accel.options import Options, device_known, option, selector_known
from dit_accel.presets import PRESETS

CACHE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
SEED = "Random seed for the selection; the initial noise has its own."
AGE = (
    "lambda, how much a token's score grows for every N steps since it was last computed. Normalized scores are about "
    "1 / sqrt(tokens), so that 0.25 lets age decide nearly alone; to compare selectors, use 0."
)
SELECTOR = (
    "Score that chooses the tokens to compute: a name from `dit-accel selectors` or `dit_accel.selectors()`, or (in Python) a "
    "function `dit_accel.SelectionContext` -> scores."
)


@dataclass(frozen=True)
class TokenCacheConfig(Options):
    """Token-wise feature caching (ToCa: Zou et al., ICLR 2025, arXiv 2410.05317) and its relatives.

    *When* is everything computed: interval, interval_spread, warmup_steps; and how many tokens otherwise: cache_ratio,
    ratio_schedule, steps. *Which* tokens: selector, age_weight, spatial_bonus, spatial_tile, query_share, text_tokens,
    share_guidance_selection, seed. *How* the rest are filled in: fill, forecast_order, cache_dtype, cache_device.

    Raises:
        TypeError: for an option that does not exist, with the one that was probably meant.
        ValueError: for a value out of range or an unknown name, with what is valid.
    """

    interval: int = option(4, "One full step every N steps; 1 always computes everything.", 1)
    cache_ratio: float = option(
        0.9, "Share of the tokens taken from the cache on a partial step: 0 caches nothing; at 1, no token is computed.", 0, 1
    )
    selector: str | Callable[..., Any] = option("random", SELECTOR, known=selector_known)
    warmup_steps: int = option(1, "Number of full steps at the start, at least 1.", 1)
    interval_spread: float = option(
        0.0, "w, by which the interval shrinks along the run: round(N / (1 - w + 2 w s / S)) after full step s of S.", 0, 0.99
    )
    ratio_schedule: str | when.RatioSchedule = option(
        "constant",
        "How the share of computed tokens, 1 - cache ratio, varies with layer, stream and step: constant, toca, or (in Python) a "
        "function `dit_accel.Place` -> factor.",
        choices=when.RATIO_SCHEDULES,
    )
    steps: int | None = option(
        None,
        "Number of steps of a run, for schedules that depend on it; needed only where the transformer is called without the "
        "pipeline given to `apply`.",
        1,
        flag="",
    )
    age_weight: float = option(0.25, AGE, 0)
    spatial_bonus: float = option(0.0, "Multiply the score of the best token of every image tile by 1 + this.", 0)
    spatial_tile: int = option(4, "Side of a tile, in tokens.", 1)
    query_share: float = option(
        1 / 16, "Share of the queries that estimate which tokens receive attention, at least 256; 1 is exact.", 1e-6, 1
    )
    text_tokens: str = option(
        "select",
        "Text tokens on a partial step (FLUX): select treats them like image tokens, reuse selects among image tokens only. Text "
        "computed on a partial step never reaches the picture, so full is the same as reuse.",
        choices=("select", "reuse", "full"),
    )
    share_guidance_selection: bool = option(
        True, "Compute the same tokens in both halves of batched guidance, by their mean score."
    )
    seed: int = option(0, SEED, 0, flag="selection_seed")
    fill: str = option(
        "reuse",
        "How the other tokens get their features: reuse the cached ones, or forecast them by a Taylor expansion over past full "
        "steps (TaylorSeer: Liu et al., ICCV 2025, arXiv 2503.06923).",
        choices=("reuse", "forecast"),
    )
    forecast_order: int = option(1, "Order of the expansion, 0 to 3; each order keeps one more copy of the features.", 0, MOST)
    cache_dtype: str | None = option(
        None, "Cache dtype, such as float8_e4m3fn; by default the model's.", choices=(None, *CACHE_DTYPES)
    )
    cache_device: str | None = option(None, "Cache device, such as cpu; by default the model's.", known=device_known)
    published_as = ""  # not an option: the preset that it was made from

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TokenCacheConfig:
        """Published settings by name, with any of them changed: "toca-flux", "toca-pixart", "fora", "taylorseer".

        Raises:
            ValueError: for an unknown name, with those that are known.
        """
        config = cls.from_dict({**look_up("preset", name, PRESETS), **changes})
        object.__setattr__(config, "published_as", name)
        return config


@dataclass(frozen=True)
class OutputCacheConfig(Options):
    """A forecast of the transformer's output between full steps, for any transformer of diffusers.

    *When* is everything computed: full_steps, interval, warmup_steps, tolerance, when, guidance_steps, sampler_steps. *How* is the
    rest forecast, and what is added to full steps: how, space, order, guidance_order, damping, correct, lead. *Which* tokens:
    compute_ratio, selector, age_weight, attention, seed, and the options that begin with merged_.

    Raises:
        TypeError: for an option that does not exist, with the one that was probably meant.
        ValueError: for a value out of range or an unknown name, with what is valid.
    """

    full_steps: tuple[int, ...] | None = option(
        None,
        "Numbers of the full steps, counted from 0, which always is one; no step after the last one listed is full. Replaces the "
        "interval.",
        0,
    )
    interval: int = option(3, "One full step every N steps. With a tolerance, the longest interval allowed.", 1)
    warmup_steps: int = option(1, "Number of full steps at the start, at least 1.", 1)
    tolerance: float | None = option(
        None,
        "Relative error (RMS) allowed for a forecast. Every full step measures the error that its own forecast would have had; the "
        "next interval is the longest whose error, growing with the distance to the power of order + 1, stays below the "
        "tolerance. Reads one number from the device on every full step.",
        1e-12,
    )
    when: str | when.Rule | None = option(
        None,
        "A rule registered with `register_when`, or (in Python) a function `dit_accel.Progress` -> steps until the next full one.",
        known=when.get,
    )
    guidance_steps: tuple[int, ...] | int | None = option(
        None,
        "Full steps on which the unconditional branch of guidance is computed too: their numbers, or one number n for every n-th "
        "full step; by default all. On other steps it follows from the conditional branch and the remembered difference of the "
        "two.",
        0,
    )
    how: str | how.Weights = option(
        "polynomial",
        "Weights for past outputs: reuse, polynomial, taylor, hermite, or your own (`register_how`, or in Python a function).",
        known=how.get,
    )
    order: int | tuple[int, ...] = option(
        1,
        "Number of full steps before the last one that count: 0 repeats the last output, 1 extrapolates linearly. One number, or "
        "one for every interval, the last of which stays in effect.",
        0,
        MOST,
    )
    space: str = option(
        "output",
        "What is forecast: the output, over time; or, with data, the picture that it implies at its noise level, over the "
        "logarithm of signal over noise, as DPM-Solver++ does (Lu et al., arXiv 2211.01095).",
        choices=("output", "data"),
    )
    guidance_order: int = option(0, "The same as order, for the difference of the guidance branches.", 0, MOST)
    damping: float | tuple[float, ...] = option(
        1.0, "Weight of the forecast; the rest repeats the last output. One number, or one for every interval.", 0, 2
    )
    correct: float | tuple[float, ...] = option(
        0.0,
        "Share of the forecasts' error that the next full step makes up for: what steps before should have added to the picture "
        "is interpolated, and the difference added to its output, as by the corrector of UniPC (Zhao et al., arXiv 2302.04867). "
        "Exact with Euler's method for flow matching, elsewhere about. One number, or one for every interval.",
        0,
        2,
    )
    compute_ratio: float = option(0.0, "Share of the image tokens computed between full steps, the same in all layers.", 0, 1)
    selector: str | Callable[..., Any] = option("random", SELECTOR, known=selector_known)
    age_weight: float = option(0.0, AGE, 0)
    attention: str = option(
        "reuse",
        "Attention of the computed tokens: reuse that of the last full step; or fresh, computed against the keys and values of the "
        "last full step, with their own updated.",
        choices=("reuse", "fresh"),
    )
    seed: int = option(0, SEED, 0, flag="selection_seed")
    sampler_steps: int | tuple[float, ...] | None = option(
        None,
        "Steps of the run in place of those that the pipeline is asked for: how many; or where along its own they lie, as shares "
        "from 0, ascending and below 1. Full steps are some of these; with interval=1 all. Sets the pipeline's scheduler.",
        0,
    )
    merged_steps: tuple[int, ...] | int | None = option(
        None,
        "Full steps on which the transformer sees the picture at a fraction of its side: their numbers, or one number n for steps "
        "before the n-th. Costs likeness to the uncached picture, and less of the picture's quality: for 5x and more.",
        0,
    )
    merged_above: float | None = option(
        None, "Noise level, from 0 to 1, above which full steps see the picture at that fraction of its side, too.", 0, 1
    )
    merged_keep: float = option(
        0.0,
        "Share of the merged cells whose tokens stay whole (FLUX), chosen by the selector from what full steps before showed of "
        "the picture: after the first; by drift, which compares two, after the second.",
        0,
        1,
    )
    merged_side: int = option(2, "That fraction, as 1 over this.", 2, choices=(2, 4))
    lead: float | tuple[float, ...] = option(
        0.0,
        "Share of its distance to the output of the full step before that a full step's output is moved on, or if negative back: a "
        "free weight for the sampler's step, as solvers have that are fitted to a model (Shaul et al., arXiv 2403.01329). One "
        "number, or one for every full step.",
        -1,
        1,
    )

    @property
    def merging(self) -> bool:
        """Whether full steps may see the picture at a fraction of its side."""
        return bool(self.merged_steps) or self.merged_above is not None

    @property
    def merging_alone(self) -> OutputCacheConfig:
        """What of it is about merged steps, with everything computed on them and on all others."""
        return OutputCacheConfig(
            interval=1, merged_steps=self.merged_steps, merged_above=self.merged_above, merged_side=self.merged_side
        )

    @property
    def run_steps(self) -> int | None:
        """Steps of a run, if they are others than the pipeline is asked for."""
        return len(self.sampler_steps) if isinstance(self.sampler_steps, tuple) else self.sampler_steps

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("full_steps", "guidance_steps", "merged_steps"):
            if isinstance(value := getattr(self, name), tuple) and list(value) != sorted(set(value)):
                raise ValueError(f"{name} must be numbers of steps, counted from 0 and ascending, not {value!r}.")
        places = self.sampler_steps if isinstance(self.sampler_steps, tuple) else (0.0,)
        if self.sampler_steps == 0 or places[0] != 0 or list(places) != sorted(set(places)) or places[-1] >= 1:
            raise ValueError(
                "sampler_steps must be a whole number of at least 1; or shares of the run, from 0, ascending and below 1, not "
                f"{self.sampler_steps!r}."
            )
        if self.guidance_steps == 0:
            raise ValueError("guidance_steps must be a whole number of at least 1, not 0; or numbers of steps.")
        if sum(value is not None for value in (self.full_steps, self.tolerance, self.when)) > 1:
            raise ValueError("full_steps, tolerance and when each say when a step is full; give one of them.")
        alike = any((*each(self.correct), *each(self.lead), self.space == "data", self.merged_keep))
        if self.compute_ratio and alike:
            raise ValueError("correct, lead, space='data' and merged_keep are about all tokens alike; leave compute_ratio at 0.")
        if (self.space, self.how) == ("data", "logit"):
            raise ValueError("space='data' takes the logarithm of signal over noise for the time already; leave how='logit' out.")


def load_config(path: str | os.PathLike[str]) -> Options:
    """The configuration that its method `save` wrote to a file, of whichever class; raises what `load` raises."""
    return Options.load(path)


def each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
