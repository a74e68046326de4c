"""Measurements as JSON, with the machine and the versions they were taken on."""

from __future__ import annotations

import functools
import json
import os
import platform
from collections.abc import Collection, Iterator
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from dit_accel.pipelines.pictures import write_atomically


def processor() -> str:
    """The CPU's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def fast_dtype() -> str:
    """bfloat16, which real checkpoints run in; on CPUs without AVX-512 torch emulates its products, many times slower: float32."""
    capable = torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return "bfloat16" if capable else "float32"


PACKAGES = ("dit-accel", "torch", "diffusers", "transformers", "cache-dit", "tomesd")


@functools.cache
def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {one.name.replace("_", "-"): one.version for one in distributions()}
    return {name: found[name] for name in PACKAGES if name in found}


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of measurements whole or not at all."""
    machine = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": versions(),
        "rows": rows,
    }
    write_atomically(path, json.dumps(record, indent=1).encode())


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a record, none if there is no record yet."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def known(rows: list[dict[str, Any]], pipeline: str, prompt: str) -> set[Any]:
    """The settings of which a pipeline has a row of this prompt; {None} where rows have no setting."""
    return {row.get("setting") for row in rows if row["pipeline"] == pipeline and row["prompt"] == prompt}


def left(
    rows: list[dict[str, Any]], pipeline: str, prompts: list[str], count: int, settings: Collection[str] = ()
) -> Iterator[tuple[int, str]]:
    """With progress, numbers and prompts of so many, spread over a set, of which a pipeline lacks rows, of some settings or all."""
    for number in track(range(count), description=pipeline):
        prompt = prompts[number * len(prompts) // count]
        if not (there := known(rows, pipeline, prompt)) or not there >= set(settings):
            yield number, prompt


def renew(page: Path, maker: str, lines: list[str]) -> None:
    """Put lines where a page has what a script of this name made before, between its marks; a page without them stays as it is."""
    text, begin, end = page.read_text(encoding="utf-8"), f"<!-- made by {maker} -->", "<!-- end -->"
    if begin in text:
        before, rest = text.split(begin)
        write_atomically(page, (before + "\n".join([begin, "", *lines, "", end]) + rest.split(end, 1)[1]).encode())
