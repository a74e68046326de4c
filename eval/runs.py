"""The evaluation loop: pipelines x methods x prompts x seeds, in batches that are each done once, by one of the processes."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from dit_accel.eval.checking import bench_of, check, resolve
from dit_accel.eval.fidelity import decibels, squared_error, ssim
from dit_accel.eval.folder import RunFolder, read_table, write_json, write_table
from dit_accel.eval.maps import record_maps
from dit_accel.eval.measuring import Bench, Measured
from dit_accel.eval.rewards import load_reward
from dit_accel.eval.rewards.pictures import open_picture
from dit_accel.eval.spec import NO_OP, Cell, Spec, noise_seed
from dit_accel.eval.timing import Watcher, take_times, with_baselines
from dit_accel.pipelines.loading import pick_device
from dit_accel.pipelines.pictures import png, write_atomically

PATIENCE = timedelta(days=30)  # of a process that waits for the others


Places = Sequence[tuple[int, int]]  # (prompt number, seed number) of pictures of one method that are denoised together


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
        self.resolved = resolve(spec, self.device)
        folder.tell = watcher.note
        place = (socket.gethostname(), self.device)
        self.shared = (gather_object([place]) if several else [place]).count(place) > 1

    def prepare(self) -> None:
        """Look at everything that can be wrong, load the rewards and the first pipeline; nothing is written.

        Raises:
            ValueError: something that was asked for cannot be had, or the folder holds something else.
            dit_accel.pipelines.loading.LoadError: a pipeline cannot be had.
        """
        check(self.spec)
        self.folder.compare(self.spec, self.resolved)
        self.rewards = {name: load_reward(name, device=self.device) for name in self.spec.scores}
        self.first: Bench | None = bench_of(self.spec, self.spec.pipelines[0], self.device)

    def run(self) -> pd.DataFrame:
        """Do what is not done yet, after `prepare`; the rows of all pictures. Interrupted at any moment, it goes on next time.

        Raises:
            InUse: another process is at work in the folder.
        """
        with ExitStack() as stack:
            session = self.begin(stack)
            for name in self.spec.pipelines:
                bench, self.first = self.first or bench_of(self.spec, name, self.device), None
                if self.state.is_main_process:
                    take_times(bench, self.folder, self.spec, self.shared, session, self.watcher)
                self.state.wait_for_everyone()
                self.make_pictures(bench)
                self.state.wait_for_everyone()
                if self.state.is_main_process:
                    record_maps(bench, self.folder, self.spec, self.watcher)
                del bench
            return self.finish() if self.state.is_main_process else pd.DataFrame()

    def begin(self, stack: ExitStack) -> int:
        """Lock the folder and begin in it, the main process for all: they are one run. The number of the session."""
        session, refused = 0, None
        if self.state.is_main_process:
            try:
                stack.enter_context(self.folder.locked())
                self.folder.begin(self.spec, self.resolved)
            except Exception as error:  # for the other processes to hear of
                refused = error
        if self.state.num_processes > 1:
            refused = gather_object([refused])[0]
        if refused is not None:
            raise refused
        if self.state.is_main_process:
            session = self.folder.record_session(self.device, self.state.num_processes)
            cut = {name: reward.cut(self.spec.prompts) for name, reward in self.rewards.items()}
            write_json(self.folder.path / "cut.json", cut)
            self.watcher.note(" on ".join(self.resolved.values()))
        return session

    def make_pictures(self, bench: Bench) -> None:
        """The missing batches of this process; first the uncached ones, to which the others are compared."""
        batches = list(enumerate(self.folder.batches()))
        cells = with_baselines(self.folder, self.spec, bench.name)
        total, missing = 0, []
        for number, cell in enumerate(cells):
            own = [one for one in batches if (one[0] + number) % self.state.num_processes == self.state.process_index]
            total += sum(len(places) for _, places in own)
            missing.append([(batch, places) for batch, places in own if not self.done(bench.name, cell, batch, places)])
        if self.state.is_main_process:
            left = sum(len(places) for some in missing for _, places in some)
            self.watcher.stage(f"{bench.name}: pictures", total, total - left)
        for number, (cell, some) in enumerate(zip(cells, missing, strict=True)):
            with Measured(bench, cell) as measured:
                for batch, places in some:
                    key = {"cell": self.folder.key(bench.name, cell)}
                    rows = [row | key for row in self.rows_of(measured, places)]
                    write_table(self.folder.rows(bench.name, cell, batch), rows)
            if number == 0:
                self.state.wait_for_everyone()

    def done(self, pipeline: str, cell: Cell, batch: int, places: Places) -> bool:
        """Whether the rows of a batch can be read, and its pictures if others are compared with them."""
        rows = self.folder.read(self.folder.rows(pipeline, cell, batch), read_table)
        if rows is None or list(zip(rows["prompt_number"], rows["seed"], strict=True)) != list(places):
            return False
        failed = rows["error"].notna()
        if cell.kind == "full":
            made = [place for place, bad in zip(places, failed, strict=True) if not bad]
            if any(self.folder.read(self.folder.path / self.folder.picture(pipeline, cell, *one), whole) is None for one in made):
                return False
        without_baseline = cell.kind != "full" and ("squared_error" not in rows or rows["squared_error"].isna().any())
        return not (self.retry_failed and (failed.any() or without_baseline))

    def rows_of(self, measured: Measured, places: Places) -> list[dict[str, Any]]:
        """One row a picture. If a batch fails it is tried picture by picture; what fails then has an error."""
        cell = measured.cell
        common = {"pipeline": measured.bench.name, "method": cell.label, "kind": cell.kind}
        try:
            return [common | row for row in self.attempt(measured, places)]
        except Exception as error:  # one failing prompt or method does not end the run
            if len(places) == 1:
                return [common | self.place(*places[0]) | {"error": f"{type(error).__name__}: {error}"}]
        return [row for place in places for row in self.rows_of(measured, [place])]

    def attempt(self, measured: Measured, places: Places) -> list[dict[str, Any]]:
        """Make, save, score and compare the pictures of one batch."""
        name, cell = measured.bench.name, measured.cell
        found = [self.place(*place) for place in places]
        share = len(places) / measured.settings.steps
        on_step = (lambda: self.watcher.advance(share)) if self.state.is_main_process else lambda: None
        pictures, cost = measured([(row["prompt"], row["noise_seed"]) for row in found], on_step)
        images = [picture.image for picture in pictures]
        for label, reward in self.rewards.items():
            for row, score in zip(found, reward.score([row["prompt"] for row in found], images), strict=True):
                row[label] = float(score)
        for row, (prompt, seed), image in zip(found, places, images, strict=True):
            path = self.folder.picture(name, cell, prompt, seed)
            record = {"prompt": row["prompt"], "seed": row["noise_seed"], "pipeline": name, "method": cell.label}
            write_atomically(self.folder.path / path, png(image, record | {"options": cell.options()}))
            row |= {"picture": path.as_posix(), "error": None, **cost}
            if cell.kind != "full":
                row |= self.fidelity(name, prompt, seed, image)
        return found

    def place(self, prompt: int, seed: int) -> dict[str, Any]:
        text = self.spec.prompts[prompt]
        return {"prompt": text, "prompt_number": prompt, "seed": seed, "noise_seed": noise_seed(text, seed)}

    def fidelity(self, name: str, prompt: int, seed: int, image: Any) -> dict[str, float]:
        """To the uncached baseline; nothing where that one has failed."""
        baseline = self.folder.path / self.folder.picture(name, self.spec.cells[0], prompt, seed)
        if not baseline.is_file():
            return {}
        full = open_picture(baseline)
        error = squared_error(full, image)
        return {"squared_error": error, "psnr": decibels(error), "ssim": ssim(full, image)}

    def finish(self) -> pd.DataFrame:
        """Write all rows as one table, with the FLOPs of uncached runs, which the no-op cache has counted."""
        rows, times = with_flops(self.folder.table("rows")), with_flops(self.folder.table("timing"))
        write_table(self.folder.path / "results.parquet", rows)
        write_table(self.folder.path / "timing.parquet", times)
        return rows


def whole(picture: Path) -> bool:
    """True of a PNG whose checksums are right; an error otherwise."""
    with Image.open(picture) as image:
        image.verify()
    return True


def with_flops(table: pd.DataFrame) -> pd.DataFrame:
    """Rows without a method have no report: their FLOPs are those of the same number of uncached steps."""
    lacking = {name: float("nan") for name in ("steps", "flops", "full_flops") if name not in table}  # where all have failed
    table = table.assign(**lacking)
    noop = table[(table["method"] == NO_OP) & table["error"].isna()]
    a_step = (noop["full_flops"] / noop["steps"]).groupby(noop["pipeline"]).median()
    plain = table["flops"].isna() & table["error"].isna()
    steps, each = table.loc[plain, "steps"], table.loc[plain, "pipeline"].map(a_step)
    table.loc[plain, "full_flops"] = steps.astype(float) * each.astype(float)
    table.loc[plain, "flops"] = table.loc[plain, "full_flops"]
    return table
