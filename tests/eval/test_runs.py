"""The evaluation loop on a tiny FLUX with random weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

import dit_accel
from dit_accel import TokenCacheConfig
from dit_accel.eval import cli, runs
from dit_accel.eval.fidelity import squared_error, ssim
from dit_accel.eval.rewards import ImageReward
from dit_accel.eval.spec import noise_seed
from dit_accel.eval.timing import matching_steps
from dit_accel.pipelines.loading import load

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "dit_accel.eval", "run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
KEYS = ["pipeline", "method", "prompt", "seed"]
MEASURED = ["seconds", "denoising_seconds"]  # what two runs of the same need not agree on


def evaluate(spec, output, *arguments, code=0):
    result = CliRunner().invoke(cli.app, ["run", str(spec), "--output", str(output), *map(str, arguments)], env={"COLUMNS": "240"})
    assert result.exit_code == code, result.output
    return result


def rows_of(output) -> pd.DataFrame:
    return pd.read_parquet(output / "results.parquet").sort_values(KEYS, ignore_index=True)


def same_rows(a: pd.DataFrame, b: pd.DataFrame) -> None:
    """Everything but the seconds. Baselines depend on seconds, so they may differ."""
    a, b = (frame[frame["kind"] != "fewer steps"].drop(columns=MEASURED).reset_index(drop=True) for frame in (a, b))
    pd.testing.assert_frame_equal(a, b, check_like=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, spec_values):
    """The folder of a run beside its specification, and what the command said."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec_values, sort_keys=False))
    return folder / "run", evaluate(folder / "spec.yaml", folder / "run")


def picture(output, row) -> Image.Image:
    return Image.open(output / row["picture"]).convert("RGB")


def test_one_row_a_picture(finished):
    output, result = finished
    rows = rows_of(output)
    methods = rows.groupby("kind")["method"].unique()
    assert list(methods["full"]) == ["full"] and list(methods["no-op"]) == ["no-op cache"] and len(methods["method"]) == 2
    assert rows["error"].isna().all()
    assert not rows.duplicated(KEYS).any()
    assert (rows.groupby("method").size() == 6).all()
    for method in methods["method"]:
        assert method in result.stdout
    assert all((output / path).is_file() for path in rows["picture"]) and rows["picture"].is_unique
    assert (rows["seconds"] >= rows["denoising_seconds"]).all() and (rows["denoising_seconds"] > 0).all()


def test_pictures_are_those_of_the_plain_pipeline_from_the_noise_of_prompt_and_seed(finished, flux_path):
    output, _ = finished
    pipe = load(str(flux_path))
    rows = rows_of(output)
    for row in rows[(rows["method"] == "full")].to_dict("records"):
        image = pipe(
            row["prompt"],
            generator=torch.Generator().manual_seed(noise_seed(row["prompt"], row["seed"])),
            height=64,
            width=48,
            num_inference_steps=4,
            guidance_scale=0.0,
            max_sequence_length=8,
        ).images[0]
        ours, theirs = np.asarray(picture(output, row), dtype=int), np.asarray(image, dtype=int)
        assert abs(ours - theirs).max() <= 1  # made in a batch
        assert ours.std() > 5


def test_scores_and_fidelity_are_those_of_the_pictures(finished, spec_values, reward_path):
    output, _ = finished
    rows = rows_of(output)
    score = spec_values["scores"][0]
    again = ImageReward.from_checkpoint(reward_path).score(list(rows["prompt"]), [output / path for path in rows["picture"]])
    np.testing.assert_allclose(rows[score], again, atol=1e-4)
    assert rows[score].std() > 1e-3
    twins = rows[rows["method"] == "full"].set_index(["prompt", "seed"])
    assert rows.loc[rows["method"] == "full", "squared_error"].isna().all()
    for row in rows[rows["method"] != "full"].to_dict("records"):
        full, own = picture(output, twins.loc[(row["prompt"], row["seed"])]), picture(output, row)
        assert row["squared_error"] == pytest.approx(squared_error(full, own))
        assert row["ssim"] == pytest.approx(ssim(full, own))
    noop = rows[rows["method"] == "no-op cache"]
    assert (noop["squared_error"] == 0).all() and np.isinf(noop["psnr"]).all()
    assert (rows.loc[rows["kind"] == "method", "squared_error"] > 0).any()


