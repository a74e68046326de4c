"""The judge of the embedded pipelines: does a picture show what its prompt asks for, and which part of it is wrong?

A small convolutional network names the concept in each cell of a picture (samples/training/judge.py trains it). Scores of a mean
reward hide what compression breaks first; these are of one thing each, and of prompts that ask for it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from dit_accel.eval.rewards.pictures import Picture, batches
from dit_accel.names import meant
from dit_accel.pipelines.catalog import samples_folder

SIDE, CELL, WIDTHS = 96, 16, (24, 48, 96, 160)  # the shorter side it looks at, and what one cell of its map covers, in pixels
TOLERANCE = 60  # Euclidean distance in RGB within which a color bears a name
SURE = 1e-6  # probabilities nearer to 0 or 1 count as this near
RELATIONS = ("left of", "right of", "above", "below")
PROMPT = re.compile(
    rf"(?:an? |the )?(?P<first>.+?)(?: (?P<relation>{'|'.join(RELATIONS)}) (?:an? |the )?(?P<second>.+?))?"
    r"(?:, \w+ (?:style|design|render)|, cartoon)?(?:,? on an? (?P<upper>\w+)(?: and (?P<lower>\w+))? background)?"
)
# What only small strokes tell from others: faces, spokes, strings, seams, seeds, petals.
FINE = frozenset(
    "monkey face,dog face,fox,cat face,lion,tiger face,cow face,pig face,mouse face,rabbit face,bear,koala,panda,frog,owl,"
    "lady beetle,honeybee,hedgehog,butterfly,pineapple,strawberry,watermelon,ear of corn,sunflower,snowman,alarm clock,"
    "jack-o-lantern,christmas tree,soccer ball,basketball,guitar,doughnut,cookie,automobile,bus,house".split(",")
)
ASPECTS = {
    "scene": "1 where all that the prompt asks for is right, else 0",
    "object": "1 where the one object asked for is the surest",
    "background": "1 where the background has the colors asked for",
    "both": "1 where the two objects asked for are the two surest",
    "places": "1 where both are, and the first lies on the right side of the second",
    "detail": "log-odds of the objects asked for, of those that only small strokes tell from others",
}


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for: one object, or two with `relation` between the first and the second."""

    subjects: tuple[str, ...]  # code points
    relation: str = ""
    background: tuple[str, ...] = ()  # names of its colors; empty: any


