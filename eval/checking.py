"""Checks of an evaluation before anything is made: that it can run, and roughly how long it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import dit_accel
from dit_accel.eval.folder import RunFolder
from dit_accel.eval.measuring import Bench, Measured
from dit_accel.eval.rewards import check_reward
from dit_accel.eval.spec import FULL, Cell, Spec, noise_seed
from dit_accel.eval.timing import PROBES
from dit_accel.pipelines.catalog import find
from dit_accel.pipelines.generation import settings_for
from dit_accel.pipelines.loading import explained, load, pick_device, pick_dtype, read_class, understand
from dit_accel.recipe import choose

TRIAL = 2  # denoising steps from which the seconds of all are estimated


def resolve(spec: Spec, device: str | None = None) -> dict[str, str]:
    """What "auto" becomes on this machine: the dtype, and the device, on CUDA with the name of the card.

    Raises:
        ValueError: the machine has no such device, or the dtype or the offloading is not to be had there.
    """
    place = pick_device(device or spec.device)
    understand(spec.dtype, device or spec.device, spec.offload)
    name = f"cuda ({torch.cuda.get_device_name(place)})" if place.type == "cuda" else place.type
    return {"dtype": str(pick_dtype(spec.dtype, place)).removeprefix("torch."), "device": name}


def check(spec: Spec) -> None:
    """Raise what would fail later: an unknown pipeline or reward, a method that a pipeline's transformer does not support.

    Methods are applied to the transformers without their weights.

    Raises:
        ValueError: something cannot run; the message names it.
        dit_accel.pipelines.loading.LoadError: a pipeline cannot be had.
    """
    for score in spec.scores:
        check_reward(score)
    for name in spec.pipelines:
        transformer = without_weights(name)
        for cell in spec.cells:
            if cell.configs or cell.speedup:
                try:
                    if cell.speedup:
                        choose(transformer, cell.speedup, None)
                    else:
                        dit_accel.apply(transformer, list(cell.configs))
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{name} cannot run the method {cell.label!r}: {error}") from None
                except RuntimeError:  # it reads the weights, which are not there
                    transformer = without_weights(name)


def without_weights(pipeline: str) -> Any:
    """The transformer of a pipeline on the meta device, which takes neither memory nor a download of weights."""
    entry = find(pipeline)
    source = entry.source if entry else pipeline
    read_class(source)
    import diffusers

    with explained(source):
        config = diffusers.AutoModel.load_config(source, subfolder="transformer")
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)


def bench_of(spec: Spec, name: str, device: str | None = None) -> Bench:
    """The pipeline of this name, loaded, and the settings it is called with."""
    pipe = load(name, spec.dtype, device or spec.device, spec.offload)
    given = {key: getattr(spec, key) for key in ("steps", "guidance", "height", "width")}
    return Bench(name, pipe, settings_for(pipe, name, **given))


@dataclass(frozen=True)
class Plan:
    """What a pipeline has to do yet. Baselines with fewer steps are found on the way: `most` counts as many as there can be."""

    pipeline: str
    methods: tuple[Cell, ...]
    pictures: int
    done: int
    rounds: int
    most: int
    seconds: float


def plan(spec: Spec, folder: RunFolder, bench: Bench) -> Plan:
    """The work of a pipeline, and about how many seconds it takes at most: every method as slow as the uncached run.

    Denoises a batch for a few steps, twice, so that the first one's warm-up is not counted.

    Args:
        bench: the pipeline, loaded, with its settings.
    """
    done = taken = 0
    if (folder.path / "spec.json").is_file():
        rows, times = folder.table("rows"), folder.table("timing")
        done = int((rows["pipeline"] == bench.name).sum()) if len(rows) else 0
        taken = times.loc[times["pipeline"] == bench.name, "round"].nunique() if len(times) else 0
    steps = bench.settings.steps
    methods = sum(cell.kind == "method" for cell in spec.cells)
    most = min(2 * methods, steps - 1) if spec.baselines else 0
    prompts = [spec.prompts[i % len(spec.prompts)] for i in range(min(spec.batch_size, len(spec.prompts) * spec.seeds))]
    with Measured(bench, Cell(FULL, (), min(TRIAL, steps), "full")) as measured:
        for _ in range(2):
            _, cost = measured([(prompt, noise_seed(prompt, i)) for i, prompt in enumerate(prompts)])
    beside = cost["seconds"] - cost["denoising_seconds"]
    picture = beside + cost["denoising_seconds"] / cost["steps"] * steps
    pictures = len(spec.cells) * len(spec.prompts) * spec.seeds
    extra = most * len(spec.prompts) * spec.seeds
    rounds = spec.timing_rounds - taken
    timed = (rounds + (1 + PROBES if rounds else 0)) * (len(spec.cells) + most) * spec.timing_batch_size
    left = max(0, pictures + extra - done) if done < pictures else 0
    return Plan(bench.name, spec.cells, pictures, done, rounds, most, (left + timed) * picture)
