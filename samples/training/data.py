"""Pictures and captions of the embedded pipelines: which emoji, which drawings of them, scenes composed of them, and how a person
would ask for one."""

from __future__ import annotations

import colorsys
import json
import os
import random
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

HERE = Path(__file__).parent
# Checkpoints and rendered pictures: several hundred megabytes that survive a deleted checkout.
WORK = Path(os.environ.get("DIT_ACCEL_TRAINING", Path.home() / ".cache/dit-accel/training"))

STYLES = {"3d": "fluent-3d", "flat": "fluent-flat", "cartoon": "noto"}  # style word of a prompt -> the set that draws it
STYLE_PHRASES = {
    "3d": ["3d style", "3d render"],
    "flat": ["flat style", "flat design"],
    "cartoon": ["cartoon style", "cartoon"],
}
TEMPLATES = [
    ("{subject}, {phrase}", 6),
    ("a {subject}, {phrase}", 1),
    ("{subject} in {phrase}", 1),
    ("a {style} drawing of a {subject}", 1),
    ("a {style} picture of a {subject}", 1),
    ("{style} {subject}", 1),
    ("the {subject}, {phrase}", 0.5),
    ("{subject}", 0.5),
]
PAIR_TEMPLATES = [
    ("{subject} {relation} {other}, {phrase}", 4),
    ("a {subject} {relation} a {other}, {phrase}", 2),
    ("{subject} {relation} {other} in {phrase}", 1),
    ("{style} {subject} {relation} {style} {other}", 1),
]
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = {  # RGB; "on a blue background", "on a blue and yellow background": the upper half is blue, the lower one yellow
    "red": (222, 64, 60),
    "orange": (245, 150, 55),
    "yellow": (248, 216, 80),
    "green": (96, 184, 92),
    "blue": (70, 124, 224),
    "purple": (146, 96, 206),
    "pink": (244, 140, 186),
    "gray": (132, 134, 140),
}
JITTER = 12  # how far each channel of a named background strays
HELD_OUT_SHARE = 0.08  # of the (concept, style) pairs; a concept loses at most one style
HELD_OUT_TOGETHER = 0.08  # of the pairs of concepts, which are then never seen in one picture
TWO, NAMED, TWO_TONE = 0.3, 0.5, 0.2  # shares: scenes of two, with a named background, and of these with two colors
GRID = 8  # pixels of a token
SIDES = (24, 32, 48, 64, 96, 128, 192)  # of subjects, the longer one, in pixels


@dataclass(frozen=True)
class Concept:
    code: str
    name: str
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one concept, or two of them with `relation` between the first and the second."""

    subjects: tuple[Concept, ...]
    style: str
    relation: str = ""
    background: tuple[str, ...] = ()  # names of its colors; empty: none of them, whatever the picture has


@cache
def concepts(path: Path = HERE / "concepts.txt") -> tuple[Concept, ...]:
    rows = []
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            code, names = line.split(" ", 1)
            name, *aliases = [part.strip() for part in names.split("|")]
            rows.append(Concept(code, name, tuple(aliases)))
    return tuple(rows)


@cache
def pairs() -> tuple[list[tuple[Concept, str]], list[tuple[Concept, str]]]:
    """(concept, style) pairs to train on, and those held out to see whether style and concept compose."""
    everything = concepts()
    held = set()
    for index in random.Random(0).sample(range(len(everything)), round(HELD_OUT_SHARE * 3 * len(everything))):
        held.add((everything[index].code, list(STYLES)[index % 3]))
    train, out = [], []
    for concept in concepts():
        for style in STYLES:
            (out if (concept.code, style) in held else train).append((concept, style))
    return train, out


@cache
def held_together(first: Concept, second: Concept) -> bool:
    """Whether these two are kept out of one another's pictures in training."""
    return random.Random("|".join(sorted((first.code, second.code)))).random() < HELD_OUT_TOGETHER


def color_names(rng: random.Random, tones: float = TWO_TONE) -> tuple[str, ...]:
    """Of a random background: one, or for a share `tones` two from top to bottom."""
    return tuple(rng.sample(list(BACKGROUNDS), 1 + (rng.random() < tones)))


def scene(
    rng: random.Random, rows: list[tuple[Concept, str]], two: float = TWO, held: bool = False, tones: float = TWO_TONE
) -> Scene:
    """A random scene of these (concept, style) pairs; a share `two` of them shows two concepts, which are seen together in
    training, or (`held`) are not."""
    concept, style = rng.choice(rows)
    background = color_names(rng, tones) if rng.random() < NAMED else ()
    alone = Scene((concept,), style, background=background)
    if rng.random() >= two:
        return alone
    others = [c for c, s in rows if s == style and c != concept and held_together(concept, c) == held]
    return replace(alone, subjects=(concept, rng.choice(others)), relation=rng.choice(RELATIONS)) if others else alone


@cache
def drawings() -> dict[str, dict[str, torch.Tensor]]:
    """By set and code point: the drawing within its bounding box, premultiplied, [4, h, w] in 0..1."""
    order = json.loads((WORK / "order.json").read_text())
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, pixels in load_file(WORK / "drawings-128.safetensors").items():
        found[name] = {}
        for code, drawing in zip(order[name], pixels, strict=False):  # the concepts come first
            inked = drawing[3] > 12
            rows, columns = inked.any(1).nonzero()[[0, -1], 0], inked.any(0).nonzero()[[0, -1], 0]
            part = drawing[:, rows[0] : rows[1] + 1, columns[0] : columns[1] + 1].float() / 255
            found[name][code] = torch.cat([part[:3] * part[3:], part[3:]])
    return found


