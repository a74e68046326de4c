"""The evaluation loop on a tiny FLUX with random weights."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

import dit_accel
from dit_accel import TokenCacheConfig
from dit_accel.eval import cli, runs, timing
from dit_accel.eval.fidelity import squared_error, ssim
from dit_accel.eval.folder import RunFolder, grown
from dit_accel.eval.measuring import Bench
from dit_accel.eval.rewards import ImageReward
from dit_accel.eval.spec import Spec, noise_seed
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


def words(text: str) -> str:
    """An error without the frame around it."""
    return " ".join(text.replace("│", " ").split())


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


def test_a_recipe_is_that_of_the_pipeline(tmp_path, spec_file, flux_path, monkeypatch):
    """The closest one that is fast enough; another one of the same speed is another method's pictures."""
    own = {"model": "tiny", "transformer": {"class": "FluxTransformer2DModel"}, "levels": [1 - i / 6 for i in range(6)]}
    own["recipes"] = [{"speedup": n, "config": {"full_steps": full}} for n, full in ((1.5, [0, 1, 3, 5]), (3.0, [0, 2]))]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tiny.json").write_text(json.dumps(own))
    monkeypatch.setenv("DIT_ACCEL_RECIPES", str(tmp_path / "own"))
    evaluate(spec_file(methods=[{"speedup": [1.5, 3]}], seeds=1, timing_rounds=1, steps=6), tmp_path / "run")
    rows, pipe = rows_of(tmp_path / "run"), load(str(flux_path))
    assert {"recipe speedup=1.5", "recipe speedup=3"} < set(rows["method"]) and rows["error"].isna().all()
    codes = [Spec(("a",), ("b",), ({"speedup": 3},)).cells[-1].code]
    (tmp_path / "own" / "tiny.json").write_text(json.dumps(own).replace("[0, 2]", "[0, 3]"))
    assert codes != [Spec(("a",), ("b",), ({"speedup": 3},)).cells[-1].code]
    (tmp_path / "own" / "tiny.json").write_text(json.dumps(own))
    dit_accel.apply(pipe, speedup=3)
    some = rows[rows["method"] == "recipe speedup=3"]
    seeds = [torch.Generator().manual_seed(noise_seed(prompt, 0)) for prompt in some["prompt"]]
    size = dict(height=64, width=48, num_inference_steps=6, guidance_scale=0.0, max_sequence_length=8)
    for row, image in zip(some.to_dict("records"), pipe(list(some["prompt"]), generator=seeds, **size).images, strict=True):
        assert abs(np.asarray(picture(tmp_path / "run", row), dtype=int) - np.asarray(image, dtype=int)).max() <= 1
    assert (some["full_flops"] / some["flops"]).tolist() == pytest.approx([3] * len(some), rel=0.01)


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
    for changes, said in (
        (("--steps", 3), "steps was 4 and is 3"),
        (("--seeds", 1), "seeds was 2 and is 1, which is fewer"),
        (("--margin", 0.2), "margin was 0.1 and is 0.2"),
        (("--dtype", "bfloat16"), 'dtype was "float32" and is "bfloat16"'),
    ):
        result = evaluate(spec, output, *changes, code=2)
        assert said in words(result.stderr) and "--output" in words(result.stderr)
    (output.parent / "other").mkdir(exist_ok=True)
    (output.parent / "other/notes.txt").write_text("mine")
    assert "is no run" in words(evaluate(spec, output.parent / "other", code=2).stderr)


def test_what_auto_became_is_kept_and_printed(finished):
    """Naming the dtype and device that "auto" stands for changes nothing."""
    output, result = finished
    assert json.loads((output / "spec.json").read_text())["resolved"] == {"dtype": "float32", "device": "cpu"}
    assert "float32 on cpu" in result.stderr
    rows = rows_of(output)
    evaluate(output.parent / "spec.yaml", output, "--dtype", "float32", "--device", "cpu")
    pd.testing.assert_frame_equal(rows, rows_of(output))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pipelines": ["emoji-flx"]}, "There is no pipeline 'emoji-flx'"),
        ({"scores": ["emoji-rewrd"]}, "Did you mean emoji-reward"),
        ({"scores": ["image-reward:/nowhere"]}, "/nowhere"),
        ({"methods": [{"cache": {"selector": "cross-entropy"}}]}, "cannot run the method 'cache selector=cross-entropy'"),
        ({"methods": [{"merge": {"merge_cross_attention": True}}]}, "has no cross-attention"),
        ({"methods": [{"cache": {"intervall": 3}}]}, "Did you mean interval"),
        ({"height": 65}, "height and width must be multiples"),
        ({"guidance": "high"}, "guidance must be a number"),
        ({"offload": "model"}, "offload 'model' needs a GPU"),
        ({"device": "cpuu"}, "cpuu"),
        ({"prompts": "none.txt"}, "none.txt"),
    ],
)
def test_what_is_wrong_begins_no_folder(spec_file, tmp_path, changes, said):
    result = evaluate(spec_file(**changes), tmp_path / "run", code=2)
    assert said in words(result.stderr)
    assert not (tmp_path / "run").exists()


