"""Do two methods differ? Paired comparisons over prompts, with intervals, tests and a declared margin.

The unit is the prompt: pictures of one prompt resemble each other, so their values are averaged over seeds first, and a
method is compared with the baseline on the same prompts and seeds. In every comparison larger values are better: negate an
error before you compare it.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap, permutation_test
from scipy.stats import t as student

Floats = NDArray[np.float64]

KEYS = ["method", "prompt", "seed"]
FEWEST = 6  # prompts for a verdict: with fewer, no sign-flip test can reach 5 %, and no interval is known to hold its level
MANY = 100  # values from which a BCa interval holds its level
BATCH = 2**21  # numbers drawn at once, which bounds the memory of a comparison of any size to a few hundred MB


@dataclass(frozen=True)
class Interval:
    """A mean over `n` values and its confidence interval."""

    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A mean of paired differences, its confidence interval and the p-value of the hypothesis that it is zero."""

    p: float


def per_prompt(frame: pd.DataFrame, value: str) -> pd.DataFrame:
    """Average the seeds of every prompt: a table [prompts, methods] of floats, both in the order of the frame.

    A cell is a mean over all seeds that any method has of that prompt, so that two cells of a row are always means over the
    same seeds. Where a picture or its value is missing the cell is NaN; `compare` leaves such a prompt out of that pair.

    Args:
        frame: one row a picture, with columns `method`, `prompt`, `seed` and `value`.
        value: the column to average.

    Warns:
        UserWarning: cells are NaN; says how many of which method.

    Raises:
        ValueError: a column is missing, a key is missing or given twice, or a value is infinite.
    """
    if missing := [column for column in [*KEYS, value] if column not in frame]:
        raise ValueError(f"The table of pictures has no column {', '.join(missing)}; it needs {', '.join(KEYS)} and {value}.")
    if frame[KEYS].isna().any(axis=None):
        raise ValueError("Some pictures have no method, prompt or seed; fill these columns in every row.")
    if (double := frame.duplicated(KEYS)).any():
        method, prompt, seed = frame.loc[double, KEYS].iloc[0]
        raise ValueError(f"{method!r} has prompt {prompt!r} with seed {seed} more than once; keep one row of each picture.")
    rows = frame[KEYS].assign(value=frame[value].astype(float))
    if endless := int(np.isinf(rows["value"]).sum()):
        raise ValueError(f"{endless} values of {value} are infinite; average a finite one, for PSNR the squared error.")
    wide = rows.pivot(index=["prompt", "seed"], columns="method", values="value")
    complete = wide.notna().groupby(level="prompt").all()
    table = wide.groupby(level="prompt").mean().where(complete).loc[frame["prompt"].unique(), frame["method"].unique()]
    lacking = table.isna().sum()
    if lacking.any():
        counts = ", ".join(f"{method!r} {count}" for method, count in lacking.items() if count)
        warnings.warn(f"Prompts left out, of {len(table)}, because a picture or its {value} is missing: {counts}.", stacklevel=2)
    return table


