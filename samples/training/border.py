"""Cure the autoencoder's border: go on training it so that pictures go on beyond their edge, as far as the latents can tell.

    python samples/training/border.py

Its convolutions pad with zeros, which the encoder of autoencoder.py takes for an edge: the outermost ring of a flat picture's
latents is off by twice their spread. Here the inside of the latents is held where it was, and the ring learns to be what it is in
a larger picture: the teacher is the autoencoder as it was, on the picture extended by its outermost pixels. An interrupted
training goes on where it stopped.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderTiny
from rich.progress import Progress, TimeRemainingColumn

from autoencoder import SETS, held_out, loss_of, psnr, save_autoencoder
from common import load_checkpoint, save_checkpoint
from data import WORK, compose, pairs, pictures, scene

MARGIN = 32  # pixels that a picture is extended by for the teacher; more than half of the encoder's field of view


@torch.no_grad()
def extended_latents(vae: AutoencoderTiny, images: torch.Tensor) -> torch.Tensor:
    """Latents [n, 8, h / 4, w / 4] of pictures [n, 3, h, w] in -1..1 that go on beyond their edge with its colors."""
    inside = slice(MARGIN // 4, -MARGIN // 4)
    return vae.encode(F.pad(images, (MARGIN,) * 4, mode="replicate")).latents[:, :, inside, inside]


def ring_errors(latents: torch.Tensor, spread: float = 1.0) -> list[float]:
    """Of the outermost ring of a flat picture's latents [channels, h, w] and of the next one: RMS of what they are off from the
    inside, over the latents' spread."""
    h, w = latents.shape[1:]
    off = latents - latents[:, h // 2, w // 2, None, None]
    errors = []
    for k in range(2):
        inner = off[:, k : h - k, k : w - k]
        sides = [inner[:, 0], inner[:, -1], inner[:, 1:-1, 0], inner[:, 1:-1, -1]]
        errors.append(torch.cat(sides, 1).pow(2).mean().sqrt().item() / spread)
    return errors


@torch.no_grad()
def border_error(vae: AutoencoderTiny) -> list[float]:
    """Ring errors of a white picture of 128 px, for latents that have a spread of 1."""
    return ring_errors(vae.encode(torch.ones(1, 3, 128, 128)).latents[0])


def main(
    minutes: float = typer.Option(12.0, help="Length of the learning-rate schedule; a resumed run goes on where it was."),
    batch: int = typer.Option(16),
    lr: float = typer.Option(1e-3),
    size: int = typer.Option(64, help="Side of the training pictures: a small one has much border."),
    noise: float = typer.Option(0.06, help="Noise added to the latents before they are decoded."),
    weight: float = typer.Option(1.0, help="Of the latents' error, beside that of the pictures."),
    threads: int = typer.Option(torch.get_num_threads()),
    start: Path = typer.Option(WORK / "vae", help="The autoencoder to cure."),
    out: Path = typer.Option(WORK / "vae-cured", help="Where the cured one is saved."),
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    teacher = AutoencoderTiny.from_pretrained(start).eval().requires_grad_(False)
    vae = AutoencoderTiny.from_pretrained(start).to(memory_format=torch.channels_last).train()
    images, rows = held_out(torch.cat([pictures()[name] for name in SETS]))[1], pairs()[0]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.0)
    path, spent, step = out.with_suffix(".pt"), 0.0, 0
    if state := load_checkpoint(path):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        spent, step = state["spent"], state["step"]

    def picture(rng: random.Random) -> torch.Tensor:
        """A scene, a crop of an emoji, a flat color."""
        kind = rng.random()
        if kind < 0.5:
            return compose(scene(rng, rows), size, size, rng)[0]
        if kind < 0.75:
            y, x = (rng.randint(0, images.shape[-1] - size) for _ in "yx")
            return images[rng.randrange(len(images)), :, y : y + size, x : x + size].float() / 127.5 - 1
        color = torch.tensor([rng.uniform(-1, 1) for _ in "rgb"] if kind < 0.92 else [1.0, 1.0, 1.0])
        return color[:, None, None].expand(3, size, size)

    with Progress(*Progress.get_default_columns(), TimeRemainingColumn(), "{task.fields[note]}") as progress:
        bar = progress.add_task("border", total=minutes * 60, note="")
        begun, saved, running = time.monotonic() - spent, spent, [0.0, 0.0]
        while spent < minutes * 60:
            rng, generator = random.Random(step), torch.Generator().manual_seed(step)
            target = torch.stack([picture(rng) for _ in range(batch)]).contiguous(memory_format=torch.channels_last)
            for group in optimizer.param_groups:
                group["lr"] = lr * max(0.01, min(step / 50, 1 - spent / (minutes * 60)))
            latents = vae.encode(target).latents
            off = F.mse_loss(latents, extended_latents(teacher, target))
            decoded = vae.decode(latents + noise * torch.randn(latents.shape, generator=generator)).sample
            loss = loss_of(decoded, target)
            optimizer.zero_grad()
            (loss + weight * off).backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            step, spent = step + 1, time.monotonic() - begun
            running = [0.98 * a + 0.02 * b.item() if a else b.item() for a, b in zip(running, (loss, off), strict=True)]
            note = f"step {step}, pictures {running[0]:.4f}, latents {running[1]:.4f}"
            progress.update(bar, completed=spent, note=note)
            if spent - saved > 60:
                save_checkpoint(path, vae=vae.state_dict(), optimizer=optimizer.state_dict(), spent=spent, step=step)
                typer.echo(note + f", ring {border_error(vae)}")
                saved = spent
    save_autoencoder(vae.eval(), out)
    held = held_out(torch.cat([pictures()[name] for name in SETS]))[0].float() / 127.5 - 1
    with torch.no_grad():
        scores = [psnr(model.decode(model.encode(held).latents).sample.clamp(-1, 1), held).mean() for model in (teacher, vae)]
    before, after = border_error(teacher), border_error(vae)
    typer.echo(f"held-out PSNR {scores[0]:.2f} -> {scores[1]:.2f} dB; rings {before} -> {after} of the latents' spread")


if __name__ == "__main__":
    typer.run(main)
