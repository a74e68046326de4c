"""Specifications: what they spread out into, and what is wrong with them."""

from __future__ import annotations

import itertools

import pytest

from dit_accel import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig
from dit_accel.eval.spec import Spec, noise_seed, read_spec

METHOD = {"cache": {"selector": "random"}}


def spec(*methods, **changes):
    return Spec(**{"pipelines": ("p",), "prompts": ("a", "b"), "methods": methods or (METHOD,)} | changes)


def test_a_grid_is_every_combination_of_its_lists():
    made = spec({"cache": {"selector": ["random", "k-norm"], "interval": [3, 5], "age_weight": 0.5}, "steps": [8, 12]})
    assert [cell.label for cell in made.cells[:2]] == ["full", "no-op cache"]
    assert made.cells[0].configs == () and made.cells[1].configs == (TokenCacheConfig(interval=1),)
    expected = {
        (selector, interval, steps): TokenCacheConfig(selector=selector, interval=interval, age_weight=0.5)
        for selector, interval, steps in itertools.product(["random", "k-norm"], [3, 5], [8, 12])
    }
    found = {(c.configs[0].selector, c.configs[0].interval, c.steps): c.configs[0] for c in made.cells[2:]}
    assert found == expected and len(made.cells) == 2 + 8
    assert len({cell.label for cell in made.cells}) == 10


def test_pairs_are_values_and_lists_of_pairs_are_swept():
    made = spec({"merge": {"stride": [2, 4]}}, {"merge": {"stride": [[2, 2], [4, 4]], "ratio": [0.3, 0.5]}})
    merges = [cell.configs[0] for cell in made.cells[2:]]
    assert merges == [
        TokenMergeConfig(stride=(2, 4)),
        *(TokenMergeConfig(stride=s, ratio=r) for s in ((2, 2), (4, 4)) for r in (0.3, 0.5)),
    ]


def test_both_methods_presets_and_fewer_steps():
    made = spec({"cache": {"preset": ["fora", "toca-flux"]}, "merge": {"ratio": 0.25}}, {"steps": [5, 10]}, {"cache": {}})
    both, other, five, ten, default = made.cells[2:]
    assert both.configs == (TokenCacheConfig.preset("fora"), TokenMergeConfig(ratio=0.25))
    assert other.configs[0] == TokenCacheConfig.preset("toca-flux")
    assert [(c.kind, c.steps, c.configs) for c in (five, ten)] == [("fewer steps", 5, ()), ("fewer steps", 10, ())]
    assert default.configs == (TokenCacheConfig(),) and default.kind == "method"


def test_output_caches_and_their_lists():
    options = {"full_steps": [[0, 1, 4], [0, 3]], "order": [[0], [1]], "damping": [1.0, 0.5]}
    made = spec({"output": options, "steps": 6}, {"output": {}})
    assert [cell.configs for cell in made.cells[2:]] == [
        *((OutputCacheConfig(full_steps=f, order=o, damping=(1.0, 0.5)),) for f in ((0, 1, 4), (0, 3)) for o in ((0,), (1,))),
        (OutputCacheConfig(),),
    ]
    assert made.cells[2].label == "output full_steps=0x1x4 order=0 damping=1.0x0.5 + 6 steps"
    assert made.cells[2].options()["output"] == made.cells[2].configs[0].to_dict() and made.cells[2].options()["steps"] == 6


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"output": {}, "cache": {}}, "output works alone"),
        ({"output": {"order": 9}}, "order must be a whole number between 0 and 3"),
        ({"output": {"fill": "reuse"}}, "OutputCacheConfig has no option fill"),
        ({"cache": {"selector": "random"}, "speed": 2}, "A method sets cache, merge, output or steps"),
        ("random", "A method sets"),
        ({}, "A method sets"),
        ({"cache": {"interval": 0}}, "interval"),
        ({"cache": {"intervall": 3}}, "intervall"),
        ({"cache": {"selector": "nobody"}}, "nobody"),
        ({"merge": {"ratio": 2}}, "ratio"),
        ({"steps": 0}, "steps must be"),
        ({"steps": True}, "steps must be"),
    ],
)
def test_a_wrong_method_is_named(method, message):
    with pytest.raises(ValueError, match=message):
        spec(method)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"timing_rounds": True}, "timing_rounds"),
        ({"margin": 0}, "margin"),
        ({"prompts": ()}, "prompts is empty"),
        ({"scores": ()}, "scores is empty"),
        ({"methods": (METHOD, METHOD)}, "comes twice"),
    ],
)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        spec(**changes)


def test_a_file_with_a_prompt_set_beside_it_and_changes(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "mine.py").write_text(
        "import dit_accel\n@dit_accel.register_selector('mine')\ndef mine(ctx):\n    raise NotImplementedError\n"
    )
    file = tmp_path / "spec.yaml"
    file.write_text(
        "pipelines: [p]\nprompts: prompts.txt\nselector_file: mine.py\nmethods: [{cache: {selector: mine}}]\nseeds: 2\n"
    )
    made = read_spec(file, seeds=5, steps=None)
    assert made.prompts == ("one", "two") and made.seeds == 5 and made.steps is None
    assert made.cells[2].configs[0].selector == "mine"
    assert read_spec(None, pipelines=["p"], prompts=["x"], methods=[METHOD]).cells == spec().cells


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pipelines: [p\n", "is not YAML"),
        ("- a\n- b\n", "must hold settings by name"),
        ("pipelines: [p]\nprompts: [a]\n", "does not set methods"),
        ("pipelines: p\nprompts: [a]\nmethods: [{steps: 3}]\n", "pipelines must be a list"),
        ("pipelines: [p]\nprompts: [a]\nmethods: [{steps: 3}]\nseed: 3\n", "sets seed, which is unknown"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    file = tmp_path / "spec.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_spec(file)


def test_noise_depends_on_prompt_and_seed_alone():
    assert noise_seed("a", 0) == noise_seed("a", 0)
    seeds = {noise_seed(prompt, seed) for prompt in ("a", "b", "a0", "a, 0") for seed in range(100)}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)