def test_a_run_grows(finished, tmp_path):
    """A method, a seed, a round and a prompt at the end: what was made stays as it is."""
    output, _ = finished
    run = tmp_path / "run"
    shutil.copytree(output, run)
    values = yaml.safe_load((output.parent / "spec.yaml").read_text())
    values |= {"prompts": [*values["prompts"], "tiger"], "seeds": 3, "timing_rounds": 3}
    values["methods"] = [{"cache": {"interval": 2, "cache_ratio": 0.5, "selector": ["random", "k-norm", "v-norm"]}}]
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    old = rows_of(output)
    old["method"] = old["method"].replace(r"cache (selector=\S+) (.*)", r"cache \2 \1", regex=True)  # options in another order
    stamps = {path: path.stat().st_mtime_ns for folder in ("rows", "pictures") for path in (run / folder).rglob("*.p*")}
    evaluate(tmp_path / "spec.yaml", run)
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    rows = rows_of(run)
    assert (rows.groupby("method").size() == 4 * 3).all() and rows["error"].isna().all() and not rows.duplicated(KEYS).any()
    both = old.merge(rows, on=KEYS, suffixes=("", "_now"))
    assert len(both) == len(old) and both["squared_error"].equals(both["squared_error_now"])
    assert (rows.loc[rows["kind"] == "no-op", "squared_error"] == 0).all()
    times = pd.read_parquet(run / "timing.parquet")
    assert sorted(times["round"].unique()) == [1, 2, 3]
    assert all(set(some["method"]) == set(rows["method"]) for _, some in times.groupby("round"))
    probed = json.loads((run / "baselines.json").read_text())
    assert len(next(iter(probed.values()))["methods"]) == 3


def test_prompts_are_added_at_the_end_only(finished, tmp_path):
    output, _ = finished
    values = yaml.safe_load((output.parent / "spec.yaml").read_text())
    spec = tmp_path / "spec.yaml"
    for prompts, said in (
        (["tiger", *values["prompts"]], 'prompt 1 was "red apple" and is "tiger"'),
        (values["prompts"][:2], 'prompt 3 was "crab, flat style" and is gone'),
    ):
        spec.write_text(yaml.safe_dump(values | {"prompts": prompts}))
        assert said in words(evaluate(spec, output, code=2).stderr)


