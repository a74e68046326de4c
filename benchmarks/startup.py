"""How long until it is there? Seconds of `import dit_accel` beyond torch and diffusers, and of `--help`, each in a fresh process.

python benchmarks/startup.py --output out/startup.json
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import typer
from recording import save
from rich.progress import track
from rich.table import Table

from dit_accel.pipelines.terminal import show

IMPORT = "import time, torch, diffusers; start = time.perf_counter(); from dit_accel import *; print(time.perf_counter() - start)"
MODELS = IMPORT.replace("from dit_accel import *", "from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel")
BIN = Path(sys.executable).parent
COMMANDS = {
    "import dit_accel, beyond torch and diffusers": [sys.executable, "-c", IMPORT],
    "for comparison: the two transformers of diffusers": [sys.executable, "-c", MODELS],
    "dit-accel --help": [str(BIN / "dit-accel"), "--help"],
    "dit-accel-eval --help": [str(BIN / "dit-accel-eval"), "--help"],
}


def main(
    repeats: int = typer.Option(7, min=1, help="Processes of each kind, after the first, which warms the disk's cache."),
    output: Path = typer.Option(Path("out/startup.json"), help="Where the measurements are written."),
) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for repeat in track(range(repeats + 1), description="processes"):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            whole = time.perf_counter() - start
            if repeat:
                seconds[name].append(whole if command[-1] == "--help" else float(printed))
    save(output, [{"what": name, "seconds": values} for name, values in seconds.items()])
    table = Table("what", "seconds", caption="Medians.")
    for name, values in seconds.items():
        table.add_row(name, f"{statistics.median(values):.3f}")
    show(table)
    typer.echo(f"Measurements: {output}")


if __name__ == "__main__":
    typer.run(main)
