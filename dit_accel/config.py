"""What the user asks for: frozen, validated, and round-tripped through plain dicts."""

from __future__ import annotations

import dataclasses
import numbers
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dit_accel import how, when, which

TEXT_TOKENS = ("select", "reuse", "full")
FILLS = ("reuse", "forecast")
CACHE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")

# FORA: arXiv 2407.01425. ToCa: arXiv 2410.05317 and the settings of its released FLUX and PixArt-alpha code.
# TaylorSeer: arXiv 2503.06923; 10 full steps of 50 give its 4.99 times fewer FLOPs on FLUX.1-dev.
PRESETS: dict[str, dict[str, Any]] = {
    "toca-flux": dict(interval=4, cache_ratio=0.9, selector="attention", warmup_steps=3, ratio_schedule="toca"),
    "toca-pixart": dict(
        interval=3,
        interval_spread=0.2,
        cache_ratio=0.7,
        selector="cross-entropy",
        ratio_schedule="toca",
        spatial_bonus=0.4,
        spatial_tile=4,
    ),
    "fora": dict(interval=3, cache_ratio=1.0),
    "taylorseer": dict(interval=6, cache_ratio=1.0, warmup_steps=3, fill="forecast", forecast_order=2),
}

Config = TypeVar("Config", bound="_Options")


