"""The evaluation loop: pipelines x methods x prompts x seeds, in batches that are each done once, by one of the processes."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState
from accelerate.utils import gather_object

from dit_accel.eval.fidelity import decibels, squared_error, ssim
from dit_accel.eval.folder import RunFolder, write_json, write_table
from dit_accel.eval.maps import record_maps
from dit_accel.eval.measuring import Bench, Measured
from dit_accel.eval.rewards import load_reward
from dit_accel.eval.rewards.pictures import open_picture
from dit_accel.eval.spec import NO_OP, Cell, Spec, noise_seed
from dit_accel.eval.timing import Watcher, take_times, with_baselines
from dit_accel.pipelines.generation import settings_for
from dit_accel.pipelines.loading import load, pick_device
from dit_accel.pipelines.pictures import png, write_atomically

PATIENCE = timedelta(days=30)  # of a process that waits for the others


@dataclass(frozen=True)
class Batch:
    """Pictures of one method that are denoised together: (prompt number, seed number) each."""

    number: int
    places: tuple[tuple[int, int], ...]


def batches_of(spec: Spec) -> list[Batch]:
    """The same for every method, whatever the number of processes: so are the pictures, to the last bit."""
    places = [(prompt, seed) for prompt in range(len(spec.prompts)) for seed in range(spec.seeds)]
    parts = [places[i : i + spec.batch_size] for i in range(0, len(places), spec.batch_size)]
    return [Batch(number, tuple(part)) for number, part in enumerate(parts)]


class Evaluation:
    """A run of a specification in a folder, alone or as one of several processes of `accelerate launch`.

    Args:
        spec: what to compare.
        folder: of the run; all processes and machines see the same one.
        watcher: told by the main process how far it is.
        retry_failed: make batches again in which a picture failed.
    """

    def __init__(self, spec: Spec, folder: RunFolder, watcher: Watcher, *, retry_failed: bool = False) -> None:
        self.spec, self.folder, self.watcher, self.retry_failed = spec, folder, watcher, retry_failed
        self.state = PartialState(cpu=pick_device(spec.device).type == "cpu", timeout=PATIENCE)
        several = self.state.num_processes > 1
        self.device = str(self.state.device) if several and spec.device == "auto" else str(pick_device(spec.device))
        self.device = "cpu" if self.device.startswith("cpu") else self.device  # accelerate numbers even the CPU
        place = (socket.gethostname(), self.device)
        self.shared = (gather_object([place]) if several else [place]).count(place) > 1

    def run(self) -> pd.DataFrame:
        """Do what is not done yet; the rows of all pictures. Interrupted at any moment, it goes on from there next time."""
        sitting = 0
        if self.state.is_main_process:
            self.folder.begin(self.spec)
            sitting = self.folder.sit_down(self.device, self.state.num_processes)
        self.rewards = {name: load_reward(name, device=self.device) for name in self.spec.scores}
        if self.state.is_main_process:
            cut = {name: reward.cut(self.spec.prompts) for name, reward in self.rewards.items()}
            write_json(self.folder.path / "cut.json", cut)
        for name in self.spec.pipelines:
            pipe = load(name, self.spec.dtype, self.device, self.spec.offload)
            given = {key: getattr(self.spec, key) for key in ("steps", "guidance", "height", "width")}
            settings = settings_for(pipe, name, **given)
            bench = Bench(name, pipe, settings)
            if self.state.is_main_process:
                take_times(bench, self.folder, self.spec, self.shared, sitting, self.watcher)
            self.state.wait_for_everyone()
            self.make_pictures(bench)
            self.state.wait_for_everyone()
            if self.state.is_main_process:
                record_maps(bench, self.folder, self.spec, self.watcher)
            del pipe, bench
        return self.finish() if self.state.is_main_process else pd.DataFrame()

    def make_pictures(self, bench: Bench) -> None:
        """The missing batches of this process; first those in full, to which the others are compared."""
        pipeline, batches = self.spec.pipelines.index(bench.name), batches_of(self.spec)
        cells = with_baselines(self.folder, self.spec, bench.name)
        mine, missing = [], []
        for number, cell in enumerate(cells):
            own = [batch for batch in batches if (batch.number + number) % self.state.num_processes == self.state.process_index]
            mine += own
            missing.append([batch for batch in own if not self.done(self.folder.rows(pipeline, number, batch.number), cell)])
        if self.state.is_main_process:
            total, left = (sum(len(batch.places) for batch in some) for some in (mine, sum(missing, [])))
            self.watcher.stage(f"{bench.name}: pictures", total, total - left)
        for number, (cell, some) in enumerate(zip(cells, missing, strict=True)):
            with Measured(bench, cell) as measured:
                for batch in some:
                    write_table(self.folder.rows(pipeline, number, batch.number), self.rows_of(number, measured, batch))
            if number == 0:
                self.state.wait_for_everyone()

    def done(self, path: Path, cell: Cell) -> bool:
        if not self.retry_failed or not path.exists():
            return path.exists()
        rows = pd.read_parquet(path)
        without_twin = cell.kind != "full" and ("squared_error" not in rows or rows["squared_error"].isna().any())
        return not (rows["error"].notna().any() or without_twin)

    def rows_of(self, number: int, measured: Measured, batch: Batch) -> list[dict[str, Any]]:
        """One row a picture. If a batch fails it is tried picture by picture; what fails then has an error."""
        cell = measured.cell
        common = {"pipeline": measured.bench.name, "method": cell.label, "kind": cell.kind}
        try:
            return [common | row for row in self.attempt(number, measured, batch.places)]
        except Exception as error:  # one failing prompt or method does not end the run
            if len(batch.places) == 1:
                return [common | self.place(*batch.places[0]) | {"error": f"{type(error).__name__}: {error}"}]
        return [row for place in batch.places for row in self.rows_of(number, measured, Batch(batch.number, (place,)))]

    def attempt(self, number: int, measured: Measured, places: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """Make, save, score and compare the pictures of one batch."""
        name, cell = measured.bench.name, measured.cell
        pipeline, found = self.spec.pipelines.index(name), [self.place(*place) for place in places]
        share = len(places) / measured.settings.steps
        on_step = (lambda: self.watcher.advance(share)) if self.state.is_main_process else lambda: None
        pictures, cost = measured([(row["prompt"], row["noise_seed"]) for row in found], on_step)
        images = [picture.image for picture in pictures]
        for label, reward in self.rewards.items():
            for row, score in zip(found, reward.score([row["prompt"] for row in found], images), strict=True):
                row[label] = float(score)
        for row, (prompt, seed), image in zip(found, places, images, strict=True):
            path = self.folder.picture(pipeline, number, prompt, seed, (name, cell.label))
            record = {"prompt": row["prompt"], "seed": row["noise_seed"], "pipeline": name, "method": cell.label}
            write_atomically(self.folder.path / path, png(image, record | {"options": cell.options()}))
            row |= {"picture": path.as_posix(), "error": None, **cost}
            if cell.kind != "full":
                row |= self.fidelity(pipeline, name, prompt, seed, image)
        return found

    def place(self, prompt: int, seed: int) -> dict[str, Any]:
        text = self.spec.prompts[prompt]
        return {"prompt": text, "prompt_number": prompt, "seed": seed, "noise_seed": noise_seed(text, seed)}

    def fidelity(self, pipeline: int, name: str, prompt: int, seed: int, image: Any) -> dict[str, float]:
        """To the twin in full; nothing where that one has failed."""
        twin = self.folder.path / self.folder.picture(pipeline, 0, prompt, seed, (name, self.spec.cells[0].label))
        if not twin.is_file():
            return {}
        full = open_picture(twin)
        error = squared_error(full, image)
        return {"squared_error": error, "psnr": decibels(error), "ssim": ssim(full, image)}

    def finish(self) -> pd.DataFrame:
        """Write all rows as one table, with the FLOPs of the runs in full, which the no-op cache has counted."""
        rows, times = with_flops(self.folder.table("rows")), with_flops(self.folder.table("timing"))
        write_table(self.folder.path / "results.parquet", rows)
        write_table(self.folder.path / "timing.parquet", times)
        return rows


def with_flops(table: pd.DataFrame) -> pd.DataFrame:
    """Rows without a method have no report: their FLOPs are those of the same number of steps in full."""
    table = table.copy()
    noop = table[(table["method"] == NO_OP) & table["error"].isna()]
    a_step = (noop["full_flops"] / noop["steps"]).groupby(noop["pipeline"]).median()
    plain = table["flops"].isna() & table["error"].isna()
    steps, each = table.loc[plain, "steps"], table.loc[plain, "pipeline"].map(a_step)
    table.loc[plain, "full_flops"] = steps.astype(float) * each.astype(float)
    table.loc[plain, "flops"] = table.loc[plain, "full_flops"]
    return table