def test_flops_are_those_of_the_report(finished, flux_path):
    """Of a picture, so a batch of one; fewer steps cost their share of the full run."""
    output, _ = finished
    pipe = load(str(flux_path))
    rows = rows_of(output)
    for method, config in {
        "cache selector=k-norm interval=2 cache_ratio=0.5": TokenCacheConfig(selector="k-norm", interval=2, cache_ratio=0.5),
        "no-op cache": TokenCacheConfig(interval=1),
    }.items():
        dit_accel.apply(pipe, config)
        pipe("red apple", height=64, width=48, num_inference_steps=4, guidance_scale=0.0, max_sequence_length=8)
        report = dit_accel.report(pipe)
        some = rows[rows["method"] == method]
        assert len(some) == 6
        np.testing.assert_allclose(some["full_flops"], report.full_flops, rtol=1e-6)
        np.testing.assert_allclose(some["flops"], sum(report.flops), rtol=1e-6)
    dit_accel.remove(pipe)
    plain = rows[rows["kind"].isin(["full", "fewer steps"])]
    np.testing.assert_allclose(plain["flops"], report.full_flops * plain["steps"] / 4, rtol=1e-6)


def test_every_method_is_timed_in_every_round(finished):
    output, _ = finished
    times = pd.read_parquet(output / "timing.parquet")
    assert all(sorted(some["round"]) == [1, 2] for _, some in times.groupby("method"))
    assert set(times["method"]) == set(rows_of(output)["method"])
    first, second = (list(times.loc[times["round"] == number, "method"]) for number in (1, 2))
    assert sorted(first) == sorted(second)
    assert times["comparable"].all() and (times["denoising_seconds"] > 0).all()


def test_the_same_again_does_nothing(finished):
    output, _ = finished
    spec = output.parent / "spec.yaml"
    before = {path: path.stat().st_mtime_ns for folder in ("rows", "timing", "pictures") for path in (output / folder).rglob("*")}
    rows = rows_of(output)
    evaluate(spec, output)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    pd.testing.assert_frame_equal(rows, rows_of(output))


def test_a_changed_specification_is_noticed_before_anything_is_made(finished):
    output, _ = finished
    spec = output.parent / "spec.yaml"
    result = evaluate(spec, output, "--seeds", 3, code=1)
    assert "seeds was 2 and is 3" in result.stderr and "--output" in result.stderr
    (output.parent / "other").mkdir(exist_ok=True)
    (output.parent / "other/notes.txt").write_text("mine")
    assert "is no run" in evaluate(spec, output.parent / "other", code=1).stderr


