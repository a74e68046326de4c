from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dit_accel.eval.fidelity import decibels, mean_psnr, psnr, squared_error, ssim


def noise(seed: int, height: int = 16, width: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def changed(picture: np.ndarray, strength: int, seed: int = 1) -> np.ndarray:
    step = np.random.default_rng(seed).integers(-strength, strength + 1, picture.shape)
    return (picture + step).clip(0, 255).astype(np.uint8)


def ssim_by_loops(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, one window at a time, with the variances as means of squared deviations."""
    weights = [[math.exp(-(y * y + x * x) / (2 * 1.5**2)) for x in range(-5, 6)] for y in range(-5, 6)]
    window = np.array(weights) / sum(map(sum, weights))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    places = []
    for channel in range(3):
        for y in range(a.shape[0] - 10):
            for x in range(a.shape[1] - 10):
                p, q = (picture[y : y + 11, x : x + 11, channel].astype(float) for picture in (a, b))
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq, cov = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum(), (window * (p - mp) * (q - mq)).sum()
                places.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return sum(places) / len(places)


@pytest.mark.parametrize("strength", [3, 40, 255])
@pytest.mark.parametrize("size", [(11, 11), (16, 20)])
def test_ssim_is_that_of_one_window_at_a_time(strength, size):
    a = noise(0, *size)
    assert ssim(a, changed(a, strength)) == pytest.approx(ssim_by_loops(a, changed(a, strength)), abs=1e-9)


def test_ssim_of_plain_areas_is_the_luminance_term_alone():
    black, white = np.zeros((12, 12, 3), np.uint8), np.full((12, 12, 3), 255, np.uint8)
    c1 = 2.55**2
    assert ssim(black, white) == pytest.approx(c1 / (255**2 + c1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 255), st.integers(0, 1000))
def test_identical_pictures_are_equal_to_one(shade, seed):
    plain = np.full((16, 20, 3), shade, np.uint8)
    plain[:8] = noise(seed, 8)
    assert ssim(plain, plain.copy()) == 1 and psnr(plain, plain.copy()) == math.inf


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 255))
def test_neither_picture_comes_first(seed, strength):
    a, b = noise(seed), changed(noise(seed), strength)
    assert ssim(a, b) == pytest.approx(ssim(b, a)) and psnr(a, b) == psnr(b, a)
    assert -1 <= ssim(a, b) < 1


def test_more_noise_is_less_faithful():
    a = np.full((32, 32, 3), 128, np.uint8)
    series = [changed(a, strength) for strength in (1, 5, 25, 125)]
    for measure in (psnr, ssim):
        values = [measure(a, b) for b in series]
        assert values == sorted(values, reverse=True)


def test_arrays_and_pictures_are_the_same():
    a, b = noise(0), noise(1)
    assert psnr(Image.fromarray(a), Image.fromarray(b)) == psnr(a, b) == psnr(a, Image.fromarray(b))
    assert ssim(Image.fromarray(a), Image.fromarray(b)) == ssim(a, b)


def test_psnr_by_its_formula():
    a, b = noise(0), noise(1)
    error = sum((int(x) - int(y)) ** 2 for x, y in zip(a.ravel(), b.ravel(), strict=True)) / a.size
    assert squared_error(a, b) == pytest.approx(error) and psnr(a, b) == pytest.approx(10 * math.log10(255 * 255 / error))


def test_one_identical_pair_neither_poisons_the_mean_nor_is_dropped():
    a, b = noise(0), noise(1)
    half = mean_psnr([(a, b), (a, a)])
    assert half == pytest.approx(psnr(a, b) + 10 * math.log10(2))  # half the error
    assert half > mean_psnr([(a, b)]) == psnr(a, b)
    assert mean_psnr([(a, a), (b, b)]) == math.inf


def test_mean_psnr_is_that_of_all_pixels():
    pairs = [(noise(i), changed(noise(i), 10 * i)) for i in range(1, 5)]
    tall = tuple(np.concatenate(side) for side in zip(*pairs, strict=True))
    assert mean_psnr(iter(pairs)) == pytest.approx(psnr(*tall))
    assert mean_psnr(pairs) <= np.mean([psnr(a, b) for a, b in pairs])


def test_decibels_of_known_errors():
    assert decibels(255**2) == 0 and decibels(0) == math.inf and decibels(1) == pytest.approx(48.1308, abs=1e-4)


@pytest.mark.parametrize("measure", [psnr, ssim, squared_error])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (noise(0), noise(0, 20, 16), "20 x 16 and 16 x 20"),
        (noise(0), noise(0)[:1], "20 x 16 and 20 x 1"),
        (noise(0) / 255, noise(0), "float64"),
        (noise(0), noise(0)[..., 0], r"\[16, 20\] is no picture"),
    ],
)
def test_what_cannot_be_compared(measure, a, b, message):
    with pytest.raises(ValueError, match=message):
        measure(a, b)


def test_no_pairs_and_small_pictures():
    with pytest.raises(ValueError, match="at least one"):
        mean_psnr([])
    with pytest.raises(ValueError, match="at least 11"):
        ssim(noise(0, 10), noise(1, 10))
