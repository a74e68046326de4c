"""The search for recipes: its parts against brute force, the whole on a tiny pipeline."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import dit_accel
from dit_accel import recipe
from dit_accel.pipelines.loading import load
from dit_accel.pipelines.tuning import run as tuning
from dit_accel.pipelines.tuning import search as searching
from dit_accel.pipelines.tuning.candidates import Candidate, changed, fewer
from dit_accel.pipelines.tuning.search import Bench, search
from dit_accel.pipelines.tuning.starts import shortest_path, spaced

LEVELS = [1.0, 0.9, 0.75, 0.6, 0.4, 0.25, 0.1, 0.0]


def off(outputs, steps):
    """How far the steps between full ones would move the picture off, interval by interval: a line between both ends, or the
    last one repeated."""
    total = 0.0
    for start, end in itertools.pairwise([*steps, len(outputs)]):
        moved = np.zeros_like(outputs[0])
        for k in range(start, end):
            guess = outputs[start]
            if end < len(outputs):
                guess = np.interp(-LEVELS[k], [-LEVELS[start], -LEVELS[end]], [0, 1]) * (outputs[end] - outputs[start]) + guess
            moved += (LEVELS[k + 1] - LEVELS[k]) * (outputs[k] - guess)
        total += np.linalg.norm(moved)
    return total


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("seed", range(5))
def test_the_shortest_path_equals_brute_force(count, seed):
    outputs = list(np.random.default_rng(seed).normal(size=(7, 20)).cumsum(0))
    found = shortest_path(outputs, LEVELS, count)
    best = min(off(outputs, (0, *rest)) for rest in itertools.combinations(range(1, 7), count - 1))
    assert found[0] == 0 and len(found) == count and off(outputs, found) == pytest.approx(best)


def test_spaced_steps_are_as_many_as_asked_for_and_apart():
    assert spaced(28, 14, lambda share: share) == tuple(range(0, 28, 2))
    for steps, count in ((28, 9), (20, 7), (10, 10), (5, 1)):
        for power in (1.0, 2.5):
            chosen = spaced(steps, count, lambda share, power=power: share**power)
            assert len(set(chosen)) == count and list(chosen) == sorted(chosen) and chosen[0] == 0 and chosen[-1] < steps


@pytest.mark.parametrize("halves", [False, True])
def test_changes_are_valid_and_stay_within_the_budget(halves):
    rng, one, most = random.Random(0), Candidate((0, 2, 5, 9), (1,) * 4, (0.7,) * 4, (0.5,) * 4, (0.0,) * 4), 4.5
    seen = set()
    for _ in range(2000):
        one = changed(one, 12, most, halves, rng)
        assert one.cost <= most and len(one.orders) == len(one.dampings) == len(one.corrects) == len(one.leads) == len(one.steps)
        assert (
            one.steps[0] == 0
            and one.steps[-1] < (len(one.run) or 12) <= 12
            and (one.guided is None or {0} <= set(one.guided) <= set(one.steps))
        )
        assert one.config.full_steps == one.steps
        seen.add(one)
    assert len(seen) > 500
    assert (max(len(one.steps) for one in seen) > 4) == halves, "a step without its unconditional branch costs half"
    assert len({one.leads for one in seen}) > 50 and all(one.leads[0] == 0 for one in seen)
    assert len({one.steps for one in seen}) > 50 and len({one.corrects for one in seen}) > 100
    assert {len(one.run) for one in seen} >= {0, 8, 9, 10, 11, 12} and len({one.run for one in seen}) > 200


def test_merged_steps_make_room_for_others():
    """A step merged by 2 costs a quarter: of 4.5, six full ones with two merged, on a run of the pipeline's steps or of its own."""
    for run in ((), (0.0, 0.25, 0.5, 0.75)):
        rng, seen = random.Random(0), set()
        steps = (0, 1, 2, 3) if run else (0, 2, 5, 9)
        one = Candidate(steps, (1,) * 4, (0.7,) * 4, (0.5,) * 4, (0.0,) * 4, run=run, shares=(0.25, 0.1))
        for _ in range(2000):
            one = changed(one, 12, 4.5, False, rng)
            part = {2: 0.25, 4: 0.1}[one.side]
            assert one.cost == pytest.approx(len(one.steps) - (1 - part) * one.merged) and one.cost <= 4.5
            assert (one.config.merged_steps or ()) == one.steps[: one.merged] and len(one.leads) == len(one.steps)
            assert one.config.merged_side == (one.side if one.merged else 2)
            assert one.steps[-1] < (len(one.run) or 12) <= 12 and list(one.run) == sorted(set(one.run))
            seen.add(one)
        assert {(len(one.steps), one.merged) for one in seen} >= {(4, 0), (5, 1), (6, 2)} and {one.side for one in seen} == {2, 4}
    found = Candidate.of(one.config)
    assert found is not None and (found.merged, found.steps, found.run) == (one.merged, one.steps, one.run)
    assert found.side == (one.side if one.merged else 2)
    for other in ({"merged_steps": (2,)}, {"merged_above": 0.5}, {"merged_steps": 1, "merged_keep": 0.5}):
        assert Candidate.of(dit_accel.OutputCacheConfig(full_steps=(0, 2), **other)) is None, "not searched"
    assert fewer(replace(one, merged=2), 2.0).merged <= 2


