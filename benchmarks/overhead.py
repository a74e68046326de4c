"""What does a step of a small model cost besides its matrix work? On the embedded pipelines, one picture at a time.

    python benchmarks/overhead.py --output out/overhead.json
    python benchmarks/overhead.py --beside ../dit-accel-before      # another checkout, in turn with this one

Every round runs in a process of its own. Matrix work is what torch's profiler counts for products, attention, convolutions and
activations; the rest of a step is Python, selecting, gathering, scattering and sums. The number of operators tells how busy a GPU's
queue is kept, where none of them takes long.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import typer
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parent.parent
PIPELINES = ("emoji-flux", "emoji-pixart")
INTERVAL = 5
KINDS = {"stock": None, "random": 0.9, "attention": 0.9, "drift": 0.9, "nothing": 1.0}  # selector, cache ratio
MATRIX = ("addmm", "mm", "bmm", "linear", "conv", "attention", "gelu", "silu")  # parts of operators' names


def seconds_of_calls(pipe: Any, settings: Any, on_call: Any = None) -> list[float]:
    """Of the transformer's calls that make one picture."""
    from dit_accel.pipelines.generation import denoise

    moments: list[float] = []
    handles = [
        pipe.transformer.register_forward_pre_hook(lambda *_: moments.append(time.perf_counter()), prepend=True),
        pipe.transformer.register_forward_hook(lambda *_: moments.append(time.perf_counter())),
    ]
    if on_call is not None:
        handles.append(pipe.transformer.register_forward_pre_hook(lambda *_: on_call(len(moments) // 2), prepend=True))
    denoise(pipe, [("red apple, 3d style", 0)], settings, lambda: None, applied=False)
    for handle in handles:
        handle.remove()
    return [end - start for start, end in zip(moments[::2], moments[1::2], strict=True)]


def operators(pipe: Any, settings: Any) -> dict[str, float]:
    """Operators of the third call, which is a partial step where something is cached, and seconds of their matrix work."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU])

    def listen(number: int) -> None:
        if number == 2:
            profiler.start()
        elif number == 3:
            profiler.stop()

    seconds_of_calls(pipe, settings, listen)
    events = [event for event in profiler.key_averages() if event.key.startswith("aten::")]
    matrix = [event for event in events if any(part in event.key for part in MATRIX)]
    return {
        "operators": sum(event.count for event in events if event.self_cpu_time_total > 0),
        "matrix_seconds": sum(event.self_cpu_time_total for event in matrix) / 1e6,
    }


def measure(name: str, dtype: str, pictures: int) -> list[dict[str, Any]]:
    """One row a kind of step: its median seconds, and the operators of one."""
    import torch

    from dit_accel import TokenCacheConfig
    from dit_accel.pipelines.generation import settings_for, switch
    from dit_accel.pipelines.loading import load

    pipe = load(name).to(getattr(torch, dtype))
    settings, seconds, rows = settings_for(pipe, name), defaultdict(list), []
    configs = {
        kind: None if ratio is None else TokenCacheConfig(interval=INTERVAL, cache_ratio=ratio, selector=selector)
        for kind, ratio in KINDS.items()
        for selector in (kind if kind in ("attention", "drift") else "random",)
    }
    for picture in range(pictures + 1):
        for kind, config in configs.items():
            switch(pipe, config)
            calls = seconds_of_calls(pipe, settings)
            if picture:  # the first warms up
                seconds[kind, "partial" if config else "full"] += [s for i, s in enumerate(calls) if i % INTERVAL or not config]
                seconds[kind, "full"] += calls[::INTERVAL] if config else []
    for (kind, step), values in seconds.items():
        row = {"pipeline": name, "kind": kind, "step": step, "seconds": statistics.median(values)}
        if step == "partial" or kind == "stock":
            switch(pipe, configs[kind])
            row |= operators(pipe, settings)
        rows.append(row)
    return rows


def in_process(checkout: Path, name: str, dtype: str, pictures: int, threads: int) -> list[dict[str, Any]]:
    """The rows of `measure` with the packages of a checkout, from a process of their own."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import json, overhead; "
    code += f"print(json.dumps(overhead.measure({name!r}, {dtype!r}, {pictures})))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(
    beside: Path | None = typer.Option(None, exists=True, help="Another checkout, measured in turn with this one."),
    rounds: int = typer.Option(3, min=1, help="Processes for each pipeline and checkout."),
    pictures: int = typer.Option(5, min=1, help="Pictures of each kind in a process, after the first."),
    dtype: str | None = typer.Option(None, help="What is computed in; by default what the machine is fast in."),
    threads: int = typer.Option(1, help="CPU threads."),
    output: Path = typer.Option(Path("out/overhead.json"), help="Where the measurements are written."),
) -> None:
    from recording import fast_dtype, save

    from dit_accel.pipelines.terminal import show

    dtype = dtype or fast_dtype()
    checkouts = {"now": ROOT} | ({"before": beside.resolve()} if beside else {})
    found: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for _ in track(range(rounds), description="rounds"):
        for name in PIPELINES:
            for checkout, path in reversed(checkouts.items()):
                for row in in_process(path, name, dtype, pictures, threads):
                    found[row["pipeline"], row["kind"], row["step"], checkout].append(row)
    table = Table("pipeline", "selector", "step", "checkout", "ms", "of it matrix work", "operators", caption="Medians.")
    rows = []
    for (name, kind, step, checkout), several in found.items():
        row = {"pipeline": name, "kind": kind, "step": step, "checkout": checkout, "dtype": dtype, "threads": threads}
        for key in ("seconds", "matrix_seconds", "operators"):
            row[key] = [one[key] for one in several if key in one]
        rows.append(row)
        shown = [f"{1e3 * statistics.median(row[key]):.2f}" if row[key] else "" for key in ("seconds", "matrix_seconds")]
        table.add_row(name, kind, step, checkout, *shown, f"{statistics.median(row['operators']):.0f}" if row["operators"] else "")
    save(output, rows)
    show(table)
    typer.echo(f"Measurements: {output}")


if __name__ == "__main__":
    typer.run(main)
