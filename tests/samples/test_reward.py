"""What the reward learns from, on drawings whose concept and set are read off their colors: every worse picture has its failure."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

import data
import reward_data
from data import BACKGROUNDS, JITTER, RELATIONS, STYLES, Scene, compose, concepts, held_together, pairs
from degrade import DEGRADATIONS, degrade
from dit_accel.eval.rewards.pictures import MEAN, STD, preprocess
from reward_data import (
    FAILURES,
    LOOKS,
    OPPOSITE,
    SIZES,
    STOPPED,
    comparison,
    counterparts,
    erased,
    failed,
    fit,
    held_out,
    patch_labels,
    request,
    shown_scene,
    unseen_scene,
)

# Colors far from every background and from one another; a drawing has its concept's around its set's.
CONCEPTS = dict(zip((c.code for c in concepts()), product((0, 22, 44, 66, 88), repeat=3), strict=False))
SETS = dict(zip(LOOKS, [(255, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (0, 0, 255), (255, 0, 0)], strict=True))
BAND = (200, 160, 20)  # across every drawing, so that no two patches are alike
MEANING = {**{CONCEPTS[concept.code]: concept for concept in concepts()}, **{color: look for look, color in SETS.items()}}


@pytest.fixture(autouse=True)
def drawings(monkeypatch):
    """Every concept in every set as a square of two colors; nothing goes through the autoencoder."""
    made = {}
    band = (torch.arange(64)[:, None] - 2 * torch.arange(64)).abs() < 4
    for look, middle in SETS.items():
        made[STYLES.get(look, look)] = found = {}
        for code, around in CONCEPTS.items():
            square = torch.ones(4, 64, 64)
            square[:3] = torch.tensor(around)[:, None, None] / 255
            square[:3, 19:45, 15:49] = torch.tensor(middle)[:, None, None] / 255
            square[:3, band] = torch.tensor(BAND)[:, None] / 255
            found[code] = square
    for module in (data, reward_data):
        monkeypatch.setattr(module, "drawings", lambda: made)
    monkeypatch.setattr(reward_data, "ENCODED", 0)
    reward_data.shown.cache_clear()
    yield
    reward_data.shown.cache_clear()


def close(image: torch.Tensor, color: tuple[int, ...], tolerance: float) -> torch.Tensor:
    return ((image + 1) * 127.5 - torch.tensor(color, dtype=torch.float)[:, None, None]).abs().amax(0) < tolerance


def read(image: torch.Tensor) -> Scene:
    """What a picture [3, h, w] in -1..1 shows, by the colors of pixels whose neighbors have the same (at rims, colors mix); of two
    objects, in the order of the first relation that holds."""
    pixels = ((image + 1) * 127.5).round().int()
    pixels = (pixels[0] << 16) + (pixels[1] << 8) + pixels[2]
    inside = torch.ones_like(pixels[1:-1, 1:-1], dtype=torch.bool)
    for y, x in product(range(3), repeat=2):
        inside &= pixels[1:-1, 1:-1] == pixels[y : y + inside.shape[0], x : x + inside.shape[1]]
    places, looks = {}, set()
    for color, count in zip(*pixels[1:-1, 1:-1][inside].unique(return_counts=True), strict=True):
        rgb = (int(color) >> 16, int(color) >> 8 & 255, int(color) & 255)
        if count > 8 and rgb in MEANING:
            what = MEANING[rgb]
            if what in SETS:
                looks.add(what)
            else:
                where = ((pixels[1:-1, 1:-1] == color) & inside).nonzero().float()
                places[what] = (where[:, 0], where[:, 1])
    (look,) = looks
    subjects = tuple(places)
    relation = ""
    if len(subjects) == 2:
        (y, x), (other_y, other_x) = places.values()
        if y.max() < other_y.min() or other_y.max() < y.min():
            relation = "above" if y.max() < other_y.min() else "below"
        if x.max() < other_x.min() or other_x.max() < x.min():
            across = "left of" if x.max() < other_x.min() else "right of"
            relation = f"{relation} {across}".strip()
    halves = []
    for half in image.tensor_split(2, 1):
        amounts = {name: int(close(half, color, JITTER + 2).sum()) for name, color in BACKGROUNDS.items()}
        name, amount = max(amounts.items(), key=lambda item: item[1])
        halves.append(name if amount > 0.1 * half[0].numel() else "")
    background = tuple(halves[: 1 if halves[0] == halves[1] else 2])
    return Scene(subjects, look, relation, background if halves[0] else ())


def like(seen: Scene, made: Scene) -> bool:
    """Whether what was read off a picture is this scene; objects of which one is left of and above the other are both."""
    if set(seen.subjects) != set(made.subjects) or (seen.style, seen.background) != (made.style, made.background):
        return False
    relation = made.relation if seen.subjects == made.subjects else OPPOSITE.get(made.relation, "")
    return relation in seen.relation if relation else len(seen.subjects) == 1


def understood(text: str) -> dict[str, object]:
    """What a caption asks for; None for a style that it does not name."""
    text, _, ground = text.partition(" on an " if " on an " in text else " on a ")
    relation = next((word for word in RELATIONS if f" {word} " in text), "")
    parts = text.split(f" {relation} ") if relation else [text]
    names = {name: c for c in concepts() for name in (c.name, *c.aliases)}
    found = []
    for part in parts:
        fits = [name for name in names if re.search(rf"(^|[ ]){re.escape(name)}($|[ ,])", part)]
        found.append(names[max(fits, key=len)])
    styles = [style for style in STYLES if re.search(rf"\b{style}\b", text)]
    background = tuple(ground.removesuffix(" background").split(" and ")) if ground else ()
    return {"subjects": tuple(found), "relation": relation, "style": styles[0] if styles else None, "background": background}


def matches(text: str, image: torch.Tensor) -> bool:
    """Whether a picture shows what a caption asks for, and no other object."""
    asked, seen = understood(text), read(image)
    style, background = asked["style"] or seen.style, asked["background"] or seen.background
    return like(seen, Scene(asked["subjects"], style, asked["relation"], background))


def draw(kind: str, seed: int) -> tuple[Scene, Scene, random.Random]:
    """A scene for training and what is shown in place of it."""
    rng = random.Random(f"{kind} {seed}")
    while (other := failed(kind, made := shown_scene(rng), rng)) is None:
        pass
    return made, other, rng


def changes(made: Scene, other: Scene) -> set[str]:
    return {part for part in ("subjects", "style", "relation", "background") if getattr(made, part) != getattr(other, part)}


@pytest.mark.parametrize("kind", FAILURES)
def test_the_worse_picture_has_this_failure_and_no_other(kind):
    parts = {"wrong object": "subjects", "wrong background": "background", "swapped places": "relation", "wrong style": "style"}
    for i in range(60):
        made, other, rng = draw(kind, i)
        (right, wrong), labels = counterparts(kind, made, other, SIZES[i % len(SIZES)], rng)
        assert like(read(right), made) and like(read(wrong), other), (made, other, read(wrong))
        assert labels.shape == (2, 2, 64)
        if kind == "missing object":
            assert changes(made, other) == {"subjects", "relation"}
            assert len(made.subjects) == 2 and len(other.subjects) == 1 and set(other.subjects) < set(made.subjects)
        else:
            assert changes(made, other) == {parts[kind]}, (made, other)
        if kind == "wrong object":
            kept = [a for a, b in zip(made.subjects, other.subjects, strict=True) if a == b]
            assert len(kept) == len(made.subjects) - 1 and len(set(made.subjects) | set(other.subjects)) == len(made.subjects) + 1
        if kind == "swapped places":
            assert other.relation == OPPOSITE[made.relation]
        if kind == "wrong style":
            assert made.style in STYLES and other.style in STYLES
        if kind == "wrong background":
            assert len(made.background) == len(other.background) and set(other.background) <= set(BACKGROUNDS)


@pytest.mark.parametrize("kind", ["wrong background", "missing object"])
def test_half_of_the_worse_pictures_differ_where_they_fail_and_nowhere_else(kind):
    alike = 0
    for i in range(60):
        made, other, rng = draw(kind, i)
        (right, wrong), _ = counterparts(kind, made, other, (96, 96), rng)
        lost = [concept for concept in made.subjects if concept not in other.subjects]
        lost_or_ground = torch.ones(96, 96, dtype=torch.bool)
        for concept in made.subjects:
            if concept not in lost:
                rows, columns = close(right, CONCEPTS[concept.code], 6).nonzero().unbind(1)
                lost_or_ground[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = False
        objects_stay = torch.equal(right[:, ~lost_or_ground], wrong[:, ~lost_or_ground])
        ground_stays = torch.equal(right[:, 0, 0], wrong[:, 0, 0]) or torch.equal(right[:, -1, -1], wrong[:, -1, -1])
        alike += objects_stay and (ground_stays or kind == "wrong background")
    assert 15 < alike < 45


def test_an_erased_object_leaves_the_background():
    for i in range(20):
        made, other, rng = draw("missing object", i)
        whole, boxes = compose(made, 96, 128, random.Random(i))
        image = erased(made, other.subjects[0], (96, 128), i)
        top, left, h, w = boxes[0 if other.subjects[0] == made.subjects[1] else 1]
        differs = (image != whole).any(0)
        assert differs[top : top + h, left : left + w].all()
        differs[top : top + h, left : left + w] = False
        assert not differs.any() and like(read(image), other)


@pytest.mark.parametrize("kind", FAILURES)
def test_prompts_are_right_of_the_better_and_wrong_of_the_worse(kind):
    for i in range(25):
        each = comparison(kind, random.Random(f"{kind} {i}"), torch.Generator(), [], None)
        assert each.pictures.shape == (2, 3, 128, 128) and len(each.better) >= 4
        right = [matches(text, each.pictures[place]) for text, place, _ in each.scored]
        assert all(right[a] and not right[b] for a, b in each.better), (each.scored, right)
        assert [fault == "" for _, _, fault in each.scored] == right and each.scored[1][2] == kind


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_a_degraded_picture_shows_the_same_and_worse(kind):
    for i in range(15):
        each = comparison(kind, random.Random(f"{kind} {i}"), torch.Generator().manual_seed(i), [], None)
        assert each.pictures.shape == (3, 3, 128, 128) and each.better[:3] == [(0, 1), (1, 2), (0, 2)]
        assert len({text for text, _, _ in each.scored[:3]}) == 1 and [place for _, place, _ in each.scored[:3]] == [0, 1, 2]
        assert matches(each.scored[0][0], each.pictures[0])
        errors = [(picture - each.pictures[0]).square().mean() for picture in each.pictures]
        assert errors[0] == 0 < 2e-5 < errors[1] < errors[2], errors
        assert [fault for _, _, fault in each.scored[:3]] == ["", kind, kind]
        for text, place, fault in each.scored[3:]:
            assert place == 0 and fault in FAILURES and not matches(text, each.pictures[0])


def test_stopped_samples_come_in_the_order_of_their_steps():
    made = Scene((concepts()[0],), "flat")
    versions = torch.tensor([250, 200, 150, 100, 50], dtype=torch.uint8)[:, None, None, None].expand(5, 3, 128, 128)
    orders = set()
    for i in range(40):
        each = comparison(STOPPED, random.Random(i), torch.Generator(), [(made, versions)], None)
        shades = [round(picture.mean().item() * 127.5 + 127.5) for picture in each.pictures]
        assert shades[0] == 250 and shades[1] > shades[2] and each.better[:3] == [(0, 1), (1, 2), (0, 2)]
        assert (each.labels == -100).all(), "a sample may show anything"
        orders.add(tuple(shades))
    assert len(orders) == 6


def test_samples_take_the_place_of_right_pictures():
    made = Scene((concepts()[0], concepts()[1]), "3d", "above")
    versions = torch.zeros(5, 3, 128, 128, dtype=torch.uint8)
    taken = Counter()
    for i in range(40):
        rng, autoencoder = random.Random(i), FakeAutoencoder()
        each = comparison("swapped places", rng, torch.Generator(), [(made, versions)], autoencoder)
        sampled = bool((each.pictures[0] == -1).all())
        assert (each.labels[0] == -100).all() == sampled
        assert autoencoder.seen == sampled, "beside a sample, the worse picture is one that was decoded too"
        assert not (each.pictures[1] == -1).all()
        taken[sampled] += 1
    assert 4 < taken[True] < 22


class FakeAutoencoder:
    """Passes pictures through as they are, and says that it did."""

    seen = False

    def encode(self, images):
        self.seen, self.latents = True, images
        return self

    def decode(self, latents):
        self.sample = latents
        return self


def test_training_shows_nothing_that_is_held_out():
    held = {(concept.code, style) for concept, style in pairs()[1]}
    for i in range(150):
        kind = (*FAILURES, "noise")[i % 6]
        for picture in comparison(kind, random.Random(i), torch.Generator().manual_seed(i), [], None).pictures[
            : 2 if i % 6 < 5 else 1
        ]:
            seen = read(picture)
            assert not {(concept.code, seen.style) for concept in seen.subjects} & held
            assert len(seen.subjects) == 1 or not held_together(*seen.subjects)


def test_measuring_shows_what_is_held_out_and_nothing_else():
    held = {(concept.code, style) for concept, style in pairs()[1]}
    ways = Counter()
    for i in range(120):
        kind = (*FAILURES, "noise")[i % 6]
        each = comparison(kind, random.Random(i), torch.Generator().manual_seed(i), [], None, unseen=True)
        seen = read(each.pictures[0])
        alone = len(seen.subjects) == 1
        assert (seen.subjects[0].code, seen.style) in held if alone else held_together(*seen.subjects)
        assert seen.style in STYLES
        assert matches(each.scored[0][0], each.pictures[0])
        assert held_out(unseen_scene(random.Random(i))) and not held_out(shown_scene(random.Random(i)))
        ways[alone] += 1
    assert min(ways.values()) > 25


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_labeled_by_what_lies_in_their_middle(size):
    counts = Counter()
    for i in range(30):
        rng = random.Random(i)
        made = shown_scene(rng)
        image, boxes = compose(made, *size, rng)
        shows, look = patch_labels(made, boxes, size).view(2, 8, 8)
        middles = fit(image[None])[0, :, 7::16, 7::16]
        for row, column in product(range(8), range(8)):
            label, pixel = int(shows[row, column]), middles[:, row : row + 1, column : column + 1]
            if label < 0:
                assert look[row, column] == -100
            elif label < len(concepts()):
                colors = (CONCEPTS[concepts()[label].code], SETS[LOOKS[look[row, column]]], BAND)
                edge = not any(close(pixel, color, 60) for color in colors)
                counts["object", edge] += 1
            elif label == len(concepts()):
                assert not made.background and look[row, column] == -100 and (pixel > 0).all()
            else:
                assert close(pixel, list(BACKGROUNDS.values())[label - len(concepts()) - 1], JITTER + 8)
                counts["ground", False] += 1
    assert counts["object", False] > 100 and counts["ground", False] > 100, counts
    assert counts["object", True] < 0.05 * counts["object", False], counts


@pytest.mark.parametrize("size", SIZES)
def test_pictures_of_any_size_are_prepared_as_imagereward_does(size):
    rng = random.Random(0)
    image, _ = compose(shown_scene(rng), *size, rng)
    pixels = ((image + 1) * 127.5).round().byte()
    theirs = preprocess(Image.fromarray(pixels.permute(1, 2, 0).numpy()), 128) * STD + MEAN
    ours = (fit(pixels[None] / 127.5 - 1)[0] + 1) / 2
    assert ours.shape == theirs.shape and (ours - theirs).abs().mean() < 2e-3


def test_the_vocabulary_has_every_word_of_every_prompt_and_35_tokens_are_enough(tmp_path):
    import reward

    model = reward.Model(tmp_path / "vocab.txt")
    prompts = []
    for i in range(4000):
        rng = random.Random(i)
        prompts.append(request(shown_scene(rng), rng))
    wordy = sorted(concepts(), key=lambda concept: len(model.tokenizer(concept.name).input_ids))[-2:]
    prompts += [request(Scene(tuple(wordy), "cartoon", "right of", ("blue", "gray")), random.Random(i)) for i in range(50)]
    tokens = model.tokenizer(prompts).input_ids
    assert all(model.tokenizer.unk_token_id not in ids for ids in tokens) and max(map(len, tokens)) <= 35
    words = set(reward.vocabulary())
    assert {"tangerine", "loaf", "left", "below", "purple", "background", "an"} <= words and "zeppelin" not in words


def test_a_reward_is_taken_over_word_by_word(tmp_path, monkeypatch):
    import reward
    from dit_accel.eval.rewards.image_reward import build_image_reward, original_name

    words = reward.vocabulary()
    monkeypatch.setattr(reward, "vocabulary", lambda: [word for word in reversed(words) if word != "purple"])
    old = reward.Model(tmp_path / "old.txt")
    weights = {original_name(name): weight for name, weight in old.net.state_dict().items()}
    build_image_reward(reward.VISION, old.text_config, weights, old.vocab).save(tmp_path / "old")
    monkeypatch.setattr(reward, "vocabulary", lambda: words)
    new = reward.Model(tmp_path / "vocab.txt")
    before = new.net["text"].embeddings.word_embeddings.weight.detach().clone()
    new.take_over(tmp_path / "old")
    after, given = (model.net["text"].embeddings.word_embeddings.weight for model in (new, old))
    for word, place in new.tokenizer.get_vocab().items():
        source = before[place] if word == "purple" else given[old.tokenizer.get_vocab()[word]]
        assert torch.equal(after[place], source), word
    images = torch.rand(1, 3, 128, 128) * 2 - 1
    assert torch.equal(new.see(images), old.see(images))


@pytest.mark.parametrize("size", [(128, 128), (96, 128)])
def test_degradations_grow_with_their_strength(size):
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image = torch.nn.functional.avg_pool2d(image[None], 9, stride=1, padding=4)[0] * 2
    for kind in DEGRADATIONS:
        versions = degrade(image, kind, [0.0, 0.1, 0.4, 0.9], torch.Generator().manual_seed(1))
        errors = [(version - image).square().mean().item() for version in versions]
        assert errors[0] < 1e-12 and errors == sorted(errors) and errors[1] > 1e-5, (kind, errors)
        assert all(version.shape == image.shape for version in versions)
    with pytest.raises(ValueError, match="no degradation 'colour'; choose one of blur"):
        degrade(image, "colour", [0.5], torch.Generator())


def test_shuffled_patches_are_those_that_show_something():
    """The patches of the picture are all there, and flat ones stay where they are."""
    image = torch.full((3, 128, 128), 0.8)
    image[:, 32:80, 48:96] = torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(0))
    for seed in range(6):
        (mixed,) = degrade(image, "shuffle", [0.4], torch.Generator().manual_seed(seed))
        assert torch.equal(mixed.flatten().sort().values, image.flatten().sort().values)
        moved = (mixed != image).any(0)
        assert moved[32:80, 48:96].any()
        moved[32:80, 48:96] = False
        assert not moved.any()


def test_samples_are_asked_for_in_every_way():
    from stopped import asked

    scenes = asked()
    singles = {(scene.subjects[0].code, scene.style) for scene in scenes if not scene.relation and not scene.background}
    assert singles == {(concept.code, style) for concept in concepts() for style in STYLES}
    assert sum(bool(scene.background) for scene in scenes) == 96
    together = [held_together(*scene.subjects) for scene in scenes if scene.relation]
    assert together.count(True) == together.count(False) == 96
    assert scenes == asked() and 96 < sum(map(held_out, scenes)) < 160


def test_two_heads_look_at_the_previous_and_at_the_next_word_from_the_start(tmp_path):
    import reward

    model = reward.Model(tmp_path / "vocab.txt")
    tokens = model.tokenizer("owl left of cactus, flat style", return_tensors="pt").input_ids
    text, n = model.net["text"], tokens.shape[1]
    with torch.no_grad():
        words, layer = text.embeddings(tokens), text.encoder.layer[0].attention.self
        query, key = (linear(words).unflatten(2, (6, 32)).transpose(1, 2) for linear in (layer.query, layer.key))
        looks = (query @ key.transpose(2, 3) / 32**0.5).softmax(-1)[0]
    for place in range(1, n):
        assert looks[0, place, place - 1] > 0.7 and looks[1, place - 1, place] > 0.7
    assert looks[2].max() < 0.7


def test_words_are_to_know_where_what_they_name_lies(tmp_path):
    import reward

    model, names = reward.Model(tmp_path / "vocab.txt"), [concept.name for concept in concepts()]
    fish, owl = names.index("tropical fish"), names.index("owl")
    shows = torch.full((3, 8, 8), len(names))
    shows[:, 0, 6:], shows[:, 4:6, 1] = owl, fish
    shows[2] = -100  # an unlabeled picture
    ids = model.tokenizer(["tropical fish below owl", "cactus, on a blue background", "owl"], padding=True).input_ids
    (rows, columns), places = model.named(ids, shows.flatten(1))
    words = [model.tokenizer.convert_ids_to_tokens(ids[row])[column] for row, column in zip(rows, columns, strict=True)]
    found = {word: place.tolist() for word, place in zip(words, places, strict=True)}
    there = [2 * 4.5 / 7 - 1, 2 * 1 / 7 - 1]  # the mean of rows 4 and 5, and column 1, of 0 to 7, as -1 to 1
    assert found == {"owl": pytest.approx([-1, 2 * 6.5 / 7 - 1]), "tropical": pytest.approx(there), "fish": pytest.approx(there)}
    assert set(rows.tolist()) == {0}
    assert model.named(ids[1:], shows[1:].flatten(1))[1].shape == (0, 2)


def test_pictures_without_labels_are_not_named(tmp_path):
    """Where their patches lie is all that is learned from them; 0 if every patch says so."""
    import reward

    model = reward.Model(tmp_path / "vocab.txt")
    seen = torch.randn(3, 65, 192)
    labels = torch.full((3, 2, 64), -100)
    rows = torch.tensor([[-1 + 2 * (i // 8) / 7, -1 + 2 * (i % 8) / 7] for i in range(64)])

    def where(pictures):
        return (model.where(pictures[:, 1:]) - rows).square().mean()

    assert torch.allclose(model.naming_loss(seen, labels), where(seen))
    labels[1, 0, :9], labels[1, 1, :4] = 5, 2
    named = model.naming_loss(seen, labels) - where(seen)
    assert torch.allclose(named, model.naming_loss(seen[1:2], labels[1:2]) - where(seen[1:2])) and named > 1
    seen[:, 1:, :2] = rows
    with torch.no_grad():
        model.where.weight.copy_(torch.eye(2, 192))
        model.where.bias.zero_()
    assert model.naming_loss(seen, torch.full_like(labels, -100)) < 1e-12


def test_measuring_counts_the_pairs_in_which_the_better_picture_is_first(monkeypatch):
    """One that reads pictures is always right, and one that says the same of all of them never."""
    import reward_measure

    class Reader:
        def score(self, prompts, pictures):
            tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1 for picture in pictures]
            return np.array([float(matches(text, image)) for text, image in zip(prompts, tensors, strict=True)])

    class Indifferent:
        def score(self, prompts, pictures):
            return np.zeros(len(prompts))

    monkeypatch.setattr(reward_measure, "DEGRADATIONS", ("noise",))
    found = reward_measure.better_first(Indifferent(), None, [], 5)
    assert found == {kind: {"better first": 0.0, "pairs": 5 if kind in FAILURES else 6} for kind in (*FAILURES, "noise")}
    monkeypatch.setattr(reward_measure, "DEGRADATIONS", ())
    assert reward_measure.better_first(Reader(), None, [], 12) == {kind: {"better first": 1.0, "pairs": 12} for kind in FAILURES}