@dataclass(frozen=True)
class Verdict:
    """What the judge says of a picture, and whether it is what was asked for; None where that was not asked for."""

    named: tuple[str, ...]  # code points of all concepts, the surest first
    object: bool | None  # one concept asked for: it is the surest
    both: bool | None  # two asked for: they are the two surest
    places: bool | None  # both, and the first lies on the right side of the second
    background: bool | None
    odds: Mapping[str, float]  # log-odds of every concept asked for

    @property
    def scene(self) -> bool:
        """Whether all is right that was asked for."""
        return all(part is not False for part in (self.object, self.both, self.places, self.background))


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a 1 x 1, at half the resolution."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        )
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(width, out, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class Judge(nn.Module):
    """Pictures [n, 3, h, w] in -1..1, of any size, to a map of logits [n, concepts + 1, rows, columns]; the last one is of nothing.

    A cell covers 16 x 16 pixels of the picture with its shorter side made 96 px.
    """

    def __init__(self, codes: list[str], widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.codes = codes
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        self.blocks = nn.Sequential(*(Residual(a, b) for a, b in zip(widths, widths[1:], strict=False)))
        self.head = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(widths[-1], len(codes) + 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        size = [round(SIDE * n / min(images.shape[2:]) / CELL) * CELL for n in images.shape[2:]]
        if list(images.shape[2:]) != size:
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        return self.head(self.blocks(self.stem(images)))


def load_judge(folder: Path) -> Judge:
    """The trained judge; `codes` has the code points of its concepts in order."""
    config = config_of(folder)
    judge = Judge(config["codes"], tuple(config["widths"]))
    weights = load_file(folder / "judge.safetensors")
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return judge.eval()


def config_of(folder: Path) -> dict[str, Any]:
    """Its `codes`, their `labels` and `aliases`, the `backgrounds` in RGB by name, and what was measured of it."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


@torch.no_grad()
def verdicts(
    judge: Judge, images: torch.Tensor, asked: Sequence[Asked], colors: Mapping[str, Sequence[int]], batch: int = 64
) -> list[Verdict]:
    """Of pictures [n, 3, h, w] in -1..1 and what they were asked to show; `colors` of backgrounds in RGB."""
    found = []
    for start in range(0, len(images), batch):
        seen = judge(images[start : start + batch]).softmax(1)[:, :-1]  # [n, concepts, rows, columns]
        sureness = seen.amax(dim=(2, 3))
        rows, columns = (torch.arange(n, dtype=seen.dtype, device=seen.device) for n in seen.shape[2:])
        total = seen.sum(dim=(2, 3))
        down, across = seen.sum(3) @ rows / total, seen.sum(2) @ columns / total  # centers of gravity [n, concepts], in cells
        for i, one in enumerate(asked[start : start + batch]):
            order = sureness[i].argsort(descending=True).tolist()
            named = tuple(judge.codes[label] for label in order)
            labels = [judge.codes.index(code) for code in one.subjects]
            single = both = places = None
            if one.relation:
                first, second = labels
                both = set(order[:2]) == {first, second}
                x, y = across[i, second] - across[i, first], down[i, second] - down[i, first]
                places = both and {"left of": x, "right of": -x, "above": y, "below": -y}[one.relation].item() > 0
            else:
                single = named[0] == one.subjects[0]
            sure = sureness[i, labels].double().clamp(SURE, 1 - SURE)
            odds = dict(zip(one.subjects, (sure / (1 - sure)).log().tolist(), strict=True))
            background = background_right(images[start + i], one.background, colors)
            found.append(Verdict(named, single, both, places, background, odds))
    return found


def background_right(image: torch.Tensor, names: Sequence[str], colors: Mapping[str, Sequence[int]]) -> bool | None:
    """Whether at least half of the pixels at the edge of a picture [3, h, w] in -1..1 have the named color; of two names, the
    first is that of the upper half."""
    if not names:
        return None
    pixels = (image.clamp(-1, 1) + 1) * 127.5
    known = torch.tensor(list(colors.values()), dtype=pixels.dtype, device=pixels.device)
    distance = (pixels[None] - known[:, :, None, None]).norm(dim=1)  # [colors, h, w]
    nearest = torch.where(distance.amin(0) < TOLERANCE, distance.argmin(0), -1)
    edge = torch.ones_like(nearest, dtype=torch.bool)
    width = min(edge.shape) // 16
    edge[width:-width, width:-width] = False
    halves = zip(names, nearest.tensor_split(len(names)), edge.tensor_split(len(names)), strict=True)
    return all((half[ring] == list(colors).index(name)).float().mean().item() >= 0.5 for name, half, ring in halves)


class JudgeScore:
    """One aspect of what the judge says of pictures; NaN for prompts that do not ask for it."""

    def __init__(self, judge: Judge, config: Mapping[str, Any], aspect: str) -> None:
        self.judge, self.aspect, self.colors = judge, aspect, config["backgrounds"]
        rows = zip(config["codes"], config["labels"], config["aliases"], strict=True)
        self.codes = {name: code for code, label, aliases in rows for name in (label, *aliases)}
        self.fine = {code for code, label in zip(config["codes"], config["labels"], strict=True) if label in FINE}

    @classmethod
    def of(cls, aspect: str = "scene", *, device: str | torch.device = "cpu") -> JudgeScore:
        """That which comes along, for "scene", "object", "background", "both", "places" or "detail".

        Raises:
            ValueError: there is no such aspect.
        """
        check_aspect(aspect)
        judge, config = _loaded(str(device))
        return cls(judge, config, aspect)

    def asked(self, prompt: str) -> Asked | None:
        """What a prompt of the embedded pipelines asks for; None if it is not one."""
        found = PROMPT.fullmatch(prompt.strip())
        names = [found[part] for part in ("first", "second") if found[part]] if found else []
        background = tuple(found[part] for part in ("upper", "lower") if found[part]) if found else ()
        if not found or any(name not in self.codes for name in names) or any(color not in self.colors for color in background):
            return None
        return Asked(tuple(self.codes[name] for name in names), found["relation"] or "", background)

    def score(self, prompts: str | Sequence[str], images: Picture | Sequence[Picture], batch_size: int = 16) -> np.ndarray:
        """What the judge says of every picture and the prompt at the same place, [N]; raises what `ImageReward.score` raises."""
        found: list[float] = []
        device = next(self.judge.parameters()).device
        for texts, opened in batches(prompts, images, batch_size):
            for text, picture in zip(texts, opened, strict=True):
                if (asked := self.asked(text)) is None:
                    found.append(math.nan)
                    continue
                pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].to(device) / 127.5 - 1
                found.append(self.value(verdicts(self.judge, pixels, [asked], self.colors)[0]))
        return np.array(found)

    def value(self, verdict: Verdict) -> float:
        if self.aspect == "detail":
            odds = [value for code, value in verdict.odds.items() if code in self.fine]
            return sum(odds) / len(odds) if odds else math.nan
        said = getattr(verdict, self.aspect)
        return math.nan if said is None else float(said)

    def cut(self, prompts: str | Sequence[str]) -> int:
        """Of no prompt an end is left unread."""
        return 0


@lru_cache(maxsize=4)
def _loaded(device: str) -> tuple[Judge, dict[str, Any]]:
    folder = samples_folder() / "judge"
    return load_judge(folder).to(device), config_of(folder)


def check_aspect(aspect: str) -> None:
    """ValueError if the judge has no such aspect."""
    if aspect not in ASPECTS:
        raise ValueError(f"The judge has no aspect {aspect!r}.{meant(aspect, ASPECTS)} Choose one of {', '.join(ASPECTS)}.")
