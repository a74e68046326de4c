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
from time import perf_counter
from typing import Any

import recording
import torch
import typer
from optimum.quanto import freeze, qint8, quantize
from rich.progress import track

import dit_accel
from dit_accel.eval.fidelity import squared_error
from dit_accel.eval.prompt_sets import read_prompt_set
from dit_accel.eval.rewards import load_reward
from dit_accel.eval.spec import noise_seed
from dit_accel.pipelines.generation import denoise, settings_for, switched
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
        quantize(pipe.transformer, weights=qint8)
        freeze(pipe.transformer)
    return pipe


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
        for number in track(range(prompts), description=name):
            prompt = PROMPTS[number * len(PROMPTS) // prompts]
            if any(row["pipeline"] == name and row["prompt"] == prompt for row in rows):
                continue
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
    tokens: int = typer.Option(1024, help="Image tokens: 1024 are 512 x 512 pixels."),
    rounds: int = typer.Option(5, min=1, help="Steps of each, in turn."),
    output: Path = typer.Option(Path("out/quantized-width.json"), help="File of the measurements."),
) -> None:
    """Time a step of one double and two single blocks of FLUX.1 at full width, and count the bytes of their weights."""
    from diffusers import FluxTransformer2DModel

    quiet()
    models = {}
    for numbers in NUMBERS[1:]:
        torch.manual_seed(0)
        with torch.device("meta"):
            model = FluxTransformer2DModel(num_layers=1, num_single_layers=2, guidance_embeds=True)
        model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
        for weight in model.parameters():
            weight.data.normal_(0, 0.02)
        if numbers == "int8":
            quantize(model, weights=qint8)
            freeze(model)
        models[numbers] = model
    side = int(tokens**0.5)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side)))
    given = {
        "hidden_states": torch.randn(1, side * side, 64, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, 512, 4096, dtype=torch.bfloat16),
        "pooled_projections": torch.randn(1, 768, dtype=torch.bfloat16),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "guidance": torch.tensor([3.5], dtype=torch.bfloat16),
        "img_ids": ids,
        "txt_ids": torch.zeros(512, 3),
    }
    taken: dict[str, list[float]] = {numbers: [] for numbers in models}
    with torch.inference_mode():
        for number in track(range(rounds + 1), description="rounds"):
            for numbers in random.Random(number).sample(list(models), len(models)):
                start = perf_counter()
                models[numbers](**given)
                taken[numbers].append(perf_counter() - start)
    recording.save(
        output, [{"numbers": n, "tokens": side * side, "seconds": taken[n][1:], "bytes": size(m)} for n, m in models.items()]
    )
    for numbers, model in models.items():
        typer.echo(f"{numbers}: {median(taken[numbers][1:]):.2f} s a step, weights {size(model) / 1e9:.2f} GB")


def size(model: Any) -> int:
    """Bytes of a model's weights as they lie in memory."""
    parts = (part for value in model.state_dict().values() for part in (value.values() if isinstance(value, dict) else [value]))
    return sum(part.numel() * part.element_size() for part in parts if isinstance(part, torch.Tensor))


if __name__ == "__main__":
    app()
