"""What the user asks for: frozen, validated, and round-tripped through plain dicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dit_accel import how, when
from dit_accel.options import Options, is_number, is_whole, known_selector, option

CACHE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
SEED = "Seed of the selection's own random numbers; it does not touch the picture's noise."
SELECTOR = "Name of the score that chooses the tokens to compute, from `dit-accel selectors` or `dit_accel.selectors()`."

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


@dataclass(frozen=True)
class TokenCacheConfig(Options):
    """Token-wise feature caching (ToCa: Zou et al., ICLR 2025, arXiv 2410.05317) and its relatives.

    *When* is everything computed: interval, interval_spread, warmup_steps; and how many tokens otherwise: cache_ratio,
    ratio_schedule, steps. *Which* tokens: selector, age_weight, spatial_bonus, spatial_tile, query_share, text_tokens,
    share_guidance_selection, seed. *How* the rest are filled: fill, forecast_order, cache_dtype, cache_device.

    Raises:
        ValueError: for a value out of range or an unknown name, with the values that would do.
    """

    interval: int = option(4, "A full step every N steps; 1 computes everything always.")
    cache_ratio: float = option(
        0.9,
        "Share of the tokens taken from the cache on a partial step: 0 caches nothing, at 1 no token is computed.",
    )
    selector: str = option("random", SELECTOR)
    warmup_steps: int = option(1, "Full steps at the start, at least 1.")
    interval_spread: float = option(
        0.0, "w, shrinks the interval along the run: round(N / (1 - w + 2 w s / S)) after full step s of S."
    )
    ratio_schedule: str | when.RatioSchedule = option(
        "constant",
        "How the share of computed tokens, 1 - cache ratio, varies with layer, stream and step: constant, toca, or (in Python) a "
        "function `dit_accel.Place` -> factor.",
    )
    steps: int | None = option(
        None,
        "Number of steps of a run, for schedules that depend on it; only needed where the transformer is used without the "
        "pipeline that `apply` was given.",
        flag="",
    )
    age_weight: float = option(
        0.25,
        "lambda, how much a token's score grows for every N steps since it was last computed. Normalized scores are about "
        "1 / sqrt(tokens), so that 0.25 lets age decide nearly alone; to compare selectors, use 0.",
    )
    spatial_bonus: float = option(0.0, "The best token of every tile of the image has its score multiplied by 1 + this.")
    spatial_tile: int = option(4, "Side of a tile, in tokens.")
    query_share: float = option(1 / 16, "Share of the queries asked which tokens receive attention, at least 256; 1 is exact.")
    text_tokens: str = option(
        "select", "Text tokens on a partial step (FLUX): select like image tokens, reuse all, or compute in full."
    )
    share_guidance_selection: bool = option(True, "Both halves of batched guidance compute the same tokens, by their mean score.")
    seed: int = option(0, SEED, flag="selection_seed")
    fill: str = option(
        "reuse",
        "reuse the cached feature, or forecast it by a Taylor expansion over the past full steps (TaylorSeer: Liu et al., ICCV "
        "2025, arXiv 2503.06923).",
    )
    forecast_order: int = option(1, "Order of the expansion, 0 to 3; every order keeps one more copy of the features.")
    cache_dtype: str | None = option(None, "Narrower type to keep features in, such as float8_e4m3fn; by default the model's.")
    cache_device: str | None = option(None, "Device on which features are kept, such as cpu; by default the model's.")

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
        choices: list[tuple[str, tuple[str | None, ...]]] = [("cache_dtype", (None, *CACHE_DTYPES))]
        choices += [("text_tokens", ("select", "reuse", "full")), ("fill", ("reuse", "forecast"))]
        if not callable(self.ratio_schedule):
            choices.append(("ratio_schedule", tuple(when.RATIO_SCHEDULES)))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {getattr(self, name)!r}.")
        if self.cache_device is not None:
            import torch

            try:
                torch.device(self.cache_device)
            except RuntimeError as error:
                raise ValueError(f"cache_device must name a device of torch, not {self.cache_device!r}.") from error
        known_selector(self.selector)

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
class TokenMergeConfig(Options):
    """Token merging (ToMe-SD: Bolya and Hoffman, CVPRW 2023, arXiv 2303.17604) of image tokens.

    *When*: warmup_steps, rematch_every. *Which* tokens: ratio, stride, randomize, seed. *How*, and in which modules: the rest.

    Raises:
        ValueError: for a value out of range, with the values that would do.
    """

    ratio: float = option(
        0.5,
        "Share of the image tokens that are merged into others, at most 1 - 1 / (width x height of the stride).",
        flag="merge_ratio",
    )
    stride: tuple[int, int] = option(
        (2, 2), "Width and height in tokens of the cells that keep one token each.", flag="merge_stride"
    )
    randomize: bool = option(True, "Merge into a random token of the cell rather than its top-left one.", flag="merge_randomize")
    merge_attention: bool = option(True, "Self-attention (the joint attention of FLUX) works on merged tokens.")
    merge_cross_attention: bool = option(False, "Cross-attention to the text works on merged tokens (PixArt).")
    merge_mlp: bool = option(
        False, "The feed-forward works on merged tokens (in FLUX's single blocks, with the output projection)."
    )
    rematch_every: int | tuple[int, int] = option((2, 1), "Steps, and layers, that share one matching; one number means both.")
    warmup_steps: int = option(0, "Steps at the start on which nothing is merged.", flag="merge_warmup_steps")
    keep_queries: bool = option(
        False,
        "Merge keys and values only, so that every token keeps its own query: half of the saving in attention's projections, all "
        "of it in the products.",
        flag="merge_keys_only",
    )
    proportional_attention: bool = option(
        False,
        "Weight merged tokens by group size: the logarithm of the size is added to attention scores. Needs an attention mask, "
        "which flash and sage attention do not take.",
        flag="merge_proportional",
    )
    seed: int = option(0, "Seed of merging's own random numbers; it does not touch the picture's noise.", flag="merge_seed")

    def __post_init__(self) -> None:
        for name, value in (("stride", self.stride), ("rematch_every", self.rematching)):
            if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(is_whole(part, 1) for part in value):
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
class OutputCacheConfig(Options):
    """A forecast of the transformer's output between full steps, for any transformer of diffusers.

    *When* is everything computed: full_steps, interval, warmup_steps, tolerance, when; the unconditional branch: guidance_steps.
    *How* the rest is forecast: how, order, guidance_order, damping. *Which* tokens are computed between full steps:
    compute_ratio, selector, attention, seed.

    Raises:
        ValueError: for a value out of range or an unknown name, with the values that would do.
    """

    full_steps: tuple[int, ...] | None = option(
        None,
        "Numbers of the steps that are computed in full, from 0, which always is one. After the last one no step is. Takes the "
        "place of the interval.",
    )
    interval: int = option(3, "A full step every N steps. With a tolerance, the longest interval allowed.")
    warmup_steps: int = option(1, "Full steps at the start, at least 1.")
    tolerance: float | None = option(
        None,
        "Relative error (RMS) that a forecast may have. Every full step knows how far off its own forecast would have been; the "
        "next interval is the longest whose error, growing with the distance to the power of order + 1, stays below the "
        "tolerance. Reads one number from the device on every full step.",
    )
    when: str | when.Rule | None = option(
        None,
        "A rule registered with `register_when`, or (in Python) a function `dit_accel.Progress` -> steps until the next full one.",
    )
    guidance_steps: tuple[int, ...] | int | None = option(
        None,
        "Of the full steps, those on which the unconditional branch of guidance is computed too: their numbers, or one number n "
        "for every n-th full step; by default all. On the others it follows from the conditional branch and what the difference "
        "of the two was.",
    )
    how: str = option(
        "polynomial",
        "Weights for past outputs: reuse, polynomial, taylor, hermite, or your own (`register_how`).",
    )
    order: int | tuple[int, ...] = option(
        1,
        "How many full steps before the last one count: 0 repeats the last output, 1 continues a line. One number, or one for "
        "every interval, of which the last one goes on.",
    )
    guidance_order: int = option(0, "The same as order, of the difference of the guidance branches.")
    damping: float | tuple[float, ...] = option(
        1.0, "Share of the forecast; the rest repeats the last output. One, or one for every interval."
    )
    compute_ratio: float = option(0.0, "Share of the image tokens that are computed between full steps, the same in all layers.")
    selector: str = option("random", SELECTOR)
    attention: str = option(
        "reuse",
        "Attention of the computed tokens: reuse that of the last full step, or fresh: computed against the keys and values of "
        "the last full step, with their own renewed.",
    )
    seed: int = option(0, SEED, flag="selection_seed")

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
                if not all(is_whole(step, 0) for step in value) or list(value) != sorted(set(value)):
                    raise ValueError(f"{name} must be numbers of steps, from 0 and rising, not {value!r}.")
                self._set(name, tuple(map(int, value)))
        if not isinstance(self.full_steps, (tuple, type(None))):
            raise ValueError(f"full_steps must be a list of steps, such as (0, 1, 2, 5, 9), not {self.full_steps!r}.")
        if self.guidance_steps is not None and not isinstance(self.guidance_steps, tuple):
            self._whole("guidance_steps", 1)
        if not all(is_whole(order, 0) and order <= how.MOST for order in each(self.order)):
            raise ValueError(f"order is 0 to {how.MOST}, or one such number for every interval, not {self.order!r}.")
        if not is_whole(self.guidance_order, 0) or self.guidance_order > how.MOST:
            raise ValueError(f"guidance_order is 0 to {how.MOST}, not {self.guidance_order!r}.")
        if not all(is_number(damping) and 0 <= damping <= 2 for damping in each(self.damping)):
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
        known_selector(self.selector)


def each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