def test_a_faster_start_is_thinned_out_of_a_slower_recipe():
    one = Candidate(
        (0, 1, 2, 4, 7, 10),
        (0, 1, 1, 1, 2, 2),
        (1.0, 0.9, 0.8, 0.7, 0.6, 0.5),
        (0.5,) * 6,
        (0, 0.1, 0.2, 0.3, 0.4, 0.5),
        guided=(0, 2, 7),
    )
    thin = fewer(one, 3)
    assert thin.cost <= 3 and thin.steps[0] == 0 and set(thin.steps) < set(one.steps)
    assert thin.dampings == tuple(one.dampings[one.steps.index(step)] for step in thin.steps)
    assert thin.leads == tuple(one.leads[one.steps.index(step)] for step in thin.steps)
    assert thin.guided == tuple(step for step in thin.steps if step in one.guided)
    early = fewer(replace(one, merged=3), 3)
    assert early.merged == sum(step in one.steps[:3] for step in early.steps) < 3, "the same steps stay merged"


class Known:
    """In the place of a bench: pictures are the closer, the fewer steps are not those wanted."""

    def __init__(self, wanted, damping, merged=0, shares=(1.0, 1.0)):
        self.wanted, self.damping, self.merged, self.spent = set(wanted), damping, merged, 0.0
        self.settings, self.prompts, self.shares = SimpleNamespace(steps=12), ["a"] * 4, lambda: shares

    def better(self, candidate, incumbent, slack=0.0):
        self.spent += 1
        return self.worth(candidate) > self.worth(incumbent)

    def worth(self, config):
        return (
            -len(self.wanted ^ set(config.full_steps))
            - abs(np.mean(config.damping) - self.damping)
            - abs(np.mean(config.correct) - 0.25)
            - abs(np.mean(config.lead))
            - 5 * (config.sampler_steps is not None)
            - 3 * abs(len(config.merged_steps or ()) - self.merged)
            - (config.merged_side - 2)
        )


def test_the_search_finds_the_best_there_is_and_ends_in_time():
    outputs = list(np.random.default_rng(0).normal(size=(12, 5)))
    levels = [1 - i / 12 for i in range(12)] + [0.0]
    bench = Known((0, 3, 4, 11), 0.5)
    best, used = search(bench, 4.4, 3000, False, (outputs, levels))
    assert (
        set(best.steps) == bench.wanted and np.mean(best.corrects) == pytest.approx(0.25, abs=0.02) and used == bench.spent <= 3001
    )
    bench = Known((0, 3, 4, 8, 11), 0.5, merged=1, shares=(0.25, 0.1))
    best, _ = search(bench, 4.4, 3000, False, (outputs, levels))
    assert set(best.steps) == bench.wanted and best.config.merged_steps == (0,), "five steps, of which one costs a quarter"
    bench = Known((0, 3, 4, 11), 0.5)
    assert search(bench, 4.4, 20, False, (outputs, levels))[1] <= 40, "starts are all tried"


