"""The results of a run: one row a method, quality with intervals beside measured seconds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dit_accel.eval.fidelity import decibels
from dit_accel.eval.spec import FULL
from dit_accel.eval.statistics import FEWEST, compare, holm, mean_interval, pareto, per_prompt

RESAMPLES = 10_000
LEVEL = 0.05  # of Holm's p, for a verdict
FAR = 0.1  # share by which a baseline's seconds may miss the method's before the verdict mentions it

Baselines = dict[str, dict[str, list[str]]]  # by pipeline and number of steps: "seconds of ..." and "FLOPs of ..."


def summarize(
    rows: pd.DataFrame,
    times: pd.DataFrame,
    *,
    score: str,
    margin: float,
    resamples: int = RESAMPLES,
    baselines: Baselines | None = None,
) -> pd.DataFrame:
    """One row a pipeline and method, in the order of the rows.

    Args:
        rows: one row a picture: results.parquet of a run.
        times: its timing.parquet.
        score: the column that says how good a picture is.
        margin: see `dit_accel.eval.statistics.non_inferior`.
        resamples: of the bootstrap and the test.
        baselines: its baselines.json; without it no method is compared with fewer steps.

    Returns:
        `pipeline`, `method`, `kind`, `pictures`, `failed`; `score` with `score_low` and `score_high`; `difference` to full over
        `n` prompts with `low`, `high`, `p`, `p_holm` and `non_inferior`; `psnr` with `psnr_low` and `psnr_high`, of the mean
        squared error; `ssim`; `identical`, the share of pictures that are; `seconds` of denoising and `end_to_end`, medians, with
        `seconds_iqr`, `seconds_low` and `seconds_high`, their quartiles; `speedup` and `end_to_end_speedup`, medians over rounds
        of full over method in the same round, with `speedup_low` and `speedup_high` their quartiles; `flops` of a picture and
        `flops_ratio`; `cache_bytes`, `peak_memory`; `comparable`, whether the seconds are; `pareto`, whether no method of the
        pipeline is both faster and better. With baselines also `matched`, the run with fewer steps that takes a method's seconds
        (full, if the method takes at least as long), `matched_seconds`, its seconds over the method's, and `matched_difference` of
        the method to it, with `matched_n`, `matched_low`, `matched_high`, `matched_p` and `matched_p_holm`. What could not be
        measured is NaN.
    """
    parts = []
    for name, some in rows.groupby("pipeline", sort=False):
        timed = times[times["pipeline"] == name]
        scored = _scored(some, score)
        part = _quality(some, scored, margin, resamples).join(cost(timed))
        if name in (baselines or {}):
            part = part.join(_matched(some, timed, scored, margin, resamples, (baselines or {})[name]))
        for column in {"score", "seconds"} - set(part):  # nothing was scored, or timed
            part[column] = math.nan
        known = part["score"].notna() & part["seconds"].notna() & (part["kind"] != "no-op")
        part["pareto"] = False
        part.loc[known, "pareto"] = pareto(part.loc[known, "seconds"], part.loc[known, "score"])
        parts.append(part.reset_index().assign(pipeline=name))
    table = pd.concat(parts, ignore_index=True)
    return table[["pipeline", *table.columns.drop("pipeline")]]


def _scored(rows: pd.DataFrame, score: str) -> pd.DataFrame | None:
    """The scores by prompt and method; None if nothing was scored."""
    if score not in rows:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of missing pictures, which are counted as failed
        return per_prompt(rows, score)


def _quality(rows: pd.DataFrame, scored: pd.DataFrame | None, margin: float, resamples: int) -> pd.DataFrame:
    """One row a method: score, paired difference to full, fidelity."""
    methods = rows["method"].unique()
    kinds = rows.groupby("method", sort=False)["kind"].first()
    table = pd.DataFrame(index=pd.Index(methods, name="method"))
    table["kind"] = kinds
    table["pictures"] = rows.groupby("method")["error"].apply(lambda errors: errors.isna().sum())
    table["failed"] = rows.groupby("method")["error"].apply(lambda errors: errors.notna().sum())
    if scored is None:
        return table.assign(score=math.nan)
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


def _matched(
    rows: pd.DataFrame,
    times: pd.DataFrame,
    scored: pd.DataFrame | None,
    margin: float,
    resamples: int,
    counts: dict[str, list[str]],
) -> pd.DataFrame:
    """One row a method that was timed: its paired difference to the run with fewer steps that takes its seconds."""
    if scored is None or "denoising_seconds" not in times:
        return pd.DataFrame(columns=["matched"])
    seconds = times[times["error"].isna()].pivot_table(index="round", columns="method", values="denoising_seconds")
    found = {}
    for method in rows.loc[rows["kind"] == "method", "method"].unique():
        matched = next((f"{count} steps" for count, of in counts.items() if f"seconds of {method}" in of), FULL)
        if method not in seconds or matched not in seconds or not {method, matched} <= set(scored):
            continue
        pair = scored[[matched, method]].dropna()
        found[method] = {"matched": matched, "matched_seconds": (seconds[matched] / seconds[method]).median()}
        if len(pair) >= 2:
            compared = compare(pair, matched, margin=margin, resamples=resamples).iloc[0]
            found[method] |= {f"matched_{part}": compared[part] for part in ("n", "difference", "low", "high", "p")}
    table = pd.DataFrame.from_dict(found, orient="index")
    if "matched_p" in table:
        known = table["matched_p"].notna()
        table.loc[known, "matched_p_holm"] = holm(table.loc[known, "matched_p"])
    return table


def verdict(row: dict[str, Any]) -> str:
    """Whether a method beats fewer steps at its seconds, the claim that decides whether it is of use; "" if that is unknown.

    Args:
        row: of `summarize`, with the columns of the matched baseline.
    """
    matched = row.get("matched")
    if not isinstance(matched, str) or pd.isna(row.get("matched_difference")):
        return ""
    if matched == FULL:
        return "no faster than full"
    low, high, seconds = row["matched_low"], row["matched_high"], row["matched_seconds"]
    if row["matched_n"] < FEWEST:
        found = f"no verdict against {matched}: {row['matched_n']:g} prompts, at least {FEWEST} are needed"
    elif row["matched_p_holm"] <= LEVEL and (low > 0 or high < 0):
        found = f"{'better' if low > 0 else 'worse'} than {matched}"
    else:
        found = f"no significant difference from {matched}"
    far = f"; {matched} took {seconds:.2f} times its seconds" if abs(seconds - 1) > FAR else ""
    difference = f"{row['matched_difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"{found} at its seconds: {difference}, p {row['matched_p_holm']:.3f} (Holm){far}"


def broken(row: dict[str, Any], scores: Sequence[str]) -> list[str]:
    """The scores of a method that lie below full's by the whole interval of their difference: by how many of its widths."""
    found = {}
    for i, score in enumerate(scores):
        difference, low, high = (row[f"{i}: {part}" if i else part] for part in ("difference", "low", "high"))
        if pd.notna(high) and high < 0:
            found[score] = difference / max(high - low, 1e-12)
    return sorted(found, key=lambda score: found[score])


def non_inferior_text(row: dict[str, Any]) -> str:
    """Of a row of `summarize`: yes, no, too few prompts, or nothing where it was not compared with full."""
    if pd.isna(row.get("difference")):
        return ""
    return "too few prompts" if pd.isna(row["non_inferior"]) else "yes" if row["non_inferior"] else "no"


def cost(times: pd.DataFrame) -> pd.DataFrame:
    """One row a method of one pipeline: seconds, ratios to full in the same round, FLOPs, memory; columns as of `summarize`."""
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
