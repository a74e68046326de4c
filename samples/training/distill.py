"""Distill guidance into emoji-flux, as in FLUX.1-dev: one pass does what guidance takes two for.

    python samples/training/distill.py                            # from the averaged weights of train.py flux
    python samples/training/distill.py --teacher samples/emoji-flux

The student is the teacher with a guidance embedding that says nothing at first, so that it starts as the teacher at guidance 1. It
learns the teacher's guided velocity, uncond + g (cond - uncond), for a random g that it is told (Meng et al., CVPR 2023). The text
encoders stay as they are. Sees train.py's scenes; an interrupted run goes on where it stopped. Writes the pipeline in diffusers
format.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderTiny, FluxPipeline, FluxTransformer2DModel

from data import WORK
from generate import open_pipeline
from loop import Scenes, run
from text import LENGTH
from train import Flux, save_pipeline, sheets

GUIDANCE = (1.0, 6.0)


def student_of(teacher: FluxPipeline) -> Flux:
    """The teacher's parts, and a transformer with a guidance embedding that adds nothing yet."""
    student = Flux(guided=True)
    for name in ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"):
        setattr(student, name, getattr(teacher, name))
    student.transformer.load_state_dict(teacher.transformer.state_dict(), strict=False)
    last = student.transformer.time_text_embed.guidance_embedder.linear_2
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    return student.requires_grad_(False)


def distillation_loss(
    teacher: FluxTransformer2DModel, student: Flux, latents: torch.Tensor, captions: list[str], generator: torch.Generator
) -> torch.Tensor:
    """Squared error of the student's velocity to the teacher's guided one, for latents [n, 8, h, w]."""
    n, _, h, w = latents.shape
    x = FluxPipeline._pack_latents(latents, *latents.shape)
    noise = torch.randn(x.shape, generator=generator)
    t = torch.randn(n, generator=generator).sigmoid()
    guidance = torch.empty(n).uniform_(*GUIDANCE, generator=generator)
    noisy = torch.lerp(x, noise, t[:, None, None])
    ids = FluxPipeline._prepare_latent_image_ids(1, h // 2, w // 2, "cpu", torch.float32)
    settings = {"img_ids": ids, "txt_ids": torch.zeros(LENGTH, 3), "return_dict": False}
    with torch.no_grad():
        text, pooled = student.encode([*captions, ""])
        unasked, empty = text[-1:].expand(n, -1, -1), pooled[-1:].expand(n, -1)
        twice = [torch.cat(both) for both in ((noisy, noisy), (text[:-1], unasked), (pooled[:-1], empty), (t, t))]
        cond, uncond = teacher(*twice, **settings)[0].chunk(2)
        target = torch.lerp(uncond.float(), cond.float(), guidance[:, None, None])
    output = student.transformer(noisy, text[:-1], pooled[:-1], t, guidance=guidance, **settings)[0]
    return F.mse_loss(output.float(), target)


def main(
    teacher: Path = typer.Option(None, help="Folder of the finished pipeline [default: the averaged weights of train.py flux]"),
    steps: int = typer.Option(6_000),
    tokens: int = typer.Option(1024, help="Image tokens a step: four pictures of 128 px, or sixteen of 64 px."),
    lr: float = typer.Option(2e-4),
    scenes: int = typer.Option(30_000, help="Different scenes of each size, as in train.py."),
    threads: int = typer.Option(torch.get_num_threads()),
    bf16: bool = typer.Option(False, help="Multiply in bfloat16: faster on a CPU with AMX or AVX512-BF16, slower on an old one."),
    checkpoint_minutes: float = typer.Option(4.0),
    vae_path: Path = typer.Option(WORK / "vae-cured"),
    out: Path = typer.Option(WORK / "emoji-flux-guided", help="Folder of the finished pipeline."),
) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    pipe, name = open_pipeline(teacher, None if teacher else "flux")
    typer.echo(f"teacher: {name}")
    model = student_of(pipe)
    vae = AutoencoderTiny.from_pretrained(vae_path).to(memory_format=torch.channels_last).eval()
    model.transformer.requires_grad_(True)
    said = run(
        "distill",
        WORK / "distilled.pt",
        model,
        lambda latents, layouts, captions, generator: distillation_loss(pipe.transformer, model, latents, captions, generator),
        sheets(model, vae),
        Scenes(vae, scenes),
        steps=steps,
        tokens=tokens,
        lr=lr,
        bf16=bf16,
        checkpoint_minutes=checkpoint_minutes,
    )
    save_pipeline(model.eval().pipeline(vae), out)
    typer.echo(f"{said}, saved to {out}")


if __name__ == "__main__":
    typer.run(main)
