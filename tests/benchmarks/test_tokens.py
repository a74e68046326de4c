"""Tokens or steps: the oracle knows the true error, settings take equally long, and the page says what the records say."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import dit_accel
from dit_accel import OutputCacheConfig

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import recording  # noqa: E402
from tokens import BARE, GIFTS, SCORE, SETTINGS, SPEEDS, Setting, against_bare, oracle, page  # noqa: E402

CALL = dict(height=64, width=48, num_inference_steps=4, output_type="latent", max_sequence_length=8)


def outputs_of(pipe, **call):
    """What the transformer returns on every step of a plain run."""
    found = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: found.append(output[0]))
    pipe("red apple", generator=torch.Generator().manual_seed(0), **CALL | call)
    handle.remove()
    return found


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_the_oracle_chooses_by_the_true_error(family, tiny_flux, tiny_pixart):
    pipe = tiny_flux() if family == "flux" else tiny_pixart()
    call = {} if family == "flux" else dict(use_resolution_binning=False, clean_caption=False)
    first, second, *_ = outputs_of(pipe, **call)
    error = (second - first).square()  # of repeating the first output on the second step
    if family == "pixart":  # patches of 2 x 2, row by row
        rows, channels, height, width = error.shape
        error = error.view(rows, channels, height // 2, 2, width // 2, 2).sum((1, 3, 5)).flatten(1)
    else:
        error = error.sum(-1)
    seen = []
    with oracle(SimpleNamespace(pipe=pipe)) as scores:
        config = OutputCacheConfig(
            full_steps=(0,), order=0, compute_ratio=0.25, selector=lambda c: seen.append(scores(c)) or seen[-1]
        )
        with dit_accel.applied(pipe, config):
            pipe("red apple", generator=torch.Generator().manual_seed(0), **CALL | call)
    assert len(seen) == 3 and torch.allclose(seen[0], error, rtol=1e-3, atol=1e-6)
    assert not pipe.transformer._forward_pre_hooks, "nothing stays behind"


def test_differences_are_paired_with_the_bare_forecast():
    """By hand: with errors of 4 and 1 in place of 1 and 4, the mean difference is 0."""
    table = [
        {"prompt": p, "speed": s, "setting": name, "squared_error": e, SCORE: v, "seconds": t, "full_steps": 3, **vars(setting)}
        for s in (1.5, 2.0)
        for p, error, twin in (("a", 1.0, 4.0), ("b", 4.0, 1.0), ("c", 2.0, 2.0))
        for name, setting, e, v, t in (
            ("full", BARE, 0.0, 1.0, 3.0),
            (BARE.label, BARE, error, 0.5, 1.5),
            (SETTINGS[1].label, SETTINGS[1], twin, 0.25, 1.0),
        )
    ]
    found = against_bare(pd.DataFrame(table)).set_index(["speed", "setting"])
    one = found.loc[(2.0, SETTINGS[1].label)]
    assert one["measured"] == 3.0 and found.loc[(2.0, BARE.label), "measured"] == 2.0
    assert one["psnr_more"] == pytest.approx(0, abs=1e-9) and one["psnr_low"] == pytest.approx(-one["psnr_high"], rel=0.05)
    assert one[f"{SCORE}_more"] == pytest.approx(-0.25)
    assert one["psnr"] == pytest.approx(np.mean([10 * np.log10(255**2 / e) for e in (1, 4, 2)]))


def test_settings_are_what_the_question_asks():
    assert {(s.ratio, s.attention, s.selector) for s in SETTINGS} >= {(0.0, "none", "none"), (0.5, "fresh", "oracle")}
    assert len(SETTINGS) == 1 + 3 * 2 * 6 and len({s.label for s in SETTINGS + GIFTS}) == len(SETTINGS + GIFTS)
    config = Setting(0.3, "fresh", "random").config(28, 9, 2.0)
    assert len(config.full_steps) == 9 and (config.compute_ratio, config.attention, config.selector) == (0.3, "fresh", "random")


def test_full_steps_are_as_many_as_the_time_allows():
    for name, steps in (("emoji-flux", 28), ("emoji-pixart", 20)):
        rows = recording.rows_of(ROOT / "docs" / "data" / "tokens-or-steps" / f"{name}.json")
        for row in rows:
            if row["count"] > 0:
                spent = row["count"] * row["full"] + (steps - row["count"]) * row["partial"]
                assert abs(spent - steps / row["speed"]) <= (row["full"] - row["partial"]) / 2 + 1e-9
        assert {row["speed"] for row in rows} == set(SPEEDS)


def test_the_page_is_what_the_records_give(tmp_path):
    text = (ROOT / "docs" / "tokens-or-steps.md").read_text()
    (tmp_path / "tokens-or-steps.md").write_text(text)
    (tmp_path / "figures").mkdir()
    page(ROOT / "docs" / "data" / "tokens-or-steps", tmp_path)
    assert (tmp_path / "tokens-or-steps.md").read_text() == text
    assert (tmp_path / "figures" / "tokens-or-steps.png").stat().st_size > 10_000
