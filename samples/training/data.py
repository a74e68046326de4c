"""Pictures and captions of the embedded pipelines: which emoji, which drawings of them, how a person would ask for one."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
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
    ("{concept}, {phrase}", 6),
    ("a {concept}, {phrase}", 1),
    ("{concept} in {phrase}", 1),
    ("a {style} drawing of a {concept}", 1),
    ("a {style} picture of a {concept}", 1),
    ("{style} {concept}", 1),
    ("the {concept}, {phrase}", 0.5),
    ("{concept}", 0.5),
]
HELD_OUT_SHARE = 0.08  # of the (concept, style) pairs; a concept loses at most one style


@dataclass(frozen=True)
class Concept:
    code: str
    name: str
    aliases: tuple[str, ...]


def concepts(path: Path = HERE / "concepts.txt") -> list[Concept]:
    rows = []
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            code, names = line.split(" ", 1)
            name, *aliases = [part.strip() for part in names.split("|")]
            rows.append(Concept(code, name, tuple(aliases)))
    return rows


def pairs() -> tuple[list[tuple[Concept, str]], list[tuple[Concept, str]]]:
    """(concept, style) pairs to train on, and those held out to see whether style and concept compose."""
    everything = concepts()
    held = set()
    for index in random.Random(0).sample(range(len(everything)), round(HELD_OUT_SHARE * 3 * len(everything))):
        held.add((everything[index].code, list(STYLES)[index % 3]))
    train, out = [], []
    for concept in everything:
        for style in STYLES:
            (out if (concept.code, style) in held else train).append((concept, style))
    return train, out


def prompt(concept: Concept, style: str) -> str:
    return f"{concept.name}, {style} style"


def caption(concept: Concept, style: str, rng: random.Random) -> str:
    """One way a person might ask for the picture."""
    template = rng.choices([t for t, _ in TEMPLATES], [w for _, w in TEMPLATES])[0]
    name = rng.choice((concept.name, concept.name, *concept.aliases))
    text = template.format(concept=name, style=style, phrase=rng.choice(STYLE_PHRASES[style]))
    for vowel in "aeiou":
        text = text.replace(f"a {vowel}", f"an {vowel}") if rng.random() < 0.5 else text
    return text


def all_captions() -> list[str]:
    """Every caption that training can produce: what the tokenizers' vocabularies are built from."""
    texts = set()
    for concept in concepts():
        for name in (concept.name, *concept.aliases):
            for style, phrases in STYLE_PHRASES.items():
                for template, _ in TEMPLATES:
                    for phrase in phrases:
                        texts.add(template.format(concept=name, style=style, phrase=phrase))
    return [*sorted(texts), "an"]


def pictures(size: int = 128) -> dict[str, torch.Tensor]:
    """Rendered pictures by set, uint8 [n, 3, size, size]; names in the order of `order.json` beside them."""
    return load_file(WORK / f"pictures-{size}.safetensors")