@dataclass(frozen=True)
class _Options:
    def to_dict(self) -> dict[str, Any]:
        """All options by name; a function given as an option stays one."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`; an unknown key raises ValueError."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"{cls.__name__} has no option {', '.join(unknown)}; its options are {', '.join(known)}.")
        return cls(**values)

    def _whole(self, name: str, least: int) -> None:
        if not _is_whole(value := getattr(self, name), least):
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        self._set(name, int(value))

    def _numbers(self, *names: str) -> None:
        for name in names:
            if not _is_number(value := getattr(self, name)):
                raise ValueError(f"{name} must be a number, not {value!r}.")
            if not isinstance(value, (int, float)):  # of numpy
                self._set(name, float(value))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _switches(self, *names: str) -> None:
        for name in names:
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {value!r}.")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class TokenCacheConfig(_Options):
    """Token-wise feature caching (ToCa: Zou et al., ICLR 2025, arXiv 2410.05317) and its relatives.

    When:
        interval: N, a full step every N steps; 1 computes everything always.
        interval_spread: w, lets the interval shrink along the run: round(N / (1 - w + 2 w s / S)) after a full step s of S.
        warmup_steps: full steps at the start, at least 1.
        cache_ratio: share of the tokens taken from the cache on a partial step, 0 to 1. At 0 nothing is cached; at 1 no
            token is computed.
        ratio_schedule: how the share of computed tokens, 1 - cache_ratio, varies with layer, stream and step: "constant",
            "toca", or a function `dit_accel.Place` -> factor.
        steps: number of steps of a run, for schedules that depend on it; only needed where the transformer is used without
            the pipeline that `apply` was given.

    Which:
        selector: name of the score that chooses the tokens to compute; see `dit_accel.selectors()`.
        age_weight: lambda, how much a token's score grows for every N steps since it was last computed. Normalised scores are
            about 1 / sqrt(tokens), so that 0.25 lets age decide nearly alone; to compare selectors, use 0.
        spatial_bonus: the best token of every tile of the image has its score multiplied by 1 + this.
        spatial_tile: side of a tile, in tokens.
        query_share: share of the queries that are asked which tokens receive attention, never fewer than 256; 1 is exact.
        text_tokens: text tokens on a partial step (FLUX): "select" like image tokens, "reuse" all, or compute them in "full".
        share_guidance_selection: whether both halves of batched guidance compute the same tokens, by their mean score.
        seed: seed of the selection's own random numbers; it does not touch the picture's noise.

    How:
        fill: "reuse" the cached feature, or "forecast" it by a Taylor expansion over the past full steps
            (TaylorSeer: Liu et al., ICCV 2025, arXiv 2503.06923).
        forecast_order: order of the expansion, 0 to 3; every order keeps one more copy of the features.
        cache_dtype: narrower type to keep features in, "float8_e4m3fn" for example; None is the model's own.
        cache_device: where features are kept, "cpu" for example; None is the model's own.

    Raises:
        ValueError: for a value out of range or an unknown name, with the values that would do.
    """

    interval: int = 4
    cache_ratio: float = 0.9
    selector: str = "random"
    warmup_steps: int = 1
    interval_spread: float = 0.0
    ratio_schedule: str | when.RatioSchedule = "constant"
    steps: int | None = None
    age_weight: float = 0.25
    spatial_bonus: float = 0.0
    spatial_tile: int = 4
    query_share: float = 1 / 16
    text_tokens: str = "select"
    share_guidance_selection: bool = True
    seed: int = 0
    fill: str = "reuse"
    forecast_order: int = 1
    cache_dtype: str | None = None
    cache_device: str | None = None

    def __post_init__(self) -> None:
        whole = [("interval", 1), ("warmup_steps", 1), ("spatial_tile", 1), ("forecast_order", 0), ("seed", 0)]
        for name, least in (*whole, *([("steps", 1)] if self.steps is not None else [])):
            self._whole(name, least)
        self._numbers("cache_ratio", "interval_spread", "query_share", "age_weight", "spatial_bonus")
        self._switches("share_guidance_selection")
        if self.forecast_order > 3:
            raise ValueError(f"forecast_order is 0 to 3, not {self.forecast_order!r}.")
        if not 0 <= self.cache_ratio <= 1:
            raise ValueError(f"cache_ratio is the share of tokens taken from the cache, between 0 and 1, not {self.cache_ratio!r}.")
        if not 0 <= self.interval_spread < 1:
            raise ValueError(f"interval_spread must be at least 0 and less than 1, not {self.interval_spread!r}.")
        if not 0 < self.query_share <= 1:
            raise ValueError(f"query_share must be more than 0 and at most 1, not {self.query_share!r}.")
        for name in ("age_weight", "spatial_bonus"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0, not {getattr(self, name)!r}.")
        choices = [("text_tokens", TEXT_TOKENS), ("fill", FILLS), ("cache_dtype", (None, *CACHE_DTYPES))]
        if not callable(self.ratio_schedule):
            choices.append(("ratio_schedule", tuple(when.RATIO_SCHEDULES)))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {getattr(self, name)!r}.")
        if self.cache_device is not None:
            try:
                torch.device(self.cache_device)
            except RuntimeError as error:
                raise ValueError(f"cache_device must name a device of torch, not {self.cache_device!r}.") from error
        which.get(self.selector)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TokenCacheConfig:
        """Published settings by name, with any of them changed: "toca-flux", "toca-pixart", "fora", "taylorseer".

        Raises:
            ValueError: for a name that is not known, with those that are.
        """
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; there are {', '.join(PRESETS)}.")
        return cls.from_dict({**PRESETS[name], **changes})


@dataclass(frozen=True)
class TokenMergeConfig(_Options):
    """Token merging (ToMe-SD: Bolya and Hoffman, CVPRW 2023, arXiv 2303.17604) of image tokens.

    When:
        warmup_steps: steps at the start on which nothing is merged.
        rematch_every: steps, and layers, that share one matching; one number means both.

    Which:
        ratio: share of the image tokens that are merged into others, at most 1 - 1 / (sx sy). At 0 nothing is merged.
        stride: (sx, sy), width and height in tokens of the cells of which one token each is merged into.
        randomize: whether that is a random token of the cell, or its top-left one.
        seed: seed of its own random numbers; it does not touch the picture's noise.

    How:
        merge_attention: whether self-attention (the joint attention of FLUX) works on merged tokens.
        merge_cross_attention: whether cross-attention to the text does (PixArt).
        merge_mlp: whether the feed-forward does; in a single block of FLUX, with the output projection.
        keep_queries: merge keys and values only, so that every token keeps its own query: half of the saving in attention's
            projections, all of it in the products.
        proportional_attention: add the logarithm of a merged token's size to its attention scores, so that it weighs as much
            as its tokens together. Needs an attention mask, which flash and sage attention do not take.

    Raises:
        ValueError: for a value out of range, with the values that would do.
    """

    ratio: float = 0.5
    stride: tuple[int, int] = (2, 2)
    randomize: bool = True
    merge_attention: bool = True
    merge_cross_attention: bool = False
    merge_mlp: bool = False
    rematch_every: int | tuple[int, int] = (2, 1)
    warmup_steps: int = 0
    keep_queries: bool = False
    proportional_attention: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("stride", self.stride), ("rematch_every", self.rematching)):
            if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(_is_whole(part, 1) for part in value):
                raise ValueError(f"{name} must be two whole numbers of at least 1, not {value!r}.")
            if isinstance(getattr(self, name), list):  # of JSON
                self._set(name, tuple(value))
        self._whole("warmup_steps", 0)
        self._whole("seed", 0)
        self._numbers("ratio")
        self._switches(
            "randomize", "merge_attention", "merge_cross_attention", "merge_mlp", "keep_queries", "proportional_attention"
        )
        most = 1 - 1 / (self.stride[0] * self.stride[1])
        if not 0 <= self.ratio <= most:
            raise ValueError(
                f"ratio is the share of image tokens merged into others, with a stride of {self.stride} between 0 and {most:g}, "
                f"not {self.ratio!r}; a larger stride allows more."
            )
        if not (self.merge_attention or self.merge_cross_attention or self.merge_mlp):
            raise ValueError("Nothing would be merged; leave at least one of merge_attention, merge_cross_attention, merge_mlp on.")
        if not self.merge_attention and (self.keep_queries or self.proportional_attention):
            raise ValueError("keep_queries and proportional_attention are about merged attention; leave merge_attention on.")

    @property
    def rematching(self) -> tuple[int, int]:
        """Steps, and layers, that share one matching."""
        every = self.rematch_every
        return every if isinstance(every, (tuple, list)) else (every, every)


@dataclass(frozen=True)
class OutputCacheConfig(_Options):
    """A forecast of the transformer's output between full steps, for any transformer of diffusers.

    When:
        full_steps: numbers of the steps that are computed in full, from 0, which always is one. It takes the place of interval.
        interval: N, a full step every N steps. With a tolerance, the longest interval allowed.
        warmup_steps: full steps at the start, at least 1.
        tolerance: relative error (RMS) that a forecast may have. Every full step knows how far off its own forecast would have
            been; the next interval is the longest whose error, growing with the distance to the power of order + 1, stays below
            the tolerance. Reads one number from the device on every full step.
        when: a rule registered with `register_when`, or a function `dit_accel.Progress` -> steps until the next full one.
        guidance_steps: of the full steps, those on which the unconditional branch of guidance is computed too: their numbers,
            or one number n for every n-th full step. On the others it follows from the conditional branch and what the
            difference of the two was. None: on all.

    How:
        how: "polynomial", "taylor", "hermite" or one's own (`register_how`): weights for the outputs of past full steps.
        order: how many full steps before the last one count: 0 repeats the last output, 1 continues a line. One number, or one
            for every interval; the last one goes on.
        guidance_order: the same of the difference of the guidance branches.
        damping: share of the forecast, the rest repeats the last output. One number, or one for every interval.

    Which:
        compute_ratio: share of the image tokens that are computed between full steps; 0 computes none.
        selector: which ones; see `dit_accel.selectors()`. One selection serves all layers of a step.
        attention: of the computed tokens: "reuse" their attention of the last full step, or "fresh": computed against the keys
            and values of the last full step, with their own renewed.
        seed: seed of the selection's own random numbers; it does not touch the picture's noise.

    Raises:
        ValueError: for a value out of range or an unknown name, with the values that would do.
    """

    full_steps: tuple[int, ...] | None = None
    interval: int = 3
    warmup_steps: int = 1
    tolerance: float | None = None
    when: str | when.Rule | None = None
    guidance_steps: tuple[int, ...] | int | None = None
    how: str = "polynomial"
    order: int | tuple[int, ...] = 1
    guidance_order: int = 0
    damping: float | tuple[float, ...] = 1.0
    compute_ratio: float = 0.0
    selector: str = "random"
    attention: str = "reuse"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("interval", 1), ("warmup_steps", 1), ("seed", 0)):
            self._whole(name, least)
        self._numbers("compute_ratio", *(["tolerance"] if self.tolerance is not None else []))
        for name in ("full_steps", "guidance_steps", "order", "damping"):
            if isinstance(value := getattr(self, name), list):  # of JSON
                self._set(name, tuple(value))
            if isinstance(value, (list, tuple)) and not value:
                raise ValueError(f"{name} must hold at least one number, or be left out.")
        for name in ("full_steps", "guidance_steps"):
            if isinstance(value := getattr(self, name), tuple):
                if not all(_is_whole(step, 0) for step in value) or list(value) != sorted(set(value)):
                    raise ValueError(f"{name} must be numbers of steps, from 0 and rising, not {value!r}.")
                self._set(name, tuple(map(int, value)))
        if not isinstance(self.full_steps, (tuple, type(None))):
            raise ValueError(f"full_steps must be a list of steps, such as (0, 1, 2, 5, 9), not {self.full_steps!r}.")
        if self.guidance_steps is not None and not isinstance(self.guidance_steps, tuple):
            self._whole("guidance_steps", 1)
        if not all(_is_whole(order, 0) and order <= how.MOST for order in each(self.order)):
            raise ValueError(f"order is 0 to {how.MOST}, or one such number for every interval, not {self.order!r}.")
        if not _is_whole(self.guidance_order, 0) or self.guidance_order > how.MOST:
            raise ValueError(f"guidance_order is 0 to {how.MOST}, not {self.guidance_order!r}.")
        if not all(_is_number(damping) and 0 <= damping <= 2 for damping in each(self.damping)):
            raise ValueError(f"damping is 0 (repeat) to 2, or one such number for every interval, not {self.damping!r}.")
        if self.tolerance is not None and not 0 < self.tolerance < float("inf"):
            raise ValueError(f"tolerance must be a finite number of more than 0, such as 0.05, not {self.tolerance!r}.")
        if not 0 <= self.compute_ratio <= 1:
            raise ValueError(f"compute_ratio is the share of computed tokens, between 0 and 1, not {self.compute_ratio!r}.")
        if self.attention not in ("reuse", "fresh"):
            raise ValueError(f"attention must be one of reuse, fresh, not {self.attention!r}.")
        if sum(value is not None for value in (self.full_steps, self.tolerance, self.when)) > 1:
            raise ValueError("full_steps, tolerance and when each say when a step is full; give one of them.")
        if isinstance(self.when, str):
            when.get(self.when)
        how.get(self.how)
        which.get(self.selector)


def each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
