"""Recipes together with smaller numbers: bfloat16 and int8 weights (optimum-quanto) at 1, 2 and 3 times the speed.

    python benchmarks/quantized.py pictures     # likeness, score; do the losses add up?
    python benchmarks/quantized.py width        # seconds and bytes of one step at FLUX's width, random weights

A picture is compared with that of the pipeline in float32, uncached, and with that in its own numbers, uncached. Were the two
losses independent, the squared error of both together would be the sum of their squared errors.
"""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median
from typing import Any

import recording
import torch
import typer
from optimum.quanto import freeze, qint8, quantize
from rich.progress import track
from width import build, run

import dit_accel
from dit_accel.eval.fidelity import squared_error
from dit_accel.eval.prompt_sets import read_prompt_set
from dit_accel.eval.rewards import load_reward
from dit_accel.eval.spec import noise_seed
from dit_accel.pipelines.generation import DenoisingClock, denoise, settings_for, switched
from dit_accel.pipelines.loading import load
from dit_accel.pipelines.terminal import quiet

app = typer.Typer(no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
ROOT = Path(__file__).parent.parent
PIPELINES, NUMBERS, SPEEDS, SCORE = ["emoji-flux", "emoji-pixart"], ("float32", "bfloat16", "int8"), (1.0, 2.0, 3.0), "emoji-reward"
PROMPTS = read_prompt_set(ROOT / "eval" / "specs" / "embedded.txt")
Output = typer.Option(Path("out/quantized.json"), help="File of the measurements.")


def loaded(name: str, numbers: str) -> Any:
    """A pipeline whose transformer computes in these numbers; int8 is of its weights, which are multiplied as float32."""
    pipe = load(name, "bfloat16" if numbers == "bfloat16" else "float32")
    if numbers == "int8":
        shrink(pipe)
    return pipe


def shrink(pipe: Any) -> None:
    """Make its transformer's weights int8."""
    quantize(pipe.transformer, weights=qint8)
    freeze(pipe.transformer)


@app.command()
def pictures(
    pipelines: list[str] = typer.Option(PIPELINES, "--pipeline", help="emoji-flux or emoji-pixart; may be repeated."),
    prompts: int = typer.Option(24, min=2, max=len(PROMPTS), help="How many prompts, spread over the set."),
    output: Path = Output,
) -> None:
    """Make, compare and score the pictures. What the output holds is not made again."""
    torch.set_num_threads(1)
    quiet()
    reward, rows = load_reward(SCORE), recording.rows_of(output)
    for name in pipelines:
        pipes = {numbers: loaded(name, numbers) for numbers in NUMBERS}
        settings = settings_for(pipes["float32"], name)
        for _, prompt in recording.left(rows, name, PROMPTS, prompts):
            made = {}
            for numbers, pipe in pipes.items():
                for speed in SPEEDS:
                    with switched(pipe, None):
                        if speed > 1:
                            dit_accel.apply(pipe, speedup=speed)
                        made[numbers, speed] = denoise(
                            pipe, [(prompt, noise_seed(prompt, 0))], settings, lambda: None, applied=False
                        )[0]
            scores = reward.score([prompt] * len(made), [one.image for one in made.values()])
            for ((numbers, speed), one), score in zip(made.items(), scores, strict=True):
                row = {"pipeline": name, "prompt": prompt, "numbers": numbers, "speed": speed, SCORE: float(score)}
                row |= {"to_float32": squared_error(made["float32", 1.0].image, one.image)}
                row |= {"to_its_own": squared_error(made[numbers, 1.0].image, one.image), "seconds": one.denoising_seconds}
                rows.append(row)
            recording.save(output, rows)


@app.command()
def width(
    pixels: int = typer.Option(512, help="Side of the picture; 512 are 1,024 tokens."),
    rounds: int = typer.Option(5, min=1, help="Steps of each, in turn."),
    output: Path = typer.Option(Path("out/quantized-width.json"), help="File of the measurements."),
) -> None:
    """Time a step of one double and two single blocks of FLUX.1 at full width, and count the bytes of their weights."""
    quiet()
    pipes = {numbers: build("flux", 1, torch.bfloat16, "cpu") for numbers in NUMBERS[1:]}
    shrink(pipes["int8"])
    taken: dict[str, list[float]] = {numbers: [] for numbers in pipes}
    for number in track(range(rounds + 1), description="rounds"):
        for numbers in random.Random(number).sample(list(pipes), len(pipes)):
            with DenoisingClock(pipes[numbers]) as clock:
                run(pipes[numbers], pixels, 1)
            taken[numbers].append(clock.seconds)
    models, tokens = {numbers: pipe.transformer for numbers, pipe in pipes.items()}, (pixels // 16) ** 2
    rows = [{"numbers": n, "tokens": tokens, "seconds": taken[n][1:], "bytes": size(m)} for n, m in models.items()]
    recording.save(output, rows)
    for numbers, model in models.items():
        typer.echo(f"{numbers}: {median(taken[numbers][1:]):.2f} s a step, weights {size(model) / 1e9:.2f} GB")


def size(model: Any) -> int:
    """Bytes of a model's weights as they lie in memory."""
    parts = (part for value in model.state_dict().values() for part in (value.values() if isinstance(value, dict) else [value]))
    return sum(part.numel() * part.element_size() for part in parts if isinstance(part, torch.Tensor))


if __name__ == "__main__":
    app()
