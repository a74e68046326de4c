"""Train the shared autoencoder: AutoencoderTiny, 4x smaller, 8 channels, latents of zero mean and unit variance.

    python samples/training/autoencoder.py --minutes 12

The latents are normalised while training (running statistics, folded into the encoder's last convolution at the end), so the
decoder's soft clamp sees what the transformers will produce and stock pipelines decode with scaling factor 1 and no shift.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderTiny
from rich.progress import Progress, TimeRemainingColumn

from common import clean_config, load_checkpoint, save_checkpoint, sheet
from data import WORK, pictures

SETS = ("noto", "noto-v1", "fluent-flat", "fluent-3d")


def build() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=8,
    )


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 on pixels, on their differences to the right and downwards, and on 4 x 4 means."""
    loss = F.l1_loss(output, target)
    for dim in (2, 3):
        loss = loss + F.l1_loss(output.diff(dim=dim), target.diff(dim=dim))
    return loss + F.l1_loss(F.avg_pool2d(output, 4), F.avg_pool2d(target, 4))


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Per picture, for values in -1..1."""
    return 10 * torch.log10(4 / (a - b).pow(2).mean(dim=(1, 2, 3)))


def held_out(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """96 of the pictures, to measure with, and the others."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:96]], images[order[96:]]


def save_autoencoder(vae: AutoencoderTiny, folder: Path) -> None:
    """In diffusers format, without a key that AutoencoderTiny writes and then warns about, or where it was loaded from."""
    vae.save_pretrained(folder)
    clean_config(folder / "config.json")


def main(
    minutes: float = typer.Option(12.0, help="Length of the learning-rate schedule; a resumed run goes on where it was."),
    batch: int = typer.Option(12),
    lr: float = typer.Option(2e-3),
    noise: float = typer.Option(0.06, help="Noise added to the normalised latents."),
    crop: int = typer.Option(64),
    out: Path = typer.Option(WORK / "vae", help="Where the finished autoencoder is saved."),
) -> None:
    torch.manual_seed(0)
    held, images = held_out(torch.cat([pictures()[name] for name in SETS]))
    vae = build().to(memory_format=torch.channels_last)
    norm = torch.nn.BatchNorm2d(8, affine=False, momentum=0.02)
    optimizer = torch.optim.AdamW([p for p in vae.parameters()], lr=lr, weight_decay=0.0)
    path, spent, step = out.with_suffix(".pt"), 0.0, 0
    if state := load_checkpoint(path):
        vae.load_state_dict(state["vae"])
        norm.load_state_dict(state["norm"])
        optimizer.load_state_dict(state["optimizer"])
        spent, step = state["spent"], state["step"]
    generator = torch.Generator().manual_seed(step)
    pick = lambda n: int(torch.randint(n, (), generator=generator))  # noqa: E731
    with Progress(*Progress.get_default_columns(), TimeRemainingColumn(), "{task.fields[note]}") as progress:
        bar = progress.add_task("autoencoder", total=minutes * 60, note="")
        start, saved, running = time.monotonic() - spent, spent, 0.0
        while spent < minutes * 60:
            rows = []
            for _ in range(batch):
                y, x = (pick(images.shape[-1] - crop + 1) for _ in "yx")
                row = images[pick(len(images)), :, y : y + crop, x : x + crop]
                rows.append(row.flip(-1) if pick(2) else row)
            target = (torch.stack(rows).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            for group in optimizer.param_groups:
                group["lr"] = lr * max(0.02, min(step / 50, 1 - spent / (minutes * 60)))
            if spent > 0.7 * minutes * 60:
                norm.eval()
            latents = norm(vae.encoder(target))
            latents = latents + noise * torch.randn(latents.shape, generator=generator)
            loss = loss_of(vae.decoder(latents), target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            step, spent = step + 1, time.monotonic() - start
            running = 0.98 * running + 0.02 * loss.item() if running else loss.item()
            progress.update(bar, completed=spent, note=f"step {step}, loss {running:.4f}")
            if spent - saved > 120:
                save_checkpoint(
                    path, vae=vae.state_dict(), norm=norm.state_dict(), optimizer=optimizer.state_dict(), spent=spent, step=step
                )
                saved = spent
    with torch.no_grad():  # z' = (z - mean) / std, as weights
        std = (norm.running_var + norm.eps).sqrt()
        last = vae.encoder.layers[-1]
        last.weight.div_(std[:, None, None, None])
        last.bias.copy_(((last.bias if last.bias is not None else 0) - norm.running_mean) / std)
        target = held.float() / 127.5 - 1
        output = torch.cat([vae.decode(vae.encode(part).latents).sample for part in target.split(16)]).clamp(-1, 1)
        scores = psnr(output, target)
    save_autoencoder(vae, out)
    sheet(torch.stack([target[:24], output[:24]], 1).flatten(0, 1), 12, out.with_suffix(".png"))
    typer.echo(f"held-out PSNR {scores.mean():.2f} dB, worst {scores.min():.2f} dB, {step * batch} crops")


if __name__ == "__main__":
    typer.run(main)
