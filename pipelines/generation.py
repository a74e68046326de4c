"""Make pictures: the same noise for the same seed whatever the batch, timed, alone or beside their uncached baselines."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image

import dit_accel
from dit_accel.doubts import DoubtWarning
from dit_accel.pipelines.catalog import find
from dit_accel.pipelines.methods import Config, first_partial_step
from dit_accel.pipelines.prompts import t5_tokenizer
from dit_accel.recipe import Recipe, choose
from dit_accel.when import Mode

OnStep = Callable[[], None]


@dataclass(frozen=True)
class Settings:
    """What one picture depends on besides its prompt and the method.

    The i-th picture of a prompt has its noise from seed + i. `batch_size` pictures are denoised together.
    """

    steps: int
    guidance: float
    height: int
    width: int
    max_sequence_length: int
    seed: int = 0
    num_images: int = 1
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "height", "width", "max_sequence_length", "num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"guidance must be a finite number of at least 0, not {self.guidance}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2**63 - 1, not {self.seed}.")


@dataclass(frozen=True)
class Picture:
    """One picture. Pictures made together share the time of their batch evenly; `work` is the report's summary.

    `saved_seconds` is an estimate of how much longer denoising would have taken without a cache; None if unknown.
    """

    image: Image.Image
    prompt: str
    seed: int
    seconds: float
    denoising_seconds: float
    work: dict[str, Any] | None = None
    saved_seconds: float | None = None


def is_flux(pipe: Any) -> bool:
    return type(pipe).__name__.startswith("Flux")


def best_settings(pipe: Any, name_or_path: str) -> dict[str, Any]:
    """Steps, guidance, size and length of the text that a pipeline is best called with."""
    if entry := find(name_or_path):
        best: dict[str, Any] = dict(steps=entry.steps, guidance=entry.guidance, max_sequence_length=entry.max_sequence_length)
        best |= dict(height=entry.size, width=entry.size)
    elif is_flux(pipe):
        distilled = pipe.transformer.config.guidance_embeds  # as FLUX.1-dev; without it, as FLUX.1-schnell
        best = (
            dict(steps=28, guidance=3.5, max_sequence_length=512)
            if distilled
            else dict(steps=4, guidance=0.0, max_sequence_length=256)
        )
        best |= dict.fromkeys(("height", "width"), pipe.default_sample_size * pipe.vae_scale_factor)
    else:
        best = dict(steps=20, guidance=4.5, max_sequence_length=120 if "Alpha" in type(pipe).__name__ else 300)
        best |= dict.fromkeys(("height", "width"), pipe.transformer.config.sample_size * pipe.vae_scale_factor)
    return best | {"max_sequence_length": min(best["max_sequence_length"], t5_tokenizer(pipe).model_max_length)}


def settings_for(pipe: Any, name_or_path: str, **given: Any) -> Settings:
    """The settings a pipeline is best called with, and on top of them those `given` that are not None."""
    settings = Settings(**best_settings(pipe, name_or_path) | {name: value for name, value in given.items() if value is not None})
    token = pipe.vae_scale_factor * (2 if is_flux(pipe) else pipe.transformer.config.patch_size)
    if settings.height % token or settings.width % token:
        raise ValueError(
            f"height and width must be multiples of {token} for this pipeline, not {settings.height} and {settings.width}."
        )
    return settings


def recipe_of(pipe: Any, speedup: float | None, min_psnr: float | None, steps: int) -> tuple[str, list[Config]]:
    """What `dit_accel.apply` with these chooses for a run of so many steps, and a line about it; raises what `apply` raises."""
    chosen = choose(pipe, speedup, min_psnr)
    if not isinstance(chosen, Recipe):
        return "No recipe is known for this pipeline; its output is forecast where past errors allow it. See dit-accel tune.", [
            chosen
        ]
    said = f"By the {chosen}" + (f", spread over {steps} steps" if steps != len(chosen.levels) else "")
    return f"{said}.", [chosen.of(steps)]


def call_arguments(pipe: Any, settings: Settings, on_step: OnStep) -> dict[str, Any]:
    """Settings as arguments of the pipeline's `__call__`."""
    arguments: dict[str, Any] = dict(
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        height=settings.height,
        width=settings.width,
        max_sequence_length=settings.max_sequence_length,
    )
    if not is_flux(pipe):
        # Binning would compute another size than asked for; cleaning would depend on which packages are installed.
        return arguments | dict(
            use_resolution_binning=False, clean_caption=False, callback=lambda step, t, latents: on_step(), callback_steps=1
        )
    if not pipe.transformer.config.guidance_embeds and settings.guidance > 1:
        arguments |= dict(true_cfg_scale=settings.guidance, negative_prompt="")

    def callback(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return tensors

    return arguments | dict(callback_on_step_end=callback)


class DenoisingClock:
    """Seconds from the start of the transformer's first call to the end of its last one, inside a `with` block, and of each."""

    def __init__(self, pipe: Any) -> None:
        self.transformer, self.device = pipe.transformer, torch.device(pipe._execution_device)
        self.begun: list[Any] = []
        self.ended: list[Any] = []

    def now(self) -> Any:
        if self.device.type == "cuda":  # an event does not make the CPU wait, so the measurement costs nothing
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        if self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def begin(self, *_: Any) -> None:
        self.begun.append(self.now())

    def end(self, *_: Any) -> None:
        self.ended.append(self.now())

    def __enter__(self) -> DenoisingClock:
        self.handles = [
            self.transformer.register_forward_pre_hook(self.begin, prepend=True),
            self.transformer.register_forward_hook(self.end),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    @property
    def seconds(self) -> float:
        return self.between(self.begun[0], self.ended[-1])

    @property
    def calls(self) -> list[float]:
        """Seconds of every call."""
        return [self.between(begun, ended) for begun, ended in zip(self.begun, self.ended, strict=True)]

    def between(self, begun: Any, ended: Any) -> float:
        if isinstance(begun, float):
            return float(ended - begun)
        ended.synchronize()
        return float(begun.elapsed_time(ended)) / 1000


def saved(calls: Sequence[Any], seconds: Sequence[float]) -> float | None:
    """Seconds that calls (of a report) would have taken longer if each had taken the median of those that computed everything.

    None where no call computed everything, or all did.
    """
    whole = [call.mode is Mode.FULL and not call.merged and call.rows == 1 for call in calls]
    if len(calls) != len(seconds) or not any(whole) or all(whole):
        return None
    full = statistics.median(second for second, one in zip(seconds, whole, strict=True) if one)
    return sum(full - second for second, one in zip(seconds, whole, strict=True) if not one)


def denoise(pipe: Any, batch: list[tuple[str, int]], settings: Settings, on_step: OnStep, applied: bool) -> list[Picture]:
    """The pictures of (prompt, seed) pairs, denoised together."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in batch]
    steps: list[int] = []
    arguments = call_arguments(pipe, settings, lambda: (steps.append(1), on_step())[1])
    start = time.perf_counter()
    with DenoisingClock(pipe) as clock:
        images = pipe([prompt for prompt, _ in batch], generator=generators, **arguments).images
    for _ in range(len(steps), settings.steps):  # of a run that has fewer than it was asked for
        on_step()
    seconds = time.perf_counter() - start  # the pictures are on the CPU by now, so the device has finished
    work, gain = None, None
    if applied:
        report = dit_accel.report(pipe)
        work, gain = report.to_dict(), saved(report.calls, clock.calls)
        del work["calls"]
    gain = None if gain is None else gain / len(batch)
    return [
        Picture(image, prompt, seed, seconds / len(batch), clock.seconds / len(batch), work, gain)
        for image, (prompt, seed) in zip(images, batch, strict=True)
    ]


def batches(prompts: list[str], settings: Settings) -> Iterator[list[tuple[str, int]]]:
    pairs = ((prompt, settings.seed + i) for prompt in prompts for i in range(settings.num_images))
    while batch := list(islice(pairs, settings.batch_size)):
        yield batch


def generate(
    pipe: Any, prompts: list[str], config: Config | Sequence[Config] | None, settings: Settings, on_step: OnStep = lambda: None
) -> Iterator[Picture]:
    """Pictures of the prompts as they are finished, `num_images` each.

    Args:
        pipe: a pipeline of `dit_accel.pipelines.loading.load`.
        prompts: what to make.
        config: as for `dit_accel.apply`; none at all computes everything.
        settings: see `settings_for`.
        on_step: called after every denoising step of a batch.
    """
    with switched(pipe, config):
        for batch in batches(prompts, settings):
            yield from denoise(pipe, batch, settings, on_step, bool(config))


def compare(
    pipe: Any, prompts: list[str], config: Config | Sequence[Config], settings: Settings, on_step: OnStep = lambda: None
) -> Iterator[tuple[Picture, Picture]]:
    """Pairs (uncached, faster) from the same noise, timed one after the other in this process after a warm-up.

    Arguments as for `generate`; a batch takes twice `steps` denoising steps.
    """
    try:
        warm_up(pipe, prompts, config, settings)
        for batch in batches(prompts, settings):
            switch(pipe, None)
            full = denoise(pipe, batch, settings, on_step, applied=False)
            switch(pipe, config)
            yield from zip(full, denoise(pipe, batch, settings, on_step, applied=True), strict=True)
    finally:
        dit_accel.remove(pipe)


def switch(pipe: Any, config: Config | Sequence[Config] | None) -> None:
    if config:
        dit_accel.apply(pipe, config)
    else:
        dit_accel.remove(pipe)


@contextmanager
def switched(pipe: Any, config: Config | Sequence[Config] | None) -> Iterator[None]:
    """A configuration, or none, for a `with` block."""
    try:
        switch(pipe, config)
        yield
    finally:
        dit_accel.remove(pipe)


def check(pipe: Any, config: Config | Sequence[Config] | None) -> None:
    """ValueError or TypeError, as from `dit_accel.apply`, unless a pipeline takes this configuration."""
    with switched(pipe, config):
        pass


def warm_up(pipe: Any, prompts: list[str], config: Config | Sequence[Config], settings: Settings) -> None:
    """A short uncached run and one up to the first partial step: neither then pays for first-time work."""
    arguments = call_arguments(pipe, settings, lambda: None)
    arguments["num_inference_steps"] = min(first_partial_step(config) + 1, settings.steps)
    batch = next(batches(prompts, settings))
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoubtWarning)  # of how short it is
        for kind in (None, config):
            switch(pipe, kind)
            pipe([prompt for prompt, _ in batch], generator=torch.Generator("cpu").manual_seed(0), **arguments)
