"""Seconds of every method of a run, taken in turn so that whatever slows the machine down slows all of them alike."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pandas as pd

from dit_accel.eval.folder import RunFolder, fewer_steps, read_table, write_json, write_table
from dit_accel.eval.measuring import Bench, Measured
from dit_accel.eval.spec import FULL, NO_OP, Cell, Spec, noise_seed

PROBES = 2  # rounds from which the fewer steps are found that match a method; their seconds are not reported


class Watcher:
    """Observes the progress of a run; the command line draws a bar."""

    def stage(self, name: str, total: int, done: int = 0) -> None: ...

    def advance(self, amount: float) -> None: ...

    def note(self, text: str) -> None: ...


def one_round(bench: Bench, cells: Sequence[Cell], spec: Spec, number: int, watcher: Watcher) -> list[dict[str, Any]]:
    """A batch of every cell in an order that changes from round to round. A cell that fails has an error instead of seconds."""
    picks = [spec.prompts[(number * spec.timing_batch_size + i) % len(spec.prompts)] for i in range(spec.timing_batch_size)]
    batch = [(prompt, noise_seed(prompt, i)) for i, prompt in enumerate(picks)]
    order = list(cells)
    random.Random(number).shuffle(order)
    rows = []
    for cell in order:
        row: dict[str, Any] = {"method": cell.label, "kind": cell.kind, "round": number, "error": None}
        try:
            with Measured(bench, cell) as measured:
                row |= measured(batch)[1]
        except Exception as error:  # one method that cannot run does not end the others
            row["error"] = f"{type(error).__name__}: {error}"
        rows.append(row)
        watcher.advance(1)
    return rows


def matching_steps(rows: Sequence[dict[str, Any]], steps: int) -> dict[int, list[str]]:
    """Uncached runs with fewer steps that cost what a method costs: how many, and which methods they match in seconds or FLOPs.

    Args:
        rows: rounds with every method.
        steps: of the full run. A method with steps of its own, or slower than full, is matched by no fewer steps.
    """
    table = pd.DataFrame(rows)
    table = table[table["error"].isna()]
    if FULL not in set(table["method"]):
        return {}
    medians = table.groupby("method", sort=False)[["denoising_seconds", "flops", "full_flops"]].median()
    found: dict[int, list[str]] = {}
    for method, kind in table.groupby("method", sort=False)["kind"].first().items():
        if kind != "method":
            continue
        ratios = {
            "seconds": medians.at[method, "denoising_seconds"] / medians.at[FULL, "denoising_seconds"],
            "FLOPs": medians.at[method, "flops"] / medians.at[NO_OP, "full_flops"],
        }
        for what, ratio in ratios.items():
            count = max(1, round(ratio * steps)) if pd.notna(ratio) else steps
            if count < steps:
                found.setdefault(count, []).append(f"{what} of {method}")
    return dict(sorted(found.items(), reverse=True))


def with_baselines(folder: RunFolder, spec: Spec, pipeline: str) -> tuple[Cell, ...]:
    """The cells of the specification, and the fewer steps that `take_times` found for this pipeline."""
    own = {cell.label for cell in spec.cells}
    cells = [fewer_steps(int(count)) for count in folder.baselines().get(pipeline, {})]
    return (*spec.cells, *(cell for cell in cells if cell.label not in own))


def take_times(bench: Bench, folder: RunFolder, spec: Spec, shared: bool, session: int, watcher: Watcher) -> None:
    """Find the baselines of methods that have none yet, then time all cells, `timing_rounds` times.

    A round is written when it is whole. One that was interrupted, or that lacks a method, is taken again with all of them: ratios
    are only taken between seconds of one round.

    Args:
        shared: whether other processes compute on this device at the same time; the rows then say that they cannot be compared.
        session: see `RunFolder.record_session`.
    """
    pipeline, warm = bench.name, find_baselines(bench, folder, spec, watcher)
    left = missing_rounds(folder, spec, pipeline)
    if not left:
        return
    cells = with_baselines(folder, spec, pipeline)
    keys = {cell.label: folder.key(pipeline, cell) for cell in cells}
    if not warm:
        watcher.stage(f"{pipeline}: warm-up for the seconds", len(cells))
        one_round(bench, cells, spec, 0, watcher)
    watcher.stage(f"{pipeline}: seconds", len(cells) * spec.timing_rounds, len(cells) * (spec.timing_rounds - len(left)))
    for number in left:
        rows = one_round(bench, cells, spec, number, watcher)
        common = {"pipeline": pipeline, "comparable": not shared, "session": session}
        write_table(folder.timing(pipeline, number), [common | row | {"cell": keys[row["method"]]} for row in rows])


def find_baselines(bench: Bench, folder: RunFolder, spec: Spec, watcher: Watcher) -> bool:
    """Find the fewer steps that match methods for which none were looked for, and forget those of methods that are gone.

    Returns:
        Whether all cells are warmed up by it.
    """
    pipeline, probed = bench.name, folder.probed()
    asked = [cell for cell in spec.cells if cell.kind == "method" and spec.baselines]
    methods = {cell.label: folder.key(pipeline, cell) for cell in asked}
    known = probed.get(pipeline, {"steps": {}, "methods": {}})
    if pipeline in probed and known["methods"] == methods:
        return False
    names = {old: label for old, key in known["methods"].items() for label, other in methods.items() if key == other}
    new = set(methods) - set(names.values())
    found: dict[str, list[str]] = {}
    if new:
        cells = with_baselines(folder, spec, pipeline)
        probing = [cell for cell in cells if cell.kind in ("full", "no-op") or cell.label in new]
        watcher.stage(f"{pipeline}: warm-up for the seconds", len(cells) + PROBES * len(probing))
        one_round(bench, cells, spec, 0, watcher)
        rows = [row for n in range(PROBES) for row in one_round(bench, probing, spec, -1 - n, watcher)]
        found = {str(count): matched for count, matched in matching_steps(rows, bench.settings.steps).items()}
    old = {
        count: [f"{what} of {names[method]}" for what, method in (one.split(" of ", 1) for one in of) if method in names]
        for count, of in known["steps"].items()
    }
    counts = sorted({count for count, of in old.items() if of} | set(found), key=int, reverse=True)
    steps = {count: [*old.get(count, []), *found.get(count, [])] for count in counts}
    write_json(folder.path / "baselines.json", probed | {pipeline: {"steps": steps, "methods": methods}})
    return bool(new)


def missing_rounds(folder: RunFolder, spec: Spec, pipeline: str) -> list[int]:
    """Rounds that have not been taken with all cells."""
    keys = {folder.key(pipeline, cell) for cell in with_baselines(folder, spec, pipeline)}
    missing = []
    for number in range(1, spec.timing_rounds + 1):
        table = folder.read(folder.timing(pipeline, number), read_table)
        if table is None or not keys <= set(table["cell"]):
            missing.append(number)
    return missing
