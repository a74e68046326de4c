"""The report of a run: its numbers, what it says about what is missing, and that it works in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from eval import cli, drawing, figures, page
from eval.folder import RunFolder, write_json, write_table
from eval.report import extremes, read_run, write_report
from eval.summary import summarise

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RESAMPLES = 200
METHODS = [
    "cache selector=random interval=3",
    "cache selector=drift interval=3",
    "cache selector=drift interval=5",
    "merge ratio=0.5",
]
PROMPTS = ["crab, 3d style", "red apple, flat style", "cactus", "a tiger"]
HOSTILE = '<script>document.title="taken"</script> & "quotes" ]]> --'


def make_run(
    path: Path,
    methods: list[str] = METHODS,
    prompts: list[str] = PROMPTS,
    pipelines: tuple[str, ...] = ("emoji-flux",),
    seeds: int = 2,
    scores: tuple[str, ...] = ("emoji-reward",),
    rounds: int = 3,
    side: int = 16,
    maps: bool = True,
    pictures: bool = True,
) -> Path:
    """A run folder as `dit-accel-eval run` leaves it, with figures out of a random generator."""
    rng = np.random.default_rng(0)
    cells = [("full", "full", 20), ("no-op cache", "no-op", 20), *((name, "method", 20) for name in methods)]
    cells += [("10 steps", "fewer steps", 10), ("5 steps", "fewer steps", 5)]
    rows, times = [], []
    for p, pipeline in enumerate(pipelines):
        base = {(prompt, seed): rng.normal(0.8, 0.5, len(scores)) for prompt in prompts for seed in range(seeds)}
        for number, (method, kind, steps) in enumerate(cells):
            plain = kind in ("full", "no-op")
            ratio = 1.0 if plain else 20 / steps if kind == "fewer steps" else 1 + 3 * number / len(cells)
            loss = 0.0 if plain else 0.08 * ratio * rng.uniform(-0.1, 0.6)
            work = {"flops": 1e10 / ratio, "full_flops": 1e10 * steps / 20, "peak_memory": None}
            work |= {"cache_bytes": 2**20 * 3.0 if kind == "method" else math.nan}
            common = {"pipeline": pipeline, "method": method, "kind": kind, "error": None, "steps": steps}
            for i, (prompt, seed) in enumerate((a, b) for a in prompts for b in range(seeds)):
                score = base[prompt, seed] - (0 if plain else rng.normal(loss, 0.05, len(scores)))
                picture = Path("pictures", f"{p:02}", f"{number:02}", f"{i:04}.png")
                if pictures:
                    colour = tuple(int(c) for c in np.random.default_rng(i).integers(0, 255, 3))
                    (path / picture).parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (side, side), colour).save(path / picture)
                error = {} if kind == "full" else {"squared_error": 0.0 if plain else float(rng.uniform(5, 50))}
                error |= {} if kind == "full" else {"ssim": 1.0 if plain else 0.95, "psnr": 20.0}
                row = {**common, "prompt": prompt, "prompt_number": i // seeds, "seed": seed, "picture": picture.as_posix()}
                rows.append({**row, **work, **error, **dict(zip(scores, map(float, score), strict=True)), "seconds": 1.0})
            for round_number in range(1, rounds + 1):
                seconds = 2.0 / ratio**0.8 * rng.uniform(0.95, 1.1)
                cost = {"denoising_seconds": seconds, "seconds": seconds + 0.2, "round": round_number, "comparable": True}
                times.append({**common, **work, **cost, "sitting": 0})
            if kind == "method" and method.startswith("cache") and maps:
                share = np.round(rng.uniform(0, 0.4, (8, 8)) + np.linspace(0, 0.3, 8), 4)
                record = {"pipeline": pipeline, "method": method, "grid": [8, 8], "share": share.tolist(), "uniformity": 0.97}
                write_json(
                    path / "maps" / f"{p:02}-{number:04}.json", record | {"row_bias": 0.1, "column_bias": 0.6, "pictures": 2}
                )
    spec = {
        "pipelines": pipelines,
        "prompts": prompts,
        "methods": [{"cache": {"selector": "random", "interval": 3}}],
        "seeds": seeds,
    }
    spec |= {"scores": scores, "margin": 0.1, "steps": 20, "guidance": None, "height": None, "width": None, "batch_size": 4}
    spec |= {
        "timing_rounds": rounds,
        "timing_batch_size": 1,
        "dtype": "auto",
        "device": "auto",
        "offload": "none",
        "selector_file": None,
    }
    write_json(path / "spec.json", {"spec": spec, "versions": {"torch": "2.13.0", "diffusers": "0.42.1"}})
    write_json(path / "cut.json", {score: 1 for score in scores})
    write_json(path / "baselines.json", {name: {"10": [f"seconds of {methods[0]}"], "5": []} for name in pipelines})
    sitting = {"started": "2026-01-02 03:04:05", "device": "cpu", "processes": 1, "hardware": "Some CPU", "threads": 4, "cores": 8}
    write_json(path / "sittings" / "000.json", sitting | {"python": "3.11.7", "platform": "Linux"})
    write_table(path / "results.parquet", rows)
    write_table(path / "timing.parquet", times)
    return path
