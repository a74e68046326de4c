"""Train the judge: a small classifier of the concepts that says whether a generated picture shows what was asked for.

    python samples/training/judge.py

Trains twice on the pictures of prepare.py. The first run never sees EmojiOne, a style that no generator sees either: its accuracy
there says how far the judge can be trusted on drawings it does not know. The second run sees all six sets, and is what ships.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderTiny
from rich.progress import Progress, TimeElapsedColumn
from safetensors.torch import load_file, save_file

from common import load_checkpoint, save_checkpoint
from data import STYLES, WORK, concepts, pictures

OUT = Path(__file__).parent.parent / "judge"
SETS = ("noto", "noto-v1", "fluent-flat", "fluent-3d", "twemoji", "emojione")
UNSEEN = "emojione"
SIZE, WIDTHS = 64, (24, 48, 96, 160)


class Residual(torch.nn.Module):
    """Two 3 x 3 convolutions beside a 1 x 1, at half the resolution."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.first = torch.nn.Sequential(
            torch.nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False), torch.nn.BatchNorm2d(out), torch.nn.ReLU(inplace=True)
        )
        self.second = torch.nn.Sequential(torch.nn.Conv2d(out, out, 3, padding=1, bias=False), torch.nn.BatchNorm2d(out))
        self.shortcut = torch.nn.Sequential(torch.nn.AvgPool2d(2), torch.nn.Conv2d(width, out, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class Judge(torch.nn.Module):
    """Pictures [n, 3, h, w] in -1..1, any size from 64 px, to logits [n, concepts]."""

    def __init__(self, labels: int, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(
            torch.nn.Conv2d(3, widths[0], 4, stride=2, padding=1, bias=False),
            torch.nn.BatchNorm2d(widths[0]),
            torch.nn.ReLU(inplace=True),
        )
        self.blocks = torch.nn.Sequential(*(Residual(a, b) for a, b in zip(widths, widths[1:], strict=False)))
        self.head = torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.Linear(widths[-1], labels))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        ink = 1 - F.interpolate(images, size=(SIZE, SIZE), mode="area")  # white is 0, like the padding of the convolutions
        return self.head(self.blocks(self.stem(ink)).mean(dim=(2, 3)))


def load_judge(folder: Path = OUT) -> tuple[Judge, list[str]]:
    """The trained judge, and the code points of its labels in order."""
    config = json.loads((folder / "config.json").read_text())
    judge = Judge(len(config["codes"]), tuple(config["widths"]))
    judge.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "judge.safetensors").items()}
    )
    return judge.eval(), config["codes"]


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(n).uniform_(low, high, generator=generator)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, scale, shift, mirror, recolour, cover, blur and roughen pictures [n, 3, h, w] in -1..1."""
    n, _, h, w = images.shape
    angle, scale = uniform(n, -0.35, 0.35, generator), uniform(n, -0.25, 0.3, generator).exp()
    stretch, mirror = uniform(n, -0.12, 0.12, generator).exp(), torch.randint(2, (n,), generator=generator) * 2 - 1
    row_x = torch.stack([angle.cos() * scale * stretch * mirror, -angle.sin() * scale, uniform(n, -0.2, 0.2, generator)], 1)
    row_y = torch.stack([angle.sin() * scale * stretch * mirror, angle.cos() * scale, uniform(n, -0.2, 0.2, generator)], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), list(images.shape), align_corners=False)
    x = 1 - F.grid_sample(1 - images, grid, align_corners=False)  # what comes in from outside is white
    column = lambda low, high, channels=1: uniform(n * channels, low, high, generator).view(n, channels, 1, 1)  # noqa: E731
    x = x.mean(1, keepdim=True).lerp(x, column(0.6, 1.4))
    x = 1 - (1 - x) * column(0.75, 1.2) * column(0.85, 1.15, 3)
    x = x + column(-0.1, 0.1, 3)
    rows, columns = torch.arange(h).view(1, 1, h, 1) / h, torch.arange(w).view(1, 1, 1, w) / w
    covered = ((rows - column(0, 1)).abs() < column(-0.15, 0.18)) & ((columns - column(0, 1)).abs() < column(0.05, 0.18))
    x = torch.where(covered, column(-1, 1, 3), x)
    parts = []
    for part in x.chunk(4):
        side = int(torch.randint(h // 3, int(1.6 * h), (), generator=generator))
        small = F.interpolate(part, size=(side, side), mode="area") if side < h else part
        parts.append(F.interpolate(small, size=(h, w), mode="bilinear", align_corners=False))
    x = torch.cat(parts)
    return x + column(0, 0.08) * torch.randn(x.shape, generator=generator)


def labelled(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [n, 3, 128, 128] in -1..1 of one set, and their labels [n]; not every set draws every concept."""
    order = json.loads((WORK / "order.json").read_text())[name]
    rows = [(order.index(c.code), label) for label, c in enumerate(concepts()) if c.code in order]
    index, labels = (torch.tensor(column) for column in zip(*rows, strict=True))
    return pictures()[name][index].float() / 127.5 - 1, labels


