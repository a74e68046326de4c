from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import dit_accel
from dit_accel import OutputCacheConfig, TokenCacheConfig
from dit_accel.pipelines import inspection


def test_uniformity_by_hand():
    even = np.ones((8, 8))
    assert inspection.uniformity(even) == pytest.approx(1)
    one = np.zeros((8, 8))
    one[0, 0] = 5
    assert inspection.uniformity(one) == pytest.approx(0)
    two = one + np.roll(one, 4, axis=0)  # two of four tiles, alike
    assert inspection.uniformity(two) == pytest.approx(math.log(2) / math.log(4))
    assert inspection.uniformity(np.ones((6, 7))) == pytest.approx(1), "ragged tiles count by their area"


def test_position_bias_by_hand():
    rows, columns = np.indices((5, 7))
    assert inspection.position_bias(rows * 2.0) == pytest.approx((1, 0))
    assert inspection.position_bias(3 - columns * 1.0) == pytest.approx((0, -1))
    assert inspection.position_bias(np.ones((5, 7))) == (0, 0)


def test_places_are_those_that_were_computed(tiny_flux):
    """Only the token in the third row and second column is ever computed, in the image stream and in the joint sequence."""

    @dit_accel.register_selector("one place")
    def one_place(context):
        scores = torch.zeros(1, context.tokens.shape[1])
        if context.stream != "text":
            scores[:, context.text + 2 * context.grid[1] + 1] = 1
        return scores

    config = TokenCacheConfig(interval=3, cache_ratio=0.95, selector="one place", age_weight=0)
    pipe = dit_accel.apply(tiny_flux(), config, record=True)
    pipe("red", height=64, width=48, num_inference_steps=5, max_sequence_length=8, output_type="latent")
    report = dit_accel.report(pipe)
    assert {len(made.tokens[0]) for made in report.selections if made.stream == "image"} == {int(0.05 * 8 * 6)}
    found = inspection.places(report)
    assert found.share.shape == report.grid == (8, 6)
    assert np.unravel_index(found.share.argmax(), found.share.shape) == (2, 1) and found.share[2, 1] == 1


@pytest.mark.parametrize(
    "config",
    [
        TokenCacheConfig(interval=3, cache_ratio=0.8, age_weight=0.0),
        OutputCacheConfig(interval=3, compute_ratio=0.2),
        OutputCacheConfig(interval=3, compute_ratio=0.2, selector="similarity", attention="fresh"),
    ],
)
def test_coverage_by_hand(tiny_flux, config):
    """7 steps: full ones are 0, 3 and 6, so that steps 1 and 2, and 4 and 5, share an interval each."""
    pipe = dit_accel.apply(tiny_flux(), config, record=True)
    pipe("red", height=64, width=48, num_inference_steps=7, max_sequence_length=8, output_type="latent")
    report, sets = dit_accel.report(pipe), {}
    assert {made.call for made in report.selections} == {1, 2, 4, 5}
    for made in report.selections:
        if made.stream != "text":
            text = 8 if made.stream == "joint" else 0
            image = {int(token) - text for token in made.tokens[0] if token >= text}
            sets.setdefault((made.stream, made.layer, made.call > 3), set()).update(image)
    found = inspection.places(report)
    assert found.coverage == pytest.approx(np.mean([len(one) / 48 for one in sets.values()])) and 0.15 < found.coverage < 0.45
    if isinstance(config, OutputCacheConfig):
        assert [len(made.tokens[0]) for made in report.selections] == [call.counts[0] for call in report.calls if call.counts]


def test_without_computed_tokens_there_is_nothing_to_record(tiny_flux):
    with pytest.raises(ValueError, match="compute_ratio"):
        dit_accel.apply(tiny_flux(), OutputCacheConfig(interval=3), record=True)


def test_nothing_recorded_raises(tiny_flux):
    pipe = dit_accel.apply(tiny_flux(), TokenCacheConfig(interval=3))
    pipe("red", height=64, width=48, num_inference_steps=5, max_sequence_length=8, output_type="latent")
    with pytest.raises(ValueError, match="record=True"):
        inspection.places(dit_accel.report(pipe))


def test_overlay_goes_from_dark_blue_to_yellow():
    gray = Image.new("RGB", (8, 8), "black")
    colors = np.asarray(inspection.overlay(gray, np.array([[0.0, 0.5]]), most=0.5)).astype(float)
    assert colors[0, 0] == pytest.approx(inspection.COLORS[0] * inspection.STRENGTH, abs=1)
    assert colors[0, -1] == pytest.approx(inspection.COLORS[-1] * inspection.STRENGTH, abs=1)


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_inspect_command(run, tmp_path, flux_path, pixart_path, family):
    path = {"flux": flux_path, "pixart": pixart_path}[family]
    small = ("--height", 64, "--width", 48, "--steps", 5, "--cache-ratio", 0.7, "--output", tmp_path / "out")
    result = run("inspect", "red apple", "--pipeline", path, *small)
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "out/red-apple-seed0-inspect.json").read_text())
    expected = set(dit_accel.selectors()) - ({"cross-entropy"} if family == "flux" else set())
    assert set(record["selectors"]) == expected and all(name in result.stdout for name in expected)
    assert record["cache"]["age_weight"] == 0
    assert all(0 < figures["uniformity"] <= 1 for figures in record["selectors"].values())
    page = Image.open(tmp_path / "out/red-apple-seed0-inspect.png")
    assert page.width > 5 * 48
    chosen = run("inspect", "red apple", "--pipeline", path, *small, "--selector", "drift", "--selector", "k-norm")
    assert chosen.exit_code == 0 and "red-apple-seed0-inspect-2.png" in chosen.stderr.replace("\n", "")
    assert set(json.loads((tmp_path / "out/red-apple-seed0-inspect-2.json").read_text())["selectors"]) == {"drift", "k-norm"}


def test_inspect_with_a_wrong_selector_is_wrong_usage(run, flux_path):
    result = run("inspect", "red", "--pipeline", flux_path, "--selector", "best")
    assert result.exit_code == 2 and "There is no selector 'best'" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((" ",), "none that is empty"),
        ((), "Give at least one prompt"),
        (("red", "--forecast-order", 2), "--forecast-order does nothing without --fill forecast"),
        (("red", "--preset", "fora"), "Nothing would be selected"),
        (("red", "--interval", 1), "Nothing would be selected"),
    ],
)
def test_inspect_refuses_what_shows_nothing(run, flux_path, arguments, message):
    result = run("inspect", *arguments, "--pipeline", flux_path)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())


def test_inspect_takes_brackets_as_they_are(run, flux_path, tmp_path):
    small = ("--height", 64, "--width", 48, "--steps", 5, "--cache-ratio", 0.7, "--output", tmp_path, "--selector", "random")
    result = run("inspect", "red zebra [/]", "--pipeline", flux_path, *small)
    assert result.exit_code == 0 and "red zebra [/]" in " ".join(result.stdout.split())
    assert "does not know zebra" in " ".join(result.stderr.split())
