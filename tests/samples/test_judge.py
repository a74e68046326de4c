"""What the judge reads off its map, and what it makes of the shipped contact sheets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import judge as judging
from data import BACKGROUNDS, STYLES, Scene, concepts
from dit_accel.eval.rewards.judge import background_right, load_judge
from judge import OUT, labels_of, verdicts

SAMPLES = Path(__file__).parents[2] / "samples"

APPLE, OWL, KEY = concepts()[6], concepts()[40], concepts()[80]


class Seen(torch.nn.Module):
    """A judge that has seen these concepts in these cells of a 6 x 6 map, whatever the picture."""

    def __init__(self, cells: dict[tuple[int, int], object]) -> None:
        super().__init__()
        self.codes = [concept.code for concept in concepts()]
        self.map = torch.zeros(len(self.codes) + 1, 6, 6)
        self.map[-1] = 10
        for sureness, ((row, column), concept) in zip((30, 25, 20), cells.items(), strict=False):
            self.map[self.codes.index(concept.code), row, column] = sureness

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.map.expand(len(images), -1, -1, -1)


def verdict(cells: dict, asked: Scene):
    return verdicts(Seen(cells), torch.zeros(1, 3, 96, 96), [asked])[0]


def test_a_single_object_is_the_one_it_is_surest_of():
    right = verdict({(4, 1): OWL, (0, 0): KEY}, Scene((OWL,), "3d"))
    assert right.object is True and right.named[:2] == (OWL.code, KEY.code) and len(right.named) == len(concepts())
    assert (right.both, right.places, right.background) == (None, None, None)
    assert verdict({(4, 1): KEY, (0, 0): OWL}, Scene((OWL,), "3d")).object is False


@pytest.mark.parametrize(
    ("relation", "places"),
    [("left of", True), ("right of", False), ("above", False), ("below", True)],
)
def test_two_objects_and_their_places(relation, places):
    """The owl lies below and to the left of the apple."""
    cells = {(5, 1): OWL, (0, 4): APPLE, (3, 3): KEY}
    found = verdict(cells, Scene((OWL, APPLE), "flat", relation))
    assert (found.object, found.both, found.places) == (None, True, places)
    other = verdict(cells, Scene((OWL, KEY), "flat", relation))
    assert (other.both, other.places) == (False, False)


def test_background_colors():
    def ground(*names: str) -> torch.Tensor:
        parts = [torch.tensor(BACKGROUNDS[name])[:, None, None].expand(3, 128 // len(names), 128) for name in names]
        image = torch.cat(parts, 1) / 127.5 - 1
        image[:, 20:108, 20:108] = 1.0  # an object
        return image + 0.05 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))

    assert background_right(ground("blue"), (), BACKGROUNDS) is None
    for name in BACKGROUNDS:
        assert [other for other in BACKGROUNDS if background_right(ground(name), (other,), BACKGROUNDS)] == [name]
    assert background_right(ground("blue", "pink"), ("blue", "pink"), BACKGROUNDS) is True
    assert background_right(ground("blue", "pink"), ("pink", "blue"), BACKGROUNDS) is False
    assert background_right(torch.ones(3, 128, 128), ("gray",), BACKGROUNDS) is False


def test_cells_are_labeled_by_what_lies_in_their_middle():
    labels = labels_of(Scene((APPLE, OWL), "3d", "left of"), [(16, 0, 64, 48), (40, 64, 20, 20)], (96, 96))
    nothing, apple, owl = len(concepts()), concepts().index(APPLE), concepts().index(OWL)
    assert labels.tolist() == [
        [nothing] * 6,
        [-100, -100, -100, nothing, nothing, nothing],
        [-100, apple, -100, nothing, nothing, nothing],
        [-100, apple, -100, nothing, owl, nothing],
        [-100, -100, -100, nothing, nothing, nothing],
        [nothing] * 6,
    ]


@pytest.mark.parametrize("name", ["emoji-flux", "emoji-pixart"])
def test_the_judge_names_what_the_contact_sheets_show(name):
    """Tiles of 64 px: every concept in 3d, flat and cartoon style."""
    sheet = Image.open(SAMPLES / f"{name}.png").convert("RGB")
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3).permute(2, 0, 1)
    places = [(i // 18 * 75, i % 18 * 64) for i in range(3 * len(concepts()))]
    tiles = torch.stack([pixels[:, y : y + 64, x : x + 64] for y, x in places]) / 127.5 - 1
    scenes = [Scene((concept,), style) for concept in concepts() for style in STYLES]
    found = verdicts(load_judge(OUT), F.interpolate(tiles, size=(128, 128), mode="bilinear"), scenes)
    assert judging.shares(found)["object"] >= 0.85


def test_how_well_the_judge_knows_drawings():
    accuracy = json.loads((SAMPLES / "judge/config.json").read_text())["accuracy"]
    assert accuracy["seen_drawings"]["autoencoder, the generators' sets"]["object"] >= 0.97
    assert accuracy["unseen_style"]["plain"]["object"] >= 0.6
    assert judging.UNSEEN not in accuracy["unseen_style"]["trained_on"]