@torch.no_grad()
def accuracy(judge: Judge, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    ranks = (torch.cat([judge(part) for part in images.split(64)]).argsort(1, descending=True) == labels[:, None]).int().argmax(1)
    return {
        "top1": round((ranks < 1).float().mean().item(), 4),
        "top5": round((ranks < 5).float().mean().item(), 4),
        "pictures": len(labels),
    }


def fit(sets: tuple[str, ...], samples: int, batch: int, lr: float, path: Path) -> Judge:
    """A judge trained on augmented pictures of these sets; goes on from the checkpoint at `path`."""
    torch.manual_seed(0)
    images, labels = (torch.cat(parts) for parts in zip(*map(labelled, sets), strict=True))
    images = F.interpolate(images, size=(SIZE, SIZE), mode="area")
    judge = Judge(len(concepts())).to(memory_format=torch.channels_last).train()
    decayed = [p for p in judge.parameters() if p.ndim > 1]
    plain = [p for p in judge.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=lr, weight_decay=0.05)
    done = 0
    if state := load_checkpoint(path):
        judge.load_state_dict(state["judge"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), "{task.fields[note]}") as progress:
        bar = progress.add_task(path.stem, total=samples, completed=done, note="")
        running = 0.0
        while done < samples:
            generator = torch.Generator().manual_seed(done)
            torch.manual_seed(done)  # dropout
            rows = torch.randint(len(images), (batch,), generator=generator)
            logits = judge(augment(images[rows], generator).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (done + batch) / (20 * batch)) * 0.5 * (1 + math.cos(math.pi * done / samples))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += batch
            running = 0.98 * running + 0.02 * loss.item() if running else loss.item()
            progress.update(bar, completed=done, note=f"loss {running:.3f}")
            if done // batch % 100 == 0 or done >= samples:
                save_checkpoint(path, judge=judge.state_dict(), optimizer=optimizer.state_dict(), done=done)
    return judge.eval()


def main(
    samples: int = typer.Option(40_000, help="Augmented pictures seen by each of the two runs."),
    batch: int = typer.Option(64),
    lr: float = typer.Option(3e-3),
    threads: int = typer.Option(torch.get_num_threads()),
    vae_path: Path = typer.Option(WORK / "vae"),
    out: Path = typer.Option(OUT),
) -> None:
    torch.set_num_threads(threads)
    settings = {"samples": samples, "batch": batch, "lr": lr}
    known = tuple(name for name in SETS if name != UNSEEN)
    strict = fit(known, **settings, path=WORK / f"judge-without-{UNSEEN}.pt")
    unseen = accuracy(strict, *labelled(UNSEEN))
    typer.echo(f"{UNSEEN}, never seen: {unseen}")

    judge = fit(SETS, **settings, path=WORK / "judge.pt")
    weights = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})  # measure what ships
    images, labels = (torch.cat(parts) for parts in zip(*map(labelled, SETS), strict=True))
    vae = AutoencoderTiny.from_pretrained(vae_path).eval()
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(part).latents).sample for part in images.split(16)]).clamp(-1, 1)
    soft = F.interpolate(F.interpolate(images, size=(32, 32), mode="area"), size=(128, 128), mode="bilinear")
    rough = augment(F.interpolate(images, size=(SIZE, SIZE), mode="area"), torch.Generator().manual_seed(1))
    degraded = {"plain": images, "autoencoder": decoded, "32px": soft, "augmented": rough}
    seen = {name: accuracy(judge, versions, labels) for name, versions in degraded.items()}
    drawn = torch.cat([torch.full((len(labelled(name)[1]),), name in STYLES.values()) for name in SETS])
    seen["autoencoder, the generators' sets"] = accuracy(judge, decoded[drawn], labels[drawn])
    typer.echo(f"all sets, pictures seen in training: {seen}")

    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, out / "judge.safetensors")
    config = {
        "size": SIZE,
        "widths": WIDTHS,
        "codes": [c.code for c in concepts()],
        "labels": [c.name for c in concepts()],
        "trained": {"sets": SETS, **settings, "pictures": len(labels)},
        "accuracy": {
            "unseen_style": {"set": UNSEEN, "trained_on": known, **unseen},
            "seen_pictures": seen,
        },
    }
    (out / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
