"""The table of a run against figures worked out by hand or by scipy."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dit_accel.eval.runs import with_flops
from dit_accel.eval.statistics import FEWEST, holm, paired
from dit_accel.eval.summary import summarize, verdict

METHODS = {"full": "full", "no-op cache": "no-op", "cache": "method", "10 steps": "fewer steps"}
STEPS = {"full": 20, "no-op cache": 20, "cache": 20, "10 steps": 10}


def made(prompts=12, seeds=3, pipelines=("p",)):
    rng = np.random.default_rng(0)
    rows, times = [], []
    for pipeline in pipelines:
        for prompt in range(prompts):
            for seed in range(seeds):
                base = rng.normal()
                for method, kind in METHODS.items():
                    loss = {"cache": 0.3, "10 steps": 0.01}.get(method, 0)
                    error = {"cache": float(prompt), "10 steps": 4.0, "no-op cache": 0.0}.get(method)
                    rows.append(
                        {
                            "pipeline": pipeline,
                            "method": method,
                            "kind": kind,
                            "prompt": f"prompt {prompt}",
                            "seed": seed,
                            "steps": STEPS[method],
                            "reward": base - loss * (1 + rng.normal() / 10),
                            "error": None,
                            "squared_error": error,
                            "ssim": None if error is None else 1 - error / 100,
                            "flops": {"cache": 25.0, "no-op cache": 100.0}.get(method),
                            "full_flops": {"cache": 100.0, "no-op cache": 100.0}.get(method),
                        }
                    )
        for number, slow in enumerate((1.0, 1.5, 4.0), start=1):
            for method, kind in METHODS.items():
                seconds = {"full": 8.0, "no-op cache": 8.0, "cache": 2.0 + (number == 2), "10 steps": 4.0}[method] * slow
                row = {"pipeline": pipeline, "method": method, "kind": kind, "round": number, "steps": STEPS[method], "error": None}
                row |= {"denoising_seconds": seconds, "seconds": seconds + 2 * slow, "comparable": True, "cache_bytes": 7.0}
                row |= {name: rows[list(METHODS).index(method)][name] for name in ("flops", "full_flops")}
                times.append(row | {"peak_memory": None})
    return with_flops(pd.DataFrame(rows)), with_flops(pd.DataFrame(times))


@pytest.fixture(scope="module")
def table():
    rows, times = made()
    return summarize(rows, times, score="reward", margin=0.1, resamples=2000).set_index("method")


def test_scores_are_means_over_prompts_and_differences_are_paired(table):
    rows, _ = made()
    means = rows.groupby(["method", "prompt"])["reward"].mean().unstack(0)
    for method in METHODS:
        assert table.at[method, "score"] == pytest.approx(means[method].mean())
        assert table.at[method, "score_low"] < table.at[method, "score"] < table.at[method, "score_high"]
    difference = means["cache"] - means["full"]
    assert table.at["cache", "difference"] == pytest.approx(difference.mean())
    t = stats.t.interval(0.95, 11, difference.mean(), stats.sem(difference))
    assert table.at["cache", "low"] <= t[0] + 1e-9 and table.at["cache", "high"] >= t[1] - 1e-9
    assert (table.at["cache", "low"], table.at["cache", "high"]) == pytest.approx(t, abs=0.02)
    assert table.at["cache", "p"] < 0.002 and not table.at["cache", "non_inferior"] and table.at["10 steps", "non_inferior"]
    assert table.loc[["full", "no-op cache"], "difference"].isna().all()
    assert table.at["cache", "p_holm"] == pytest.approx(2 * table.at["cache", "p"])  # two methods: the no-op cache is not tested
    assert (table["n"].dropna() == 12).all() and (table["pictures"] == 36).all() and (table["failed"] == 0).all()


def test_fidelity_is_of_the_mean_error_and_identical_pairs_count(table):
    assert table.at["cache", "psnr"] == pytest.approx(10 * math.log10(255**2 / 5.5))
    assert table.at["cache", "psnr_low"] < table.at["cache", "psnr"] < table.at["cache", "psnr_high"]
    assert table.at["cache", "identical"] == pytest.approx(1 / 12) and table.at["cache", "ssim"] == pytest.approx(1 - 0.055)
    assert table.at["no-op cache", "identical"] == 1 and math.isinf(table.at["no-op cache", "psnr"])
    assert pd.isna(table.at["full", "psnr"]) and pd.isna(table.at["full", "identical"])


def test_speed_ups_are_taken_within_rounds(table):
    """The machine is four times slower in one round, which changes no ratio."""
    assert table.at["cache", "speedup"] == 4 and table.at["10 steps", "speedup"] == 2 and table.at["full", "speedup"] == 1
    assert table.at["cache", "speedup_low"] == pytest.approx(np.quantile([4, 8 / 3, 4], 0.25))
    assert table.at["cache", "end_to_end_speedup"] == pytest.approx(np.median([10 / 4, 10 / 5, 10 / 4]))
    assert table.at["cache", "seconds"] == 4.5 and table.at["cache", "flops_ratio"] == 4 and table.at["10 steps", "flops"] == 50
    assert set(table.index[table["pareto"]]) == {"full", "10 steps", "cache"}


def test_a_method_that_always_fails_is_counted_and_hurts_nothing():
    rows, times = made()
    alone = summarize(rows, times, score="reward", margin=0.1, resamples=500).set_index("method")
    broken = rows[rows["method"] == "cache"].assign(method="broken", error="no", reward=None, squared_error=None, ssim=None)
    failed = times[times["method"] == "cache"].assign(method="broken", error="no", seconds=None, denoising_seconds=None)
    some = rows.copy()
    lost = (some["method"] == "cache") & (some["prompt"] == "prompt 3")
    some.loc[lost, ["reward", "squared_error", "ssim"]] = None
    some.loc[lost, "error"] = "no"
    result = summarize(pd.concat([some, broken]), pd.concat([times, failed]), score="reward", margin=0.1, resamples=500).set_index(
        "method"
    )
    assert result.at["broken", "failed"] == 36 and result.at["broken", "pictures"] == 0 and pd.isna(result.at["broken", "score"])
    assert not result.at["broken", "pareto"] and pd.isna(result.at["broken", "speedup"])
    assert result.at["cache", "failed"] == 3 and result.at["cache", "n"] == 11
    pd.testing.assert_series_equal(result.loc["10 steps"], alone.loc["10 steps"], check_dtype=False)


def test_pipelines_are_apart():
    rows, times = made(pipelines=("p", "q"))
    both = summarize(rows, times, score="reward", margin=0.1, resamples=500)
    one = summarize(*(frame[frame["pipeline"] == "q"] for frame in (rows, times)), score="reward", margin=0.1, resamples=500)
    pd.testing.assert_frame_equal(both[both["pipeline"] == "q"].reset_index(drop=True), one)


def against(loss: float, prompts: int = 12, slower: float = 1.0, methods: int = 1) -> pd.DataFrame:
    """The summary of methods that each lose `loss` against ten steps, which take `slower` times their seconds."""
    rng, rows, times = np.random.default_rng(1), [], []
    names = [f"cache {i}" for i in range(methods)]
    for method in ("full", "10 steps", *names):
        kind = {"full": "full", "10 steps": "fewer steps"}.get(method, "method")
        cost = {"full": 8.0, "10 steps": 4.0 * slower}.get(method, 4.0)
        row = {"pipeline": "p", "method": method, "kind": kind, "error": None, "steps": 20, "flops": 1.0, "full_flops": 1.0}
        for prompt in range(prompts):
            score = prompt - (0.5 + loss * (1 + rng.normal() / 4) if kind == "method" else 0.5 * (kind == "fewer steps"))
            rows.append(row | {"prompt": f"{prompt}", "seed": 0, "reward": score})
        cost = {"denoising_seconds": cost, "seconds": cost, "round": 1, "comparable": True, "cache_bytes": None}
        times.append(row | cost | {"peak_memory": None})
    baselines = {"p": {"10": [f"seconds of {name}" for name in names], "7": [f"FLOPs of {names[0]}"]}}
    return summarize(
        pd.DataFrame(rows), pd.DataFrame(times), score="reward", margin=0.1, resamples=500, baselines=baselines
    ).set_index("method")


@pytest.mark.parametrize(
    ("loss", "said"),
    [(-0.2, "better than 10 steps"), (0.2, "worse than 10 steps"), (0.0, "no significant difference from 10 steps")],
)
def test_every_method_is_compared_with_fewer_steps_at_its_seconds(loss, said):
    row = against(loss).loc["cache 0"].to_dict()
    assert row["matched"] == "10 steps" and row["matched_seconds"] == 1 and row["matched_n"] == 12
    assert row["matched_difference"] == pytest.approx(row["difference"] + 0.5)  # to full, of which ten steps lose 0.5
    assert row["matched_low"] <= row["matched_difference"] <= row["matched_high"]
    assert verdict(row).startswith(f"{said} at its seconds: ") and f"{row['matched_difference']:+.3f}" in verdict(row)
    assert "times its seconds" not in verdict(row) and verdict(against(loss).loc["10 steps"].to_dict()) == ""


def test_the_comparison_with_fewer_steps_is_adjusted_for_the_number_of_methods():
    table = against(-0.2, prompts=FEWEST, methods=4)
    found = table.loc[table["kind"] == "method"]
    assert found["matched_p"].tolist() == [2 / 2**FEWEST] * 4  # the least that there is
    assert found["matched_p_holm"].tolist() == holm(found["matched_p"]).tolist()
    assert verdict(found.iloc[0].to_dict()).startswith("no significant difference")


def test_no_verdict_from_few_prompts_and_none_without_a_baseline():
    few = against(-0.2, prompts=FEWEST - 1).loc["cache 0"].to_dict()
    assert verdict(few).startswith(f"no verdict against 10 steps: {FEWEST - 1} prompts") and few["non_inferior"] is None
    far = verdict(against(-0.2, slower=1.25).loc["cache 0"].to_dict())
    assert far.endswith("; 10 steps took 1.25 times its seconds")
    slow = {"matched": "full", "matched_difference": 0.1, "matched_n": 20}
    assert verdict(slow) == "no faster than full" and verdict({}) == "" == verdict({"matched": math.nan})


def test_a_method_that_no_fewer_steps_match_is_compared_with_full():
    rows, times = made()
    table = summarize(rows, times, score="reward", margin=0.1, resamples=500, baselines={"p": {}}).set_index("method")
    assert table.at["cache", "matched"] == "full" and table.at["cache", "matched_difference"] == table.at["cache", "difference"]
    means = rows.groupby(["method", "prompt"])["reward"].mean().unstack(0)
    assert table.at["cache", "matched_low"] == paired(means["cache"] - means["full"], resamples=500).low