def test_few_prompts_do_not_decide_about_what_differs_much(flux_path, tmp_path, monkeypatch):
    """On the first two prompts b is 1 dB farther, on all of them 1 dB closer; c is closer on those two alone."""
    likeness = {"a": [20.0] * 6, "b": [19.0, 19.0, 22.0, 22.0, 22.0, 22.0], "c": [25.0, 25.0] + [10.0] * 4}
    monkeypatch.setattr(searching, "RACE", (2, 4))
    bench = Bench(None, ["red"] * 6, None, tmp_path / "none")
    monkeypatch.setattr(bench, "psnr", lambda config, places: [likeness[config][i] for i in places])
    assert not bench.better("b", "a") and bench.better("b", "a", 1.5) and not bench.better("b", "a", 0.9)
    assert not bench.better("c", "a") and not bench.better("c", "a", 1.5)


def bench_of(pipe, path, **more):
    settings = searching.Settings(steps=4, guidance=0.0, height=32, width=32, max_sequence_length=8, batch_size=2)
    return Bench(pipe, ["red", "blue", "green"], settings, path, **more)


@pytest.mark.parametrize("name", ["emoji-flux", "emoji-pixart"])
def test_a_search_starts_from_the_recipes_that_ship(name):
    """As candidates they are the same configurations; what a run without forecasts does not look at may differ."""
    for one in recipe.read(recipe.SHIPPED / f"{name}.json"):
        candidate = Candidate.of(one.config)
        assert candidate is not None and len(candidate.leads) == len(candidate.steps)
        own, again = one.config.to_dict(), candidate.config.to_dict()
        if candidate.config.order == 0:
            own, again = ({key: value for key, value in some.items() if key not in ("damping", "correct")} for some in (own, again))
        assert again == own
    assert Candidate.of(dit_accel.OutputCacheConfig(interval=3)) is None


def test_what_was_evaluated_is_not_evaluated_again(flux_path, tmp_path, monkeypatch):
    pipe, path = load(str(flux_path)), tmp_path / "known.jsonl"
    config = Candidate((0, 2), (0, 0), (1.0, 1.0), (0.0, 0.0), (0.0, 0.0)).config
    bench = bench_of(pipe, path)
    values = bench.psnr(config, [0, 2])
    assert 0 < bench.spent and all(5 < value <= searching.BEST for value in values)
    everything = Candidate((0, 1, 2, 3), (0,) * 4, (1.0,) * 4, (0.5,) * 4, (0.0,) * 4).config
    assert bench.psnr(everything, [0]) == [searching.BEST], "identical"
    path.write_text(path.read_text() + '{"key": "cut o')
    monkeypatch.setattr(Bench, "pictures", lambda *args: pytest.fail("made again"))
    again = bench_of(pipe, path)
    assert again.psnr(config, [2, 0]) == values[::-1]
    assert again.spent == pytest.approx(sum(json.loads(line)["seconds"] for line in path.read_text().splitlines()[:2]))


def test_what_forecasts_take_leaves_room_for_fewer_full_steps(tmp_path, monkeypatch):
    """A full step of 1 s, a forecast of 0.1 s, and 0.5 s beside them: by hand, k full steps of 4 take 0.9 k + 0.9 s."""
    monkeypatch.setattr(Bench, "seconds", lambda self, config: 4.5 if config is None else 1.8)
    bench = bench_of(None, tmp_path / "known.jsonl")
    for k in (1, 2, 3.5, 4):
        assert bench.room(4.5 / (0.9 * k + 0.9)) == pytest.approx(k)
    assert bench.room(100) == 1, "no more can be had"
    with monkeypatch.context() as patched:  # four merged steps take as long as two full ones
        patched.setattr(Bench, "seconds", lambda self, config: 2.7 if config is not None and config.merging else 4.5)
        assert bench.shares() == pytest.approx((0.5, 0.5))
        patched.setattr(Bench, "part", lambda *args: (_ for _ in ()).throw(TypeError("not merged")))
        assert bench.shares() == (1, 1)
    monkeypatch.setattr(Bench, "seconds", lambda *args: pytest.fail("timed again"))
    assert bench_of(None, tmp_path / "known.jsonl").room(4.5 / 2.7) == pytest.approx(2), "an interrupted search goes on the same"


