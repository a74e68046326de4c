"""What one command does once its options are understood: make the pictures, save them, and tabulate them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from dit_accel.pipelines.generation import OnStep, Picture, Settings, compare, generate
from dit_accel.pipelines.methods import Config, describe, parts, settings_of
from dit_accel.pipelines.pictures import psnr, psnr_text, save, side_by_side, stem, unused
from dit_accel.pipelines.prompts import cut_text, unknown_words


@dataclass
class Job:
    """Prompts for one pipeline. `name` is what the user called the pipeline; `log` is where warnings and progress go."""

    pipe: Any
    name: str
    prompts: list[str]
    config: Config | list[Config] | None
    settings: Settings
    output: Path
    log: Console
    overwrite: bool = False

    def __post_init__(self) -> None:
        self.taken: set[str] = set()

    def warn(self) -> None:
        """Say which words of the prompts the pipeline will not see."""
        for prompt in self.prompts:
            quoted = escape(repr(prompt))
            if words := unknown_words(self.pipe, prompt):
                self.log.print(f"[yellow]Warning:[/] {escape(self.name)} does not know {escape(', '.join(words))} in {quoted}.")
            if cut := cut_text(self.pipe, prompt, self.settings.max_sequence_length):
                self.log.print(
                    f"[yellow]Warning:[/] {quoted} is longer than {self.settings.max_sequence_length} tokens; "
                    f"{escape(self.name)} does not see {escape(repr(cut))}."
                )

    def generate(self) -> Table:
        """One file a picture; the table says which."""
        table = Table("prompt", "seed", "denoising s", "whole call s", Column("picture", overflow="fold"))
        with self.progress(runs=1) as on_step:
            for picture in generate(self.pipe, self.prompts, self.config, self.settings, on_step):
                path = self.path(picture)
                save(picture.image, path, self.record(picture, self.config))
                times = f"{picture.denoising_seconds:.2f}", f"{picture.seconds:.2f}"
                table.add_row(escape(picture.prompt), f"{picture.seed}", *times, escape(str(path)))
        return table

    def compare(self, table: Table | None = None) -> Table:
        """Three files a picture: faster, in full, and both side by side. Adds to a table of an earlier job if there is one."""
        assert self.config
        table = table or Table(
            "pipeline",
            "prompt",
            "seconds full",
            "seconds merged" if list(parts(self.config)) == ["token-merge"] else "seconds cached",
            "speed-up",
            "PSNR",
            "picture",
            caption="Seconds are of denoising.",
        )
        with self.progress(runs=2) as on_step:
            for full, faster in compare(self.pipe, self.prompts, self.config, self.settings, on_step):
                path, likeness = self.path(faster), psnr(full.image, faster.image)
                beside = path.with_name(f"{path.stem}-compare.png")
                save(full.image, path.with_name(f"{path.stem}-full.png"), self.record(full, None))
                save(faster.image, path, self.record(faster, self.config))
                speedup = full.denoising_seconds / faster.denoising_seconds
                page = side_by_side(
                    f"{faster.prompt} ({self.name}, seed {faster.seed})",
                    [
                        (full.image, ["in full", f"{full.denoising_seconds:.2f} s denoising"]),
                        (
                            faster.image,
                            [
                                describe(self.config),
                                f"{faster.denoising_seconds:.2f} s, {speedup:.2f}x, PSNR {psnr_text(likeness)}",
                            ],
                        ),
                    ],
                )
                comparison = {
                    "psnr_db": None if math.isinf(likeness) else likeness,
                    "identical": math.isinf(likeness),
                    "speedup_denoising": speedup,
                    "speedup_whole_call": full.seconds / faster.seconds,
                    "full": {"seconds": full.seconds, "denoising_seconds": full.denoising_seconds},
                }
                save(page, beside, self.record(faster, self.config) | {"comparison": comparison})
                table.add_row(
                    escape(self.name),
                    escape(faster.prompt),
                    f"{full.denoising_seconds:.2f}",
                    f"{faster.denoising_seconds:.2f}",
                    f"{speedup:.2f}x",
                    psnr_text(likeness),
                    escape(str(beside)),
                )
        return table

    def path(self, picture: Picture) -> Path:
        name = stem(picture.prompt, picture.seed)
        return self.output / f"{name if self.overwrite else unused(self.output, name, self.taken)}.png"

    def record(self, picture: Picture, config: Config | list[Config] | None) -> dict[str, Any]:
        """All that is needed to make the picture again, and what making it took."""
        settings = asdict(self.settings)
        del settings["seed"], settings["num_images"]  # the picture's own seed takes their place
        parameter = next(self.pipe.transformer.parameters())
        device = torch.device(self.pipe._execution_device)
        return {
            "prompt": picture.prompt,
            "seed": picture.seed,
            "pipeline": self.name,
            "pipeline_class": type(self.pipe).__name__,
            **settings,
            **settings_of(config),
            "work": picture.work,
            "seconds": picture.seconds,
            "denoising_seconds": picture.denoising_seconds,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "versions": {package: version(package) for package in ("dit-accel", "torch", "diffusers", "transformers")},
        }

    @contextmanager
    def progress(self, runs: int) -> Iterator[OnStep]:
        """A bar over all denoising steps; gives what to call after each."""
        pictures = len(self.prompts) * self.settings.num_images
        total = -(-pictures // self.settings.batch_size) * self.settings.steps * runs
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.log, transient=True) as bar:
            task = bar.add_task(f"{self.name}: denoising", total=total)
            yield lambda: bar.advance(task)
