"""Scenes and their captions, on a miniature of drawings: blobs of a color of their own."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch
from safetensors.torch import save_file

import data
from data import (
    BACKGROUNDS,
    RELATIONS,
    STYLE_PHRASES,
    STYLES,
    Scene,
    compose,
    concepts,
    held_together,
    pairs,
    scene,
    scene_caption,
)

BLOBS = [(255, 0, 255), (0, 255, 255), (0, 255, 0)]  # of the first concepts: far from every background


@pytest.fixture
def blobs(tmp_path, monkeypatch):
    """The first three concepts: a tall, a wide and a square blob, each with a red spot in its left half."""
    pixels = torch.zeros(3, 4, 128, 128, dtype=torch.uint8)
    for drawing, color, (h, w) in zip(pixels, BLOBS, [(100, 50), (50, 100), (80, 80)], strict=True):
        part = drawing[:, 10 : 10 + h, 20 : 20 + w]
        part[:3], part[3] = torch.tensor(color, dtype=torch.uint8)[:, None, None], 255
        part[:3, h // 4 : h // 2, w // 8 : w // 4] = torch.tensor((255, 0, 0), dtype=torch.uint8)[:, None, None]
    save_file({name: pixels.clone() for name in STYLES.values()}, tmp_path / "drawings-128.safetensors")
    order = [concept.code for concept in concepts()[:3]]
    (tmp_path / "order.json").write_text(json.dumps(dict.fromkeys(STYLES.values(), order)))
    monkeypatch.setattr(data, "WORK", tmp_path)
    data.drawings.cache_clear()
    yield concepts()[:3]
    data.drawings.cache_clear()


def shows(image: torch.Tensor, color: tuple[int, int, int], tolerance: float = 40) -> torch.Tensor:
    """Where a picture [3, h, w] in -1..1 has about this color."""
    return ((image + 1) * 127.5 - torch.tensor(color, dtype=torch.float)[:, None, None]).abs().amax(0) < tolerance


def test_a_scene_and_its_picture_follow_from_a_seed(blobs):
    assert all(scene(random.Random(i), pairs()[0]) == scene(random.Random(i), pairs()[0]) for i in range(20))
    made = Scene(blobs[:2], "3d", "above")
    first, boxes = compose(made, 96, 128, random.Random(5))
    again, boxes_again = compose(made, 96, 128, random.Random(5))
    other, _ = compose(made, 96, 128, random.Random(6))
    assert first.shape == (3, 96, 128) and first.abs().max() < 1.001
    assert torch.equal(first, again) and boxes == boxes_again and not torch.equal(first, other)


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (128, 64)])
def test_the_boxes_are_where_the_objects_are(blobs, size):
    for i in range(30):
        alone = i % 2 == 0
        subjects = (blobs[i % 3],) if alone else tuple(random.Random(i).sample(blobs, 2))
        made = Scene(subjects, "flat", "" if alone else RELATIONS[i % 4])
        image, boxes = compose(made, *size, random.Random(i))
        for concept, (top, left, h, w) in zip(made.subjects, boxes, strict=True):
            rows, columns = shows(image, BLOBS[blobs.index(concept)]).nonzero().unbind(1)
            found = (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
            assert all(abs(a - b) <= 1 for a, b in zip(found, (top, left, top + h, left + w), strict=True)), (made, found)
        if alone:
            assert 0.43 <= max(boxes[0][2:]) / min(size) <= 0.97


@pytest.mark.parametrize("relation", RELATIONS)
def test_two_objects_lie_as_they_were_asked_to(blobs, relation):
    """The first one as a whole on its side of the second."""
    for i in range(20):
        image, _ = compose(Scene((blobs[0], blobs[1]), "cartoon", relation), 96, 96, random.Random(i))
        first, second = (shows(image, BLOBS[k]).nonzero()[:, 1 if relation.endswith("of") else 0] for k in (0, 1))
        before, after = (first, second) if relation in ("left of", "above") else (second, first)
        assert before.max() < after.min()


def test_drawings_come_mirrored_and_at_any_place(blobs):
    lefts, tops, sides = [], [], set()
    for i in range(60):
        image, [(top, left, h, w)] = compose(Scene((blobs[2],), "3d"), 96, 96, random.Random(i))
        lefts.append(left / (96 - w))
        tops.append(top / (96 - h))
        spot = shows(image, (255, 0, 0), 90).nonzero()[:, 1].float().mean()
        sides.add(bool(spot < left + w / 2))
    assert sides == {True, False}
    assert min(lefts) < 0.2 < 0.8 < max(lefts) and min(tops) < 0.2 < 0.8 < max(tops)


def test_backgrounds_have_the_named_colors_and_are_pale_without_a_name(blobs):
    for i, names in enumerate([(), *((name,) for name in BACKGROUNDS), ("blue", "yellow"), ("green", "red")]):
        image, [(top, left, h, w)] = compose(Scene((blobs[0],), "3d", background=names), 96, 96, random.Random(i))
        free = torch.ones(96, 96, dtype=torch.bool)
        free[max(0, top - 1) : top + h + 1, max(0, left - 1) : left + w + 1] = False
        if not names:
            assert (image[:, free].amax(0) > 0.7).all() and (image[:, free].amin(0) > 0.1).all()
        for name, part, where in zip(
            names, image.tensor_split(len(names) or 1, 1), free.tensor_split(len(names) or 1), strict=False
        ):
            assert shows(part, BACKGROUNDS[name], data.JITTER + 1)[where].all(), names


def test_training_never_shows_what_is_held_out():
    train, out = pairs()
    assert not {(c.code, style) for c, style in train} & {(c.code, style) for c, style in out}
    scenes = [scene(random.Random(i), train, two=1.0) for i in range(1500)]
    assert all(not held_together(*made.subjects) for made in scenes)
    assert all((subject, made.style) in train for made in scenes for subject in made.subjects)
    held = [scene(random.Random(i), train, two=1.0, held=True) for i in range(300)]
    together = [made.subjects for made in held if made.relation]
    assert len(together) > 250 and all(held_together(*subjects) for subjects in together)
    both_ways = [(a, b) for a in concepts() for b in concepts() if a != b]
    assert all(held_together(a, b) == held_together(b, a) for a, b in both_ways)
    assert 0.06 < sum(held_together(a, b) for a, b in both_ways) / len(both_ways) < 0.1


def test_the_concepts_are_those_of_the_file():
    assert len(concepts()) == 110 and concepts()[0].code == "1f347" and concepts()[0].name == "grapes"
    assert all(concept in concepts() for part in pairs() for concept, _ in part)


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (96, 96)])
def test_a_layout_tells_which_part_of_which_subject_a_token_shows(blobs, size):
    """Each blob is known by its color, and its red spot lies in a known part of it."""
    from loop import layout_of

    for i in range(20):
        made = Scene(tuple(random.Random(i).sample(blobs, 2)), "3d", RELATIONS[i % 4])
        image, boxes = compose(made, *size, random.Random(i))
        layout = layout_of(boxes, size)
        assert layout.shape == (5, size[0] // 8, size[1] // 8)
        for row in range(size[0] // 8):
            for column in range(size[1] // 8):
                y, x = 8 * row + 4, 8 * column + 4
                token = layout[:, row, column]
                inside = [top < y < top + h and left < x < left + w for top, left, h, w in boxes]
                assert token[:2].tolist() == inside
                if not any(inside):
                    assert not token.any()
                    continue
                top, left, h, w = boxes[inside.index(True)]
                assert token[2:].tolist() == pytest.approx([(y - top) / h, (x - left) / w, max(h, w) / 128])
                color = ((image[:, y, x] + 1) * 127.5).tolist()
                own = BLOBS[blobs.index(made.subjects[inside.index(True)])]
                spot = 0.3 < token[2] < 0.45 and (0.14 < token[3] < 0.23 or 0.77 < token[3] < 0.86)
                if not spot and not (0.2 < token[2] < 0.55):  # well away from the red spot and its edge
                    assert color == pytest.approx(own, abs=30)


def caption_pattern(made: Scene) -> str:
    """Every caption that names this scene, and nothing but it."""
    names = ["(?:" + "|".join(map(re.escape, (c.name, *c.aliases))) + ")" for c in made.subjects]
    phrase = "(?:" + "|".join(STYLE_PHRASES[made.style]) + ")"
    article, style = "(?:an? |the )?", f"(?:{made.style} )?"
    subjects = f" {made.relation} ".join(f"{article}{style}{name}" for name in names)
    picture = f"(?:an? {made.style} (?:drawing|picture) of )?"
    ground = f",? on an? {' and '.join(made.background)} background" if made.background else ""
    return f"{picture}{subjects}(?:,? (?:in )?{phrase})?{ground}"


def test_a_caption_says_what_the_scene_names_and_nothing_else():
    ways = set()
    for i in range(3000):
        rng = random.Random(i)
        made = scene(rng, pairs()[0])
        text = scene_caption(made, rng)
        assert re.fullmatch(caption_pattern(made), text), (made, text)
        assert re.fullmatch(caption_pattern(made), data.scene_prompt(made))
        ways.add((len(made.subjects), len(made.background)))
    assert ways == {(n, colors) for n in (1, 2) for colors in (0, 1, 2)}


def test_the_tokenizers_know_every_word_and_captions_fit():
    from text import LENGTH, clip_tokenizer, t5_tokenizer

    clip, t5 = clip_tokenizer(), t5_tokenizer()
    rngs = [random.Random(i) for i in range(3000)]
    captions = [scene_caption(scene(rng, pairs()[0], two=0.5), rng) for rng in rngs]
    wordy = sorted(concepts(), key=lambda concept: len(concept.name.split()))[-2:]
    longest = Scene(tuple(wordy), "cartoon", "left of", ("blue", "gray"))
    captions += [scene_caption(longest, rng) for rng in rngs[:100]]
    words = clip(captions).input_ids
    assert max(map(len, words)) <= LENGTH
    tokens = {token for ids in words for token in clip.convert_ids_to_tokens(ids)} - {clip.bos_token, clip.eos_token}
    assert all(token.endswith("</w>") for token in tokens), "a word of several tokens is one that it does not know"
    pieces = t5(captions).input_ids
    assert max(map(len, pieces)) <= LENGTH
    assert all(t5.unk_token_id not in ids for ids in pieces)
    assert t5.unk_token_id in t5("a zeppelin").input_ids


@pytest.mark.parametrize(
    ("caption", "places"),
    [
        ("owl, 3d style", "whole whole whole whole"),
        ("owl left of red apple, flat style", "left whole whole right right whole whole whole"),
        ("a key below an owl in 3d style", "lower lower whole upper upper whole whole whole"),
        ("3d owl on a red and blue background", "whole whole whole whole upper whole lower whole"),
    ],
)
def test_words_belong_in_the_half_that_they_are_about(caption, places):
    from text import LENGTH, PLACES, roles, t5_tokenizer

    (row,) = roles([caption])
    said = [PLACES[role] for role in row[row >= 0]]
    assert said == places.split() and len(row) == LENGTH
    assert len(said) == len(t5_tokenizer()(caption).input_ids) - 1, "one a token, but for the end"