def mean_interval(values: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of unpaired values and its confidence interval.

    From 100 values on the BCa bootstrap interval (Efron, JASA 1987, through `scipy.stats.bootstrap`); with fewer, where that is too
    short, that of `studentized`. It depends neither on the order of the values nor, up to rounding, on their unit or origin. If
    all values are equal it is that value.

    Args:
        values: [n], one value a prompt.
        confidence: probability that the interval covers the true mean, in (0, 1).
        resamples: bootstrap resamples.
        seed: of the resamples.

    Raises:
        ValueError: fewer than two values, values that are not finite, or a confidence outside (0, 1).
    """
    ordered = sample(values)
    if not 0 < confidence < 1:
        raise ValueError(f"The confidence is {confidence}; give a probability between 0 and 1, such as 0.95.")
    mean = math.fsum(ordered) / ordered.size
    if ordered[0] == ordered[-1]:
        return Interval(ordered.size, *[float(ordered[0])] * 3)
    centered = ordered - mean
    scale = float(np.abs(centered).max())
    if ordered.size < MANY:
        low, high = (float(end) for end in studentized(centered / scale, confidence, resamples, seed))
    else:
        low, high = bootstrap(
            (centered / scale,),
            rounded_mean,
            method="BCa",
            confidence_level=confidence,
            n_resamples=resamples,
            batch=math.ceil(BATCH / ordered.size),
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return Interval(ordered.size, mean, mean + scale * float(low), mean + scale * float(high))


def studentized(values: Floats, confidence: float, resamples: int, seed: int) -> tuple[Floats, Floats]:
    """The ends of the wider of two intervals of a mean, each at either end: Student's t, and the bootstrap-t.

    Student's t holds its level where values are symmetric and is too short toward a long tail; there the bootstrap-t (Efron and
    Tibshirani 1993, chapter 12) reaches further. In a resample of equal values, one n-th of the variance of all takes its place.

    Args:
        values: [..., n], samples in ascending order; every one gets the same resamples.
        confidence, resamples, seed: see `mean_interval`.

    Returns:
        The lower and the upper ends, each [...].
    """
    n = values.shape[-1]
    mean = values.mean(-1, keepdims=True)
    centered = values - mean
    spread = np.sqrt((centered**2).sum(-1, keepdims=True) / (n - 1))
    shares = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples).T / n  # [n, resamples]
    means = centered @ shares
    spreads = np.sqrt((((centered**2) @ shares - means**2) * n / (n - 1)).clip(0))
    spreads = np.where(spreads > 1e-6 * spread, spreads, spread / math.sqrt(n))
    ratios = np.divide(means, spreads, out=np.zeros_like(means), where=spreads > 0).round(12)
    tail = (1 - confidence) / 2
    below, above = np.quantile(ratios, [tail, 1 - tail], axis=-1)
    t = float(student.ppf(1 - tail, n - 1)) / math.sqrt(n)
    center, unit = mean[..., 0], spread[..., 0]
    return center - unit * np.maximum(above, t), center - unit * np.minimum(below, -t)


def paired(differences: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Difference:
    """The mean of paired differences, its interval (see `mean_interval`) and a two-sided sign-flip test of mean zero.

    The test assumes that without an effect d is as likely as -d. All 2**n sign patterns are counted if they are no more than
    `resamples`; otherwise p = (b + 1) / (resamples + 1) (Phipson and Smyth, 2010), doubled for two sides.

    Args:
        differences: [n], method minus baseline, one a prompt.
        confidence: probability that the interval covers the true mean, in (0, 1).
        resamples: bootstrap resamples, and random sign patterns.
        seed: of both.

    Raises:
        ValueError: as `mean_interval`.
    """
    interval = mean_interval(differences, confidence=confidence, resamples=resamples, seed=seed)
    ordered = sample(differences)
    test = permutation_test(
        (ordered / (np.abs(ordered).max() or 1.0),),
        rounded_mean,
        permutation_type="samples",  # of one sample: the signs are flipped
        n_resamples=resamples,
        batch=math.ceil(BATCH / ordered.size),
        rng=np.random.default_rng(seed),
    )
    return Difference(**asdict(interval), p=float(test.pvalue))


def sample(values: ArrayLike) -> Floats:
    """The values in ascending order, float64, so that nothing that is drawn from them depends on the order they came in."""
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=None)
    if ordered.size < 2:
        raise ValueError(f"There are {ordered.size} values to average; at least two prompts are needed for an interval.")
    if endless := int((~np.isfinite(ordered)).sum()):
        raise ValueError(f"{endless} of {ordered.size} values are NaN or infinite; leave them out and count them.")
    return ordered


def rounded_mean(values: Floats, axis: int) -> Floats:
    """Means of values within [-1, 1] to 12 digits: resamples with the same mean tie, in whatever order they were summed."""
    return np.asarray(np.mean(values, axis=axis).round(12))


def holm(p_values: ArrayLike) -> Floats:
    """Holm's adjusted p-values, in the given order: Scandinavian Journal of Statistics, 1979.

    The i-th smallest of the m becomes max over j <= i of min(1, (m - j + 1) p_j). Rejecting those up to 0.05 keeps the probability
    of any false rejection at 0.05, whatever the dependence between the tests.

    Raises:
        ValueError: a p-value is NaN or outside [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("A p-value is NaN or outside [0, 1]; adjust only the tests that were made.")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)).clip(max=1)
    return adjusted


