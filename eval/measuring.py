"""One batch of one method, measured: pictures, seconds, memory and what the report says about the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import dit_accel
from eval.spec import Cell
from pipelines.generation import OnStep, Picture, Settings, denoise, switch

WORK = ("flops", "full_flops", "cache_bytes", "tokens_share", "tokens_merged", "full_steps", "partial_steps")


class Measured:
    """A pipeline with the method of one cell in place, inside a `with` block; the original pipeline after it."""

    def __init__(self, pipe: Any, cell: Cell, settings: Settings) -> None:
        self.pipe, self.cell = pipe, cell
        self.settings = replace(settings, steps=cell.steps or settings.steps)

    def __enter__(self) -> Measured:
        switch(self.pipe, list(self.cell.configs))
        return self

    def __exit__(self, *_: Any) -> None:
        dit_accel.remove(self.pipe)

    def __call__(self, batch: Sequence[tuple[str, int]], on_step: OnStep = lambda: None) -> tuple[list[Picture], dict[str, Any]]:
        """Pictures of (prompt, noise seed) pairs, denoised together, and what one of them cost.

        Seconds and FLOPs are the batch's divided by its pictures; memory is the batch's. A method's own report knows its
        FLOPs; without one they are missing, and known from the no-op cache.
        """
        device = torch.device(self.pipe._execution_device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        pictures = denoise(self.pipe, list(batch), self.settings, on_step, bool(self.cell.configs))
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        work = pictures[0].work or {}
        cost = {name: work.get(name) for name in WORK}
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
