"""Distill guidance into emoji-flux, as in FLUX.1-dev: one pass does what guidance takes two for.

    python samples/training/distill.py                            # from the averaged weights of train.py flux
    python samples/training/distill.py --teacher samples/emoji-flux

The student is the teacher with a guidance embedding that says nothing at first, so that it starts as the teacher at guidance 1. It
learns the teacher's guided velocity, uncond + g (cond - uncond), for a random g that it is told (Meng et al., CVPR 2023). The text
encoders stay as they are. Sees train.py's scenes; an interrupted run goes on where it stopped. Writes the pipeline in diffusers
format.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderTiny, FluxPipeline, FluxTransformer2DModel
from rich.progress import Progress, TimeElapsedColumn

from common import load_checkpoint, save_checkpoint, sheet
from data import WORK, pairs, scene, scene_caption, scene_prompt
from generate import open_pipeline
from text import LENGTH
from train import DROPOUT, SIZES, Flux, Scenes, learning_rate, sample, save_pipeline

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
    samples: int = typer.Option(60_000, help="Pictures seen."),
    batch: int = typer.Option(32, help="Pictures of 128 px at a time; twice as many of small ones."),
    lr: float = typer.Option(3e-4),
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
    pool = Scenes(vae, scenes)
    parameters = list(model.transformer.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    average = [p.detach().clone() for p in parameters]
    path, done, step, spent = WORK / "distilled.pt", 0, 0, 0.0
    if state := load_checkpoint(path):
        model.transformer.load_state_dict(state["transformer"])
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]
        done, step, spent = state["done"], state["step"], state["spent"]
    rng = random.Random(1)
    shown = [scene_prompt(scene(rng, pairs()[0])) for _ in range(18)]

    def swap_average() -> None:
        for p, a in zip(parameters, average, strict=True):
            p.data, a.data = a.data, p.data

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), "{task.fields[note]}") as progress:
        bar = progress.add_task("distill", total=samples, completed=done, note="")
        clock = time.monotonic()
        saved, running = clock, 0.0
        while done < samples:
            generator, rng = torch.Generator().manual_seed(step), random.Random(f"distill {step}")
            size = rng.choices(*SIZES["large"])[0]
            count = batch if size[0] * size[1] > 96 * 96 else 2 * batch
            latents, rows = pool([rng.randrange(scenes) for _ in range(count)], size)
            captions = ["" if rng.random() < DROPOUT else scene_caption(row, rng) for row in rows]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = distillation_loss(pipe.transformer, model, latents, captions, generator)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.param_groups[0]["lr"] = lr * learning_rate(done, samples)
            optimizer.step()
            optimizer.zero_grad()
            step, done = step + 1, done + count
            torch._foreach_lerp_(average, [p.data for p in parameters], 1 - min(0.999, step / (step + 10)))
            running = 0.98 * running + 0.02 * loss.item() if running else loss.item()
            progress.update(bar, completed=done, note=f"{size[0]} x {size[1]} px, loss {running:.4f}")
            if (now := time.monotonic()) - saved > checkpoint_minutes * 60 or done >= samples:
                state = {"transformer": model.transformer.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
                save_checkpoint(path, **state, done=done, step=step, spent=spent + now - clock)
                swap_average()
                sheet(sample(model, vae, shown, (128, 128)), 6, WORK / f"sheets/distilled-{done:07d}.png")
                swap_average()
                progress.console.print(f"distill: {done} pictures, {(spent + now - clock) / 60:.0f} minutes, loss {running:.4f}")
                saved = time.monotonic()
    swap_average()
    save_pipeline(model.eval().pipeline(vae), out)
    typer.echo(f"distill: {done} samples, {(spent + time.monotonic() - clock) / 60:.0f} minutes, saved to {out}")


if __name__ == "__main__":
    typer.run(main)
