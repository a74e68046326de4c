"""What the reward learns from and is measured by: pictures of which one is better for a prompt, by kind of failure."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from torch import Tensor

from data import (
    BACKGROUNDS,
    STYLES,
    WORK,
    Concept,
    Scene,
    compose,
    concepts,
    drawings,
    ground,
    held_together,
    pairs,
    scene,
    scene_caption,
    scene_prompt,
)
from degrade import DEGRADATIONS, degrade
from judge import Box, through
from stopped import asked

UNNAMED = ("noto-v1", "twemoji", "emojione")  # sets that no style word stands for
LOOKS = (*STYLES, *UNNAMED)
FAILURES = ("wrong object", "wrong background", "swapped places", "missing object", "wrong style")
STOPPED = "stopped early"
KINDS = (*FAILURES, *DEGRADATIONS, STOPPED)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SIZES, SHARES = [(128, 128), (96, 96), (64, 64), (96, 128), (128, 96)], [6, 2, 2, 1, 1]  # of pictures before they are scored
SIDE, PATCH = 128, 16  # of the reward's vision transformer
WEAK, MORE = (0.2, 0.5), (0.25, 0.5)  # strength of the weaker degradation, and what the stronger one adds
ENCODED = 1 / 12  # share of the comparisons whose pictures go through the autoencoder
SAMPLED = 0.3  # share in which the right picture is a sample of the pipelines
EXTRA = 2  # more wrong prompts for each right picture
Sample = tuple[Scene, Tensor]  # what was asked for, and pictures uint8 [1 + stops, 3, 128, 128], the finished one first


@dataclass(frozen=True)
class Comparison:
    """Pictures [n, 3, 128, 128] in -1..1, the best one first, and prompts for them.

    `scored` has (prompt, place of a picture, what is wrong with it or ""), `better` pairs of places in `scored`, the better one
    first. `labels` [n, 2, 64] tell what the pictures' patches show, as `patch_labels` does.
    """

    kind: str
    pictures: Tensor
    labels: Tensor
    scored: list[tuple[str, int, str]]
    better: list[tuple[int, int]]


@cache
def shown() -> list[tuple[Concept, str]]:
    """(concept, style or set) pairs to train on: all drawings but those that the generators never see."""
    everything = [(c, look) for look in LOOKS for c in concepts() if c.code in drawings()[STYLES.get(look, look)]]
    return [row for row in everything if row not in pairs()[1]]


def held_out(made: Scene) -> bool:
    """Whether training never shows this: a concept in this style, or two concepts together."""
    together = len(made.subjects) == 2 and held_together(*made.subjects)
    return together or any((concept, made.style) in pairs()[1] for concept in made.subjects)


def failed(kind: str, made: Scene, rng: random.Random, unseen: bool = False) -> Scene | None:
    """What a picture with this failure might show in place of a scene; None if the scene cannot fail so.

    Unless `unseen`, it is nothing that training never shows.
    """
    if kind == "wrong object":
        place = rng.randrange(len(made.subjects))
        others = [c for c in concepts() if c not in made.subjects and c.code in drawings()[STYLES.get(made.style, made.style)]]
        changed = [(*made.subjects[:place], c, *made.subjects[place + 1 :]) for c in rng.sample(others, min(4, len(others)))]
        options = [replace(made, subjects=subjects) for subjects in changed]
    elif kind == "wrong background":
        colors = [tuple(rng.sample(list(BACKGROUNDS), len(made.background))) for _ in range(3)]
        options = [replace(made, background=names) for names in colors if names != made.background]
    elif kind == "swapped places":
        options = [replace(made, relation=OPPOSITE[made.relation])] if made.relation else []
    elif kind == "missing object":
        options = [replace(made, subjects=(concept,), relation="") for concept in made.subjects] if made.relation else []
    elif kind == "wrong style":
        options = [replace(made, style=style) for style in STYLES if style != made.style] if made.style in STYLES else []
    else:
        raise ValueError(f"There is no failure {kind!r}; choose one of {', '.join(FAILURES)}.")
    options = [option for option in options if unseen or not held_out(option)]
    return rng.choice(options) if options else None


def shown_scene(rng: random.Random) -> Scene:
    """One for training."""
    return scene(rng, shown(), 0.5)


def unseen_scene(rng: random.Random) -> Scene:
    """One that training never shows: a concept in a style that it is never seen in, or two that are never seen together."""
    alone = rng.random() < 0.5
    while not held_out(made := scene(rng, pairs()[1], 0.0) if alone else scene(rng, pairs()[0], 1.0, held=True)):
        pass  # no partner for this concept is held out
    return made


def request(made: Scene, rng: random.Random, styled: bool = False) -> str:
    """One way a person might ask for the scene; `styled`: with its style, if that has a name."""
    while made.style in STYLES:
        text = scene_caption(made, rng)
        if made.style in text or not styled:
            return text
    article = rng.choice(("", "a ", "the "))
    names = [article + rng.choice((c.name, c.name, *c.aliases)) for c in made.subjects]
    ending = f", on a {' and '.join(made.background)} background" if made.background else ""
    return f" {made.relation} ".join(names) + ending


def patch_labels(made: Scene, boxes: list[Box], size: tuple[int, int]) -> Tensor:
    """What each patch of a picture [3, height, width] shows once `fit` has prepared it, [2, 64].

    First the number of the concept whose box its middle lies in or, after all concepts, of the background's color; the first of
    these is for pastels without a name. Then the number of the drawing's set. -100 where there is none, and at the rim of boxes.
    """
    height, width = size
    side, label = min(size), concepts().index
    y, x = ((torch.arange(SIDE // PATCH) + 0.5) * PATCH / SIDE * side + (n - side) // 2 for n in size)
    colors = [len(concepts()) + (1 + list(BACKGROUNDS).index(name) if name else 0) for name in made.background or ("",)]
    ground = torch.tensor(colors)[(y / height * len(colors)).long()]
    labels = torch.stack([ground[:, None].expand(-1, len(x)), torch.full((len(y), len(x)), -100)])
    rim = PATCH / SIDE * side / 2
    for concept, (top, left, h, w) in zip(made.subjects, boxes, strict=True):
        beyond_y, beyond_x = (y - top - h / 2).abs() - h / 2, (x - left - w / 2).abs() - w / 2
        beyond = torch.maximum(beyond_y[:, None], beyond_x)
        labels[0][beyond < rim] = -100
        labels[0][beyond < 0], labels[1][beyond < 0] = label(concept), LOOKS.index(made.style)
    return labels.flatten(1)


def fit(images: Tensor) -> Tensor:
    """Pictures [n, 3, h, w] in -1..1 as ImageReward prepares them: the shorter side made 128 px, the middle [n, 3, 128, 128]."""
    h, w = (SIDE * n // min(images.shape[2:]) for n in images.shape[2:])
    if (h, w) != images.shape[2:]:
        images = F.interpolate(images, (h, w), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    return images[:, :, (h - SIDE) // 2 : (h + SIDE) // 2, (w - SIDE) // 2 : (w + SIDE) // 2]


def erased(made: Scene, kept: Concept, size: tuple[int, int], seed: int) -> Tensor:
    """The picture that `compose` makes of this seed, with nothing but the background where the other subject was."""
    image, boxes = compose(made, *size, random.Random(seed))
    empty = ground(made.background, *size, random.Random(seed)) * 2 - 1
    top, left, h, w = boxes[1 - made.subjects.index(kept)]
    part = (slice(None), slice(top, top + h), slice(left, left + w))
    image[part] = empty[part]
    return image


def counterparts(kind: str, made: Scene, other: Scene, size: tuple[int, int], rng: random.Random) -> tuple[Tensor, Tensor]:
    """A picture of a scene and one of what it shows instead, [2, 3, height, width], and their patches' labels [2, 2, 64].

    Half of them differ in the failure alone.
    """
    seed = rng.getrandbits(32)
    alike = rng.random() < 0.5
    image, boxes = compose(made, *size, random.Random(seed))
    if alike and kind == "missing object":
        kept = other.subjects[0]
        wrong, left = erased(made, kept, size, seed), [boxes[made.subjects.index(kept)]]
    else:
        wrong, left = compose(other, *size, random.Random(seed if alike else seed + 1))
    return torch.stack([image, wrong]), torch.stack([patch_labels(made, boxes, size), patch_labels(other, left, size)])


def comparison(
    kind: str,
    rng: random.Random,
    generator: torch.Generator,
    samples: list[Sample],
    vae: AutoencoderTiny,
    unseen: bool = False,
) -> Comparison:
    """A random one of this kind, of scenes that training shows or, if `unseen`, never shows. So are those of `samples`, which it
    makes use of, and must if the kind is "stopped early"."""
    size, draw = rng.choices(SIZES, SHARES)[0], unseen_scene if unseen else shown_scene
    sample: Tensor | None = None
    if kind == STOPPED or (samples and rng.random() < SAMPLED):
        made, sample = rng.choice(samples)
    else:
        made = draw(rng)
    ask = scene_prompt if unseen else partial(request, rng=rng, styled=kind == "wrong style")
    if kind in FAILURES:
        while (other := failed(kind, made, rng, unseen)) is None:
            made, sample = draw(rng), None
        images, labels = counterparts(kind, made, other, size, rng)
        wanted, instead = ask(made), ask(other)
        scored = [(wanted, 0, ""), (wanted, 1, kind), (instead, 1, ""), (instead, 0, kind)]
        better = [(0, 1), (2, 3), (0, 3), (2, 1)]
    else:
        image, boxes = compose(made, *size, rng)
        images, labels = image[None], patch_labels(made, boxes, size)[None]
        text = ask(made)
        scored, better = [(text, 0, ""), (text, 1, kind), (text, 2, kind)], [(0, 1), (1, 2), (0, 2)]
    if rng.random() < ENCODED or (sample is not None and kind in FAILURES):  # beside a sample, which was decoded too
        images = through(vae, images)
    images = fit(images)
    if sample is not None:
        versions = sample.float() / 127.5 - 1
        images[0], labels[0] = versions[0], -100
        if kind == STOPPED:
            images = torch.cat([images, versions[sorted(rng.sample(range(1, len(versions)), 2))]])
    if kind in DEGRADATIONS:
        weak = rng.uniform(*WEAK)
        images = torch.stack([images[0], *degrade(images[0], kind, [weak, weak + rng.uniform(*MORE)], generator)])
    for _ in range(0 if unseen else EXTRA):
        if other := failed(fault := rng.choice(FAILURES), made, rng):
            better.append((0, len(scored)))
            scored.append((request(other, rng, styled=True), 0, fault))
    return Comparison(kind, images, labels, scored, better)


def finished_and_stopped(families: tuple[str, ...] = ("flux", "pixart")) -> tuple[list[Sample], list[Sample]]:
    """What stopped.py has made: to train on, and of scenes that training never shows."""
    shown_ones: list[Sample] = []
    unseen_ones: list[Sample] = []
    for family in families:
        pictures = load_file(WORK / f"stopped-{family}.safetensors")["pictures"]
        for made, versions in zip(asked(), pictures, strict=True):
            (unseen_ones if held_out(made) else shown_ones).append((made, versions))
    return shown_ones, unseen_ones
