"""The work of one command, its options parsed: make the pictures, save them, and list them in a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dit_accel.pipelines.generation import OnStep, Picture, Settings, compare, generate
from dit_accel.pipelines.methods import Config, describe, parts, settings_of
from dit_accel.pipelines.pictures import psnr, psnr_text, save, side_by_side, stem, unused
from dit_accel.pipelines.progress import denoising
from dit_accel.pipelines.prompts import cut_text, unknown_words
from dit_accel.pipelines.terminal import warn


@dataclass
class Job:
    """Prompts for one pipeline.

    Attributes:
        name: what the user called the pipeline.
        output: folder of the pictures.
        log: where warnings, progress and a line about every picture go.
        overwrite: whether pictures of an earlier job may be replaced; no two of this one share a file.
        tell: called with the record of every picture once it is saved, and the paths of its files.
    """

    pipe: Any
    name: str
    prompts: list[str]
    config: Config | list[Config] | None
    settings: Settings
    output: Path
    log: Console
    overwrite: bool = False
    tell: Callable[[dict[str, Any]], None] = lambda record: None

    def __post_init__(self) -> None:
        self.taken: set[str] = set()

    def warn(self, doubts: Sequence[str] = ()) -> None:
        """Say which words of the prompts the pipeline will not see, and what else is doubtful."""
        said = list(doubts)
        for prompt in self.prompts:
            if words := unknown_words(self.pipe, prompt):
                said.append(f"{self.name} does not know {', '.join(words)} in {prompt!r}.")
            if cut := cut_text(self.pipe, prompt, self.settings.max_sequence_length):
                said.append(
                    f"{prompt!r} is longer than {self.settings.max_sequence_length} tokens; {self.name} does not see {cut!r}."
                )
        for sentence in said:
            warn(self.log, sentence)

    def generate(self) -> Table:
        """One file a picture; the table says which."""
        table = Table("prompt", "seed", "denoising s", "whole call s", Column("picture", no_wrap=True))
        with self.progress(runs=1) as on_step:
            for picture in generate(self.pipe, self.prompts, self.config, self.settings, on_step):
                record = self.record(picture, self.config)
                path = self.keep(picture, record, endings=("",))
                self.tell({"picture": str(path), **record})
                self.say(path, picture, picture.saved_seconds)
                times = f"{picture.denoising_seconds:.2f}", f"{picture.seconds:.2f}"
                table.add_row(escape(picture.prompt), f"{picture.seed}", *times, escape(str(path)))
        return table

    def compare(self, table: Table | None = None) -> Table:
        """Three files a picture: faster, uncached, and both side by side. Adds to a table of an earlier job if there is one."""
        assert self.config
        table = table or Table(
            "pipeline",
            "prompt",
            "seconds uncached",
            "seconds merged" if list(parts(self.config)) == ["token-merge"] else "seconds cached",
            "speed-up",
            "PSNR",
            Column("picture", no_wrap=True),
            caption="Seconds are of denoising.",
        )
        with self.progress(runs=2) as on_step:
            for full, faster in compare(self.pipe, self.prompts, self.config, self.settings, on_step):
                record, likeness = self.record(faster, self.config), psnr(full.image, faster.image)
                path = self.keep(faster, record, endings=("", "-full", "-compare"))
                beside, whole = path.with_name(f"{path.stem}-compare.png"), path.with_name(f"{path.stem}-full.png")
                save(full.image, whole, self.record(full, None))
                speedup = full.denoising_seconds / faster.denoising_seconds
                page = side_by_side(
                    f"{faster.prompt} ({self.name}, seed {faster.seed})",
                    [
                        (full.image, ["uncached", f"{full.denoising_seconds:.2f} s denoising"]),
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
                record |= {"comparison": comparison}
                save(page, beside, record)
                self.tell({"picture": str(path), "full": str(whole), "compare": str(beside), **record})
                self.say(beside, faster, full.denoising_seconds - faster.denoising_seconds)
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

    def keep(self, picture: Picture, record: dict[str, Any], endings: Sequence[str]) -> Path:
        """Save a picture under a name that no other has, also where another process writes into the same folder."""
        folder = None if self.overwrite else self.output
        while True:
            name = unused(folder, stem(picture.prompt, picture.seed), self.taken, endings)
            path = self.output / f"{name}.png"
            try:
                save(picture.image, path, record, replace=self.overwrite)
                return path
            except FileExistsError:
                if not path.exists():
                    raise

    def say(self, path: Path, picture: Picture, saved: float | None) -> None:
        """A line about a picture: where it is, its seconds, those that were saved, and what the report says."""
        words = [f"{picture.seconds:.2f} s"]
        if saved is not None:
            words.append(f"about {abs(saved):.2f} s {'saved' if saved >= 0 else 'lost'}")
        if work := picture.work:
            words.append(f"{work['full_flops'] / work['flops']:.2f} times fewer FLOPs" if work["flops"] else "no FLOPs")
            words.append(f"cache {work['cache_bytes'] / 2**20:.1f} MiB")
        self.log.print(f"{escape(str(path))}: {', '.join(words)}", soft_wrap=True, highlight=False)

    def record(self, picture: Picture, config: Config | list[Config] | None) -> dict[str, Any]:
        """All that is needed to make the picture again, and what it cost."""
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
            "saved_seconds_estimate": picture.saved_seconds,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "versions": {package: version(package) for package in ("dit-accel", "torch", "diffusers", "transformers")},
        }

    def progress(self, runs: int) -> AbstractContextManager[OnStep]:
        """Shows how many of all denoising steps are done; gives what to call after each."""
        pictures = len(self.prompts) * self.settings.num_images
        return denoising(self.log, -(-pictures // self.settings.batch_size) * self.settings.steps * runs)