def test_a_failing_prompt_and_a_failing_method_do_not_end_the_run(spec_file, tmp_path, monkeypatch):
    spec = spec_file(
        methods=[{"cache": {"selector": "k-norm", "interval": 2}}, {"merge": {"merge_cross_attention": True}}], timing_rounds=1
    )
    true_denoise = runs.Measured.__call__

    def denoise(self, batch, *arguments):
        if self.cell.kind == "method" and any(prompt == "green cat" for prompt, _ in batch):
            raise RuntimeError("no green cats today")
        return true_denoise(self, batch, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(runs.Measured, "__call__", denoise)
        result = evaluate(spec, tmp_path / "run", code=1)
    rows = rows_of(tmp_path / "run")
    failed = rows[rows["error"].notna()]
    cats = failed[failed["method"].str.startswith("cache")]
    assert set(cats["prompt"]) == {"green cat"} and set(cats["error"]) == {"RuntimeError: no green cats today"}
    merged = rows[rows["method"].str.startswith("merge")]
    assert len(merged) == 6 and merged["error"].notna().all() and "cross-attention" in merged["error"].iloc[0]
    assert "8 of" in result.stderr and "--retry-failed" in result.stderr
    good = rows[rows["error"].isna()]
    assert (good.groupby("method").size().drop("cache selector=k-norm interval=2") == 6).all()

    evaluate(spec, tmp_path / "run", code=1)  # without being asked to, nothing is tried again
    pd.testing.assert_frame_equal(rows, rows_of(tmp_path / "run"))
    evaluate(spec, tmp_path / "run", "--retry-failed", code=1)
    again = rows_of(tmp_path / "run")
    assert set(again.loc[again["error"].notna(), "method"]) == set(merged["method"])
    assert len(again) == len(rows)


def test_killed_at_any_moment_it_goes_on(finished, spec_file, tmp_path):
    """Killed three times, the last one while pictures are made: same rows as a run in one go, and no half-written file."""
    output, _ = finished
    spec = spec_file()
    run = tmp_path / "run"
    for appears in ("timing/*.parquet", "rows/*.parquet", "rows/00-0002-*.parquet"):
        process = subprocess.Popen(
            [*COMMAND, str(spec), "--output", str(run)], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 240
        while process.poll() is None and not list(run.glob(appears)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (run / "results.parquet").exists()
        for path in run.glob("*/*.parquet"):
            pd.read_parquet(path)
        for path in run.glob("*/*.json"):
            json.loads(path.read_text())
    evaluate(spec, run)
    same_rows(rows_of(output), rows_of(run))
    assert len(list((run / "sittings").iterdir())) == 4


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(finished, spec_file, tmp_path):
    output, _ = finished
    spec = spec_file()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    arguments = ["-m", "dit_accel.eval", "run", str(spec), "--output", str(tmp_path / "run")]
    done = subprocess.run([*launch, *arguments], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    same_rows(rows_of(output), rows_of(tmp_path / "run"))
    assert json.loads((tmp_path / "run/sittings/000.json").read_text())["processes"] == 2
    assert not pd.read_parquet(tmp_path / "run/timing.parquet")["comparable"].any()


def test_an_output_cache_is_a_method(spec_file, tmp_path):
    spec = spec_file(methods=[{"output": {"full_steps": [0, 1], "order": 1}}], seeds=1, timing_rounds=1)
    done = CliRunner().invoke(cli.app, ["run", str(spec), "--output", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    rows = rows_of(tmp_path / "run")
    rows = rows[rows["kind"] == "method"]
    assert set(rows["method"]) == {"output full_steps=0x1 order=1"} and rows["error"].isna().all()
    assert (rows["full_steps"] == 2).all() and (rows["partial_steps"] == 2).all() and (rows["flops"] < rows["full_flops"]).all()


def test_steps_that_match_a_method():
    rows = [
        {"method": "full", "kind": "full", "denoising_seconds": 10.0, "flops": None, "full_flops": None},
        {"method": "no-op cache", "kind": "no-op", "denoising_seconds": 11.0, "flops": 100.0, "full_flops": 100.0},
        {"method": "fast", "kind": "method", "denoising_seconds": 4.0, "flops": 25.0, "full_flops": 100.0},
        {"method": "slow", "kind": "method", "denoising_seconds": 12.0, "flops": 40.0, "full_flops": 100.0},
        {"method": "8 steps", "kind": "fewer steps", "denoising_seconds": 4.0, "flops": None, "full_flops": None},
    ]
    rows = [row | {"error": None} for row in rows] + [rows[2] | {"method": "broken", "error": "no", "denoising_seconds": None}]
    assert matching_steps(rows, 20) == {8: ["seconds of fast", "FLOPs of slow"], 5: ["FLOPs of fast"]}
    assert matching_steps(rows[1:], 20) == {}


def test_help_shows_the_grids_whole():
    shown = CliRunner().invoke(cli.app, ["run", "--help"], env={"COLUMNS": "200"}).output
    assert "{selector: [random, drift]}" in shown and "{selector: [random, drift], interval: [3, 5]}" in shown
