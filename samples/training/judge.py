"""Train the judge: a small convolutional network that finds the concepts in a picture, and with them says whether a generated
picture shows what its prompt asked for: the object, the background's colors, two objects and their places.

    python samples/training/judge.py

Trains twice on scenes composed of the drawings of prepare.py. The first run never sees EmojiOne, a style that no generator sees
either: its accuracy there says how far the judge can be trusted on drawings it does not know. The second run sees all six sets, and
is what ships. An interrupted training goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderTiny
from rich.progress import Progress, TimeElapsedColumn
from safetensors.torch import load_file, save_file

from augment import augment
from common import load_checkpoint, open_vae, save_checkpoint, write_json
from data import BACKGROUNDS, HELD_OUT_TOGETHER, STYLES, WORK, Concept, Scene, compose, concepts, drawings, scene

OUT = Path(__file__).parent.parent / "judge"
SETS = ("noto", "noto-v1", "fluent-flat", "fluent-3d", "twemoji", "emojione")
UNSEEN = "emojione"
SIDE, CELL, WIDTHS = 96, 16, (24, 48, 96, 160)  # the shorter side it looks at, and what one cell of its map covers, in pixels
SIZES, SHARES = [(96, 96), (96, 128), (128, 96)], [8, 1, 1]  # of training pictures, and how often each comes
NOTHING = 0.2  # weight of a cell that shows nothing: most do
TOLERANCE = 60  # Euclidean distance in RGB within which a color bears a name
Box = tuple[int, int, int, int]


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
    """Pictures [n, 3, h, w] in -1..1, of any size, to a map of logits [n, concepts + 1, rows, columns]; the last one is of nothing.

    A cell covers 16 x 16 pixels of the picture with its shorter side made 96 px.
    """

    def __init__(self, codes: list[str], widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.codes = codes
        self.stem = torch.nn.Sequential(
            torch.nn.Conv2d(3, widths[0], 4, stride=2, padding=1, bias=False),
            torch.nn.BatchNorm2d(widths[0]),
            torch.nn.ReLU(inplace=True),
        )
        self.blocks = torch.nn.Sequential(*(Residual(a, b) for a, b in zip(widths, widths[1:], strict=False)))
        self.head = torch.nn.Sequential(torch.nn.Dropout2d(0.1), torch.nn.Conv2d(widths[-1], len(codes) + 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        size = [round(SIDE * n / min(images.shape[2:]) / CELL) * CELL for n in images.shape[2:]]
        if list(images.shape[2:]) != size:
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        return self.head(self.blocks(self.stem(images)))


@dataclass(frozen=True)
class Verdict:
    """What the judge says of a picture, and whether it is what was asked for; None where that was not asked for."""

    named: tuple[str, ...]  # code points of all concepts, the surest first
    object: bool | None  # one concept asked for: it is the surest
    both: bool | None  # two asked for: they are the two surest
    places: bool | None  # both, and the first lies on the right side of the second
    background: bool | None


def load_judge(folder: Path = OUT) -> Judge:
    """The trained judge; `codes` has the code points of its concepts in order."""
    config = json.loads((folder / "config.json").read_text())
    judge = Judge(config["codes"], tuple(config["widths"]))
    judge.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "judge.safetensors").items()}
    )
    return judge.eval()


@torch.no_grad()
def verdicts(judge: Judge, images: torch.Tensor, scenes: list[Scene], batch: int = 64) -> list[Verdict]:
    """Of pictures [n, 3, h, w] in -1..1 and what they were asked to show."""
    found = []
    for start in range(0, len(images), batch):
        seen = judge(images[start : start + batch]).softmax(1)[:, :-1]  # [n, concepts, rows, columns]
        sureness = seen.amax(dim=(2, 3))
        rows, columns = torch.arange(seen.shape[2], dtype=seen.dtype), torch.arange(seen.shape[3], dtype=seen.dtype)
        total = seen.sum(dim=(2, 3))
        down, across = seen.sum(3) @ rows / total, seen.sum(2) @ columns / total  # centers of gravity [n, concepts], in cells
        for i, asked in enumerate(scenes[start : start + batch]):
            order = sureness[i].argsort(descending=True).tolist()
            named = tuple(judge.codes[label] for label in order)
            single = both = places = None
            if asked.relation:
                first, second = (judge.codes.index(concept.code) for concept in asked.subjects)
                both = set(order[:2]) == {first, second}
                x, y = across[i, second] - across[i, first], down[i, second] - down[i, first]
                places = both and {"left of": x, "right of": -x, "above": y, "below": -y}[asked.relation].item() > 0
            else:
                single = named[0] == asked.subjects[0].code
            found.append(Verdict(named, single, both, places, background_right(images[start + i], asked.background)))
    return found


def background_right(image: torch.Tensor, names: tuple[str, ...]) -> bool | None:
    """Whether at least half of the pixels at the edge of a picture [3, h, w] in -1..1 have the named color; of two names, the
    first is that of the upper half."""
    if not names:
        return None
    pixels = (image.clamp(-1, 1) + 1) * 127.5
    colors = torch.tensor(list(BACKGROUNDS.values()), dtype=pixels.dtype)
    distance = (pixels[None] - colors[:, :, None, None]).norm(dim=1)  # [colors, h, w]
    nearest = torch.where(distance.amin(0) < TOLERANCE, distance.argmin(0), -1)
    edge = torch.ones_like(nearest, dtype=torch.bool)
    width = min(edge.shape) // 16
    edge[width:-width, width:-width] = False
    halves = zip(names, nearest.tensor_split(len(names)), edge.tensor_split(len(names)), strict=True)
    return all((half[ring] == list(BACKGROUNDS).index(name)).float().mean().item() >= 0.5 for name, half, ring in halves)


def shares(found: list[Verdict]) -> dict[str, float | int]:
    """Share of the pictures that are right in each respect, of those it was asked of."""
    result: dict[str, float | int] = {}
    for part in ("object", "background", "both", "places"):
        if asked := [getattr(verdict, part) for verdict in found if getattr(verdict, part) is not None]:
            result[part] = round(sum(asked) / len(asked), 4)
    return result | {"pictures": len(found)}


def rows_of(sets: tuple[str, ...]) -> list[tuple[Concept, str]]:
    """(concept, set) pairs; not every set draws every concept."""
    return [(concept, name) for name in sets for concept in concepts() if concept.code in drawings()[name]]


def labels_of(made: Scene, boxes: list[Box], size: tuple[int, int]) -> torch.Tensor:
    """Labels [rows, columns] of a picture's cells: what the middle of a box shows, nothing outside boxes, -100 in between."""
    labels = torch.full((size[0] // CELL, size[1] // CELL), len(concepts()))
    y, x = ((torch.arange(n) + 0.5) * CELL for n in labels.shape)
    for concept, (top, left, h, w) in zip(made.subjects, boxes, strict=True):
        off_y, off_x = (y - top - h / 2).abs() / h, (x - left - w / 2).abs() / w  # half a box: .5
        inside = lambda limit, off_y=off_y, off_x=off_x: (off_y < limit)[:, None] & (off_x < limit)  # noqa: E731
        labels[inside(0.5)] = -100
        label = concepts().index(concept)
        labels[inside(0.25)] = label
        labels[int(top + h / 2) // CELL, int(left + w / 2) // CELL] = label
    return labels


@torch.no_grad()
def through(vae: AutoencoderTiny, images: torch.Tensor) -> torch.Tensor:
    """Pictures [n, 3, h, w] in -1..1, encoded and decoded."""
    parts = [vae.decode(vae.encode(part).latents).sample for part in images.split(16)]
    return torch.cat(parts).float().clamp(-1, 1)


def composed(
    rows: list[tuple[Concept, str]], count: int, size: tuple[int, int], seed: object, two: float
) -> tuple[torch.Tensor, list[Scene], torch.Tensor]:
    """Pictures [count, 3, height, width] in -1..1 of random scenes, the scenes and their cells' labels."""
    images, scenes, labels = [], [], []
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        scenes.append(scene(rng, rows, two, rng.random() < HELD_OUT_TOGETHER))
        image, boxes = compose(scenes[-1], *size, rng)
        images.append(image)
        labels.append(labels_of(scenes[-1], boxes, size))
    return torch.stack(images), scenes, torch.stack(labels)


def accuracy(judge: Judge, sets: tuple[str, ...], count: int, vae: AutoencoderTiny | None = None) -> dict[str, float | int]:
    """On `count` scenes of 128 px that no training saw, composed of these sets; with `vae` after encoding and decoding."""
    images, scenes, _ = composed(rows_of(sets), count, (128, 128), "accuracy", 0.4)
    return shares(verdicts(judge, through(vae, images) if vae else images, scenes))


def fit(sets: tuple[str, ...], vae: AutoencoderTiny, samples: int, batch: int, lr: float, bf16: bool, path: Path) -> Judge:
    """A judge trained on scenes of these sets, one in eight through the autoencoder; goes on from the checkpoint at `path`."""
    torch.manual_seed(0)
    rows = rows_of(sets)
    judge = Judge([c.code for c in concepts()]).to(memory_format=torch.channels_last).train()
    decayed = [p for p in judge.parameters() if p.ndim > 1]
    plain = [p for p in judge.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=lr, weight_decay=0.05)
    weight = torch.ones(len(concepts()) + 1)
    weight[-1] = NOTHING
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
            images, _, labels = composed(rows, batch, random.Random(done).choices(SIZES, SHARES)[0], done, 0.5)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                images[: batch // 8] = through(vae, images[: batch // 8])
                images = augment(images, generator, 0.3, mirror=False)
                logits = judge(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels, weight, label_smoothing=0.05)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (done + batch) / (20 * batch)) * 0.5 * (1 + math.cos(math.pi * done / samples))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += batch
            running = 0.98 * running + 0.02 * loss.item() if running else loss.item()
            progress.update(bar, completed=done, note=f"loss {running:.3f}")
            if done // batch % 200 == 0 or done >= samples:
                save_checkpoint(path, judge=judge.state_dict(), optimizer=optimizer.state_dict(), done=done)
                progress.console.print(f"{path.stem}: {done} pictures, loss {running:.3f}")
    return judge.eval()


def main(
    samples: int = typer.Option(128_000, help="Scenes seen by each of the two runs."),
    batch: int = typer.Option(64),
    lr: float = typer.Option(3e-3),
    count: int = typer.Option(1000, help="New scenes that each accuracy is measured on."),
    bf16: bool = typer.Option(False, help="Multiply in bfloat16: faster on a CPU with AMX or AVX512-BF16, slower on an old one."),
    threads: int = typer.Option(torch.get_num_threads()),
    vae_path: Path = typer.Option(WORK / "vae-cured"),
    out: Path = typer.Option(OUT),
) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    vae = open_vae(vae_path)
    settings = {"samples": samples, "batch": batch, "lr": lr}
    others = tuple(name for name in SETS if name != UNSEEN)
    strict = fit(others, vae, **settings, bf16=bf16, path=WORK / f"judge-without-{UNSEEN}.pt")
    unseen = {"plain": accuracy(strict, (UNSEEN,), count), "autoencoder": accuracy(strict, (UNSEEN,), count, vae)}
    typer.echo(f"{UNSEEN}, never seen: {unseen}")

    judge = fit(SETS, vae, **settings, bf16=bf16, path=WORK / "judge.pt")
    weights = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})  # measure what ships
    drawn = tuple(STYLES.values())
    seen = {
        "all sets": accuracy(judge, SETS, count),
        "the generators' sets": accuracy(judge, drawn, count),
        "autoencoder, the generators' sets": accuracy(judge, drawn, count, vae),
    }
    typer.echo(f"drawings seen in training, in new scenes: {seen}")

    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, out / "judge.safetensors")
    config = {
        "side": SIDE,
        "cell": CELL,
        "widths": WIDTHS,
        "codes": judge.codes,
        "labels": [c.name for c in concepts()],
        "trained": {"sets": SETS, **settings},
        "accuracy": {"unseen_style": {"set": UNSEEN, "trained_on": others, **unseen}, "seen_drawings": seen},
    }
    write_json(out / "config.json", config)


if __name__ == "__main__":
    typer.run(main)
