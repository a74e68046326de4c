"""Specifications: what they spread out into, and what is wrong with them."""

from __future__ import annotations

import hashlib
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
        ({"speedup": 0.5}, "speedup must be a number of at least 1"),
        ({"speedup": [2, 2]}, "comes twice"),
        ({"speedup": 2, "steps": 5}, "speedup works alone"),
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
        ({"baselines": 1}, "baselines"),
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
        ("pipelines: [p]\nprompts: [a]\n", "methods must be set; give a specification that does, or --method"),
        ("pipelines: p\nprompts: [a]\nmethods: [{steps: 3}]\n", "spec.yaml, line 1: pipelines must be a list, not 'p'"),
        (
            "pipelines: [p]\nprompts: [a]\nmethods: [{steps: 3}]\nseed: 3\n",
            "spec.yaml, line 4: seed is unknown. Did you mean seeds",
        ),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    file = tmp_path / "spec.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_spec(file)


HEAD = "pipelines: [p]\nprompts: [crab]\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("methods: [{steps: 3}]\nmethods: [{steps: 4}]\n", "line 4: methods comes twice, on line 3 already"),
        ("methods:\n- cache: {interval: 3}\n  cache: {interval: 5}\n", "line 5: cache comes twice, on line 4 already"),
        ("methods:\n- cache: {interval: 3, interval: 5}\n", "line 4: interval comes twice, on this line already"),
        ("methods:\n- cache: {? [a] : 3}\n", "line 4: a key must be a word"),
        ("methods: &a\n- *a\n", "line 3: an alias stands inside what it refers to"),
        ("methods: []\n", "line 3: methods is empty"),
        ("methods:\n", "line 3: methods must be a list, not empty"),
        ("methods:\n- cache:\n", "line 4: cache must be options by name, or {} for its defaults, not empty"),
        ("methods:\n- cache: {interval: 3}\n- cache: {interval: []}\n", "line 5: interval is an empty list"),
        ("methods:\n- cache:\n    selector: random\n    interval: eight\n", "line 6: interval must be a whole .*, not 'eight'"),
        (
            "methods:\n- cache:\n    selector: [random,\n      rando]\n",
            "line 5: There is no selector 'rando'.* Did you mean random",
        ),
        ("methods:\n- cache: {intervall: 3}\n", "line 4: TokenCacheConfig has no option intervall. Did you mean interval"),
        ("methods:\n- cache: {}\n  setps: 3\n", "line 5: .* not setps. Did you mean steps"),
        ("methods:\n- steps: [4,\n    eight]\n", "line 5: steps must be a whole number of at least 1, not 'eight'"),
        ("methods: [{steps: []}]\n", "line 3: steps is an empty list"),
        ("methods: [{steps: 3}]\nsteps: eight\n", "line 4: steps must be a whole number of at least 1, not 'eight'"),
        ("methods: [{steps: 3}]\nguidance: high\n", "line 4: guidance must be a number of at least 0, not 'high'"),
        ("methods: [{steps: 3}]\nseeds:\n", "line 4: seeds must be a whole number of at least 1, not empty"),
        ("methods: [{steps: 3}]\nmargin: .inf\n", "line 4: margin must be a number above 0, not inf"),
        ("methods: [{steps: 3}]\nscores: []\n", "line 4: scores is empty"),
        ("methods: [{steps: 3}]\ndtype: float23\n", "line 4: dtype must be one of .*, not 'float23'. Did you mean float32"),
        ("methods: [{steps: 3}]\noffload: no\n", "line 4: offload must be one of .*, not false"),
        ("methods: [{steps: 3}]\ndevice: 0\n", "line 4: device must be text, not 0. Put 0 in quotes"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path, body, message):
    file = tmp_path / "spec.yaml"
    file.write_text(HEAD + body)
    with pytest.raises(ValueError, match=f"spec.yaml, {message}"):
        read_spec(file)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("yes", "not true. Put yes in quotes"),
        ("017", "not 15. Put 017 in quotes"),
        ("1e3", None),  # which YAML 1.1 reads as text
        ("2024-01-01", "Put 2024-01-01 in quotes"),
        ("", "not empty"),
        ("' '", "empty or not Unicode"),
        ("crab", "has 'crab' twice"),
        ("[fox]", "must hold texts, not \\['fox'\\]"),
    ],
)
def test_prompts_are_texts(tmp_path, written, message):
    file = tmp_path / "spec.yaml"
    file.write_text(f"pipelines: [p]\nmethods: [{{steps: 3}}]\nprompts:\n- crab\n- {written}\n")
    if message is None:
        assert read_spec(file).prompts == ("crab", written)
        return
    with pytest.raises(ValueError, match=f"spec.yaml, line 5: prompts .*{message}"):
        read_spec(file)


def test_what_is_wrong_on_the_command_line_is_named_as_it_is_spelled_there(tmp_path):
    file = tmp_path / "spec.yaml"
    file.write_text(HEAD + "methods: [{steps: 3}]\n")
    for change, message in (
        ({"batch_size": 0}, "^--batch-size must be a whole number"),
        ({"pipelines": ["p", "p"]}, "^--pipeline has 'p' twice"),
        ({"methods": [{"cache": {"interval": 0}}]}, "^--method: interval must be"),
        ({"selector_file": str(tmp_path / "none.py")}, "^--selector-file is .*none.py, which does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            read_spec(file, **change)


def test_a_selector_file_that_fails_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("1 / 0\n")
    (tmp_path / "spec.yaml").write_text(HEAD + "methods: [{steps: 3}]\nselector_file: mine.py\n")
    with pytest.raises(ValueError, match="line 4: selector_file .*mine.py fails: ZeroDivisionError"):
        read_spec(tmp_path / "spec.yaml")


def test_a_file_with_a_byte_order_mark_and_one_in_another_encoding(tmp_path):
    file = tmp_path / "spec.yaml"
    text = "pipelines: [p]\nprompts: [caf\u00e9]\nmethods: [{steps: 3}]\n"
    file.write_text(text, encoding="utf-8-sig")
    assert read_spec(file).prompts == ("caf\u00e9",)
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="line 2: this is not UTF-8"):
        read_spec(file)


def test_only_what_a_selector_file_registers_depends_on_it(tmp_path):
    code = "import dit_accel\n@dit_accel.register_selector('mine', per_picture=False)\ndef mine(ctx):\n    return ctx.noise\n"
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "spec.yaml").write_text(HEAD + "methods: [{cache: {selector: [mine, random]}}]\nselector_file: mine.py\n")
    full, noop, mine, random = read_spec(tmp_path / "spec.yaml").cells
    assert mine.code == hashlib.sha256(code.encode()).hexdigest() and not (full.code or noop.code or random.code)


def test_settings_that_differ_little_have_labels_that_differ():
    made = spec({"cache": {"cache_ratio": [0.9, 0.9000001]}})
    assert [cell.label for cell in made.cells[2:]] == ["cache cache_ratio=0.9", "cache cache_ratio=0.9000001"]


def test_noise_depends_on_prompt_and_seed_alone():
    assert noise_seed("a", 0) == noise_seed("a", 0)
    seeds = {noise_seed(prompt, seed) for prompt in ("a", "b", "a0", "a, 0") for seed in range(100)}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)
