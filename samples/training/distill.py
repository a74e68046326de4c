"""Distill guidance into emoji-flux, as in FLUX.1-dev: one pass does what guidance takes two for.

    python samples/training/distill.py                            # from the averaged weights of train.py flux
    python samples/training/distill.py --teacher samples/emoji-flux

The student is the teacher with a guidance embedding that says nothing at first, so that it starts as the teacher at guidance 1. It
learns the teacher's guided velocity, uncond + g (cond - uncond), for a random g that it is told (Meng et al., CVPR 2023). The text
encoders stay as they are. Sees train.py's scenes; an interrupted run goes on where it stopped. Writes the pipeline in diffusers
format.
"""

from __future__ import annotations

from math import inf
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from diffusers import FluxPipeline, FluxTransformer2DModel

from common import open_vae
from data import WORK
from generate import open_pipeline
from loop import Text, run
from train import Flux, places, save_pipeline, sheets, times

GUIDANCE = (1.0, 6.0)
EARLY = 0.3  # as train.py's --early


def student_of(teacher: FluxPipeline, start: Path | None = None) -> Flux:
    """The teacher's parts, and a transformer with a guidance embedding: that of a finished pipeline, or the teacher's own with an
    embedding that adds nothing yet."""
    student = Flux(guided=True)
    for name in ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"):
        setattr(student, name, getattr(teacher, name))
    if start:
        student.transformer.load_state_dict(FluxTransformer2DModel.from_pretrained(start / "transformer").state_dict())
    else:
        student.transformer.load_state_dict(teacher.transformer.state_dict(), strict=False)
        last = student.transformer.time_text_embed.guidance_embedder.linear_2
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
    return student.requires_grad_(False)


def distillation_loss(
    teacher: FluxTransformer2DModel, student: Flux, latents: torch.Tensor, tokens: Text, generator: torch.Generator
) -> torch.Tensor:
    """Squared error of the student's velocity to the teacher's guided one, for latents [n, 8, h, w]; the last of the captions is
    the empty one."""
    n, device = len(latents), latents.device
    x = FluxPipeline._pack_latents(latents, *latents.shape)
    noise = torch.randn(x.shape, generator=generator, device=device)
    t, _ = times(n, EARLY, generator, device)
    guidance = torch.empty(n, device=device).uniform_(*GUIDANCE, generator=generator)
    noisy = torch.lerp(x, noise, t[:, None, None])
    settings = {**places(*latents.shape[2:], device), "return_dict": False}
    with torch.no_grad():
        text, pooled = student.encode(*tokens)
        unasked, empty = text[-1:].expand(n, -1, -1), pooled[-1:].expand(n, -1)
        twice = [torch.cat(both) for both in ((noisy, noisy), (text[:-1], unasked), (pooled[:-1], empty), (t, t))]
        cond, uncond = teacher(*twice, **settings)[0].chunk(2)
        target = torch.lerp(uncond.float(), cond.float(), guidance[:, None, None])
    output = student.transformer(noisy, text[:-1], pooled[:-1], t, guidance=guidance, **settings)[0]
    return F.mse_loss(output.float(), target)


def main(
    teacher: Path = typer.Option(None, help="Folder of the finished pipeline [default: the averaged weights of train.py flux]"),
    start: Path = typer.Option(None, help="Folder of a distilled pipeline whose weights to start from."),
    steps: int = typer.Option(6_000, help="Steps in all."),
    minutes: float = typer.Option(inf, help="Minutes in all: the learning rate falls over the last third of what ends first."),
    tokens: int = typer.Option(1024, help="Image tokens a step: four pictures of 128 px, or sixteen of 64 px."),
    lr: float = typer.Option(2e-4),
    device: str = typer.Option("cpu", help="cpu or cuda"),
    workers: int = typer.Option(0, help="Processes that compose scenes, for a GPU that would wait for them."),
    threads: int = typer.Option(torch.get_num_threads()),
    bf16: bool = typer.Option(False, help="Multiply in bfloat16: faster on a GPU, or on a CPU with AMX or AVX512-BF16."),
    checkpoint_minutes: float = typer.Option(4.0),
    vae_path: Path = typer.Option(WORK / "vae-cured"),
    out: Path = typer.Option(WORK / "emoji-flux-guided", help="Folder of the finished pipeline."),
) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    pipe, name = open_pipeline(teacher, None if teacher else "flux")
    typer.echo(f"teacher: {name}")
    model = student_of(pipe, start).to(device)
    vae, guiding = open_vae(vae_path, device), pipe.transformer.to(device)
    model.transformer.requires_grad_(True)
    said = run(
        "distill",
        WORK / "distilled.pt",
        model,
        lambda captions: model.tokens([*captions, ""]),
        lambda latents, layouts, text, generator: distillation_loss(guiding, model, latents, text, generator),
        sheets(model, vae),
        vae,
        steps=steps,
        minutes=minutes,
        tokens=tokens,
        lr=lr,
        bf16=bf16,
        workers=workers,
        checkpoint_minutes=checkpoint_minutes,
    )
    save_pipeline(model.eval().pipeline(vae), out)
    typer.echo(f"{said}, saved to {out}")


if __name__ == "__main__":
    typer.run(main)