def non_inferior(difference: Difference, margin: float) -> bool | None:
    """Whether the method is worse than the baseline by less than `margin`: the interval lies above -margin as a whole.

    With a two-sided interval of 95 % this is a one-sided test at 2.5 % (ICH E9, section 3.3.2). The margin is the largest loss
    that does not matter, in the unit of the values, declared before the results are seen.

    The level holds for differences that are spread evenly. Where a few prompts lose much and most nothing the verdict errs more
    often, with `FEWEST` prompts and exponential losses 6 % of the time. None with fewer prompts, from which there is no verdict.

    Raises:
        ValueError: the margin is not a positive number.
    """
    if not 0 < margin < math.inf:
        raise ValueError(f"The margin is {margin}; declare the largest loss that does not matter, a number above 0.")
    return difference.low > -margin if difference.n >= FEWEST else None


def compare(
    table: pd.DataFrame,
    baseline: str,
    *,
    margin: float,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare every method with the baseline, each on the prompts that both have.

    Args:
        table: [prompts, methods], from `per_prompt`; larger is better.
        baseline: a column of the table.
        margin: see `non_inferior`.
        confidence, resamples, seed: see `paired`.

    Returns:
        One row a method, indexed by its name: `n` prompts compared, `mean` and `baseline_mean` over them, their `difference`,
        its interval from `low` to `high`, `p`, `p_holm` over all rows, `non_inferior` (None with too few prompts), and the number
        of `excluded` prompts.

    Raises:
        ValueError: the baseline is not in the table, or a method shares fewer than two prompts with it; else as `paired` and
            `non_inferior`.
    """
    if baseline not in table:
        raise ValueError(f"There is no method {baseline!r} to compare with; there are {', '.join(map(repr, table))}.")
    rows = {}
    for method in table.columns.drop(baseline):
        both = table[[method, baseline]].dropna()
        if len(both) < 2:
            raise ValueError(
                f"{method!r} and {baseline!r} share {len(both)} of {len(table)} prompts, at least two are needed; "
                "make the missing pictures with the same seeds, or leave the method out."
            )
        found = paired(both[method] - both[baseline], confidence=confidence, resamples=resamples, seed=seed)
        rows[method] = {
            "n": found.n,
            "mean": both[method].mean(),
            "baseline_mean": both[baseline].mean(),
            "difference": found.mean,
            "low": found.low,
            "high": found.high,
            "p": found.p,
            "p_holm": math.nan,
            "non_inferior": non_inferior(found, margin),
            "excluded": len(table) - found.n,
        }
    if not rows:
        raise ValueError(f"There is no method besides {baseline!r}; add one to compare with it.")
    result = pd.DataFrame.from_dict(rows, orient="index").rename_axis(index="method")
    return result.assign(p_holm=holm(result["p"]))


def pareto(cost: ArrayLike, quality: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other one dominates: matches in cost and quality and surpasses in one of them.

    Points that are equal do not beat each other.

    Args:
        cost: [n], smaller is better.
        quality: [n], larger is better.

    Raises:
        ValueError: the lengths differ, or a number is NaN.
    """
    c, q = np.asarray(cost, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    if c.ndim != 1 or c.shape != q.shape:
        raise ValueError(f"Costs {list(c.shape)} and qualities {list(q.shape)} do not match; give one of each for every point.")
    if np.isnan(c).any() or np.isnan(q).any():
        raise ValueError("A cost or a quality is NaN; leave out the points that were not measured.")
    matched = (c[:, None] <= c) & (q[:, None] >= q)  # [i, j]: i is at least as good as j
    return np.asarray(~(matched & ~matched.T).any(axis=0))