@cache
def resized(drawing: torch.Tensor, side: int) -> torch.Tensor:
    """One of `drawings` at this length of its longer side in pixels, [4, h, w]."""
    h, w = (max(1, round(side * n / max(drawing.shape[1:]))) for n in drawing.shape[1:])
    return F.interpolate(drawing[None], size=(h, w), mode="bilinear", antialias=True, align_corners=False)[0]


def ground(background: tuple[str, ...], height: int, width: int, rng: random.Random) -> torch.Tensor:
    """The named background [3, height, width] in 0..1, or a random pastel."""
    if not background:
        color = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.3), rng.uniform(0.86, 1.0))
        return torch.tensor(color)[:, None, None].expand(3, height, width).clone()
    canvas = torch.empty(3, height, width)
    for name, rows in zip(background, canvas.tensor_split(len(background), dim=1), strict=True):
        color = torch.tensor([channel + rng.uniform(-JITTER, JITTER) for channel in BACKGROUNDS[name]]) / 255
        rows.copy_(color[:, None, None].expand_as(rows))
    return canvas


def compose(scene: Scene, height: int, width: int, rng: random.Random) -> tuple[torch.Tensor, list[tuple[int, int, int, int]]]:
    """The scene as a picture [3, height, width] in -1..1, and where its subjects lie: (top, left, height, width) of each. Its style
    is one of STYLES, or the name of any set.

    One subject takes 45 to 95 % of the shorter side, anywhere. Two have half of the picture each, left and right or upper and
    lower, and take 60 to 95 % of what fits there. Sizes are some of SIDES and places are whole tokens: a drawing then is made of
    the same few tokens wherever it lies, which a small model learns in a fraction of the time.
    """
    canvas = ground(scene.background, height, width, rng)
    areas = [(0, 0, height, width)]
    if scene.relation in ("left of", "right of"):
        areas = [(0, 0, height, width // 2), (0, width // 2, height, width - width // 2)]
    elif scene.relation:
        areas = [(0, 0, height // 2, width), (height // 2, 0, height - height // 2, width)]
    if scene.relation in ("right of", "below"):
        areas.reverse()
    boxes = []
    for concept, (top, left, tall, wide) in zip(scene.subjects, areas, strict=True):
        fits, least = min(tall, wide), 0.6 if scene.relation else 0.45
        side = rng.choice([n for n in SIDES if least * fits <= n <= 0.95 * fits])
        small = resized(drawings()[STYLES.get(scene.style, scene.style)][concept.code], side)
        if rng.random() < 0.5:
            small = small.flip(-1)
        h, w = small.shape[1:]
        top, left = (start + GRID * rng.randint(0, free // GRID) for start, free in ((top, tall - h), (left, wide - w)))
        part = canvas[:, top : top + h, left : left + w]
        part.mul_(1 - small[3:]).add_(small[:3])
        boxes.append((top, left, h, w))
    return canvas * 2 - 1, boxes


def scene_prompt(scene: Scene) -> str:
    """The scene in the plainest words."""
    text = f" {scene.relation} ".join(concept.name for concept in scene.subjects)
    ending = f", on a {' and '.join(scene.background)} background" if scene.background else ""
    return f"{text}, {scene.style} style{ending}"


def prompt(concept: Concept, style: str) -> str:
    return scene_prompt(Scene((concept,), style))


def fill(template: str, scene: Scene, rng: random.Random) -> str:
    names = [rng.choice((c.name, c.name, *c.aliases)) for c in scene.subjects]
    return template.format(
        subject=names[0],
        other=names[-1],
        relation=scene.relation,
        style=scene.style,
        phrase=rng.choice(STYLE_PHRASES[scene.style]),
    )


def scene_caption(scene: Scene, rng: random.Random) -> str:
    """One way a person might ask for the picture; says what the scene names, and nothing else."""
    templates = PAIR_TEMPLATES if scene.relation else TEMPLATES
    text = fill(rng.choices([t for t, _ in templates], [w for _, w in templates])[0], scene, rng)
    if scene.background:
        comma = rng.choice((",", ",", ",", ""))
        text += f"{comma} on a {' and '.join(scene.background)} background"
    for vowel in "aeiou":
        text = re.sub(rf"\ba {vowel}", f"an {vowel}", text) if rng.random() < 0.5 else text
    return text


def caption(concept: Concept, style: str, rng: random.Random) -> str:
    """One way a person might ask for a picture of this alone, with any background."""
    return scene_caption(Scene((concept,), style), rng)


def all_captions() -> list[str]:
    """Captions with every word that training can produce, in about the frequencies of training: what the tokenizers'
    vocabularies are built from."""
    texts = set()
    for concept in concepts():
        for name in (concept.name, *concept.aliases):
            for style, phrases in STYLE_PHRASES.items():
                for template, _ in TEMPLATES:
                    for phrase in phrases:
                        texts.add(template.format(subject=name, style=style, phrase=phrase))
    one = concepts()[0].name
    texts |= {
        f"{one} {relation} {one}, 3d style, on a {color} and gray background" for relation in RELATIONS for color in BACKGROUNDS
    }
    return [*sorted(texts), "an"]


def pictures(size: int = 128) -> dict[str, torch.Tensor]:
    """Rendered pictures on white by set, uint8 [n, 3, size, size]; names in the order of `order.json` beside them."""
    return load_file(WORK / f"pictures-{size}.safetensors")
