"""The evaluation loop: pipelines x methods x prompts x seeds, in batches that are each done once, by one of the processes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState
from accelerate.utils import gather_object

from eval.fidelity import decibels, squared_error, ssim
from eval.folder import RunFolder, write_json, write_table
from eval.maps import record_maps
from eval.measuring import Measured
from eval.rewards import load_reward
from eval.rewards.pictures import open_picture
from eval.spec import NO_OP, Cell, Spec, noise_seed
from eval.timing import Watcher, take_times, with_baselines
from pipelines.generation import Settings, settings_for
from pipelines.loading import load, pick_device
from pipelines.pictures import png, write_atomically

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
            if self.state.is_main_process:
                take_times(pipe, settings, self.folder, self.spec, name, self.shared, sitting, self.watcher)
            self.state.wait_for_everyone()
            self.make_pictures(name, pipe, settings)
            self.state.wait_for_everyone()
            if self.state.is_main_process:
                record_maps(pipe, settings, self.folder, self.spec, name, self.watcher)
            del pipe
        return self.finish() if self.state.is_main_process else pd.DataFrame()

    def make_pictures(self, name: str, pipe: Any, settings: Settings) -> None:
        """The missing batches of this process; first those in full, to which the others are compared."""
        pipeline, batches = self.spec.pipelines.index(name), batches_of(self.spec)
        cells = with_baselines(self.folder, self.spec, name)
        mine = [
            [batch for i, batch in enumerate(batches) if (i + number) % self.state.num_processes == self.state.process_index]
            for number in range(len(cells))
        ]
        missing = [
            [batch for batch in some if not self.done(self.folder.rows(pipeline, number, batch.number), cells[number])]
            for number, some in enumerate(mine)
        ]
        pictures = [sum(len(batch.places) for some in part for batch in some) for part in (mine, missing)]
        if self.state.is_main_process:
            self.watcher.stage(f"{name}: pictures", pictures[0], pictures[0] - pictures[1])
        for number, (cell, some) in enumerate(zip(cells, missing, strict=True)):
            for batch, rows in self.rows_of(name, pipe, settings, number, cell, some):
                write_table(self.folder.rows(pipeline, number, batch.number), rows)
            if number == 0:
                self.state.wait_for_everyone()

    def done(self, path: Path, cell: Cell) -> bool:
        if not self.retry_failed or not path.exists():
            return path.exists()
        rows = pd.read_parquet(path)
        without_twin = cell.kind != "full" and ("squared_error" not in rows or rows["squared_error"].isna().any())
        return not (rows["error"].notna().any() or without_twin)

    def rows_of(
        self, name: str, pipe: Any, settings: Settings, number: int, cell: Cell, batches: Sequence[Batch]
    ) -> Iterator[tuple[Batch, list[dict[str, Any]]]]:
        """One row a picture, batch by batch. A batch that fails is tried picture by picture; what fails then has an error."""
        advance = self.watcher.advance if self.state.is_main_process else lambda amount: None
        for batch in batches:
            steps = cell.steps or settings.steps
            step: Callable[[], None] = lambda share=len(batch.places) / steps: advance(share)  # noqa: B008, E731
            common = {"pipeline": name, "method": cell.label, "kind": cell.kind}
            rows: list[dict[str, Any]] = []
            for attempt in (batch.places,) if len(batch.places) == 1 else (batch.places, *((place,) for place in batch.places)):
                try:
                    rows += self.attempt(name, pipe, settings, number, cell, attempt, step)
                except Exception as error:  # one failing prompt or method does not end the run
                    if len(attempt) == 1:
                        reason = f"{type(error).__name__}: {error}"
                        rows.append({**self.place(*attempt[0]), "error": reason})
                else:
                    if len(attempt) == len(batch.places):
                        break
            yield batch, [common | row for row in rows]

    def attempt(
        self,
        name: str,
        pipe: Any,
        settings: Settings,
        number: int,
        cell: Cell,
        places: Sequence[tuple[int, int]],
        on_step: Callable[[], None],
    ) -> list[dict[str, Any]]:
        """Make, save, score and compare the pictures of one batch."""
        pipeline = self.spec.pipelines.index(name)
        found = [self.place(*place) for place in places]
        with Measured(pipe, cell, settings) as measured:
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
    table.loc[plain, "full_flops"] = table.loc[plain, "steps"].astype(float) * table.loc[plain, "pipeline"].map(a_step).astype(
        float
    )
    table.loc[plain, "flops"] = table.loc[plain, "full_flops"]
    return table
