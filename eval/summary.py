"""What came out of a run: one row a method, quality with intervals beside measured seconds."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pandas as pd

from dit_accel.eval.fidelity import decibels
from dit_accel.eval.spec import FULL
from dit_accel.eval.statistics import compare, mean_interval, pareto, per_prompt

RESAMPLES = 10_000


def summarise(rows: pd.DataFrame, times: pd.DataFrame, *, score: str, margin: float, resamples: int = RESAMPLES) -> pd.DataFrame:
    """One row a pipeline and method, in the order of the rows.

    Args:
        rows: one row a picture: results.parquet of a run.
        times: its timing.parquet.
        score: the column that says how good a picture is.
        margin: see `dit_accel.eval.statistics.non_inferior`.
        resamples: of the bootstrap and the test.

    Returns:
        `pipeline`, `method`, `kind`, `pictures`, `failed`; `score` with `score_low` and `score_high`; `difference` to full over
        `n` prompts with `low`, `high`, `p`, `p_holm` and `non_inferior`; `psnr` with `psnr_low` and `psnr_high`, of the mean
        squared error; `ssim`; `identical`, the share of pictures that are; `seconds` of denoising and `end_to_end`, medians, with
        `seconds_iqr`, `seconds_low` and `seconds_high`, their quartiles; `speedup` and `end_to_end_speedup`, medians over rounds
        of full over method in the same round, with `speedup_low` and `speedup_high` their quartiles; `flops` of a picture and
        `flops_ratio`; `cache_bytes`, `peak_memory`; `comparable`, whether the seconds are; `pareto`, whether no method of the
        pipeline is both faster and better. What could not be measured is NaN.
    """
    parts = []
    for name, some in rows.groupby("pipeline", sort=False):
        part = _quality(some, score, margin, resamples).join(_cost(times[times["pipeline"] == name]))
        for column in {"score", "seconds"} - set(part):  # nothing was scored, or timed
            part[column] = math.nan
        known = part["score"].notna() & part["seconds"].notna() & (part["kind"] != "no-op")
        part["pareto"] = False
        part.loc[known, "pareto"] = pareto(part.loc[known, "seconds"], part.loc[known, "score"])
        parts.append(part.reset_index().assign(pipeline=name))
    table = pd.concat(parts, ignore_index=True)
    return table[["pipeline", *table.columns.drop("pipeline")]]


def _quality(rows: pd.DataFrame, score: str, margin: float, resamples: int) -> pd.DataFrame:
    """One row a method: score, paired difference to full, fidelity."""
    methods = rows["method"].unique()
    kinds = rows.groupby("method", sort=False)["kind"].first()
    table = pd.DataFrame(index=pd.Index(methods, name="method"))
    table["kind"] = kinds
    table["pictures"] = rows.groupby("method")["error"].apply(lambda errors: errors.isna().sum())
    table["failed"] = rows.groupby("method")["error"].apply(lambda errors: errors.notna().sum())
    if score not in rows:
        return table.assign(score=math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of missing pictures, which are counted as failed
        scored = per_prompt(rows, score)
    usable = [method for method in methods if FULL in scored and (scored[method].notna() & scored[FULL].notna()).sum() >= 2]
    for method in methods:
        values = scored[method].dropna()
        if len(values) >= 2:
            found = mean_interval(values, resamples=resamples)
            table.loc[method, ["score", "score_low", "score_high"]] = [found.mean, found.low, found.high]
        errors = rows.loc[(rows["method"] == method) & rows["error"].isna()]
        if kinds[method] != "full" and "squared_error" in errors and errors["squared_error"].notna().any():
            table.loc[method, ["ssim", "identical"]] = [errors["ssim"].mean(), (errors["squared_error"].dropna() == 0).mean()]
            by_prompt = errors.groupby("prompt")["squared_error"].mean()
            if len(by_prompt) >= 2:
                error = mean_interval(by_prompt, resamples=resamples)
                ends = [decibels(max(0.0, value)) for value in (error.mean, error.high, error.low)]
                table.loc[method, ["psnr", "psnr_low", "psnr_high"]] = ends
    tested = [method for method in usable if method == FULL or kinds[method] not in ("full", "no-op")]
    if len(tested) > 1:
        compared = compare(scored[tested], FULL, margin=margin, resamples=resamples)
        table = table.join(compared[["n", "difference", "low", "high", "p", "p_holm", "non_inferior"]])
    return table


def _cost(times: pd.DataFrame) -> pd.DataFrame:
    """One row a method: seconds, ratios to full in the same round, FLOPs, memory."""
    good = times[times["error"].isna()]
    result: dict[Any, dict[str, float]] = {}
    full = good[good["method"] == FULL].set_index("round")
    for method, some in good.groupby("method", sort=False):
        own = some.set_index("round")
        ratio = (full["denoising_seconds"] / own["denoising_seconds"]).dropna()
        whole = (full["seconds"] / own["seconds"]).dropna()
        low, high = np.percentile(own["denoising_seconds"], [25, 75])
        result[method] = {
            "seconds": own["denoising_seconds"].median(),
            "seconds_iqr": high - low,
            "seconds_low": low,
            "seconds_high": high,
            "end_to_end": own["seconds"].median(),
            "speedup": ratio.median(),
            "speedup_low": ratio.quantile(0.25),
            "speedup_high": ratio.quantile(0.75),
            "end_to_end_speedup": whole.median(),
            "flops": own["flops"].median(),
            "flops_ratio": full["flops"].median() / own["flops"].median(),
            "cache_bytes": pd.to_numeric(own["cache_bytes"]).max(),
            "peak_memory": pd.to_numeric(own["peak_memory"]).max(),
            "comparable": bool(own["comparable"].all()),
        }
    return pd.DataFrame.from_dict(result, orient="index")
