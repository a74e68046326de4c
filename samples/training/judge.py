"""Train the judge: a small convolutional network that finds the concepts in a picture, and with them says whether a generated
picture shows what its prompt asked for: the object, the background's colors, two objects and their places.

    python samples/training/judge.py

Trains twice on scenes composed of the drawings of prepare.py. The first run never sees EmojiOne, a style that no generator sees
either: its accuracy there says how far the judge can be trusted on drawings it does not know. The second run sees all six sets, and
is what ships. An interrupted training goes on where it stopped.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderTiny
from rich.progress import Progress, TimeElapsedColumn
from safetensors.torch import save_file

from augment import augment
from common import load_checkpoint, open_vae, save_checkpoint, write_json
from data import BACKGROUNDS, HELD_OUT_TOGETHER, STYLES, WORK, Concept, Scene, compose, concepts, drawings, scene
from dit_accel.eval.rewards import judge as rewards
from dit_accel.eval.rewards.judge import CELL, SIDE, WIDTHS, Asked, Judge, Verdict

OUT = Path(__file__).parent.parent / "judge"
SETS = ("noto", "noto-v1", "fluent-flat", "fluent-3d", "twemoji", "emojione")
UNSEEN = "emojione"
SIZES, SHARES = [(96, 96), (96, 128), (128, 96)], [8, 1, 1]  # of training pictures, and how often each comes
NOTHING = 0.2  # weight of a cell that shows nothing: most do
Box = tuple[int, int, int, int]


def verdicts(judge: Judge, images: torch.Tensor, scenes: list[Scene], batch: int = 64) -> list[Verdict]:
    """Of pictures [n, 3, h, w] in -1..1 and what they were asked to show."""
    asked = [Asked(tuple(concept.code for concept in made.subjects), made.relation, made.background) for made in scenes]
    return rewards.verdicts(judge, images, asked, BACKGROUNDS, batch)


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
        "aliases": [c.aliases for c in concepts()],
        "backgrounds": BACKGROUNDS,
        "trained": {"sets": SETS, **settings},
        "accuracy": {"unseen_style": {"set": UNSEEN, "trained_on": others, **unseen}, "seen_drawings": seen},
    }
    write_json(out / "config.json", config)


if __name__ == "__main__":
    typer.run(main)
