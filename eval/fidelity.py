"""How close an accelerated picture is to the one of the same prompt and seed without acceleration: PSNR and SSIM.

Identical pictures are the best result there is, and count as such everywhere: a mean is never taken without them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from dit_accel.pipelines.pictures import Picture, decibels, psnr, rgb_pair, squared_error

__all__ = ["decibels", "mean_psnr", "psnr", "squared_error", "ssim"]

Floats = NDArray[np.float64]

RADIUS, SIGMA = 5, 1.5  # of the Gaussian window, in pixels


def mean_psnr(pairs: Iterable[tuple[Picture, Picture]]) -> float:
    """PSNR of many pairs, in dB: that of their mean squared error; infinite only if all pairs are identical.

    A mean of decibels is infinite as soon as one pair is identical, which tempts one to drop such pairs. An identical pair has the
    error 0 and lowers the mean error like any other. So does torchmetrics' `PeakSignalNoiseRatio`, for pictures of one size. The
    result is at most the mean of the decibels, and far-off pictures weigh more in it. For an interval, convert the ends of
    `mean_interval` of the squared errors with `decibels`; for `compare`, negate the squared errors.

    Raises:
        ValueError: there is no pair, or two pictures differ in size.
    """
    errors = [squared_error(a, b) for a, b in pairs]
    if not errors:
        raise ValueError("There are no pairs of pictures to compare; give at least one.")
    return decibels(float(np.mean(errors)))


def ssim(a: Picture, b: Picture) -> float:
    """Structural similarity of two RGB pictures of 8 bits, from -1 to 1; 1 if they are identical.

    Wang et al., IEEE Transactions on Image Processing 2004, equations 13 to 17: Gaussian window of 11 x 11 with sigma 1.5,
    K1 = 0.01, K2 = 0.03, population variances; the mean over all places where the window lies inside the picture, and over the
    three channels. In float64, because in float32 the variance of a white area is rounding error.

    Raises:
        ValueError: the pictures differ in size or have a side of fewer than 11 pixels.
    """
    first, second = rgb_pair(a, b)
    if min(first.shape[:2]) < 2 * RADIUS + 1:
        raise ValueError(f"SSIM needs pictures of at least {2 * RADIUS + 1} pixels a side; use PSNR for smaller ones.")
    return float(np.mean([similarity(first[..., i].astype(np.float64), second[..., i].astype(np.float64)) for i in range(3)]))


def similarity(x: Floats, y: Floats) -> float:
    """Mean structural similarity of two channels [height, width] with values from 0 to 255."""
    mean_x, mean_y = windowed(x), windowed(y)
    variances = (windowed(x * x) - mean_x**2) + (windowed(y * y) - mean_y**2)
    covariance = windowed(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return float(np.mean(luminance * structure))


def windowed(channel: Floats) -> Floats:
    """Means under the Gaussian window, [height, width] -> [height - 10, width - 10]."""
    means = gaussian_filter(channel, SIGMA, radius=RADIUS)
    return np.asarray(means[RADIUS:-RADIUS, RADIUS:-RADIUS])
