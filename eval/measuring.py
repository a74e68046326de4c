"""One batch of one method, measured: pictures, seconds, memory and what the report says about the work."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import dit_accel
from dit_accel.eval.spec import Cell
from dit_accel.pipelines.generation import OnStep, Picture, Settings, denoise, switch
from dit_accel.recipe import choose

WORK = ("flops", "full_flops", "cache_bytes", "tokens_share", "tokens_merged", "full_steps", "partial_steps")


@dataclass
class Bench:
    """A loaded pipeline, and the work of its methods so far: it is counted once for every method and size of batch."""

    name: str
    pipe: Any
    settings: Settings
    works: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)


class Measured:
    """A pipeline with the method of one cell, inside a `with` block; the original pipeline after it."""

    def __init__(self, bench: Bench, cell: Cell) -> None:
        self.bench, self.cell, self.applied = bench, cell, False
        self.settings = replace(bench.settings, steps=cell.steps or bench.settings.steps)

    def __enter__(self) -> Measured:
        return self

    def __exit__(self, *_: Any) -> None:
        dit_accel.remove(self.bench.pipe)

    def __call__(self, batch: Sequence[tuple[str, int]], on_step: OnStep = lambda: None) -> tuple[list[Picture], dict[str, Any]]:
        """Pictures of (prompt, noise seed) pairs, denoised together, and what one of them cost.

        Seconds and FLOPs are the batch's divided by its pictures; memory is the batch's. A method's own report knows its
        FLOPs; without a method they are missing here. After an error the method is applied again.
        """
        pipe, key = self.bench.pipe, (self.cell.label, len(batch))
        device = torch.device(pipe._execution_device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            if not self.applied:
                switch(pipe, [choose(pipe, self.cell.speedup, None)] if self.cell.speedup else list(self.cell.configs))
                self.applied = True
            with warnings.catch_warnings():
                if self.cell.kind == "no-op":  # is meant to save nothing
                    warnings.filterwarnings("ignore", "dit_accel saved nothing")
                pictures = denoise(pipe, list(batch), self.settings, on_step, applied=False)
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
            if key not in self.bench.works:
                self.bench.works[key] = dit_accel.report(pipe).to_dict() if self.cell.configs or self.cell.speedup else {}
        except BaseException:
            dit_accel.remove(pipe)
            self.applied = False
            raise
        cost = {name: self.bench.works[key].get(name) for name in WORK}
        for name in ("flops", "full_flops"):
            cost[name] = None if cost[name] is None else cost[name] / len(batch)
        return pictures, {
            "steps": self.settings.steps,
            "batch_size": len(batch),
            "seconds": pictures[0].seconds,
            "denoising_seconds": pictures[0].denoising_seconds,
            "peak_memory": peak,
            **cost,
        }
