"""Which places each method computes: recorded on one batch, apart from the pictures whose quality and seconds are measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import dit_accel
from dit_accel import OutputCacheConfig, TokenCacheConfig
from dit_accel.eval.folder import RunFolder, read_json, write_json
from dit_accel.eval.measuring import Bench
from dit_accel.eval.spec import Cell, Spec, noise_seed
from dit_accel.eval.timing import Watcher, with_baselines
from dit_accel.pipelines.generation import denoise
from dit_accel.pipelines.inspection import FIGURES, places


def selects(cell: Cell) -> bool:
    """Whether a method chooses among tokens on some steps."""
    return any(
        0 < c.compute_ratio < 1
        if isinstance(c, OutputCacheConfig)
        else isinstance(c, TokenCacheConfig) and c.interval > 1 and 0 < c.cache_ratio < 1
        for c in cell.configs
    )


def record_maps(bench: Bench, folder: RunFolder, spec: Spec, watcher: Watcher) -> None:
    """Write the missing maps of a pipeline: means over the first prompts, as many as are denoised together.

    A method that cannot run has no map; the rows of its pictures say why.
    """
    pipeline = bench.name
    cells = [cell for cell in with_baselines(folder, spec, pipeline) if selects(cell)]
    left = [cell for cell in cells if folder.read(folder.map(pipeline, cell), read_json) is None]
    batch = [(prompt, noise_seed(prompt, 0)) for prompt in spec.prompts[: spec.batch_size]]
    watcher.stage(f"{pipeline}: selection maps", len(cells), len(cells) - len(left))
    rows = folder.table("rows")
    failed = set(rows.loc[rows["error"].notna(), "cell"])
    for cell in left:
        key = folder.key(pipeline, cell)
        if key not in failed:
            write_json(
                folder.map(pipeline, cell),
                {"pipeline": pipeline, "method": cell.label, "cell": key, **shares(bench, cell, batch)},
            )
        watcher.advance(1)


def shares(bench: Bench, cell: Cell, batch: list[tuple[str, int]]) -> dict[str, Any]:
    """Means over the pictures of a batch: `share` of the selections that computed each place, and its figures."""
    settings = replace(bench.settings, steps=cell.steps or bench.settings.steps)
    try:
        dit_accel.apply(bench.pipe, list(cell.configs), record=True)
        denoise(bench.pipe, batch, settings, lambda: None, applied=False)
        report = dit_accel.report(bench.pipe)
        found = [places(report, picture) for picture in range(len(batch))]
    finally:
        dit_accel.remove(bench.pipe)
    figures = {name: float(np.mean([getattr(one, name) for one in found])) for name in FIGURES}
    share = np.mean([one.share for one in found], axis=0)
    return {"grid": list(report.grid), "share": share.round(4).tolist(), "pictures": len(batch), **figures}