def test_pictures_are_those_of_the_pipeline(flux_path, tmp_path):
    """By hand: the picture of the plain pipeline and of the configuration, and their PSNR."""
    import torch

    pipe = load(str(flux_path))
    config = Candidate((0, 2), (0, 0), (1.0, 1.0), (0.0, 0.0), (0.0, 0.0)).config
    [value] = bench_of(pipe, tmp_path / "known.jsonl").psnr(config, [1])
    call = dict(height=32, width=32, num_inference_steps=4, guidance_scale=0.0, max_sequence_length=8)
    draw = lambda: np.asarray(pipe("blue", generator=torch.Generator().manual_seed(1), **call).images[0], dtype=float)
    plain = draw()
    with dit_accel.applied(pipe, config):
        error = np.mean((plain - draw()) ** 2)
    assert value == pytest.approx(10 * np.log10(255**2 / error))


def test_the_command_writes_recipes_and_a_page_and_goes_on(run, flux_path, tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_ACCEL_RECIPES", str(tmp_path / "own"))
    monkeypatch.setattr(Bench, "room", lambda bench, speedup: bench.settings.steps * 0.97 / speedup)  # no clock decides
    monkeypatch.setattr(Bench, "shares", lambda bench: (1.0, 1.0))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red\nblue\ngreen\nwhite\nblack\n")
    asked = ["tune", flux_path, "--speedup", "2,1.5", "--prompts-file", prompts, "--searched", 2, "--measured", 3, "--budget", 0.02]
    asked += ["--output", tmp_path / "out", "--steps", 6, "--height", 32, "--width", 32]
    result = run(*asked)
    assert result.exit_code == 0, result.stderr
    found = recipe.read(tmp_path / "out/recipes.json")
    assert [one.speedup for one in found] == [1.5, 2] and found[0].measured["pictures"] == 3
    assert [len(one.config.full_steps) for one in found] == [4, 3] and len(found[0].levels) == 6
    for one in found:
        assert one.psnr[1] <= one.psnr[0] <= one.psnr[2] and one.measured["flops"] == pytest.approx(
            6 / len(one.config.full_steps), 1e-2
        )
    page = (tmp_path / "out/tune.md").read_text()
    assert "fewer steps" in result.stdout and "| 2x |" in page
    assert {"tune.png", "tune-1.png", "tune-3.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    pipe = load(str(flux_path))
    dit_accel.apply(pipe, speedup=1.8)
    assert dit_accel.recipes(pipe) == found
    before = (tmp_path / "out/evaluations.jsonl").read_text()
    assert run(*asked).exit_code == 0
    assert (tmp_path / "out/evaluations.jsonl").read_text() == before, "the same search, looked up"
    assert [one.config for one in recipe.read(tmp_path / "out/recipes.json")] == [one.config for one in found]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--speedup", "1"), "--speedup must be numbers above 1"),
        (("--speedup", "two"), "two"),
        (("--searched", 1), "Search on two prompts or more"),
        (("--measured", 99), "There are 100 prompts, of 107"),
        (("--prompts-file", "nothing.txt"), "There is no prompt set nothing.txt"),
    ],
)
def test_what_cannot_be_tuned_is_said_before_anything_is_loaded(run, asked, message):
    result = run("tune", "emoji-flux", *asked)
    assert result.exit_code == 2 and message in result.stderr, result.stderr


def test_the_sets_of_prompts_have_as_many_as_asked_for_by_default():
    for pipeline in ("emoji-flux", "black-forest-labs/FLUX.1-dev"):
        assert len(tuning.prompts_for(pipeline, None, 8, 24)) == 32
    assert "style" in tuning.prompts_for("emoji-pixart", None, 8, 24)[0]