def test_a_changed_selector_file_makes_only_its_methods_anew(spec_file, tmp_path):
    code = "import dit_accel\n@dit_accel.register_selector('mine', per_picture=False)\ndef mine(ctx):\n    return {}ctx.noise\n"
    methods = [{"cache": {"selector": ["random", "mine"], "interval": 2, "cache_ratio": 0.5}}]
    methods_of = [f"cache selector={name} interval=2 cache_ratio=0.5" for name in ("random", "mine")]
    spec = spec_file(methods=methods, selector_file="mine.py", seeds=1, timing_rounds=1)
    command = [*COMMAND, str(spec), "--output", str(tmp_path / "run")]
    stamps = []
    for sign in ("", "-"):
        (tmp_path / "mine.py").write_text(code.format(sign))
        done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=540)
        assert done.returncode == 0, done.stderr
        stamps.append({path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/rows").iterdir()})
    assert stamps[0].items() <= stamps[1].items()
    new = pd.concat(pd.read_parquet(tmp_path / "run/rows" / name) for name in set(stamps[1]) - set(stamps[0]))
    assert {name for name, kind in zip(new["method"], new["kind"], strict=True) if kind != "fewer steps"} == {methods_of[-1]}
    rows = rows_of(tmp_path / "run")
    assert (rows.groupby("method").size() == 3).all()


def test_files_that_cannot_be_read_are_made_anew(finished, tmp_path):
    output, _ = finished
    run = tmp_path / "run"
    shutil.copytree(output, run)
    row = next(path for path in sorted((run / "rows").iterdir()) if "k-norm" in pd.read_parquet(path)["method"].iloc[0])
    full = next((run / "pictures").rglob("full-*/0000-00.png"))
    broken = [row, next((run / "timing").iterdir()), full, next((run / "maps").iterdir()), run / "baselines.json"]
    broken += [run / "sessions/000.json", run / "cut.json", run / "results.parquet"]
    for i, path in enumerate(broken):
        path.write_bytes(path.read_bytes()[: 20 * (i % 2)])
    result = evaluate(output.parent / "spec.yaml", run)
    same_rows(rows_of(output), rows_of(run))
    for path in broken[:5]:
        assert f"{path} cannot be read and counts as missing" in result.stderr
    for path in [*broken[:2], run / "results.parquet"]:
        pd.read_parquet(path)
    for path in [*broken[3:5], run / "cut.json"]:
        json.loads(path.read_text())
    assert np.array_equal(np.asarray(Image.open(full)), np.asarray(Image.open(output / full.relative_to(run))))


def test_a_lost_specification_file_costs_nothing(finished, tmp_path):
    output, _ = finished
    shutil.copytree(output, tmp_path / "run")
    (tmp_path / "run/spec.json").write_bytes(b"")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/rows").iterdir()}
    result = evaluate(output.parent / "spec.yaml", tmp_path / "run")
    assert "spec.json cannot be read and counts as missing" in result.stderr
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    pd.testing.assert_frame_equal(rows_of(output), rows_of(tmp_path / "run"))


def test_two_starts_in_one_folder(finished, tmp_path):
    """The second one is refused by name; the lock of a process that was killed is free."""
    output, _ = finished
    run = tmp_path / "run"
    shutil.copytree(output, run)
    code = "import time; from pathlib import Path; from dit_accel.eval.folder import RunFolder\n"
    code += f"with RunFolder(Path({str(run)!r})).locked():\n    print('locked', flush=True)\n    time.sleep(600)\n"
    holder = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    said = evaluate(output.parent / "spec.yaml", run, code=1).stderr
    assert f"is in use by process {holder.pid} on {socket.gethostname()} since 20" in said
    holder.kill()
    holder.communicate()
    assert json.loads((run / "running.json").read_text())["pid"] == holder.pid
    evaluate(output.parent / "spec.yaml", run)
    assert not (run / "running.json").exists()


def test_check_says_what_would_run_and_writes_nothing(finished, spec_file, tmp_path):
    output, _ = finished
    new = tmp_path / "run"
    done = CliRunner().invoke(cli.app, ["check", str(spec_file()), "--output", str(new)], env={"COLUMNS": "240"})
    assert done.exit_code == 0, done.output
    assert not new.exists()
    said = words(done.stdout)
    for text in ("cache selector=k-norm interval=2 cache_ratio=0.5", "no-op cache", "float32 on cpu", "Made already: 0 pictures"):
        assert text in said
    assert re.search(r"About \d+:\d\d:\d\d", said) and "at most 3" in said  # of four steps
    again = CliRunner().invoke(cli.app, ["check", str(spec_file()), "--output", str(output)], env={"COLUMNS": "240"})
    assert f"Made already: {len(rows_of(output))} pictures" in words(again.stdout)
    changed = CliRunner().invoke(cli.app, ["check", str(spec_file()), "--output", str(output), "--steps", "3"])
    assert changed.exit_code == 2 and "steps was 4 and is 3" in words(changed.stderr)
    wrong = CliRunner().invoke(cli.app, ["check", str(spec_file()), "--method", "cache: {selector: cross-entropy}"])
    assert wrong.exit_code == 2 and "cross-entropy" in words(wrong.stderr)


def test_errors_are_text_not_markup(spec_file, tmp_path, monkeypatch):
    def denoise(self, batch, *arguments):
        raise RuntimeError("bad [/red] [bold]tag[/] [link=x]")

    monkeypatch.setattr(runs.Measured, "__call__", denoise)
    result = evaluate(spec_file(seeds=1, timing_rounds=1, prompts=["[/] crab [red]"]), tmp_path / "[red]run[/]", code=1)
    assert "bad [/red] [bold]tag[/] [link=x]" in result.stderr and "'[/] crab [red]'" in result.stderr
    wrong = evaluate(spec_file(pipelines=["[/red]x"]), tmp_path / "other", code=2)
    assert "[/red]x" in words(wrong.stderr)


def test_version():
    from importlib.metadata import version

    assert CliRunner().invoke(cli.app, ["--version"]).stdout == f"dit-accel-eval {version('dit-accel')}\n"


def test_a_failing_prompt_and_a_failing_method_do_not_end_the_run(spec_file, tmp_path, monkeypatch):
    spec = spec_file(methods=[{"cache": {"selector": "k-norm", "interval": 2}}, {"merge": {"ratio": 0.5}}], timing_rounds=1)
    true_denoise = runs.Measured.__call__

    def denoise(self, batch, *arguments):
        if self.cell.kind == "method" and any(prompt == "green cat" for prompt, _ in batch):
            raise RuntimeError("no green cats today")
        return no_merging(self, batch, *arguments)

    def no_merging(self, batch, *arguments):
        if self.cell.label.startswith("merge"):
            raise RuntimeError("nothing can be merged")
        return true_denoise(self, batch, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(runs.Measured, "__call__", denoise)
        result = evaluate(spec, tmp_path / "run", code=1)
    rows = rows_of(tmp_path / "run")
    failed = rows[rows["error"].notna()]
    cats = failed[failed["method"].str.startswith("cache")]
    assert set(cats["prompt"]) == {"green cat"} and set(cats["error"]) == {"RuntimeError: no green cats today"}
    merged = rows[rows["method"].str.startswith("merge")]
    assert len(merged) == 6 and merged["error"].notna().all() and "nothing can be merged" in set(merged["error"].str[14:])
    assert "8 of" in result.stderr and "--retry-failed" in result.stderr
    good = rows[rows["error"].isna()]
    assert (good.groupby("method").size().drop("cache selector=k-norm interval=2") == 6).all()

    monkeypatch.setattr(runs.Measured, "__call__", no_merging)
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
    for appears in ("timing/*.parquet", "rows/*.parquet", "pictures/*/cache-selector*/*.png"):
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
    assert len(list((run / "sessions").iterdir())) == 4


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
    assert json.loads((tmp_path / "run/sessions/000.json").read_text())["processes"] == 2
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


def test_baselines_of_methods_that_stay_do_not_move(tmp_path, monkeypatch):
    """Probed again, they would: seconds are never the same twice."""
    seconds = {"full": 20.0, "no-op cache": 20.0}
    asked = []

    def one_round(bench, cells, spec, number, watcher):
        asked.append((number, [cell.label for cell in cells]))
        rows = [{"method": cell.label, "kind": cell.kind, "error": None} for cell in cells]
        return [row | {"denoising_seconds": seconds.get(row["method"], 20.0), "flops": None, "full_flops": None} for row in rows]

    monkeypatch.setattr(timing, "one_round", one_round)
    bench = Bench("p", None, SimpleNamespace(steps=20))

    def found(baselines=True, **costs):
        seconds.update({f"cache interval={name[1:]}": cost for name, cost in costs.items()})
        methods = ({"cache": {"interval": [int(name[1:]) for name in costs]}},)
        spec = Spec(pipelines=("p",), prompts=("a",), methods=methods, baselines=baselines)
        folder = RunFolder(tmp_path)
        folder.begin(spec, {"dtype": "float32", "device": "cpu"})
        asked.clear()
        timing.find_baselines(bench, folder, spec, timing.Watcher())
        return folder.baselines().get("p")

    assert found(i3=10, i4=8, i9=25) == {"10": ["seconds of cache interval=3"], "8": ["seconds of cache interval=4"]}
    assert found(i3=12, i4=6, i9=18) == found(i3=10, i4=8, i9=25) and asked == []
    assert found(i3=12, i4=6, i9=18) and json.loads((tmp_path / "baselines.json").read_text())["p"]["methods"].keys() == {
        f"cache interval={i}" for i in (3, 4, 9)
    }
    assert found(i3=12, i5=5) == {"10": ["seconds of cache interval=3"], "5": ["seconds of cache interval=5"]}
    assert [number for number, _ in asked] == [0, -1, -2] and asked[1][1] == ["full", "no-op cache", "cache interval=5"]
    assert found(baselines=False, i3=12, i5=5) is None and asked == [], "not wanted"
    assert found(i3=12) == {"12": ["seconds of cache interval=3"]}


def test_new_pictures_make_new_batches():
    spec = Spec(pipelines=("p",), prompts=("a", "b"), methods=({"steps": 3},), seeds=2, batch_size=3)
    old = grown([], spec)
    assert old == [[(0, 0), (0, 1), (1, 0)], [(1, 1)]]
    more = grown(old, replace(spec, prompts=("a", "b", "c"), seeds=3))
    assert more[:2] == old and more[2:] == [[(0, 2), (1, 2), (2, 0)], [(2, 1), (2, 2)]]


def test_help_shows_the_grids_whole():
    shown = CliRunner().invoke(cli.app, ["run", "--help"], env={"COLUMNS": "200"}).output
    assert "{selector: [random, drift]}" in shown and "{selector: [random, drift], interval: [3, 5]}" in shown
