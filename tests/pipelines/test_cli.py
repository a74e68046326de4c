from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dit_accel
from dit_accel import OutputCacheConfig, when
from dit_accel.pipelines import generation, job, methods, options
from dit_accel.pipelines.loading import load

OUTPUT = ("--method", "output-cache")


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=np.float64)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_generate_writes_a_picture_with_its_settings(make, tmp_path, flux_path):
    result = make("red apple, 3d style", "--seed", 3, "--interval", 2, "--cache-ratio", 0.5, "--warmup-steps", 1)
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    assert names(out) == ["manifest.jsonl", "red-apple-3d-style-seed3.json", "red-apple-3d-style-seed3.png"]
    record = json.loads((out / "red-apple-3d-style-seed3.json").read_text())
    assert record["prompt"] == "red apple, 3d style" and record["seed"] == 3 and record["steps"] == 3
    assert (record["height"], record["width"]) == (64, 48)
    assert record["pipeline"] == str(flux_path) and record["dtype"] == "float32" and record["device"] == "cpu"
    assert record["method"] == "token-cache"
    assert record["cache"]["interval"] == 2 and record["cache"]["cache_ratio"] == 0.5 and record["cache"]["selector"] == "random"
    assert record["work"]["full_steps"] == 2 and record["work"]["partial_steps"] == 1
    assert record["seconds"] >= record["denoising_seconds"] > 0
    assert set(record["versions"]) >= {"dit-accel", "torch", "diffusers"}
    image = Image.open(out / "red-apple-3d-style-seed3.png")
    assert image.size == (48, 64)
    assert image.text["prompt"] == record["prompt"]
    assert {k: json.loads(v) for k, v in image.text.items() if not isinstance(record[k], str)} == {
        k: v for k, v in record.items() if not isinstance(v, str)
    }
    assert "red-apple-3d-style-seed3.png" in result.stdout


def test_the_picture_is_that_of_the_plain_pipeline(make, tmp_path, flux_path):
    assert make("red apple", "--method", "none", "--seed", 1).exit_code == 0
    pipe = load(str(flux_path))
    settings = generation.settings_for(pipe, "tiny", height=64, width=48, steps=3, seed=1)
    arguments = dict(height=64, width=48, num_inference_steps=3, guidance_scale=0.0, max_sequence_length=8)
    direct = pipe("red apple", generator=torch.Generator().manual_seed(1), **arguments).images[0]
    assert settings.guidance == 0.0
    assert np.array_equal(pixels(tmp_path / "out/red-apple-seed1.png"), np.asarray(direct))


def test_prompts_from_a_file_and_from_the_line(make, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# two\nblue tiger\ngreen teapot\n")
    result = make("red apple", "--prompts-file", file, "--num-images", 2, "--batch-size", 4)
    assert result.exit_code == 0, result.stderr
    pngs = [name for name in names(tmp_path / "out") if name.endswith(".png")]
    assert pngs == [f"{slug}-seed{i}.png" for slug in ("blue-tiger", "green-teapot", "red-apple") for i in range(2)]


def test_nothing_is_overwritten(make, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/red-seed0-2-full.png").write_bytes(b"of another program")
    assert make("red", "Red!", "--method", "none", "--steps", 1).exit_code == 0
    assert make("red", "--compare", "--steps", 2).exit_code == 0
    pngs = [name for name in names(tmp_path / "out") if name.endswith(".png")]
    assert pngs == [
        "red-seed0-2-full.png",
        "red-seed0-2.png",
        *(f"red-seed0-3{end}.png" for end in ("-compare", "-full", "")),
        "red-seed0.png",
    ]
    assert (tmp_path / "out/red-seed0-2-full.png").read_bytes() == b"of another program"
    lines = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [f"red-seed0{end}.png" for end in ("", "-2", "-3", "-3-full", "-3-compare")]
    for line in lines:
        assert json.loads((tmp_path / "out" / line.pop("file")).with_suffix(".json").read_text()) == line


def test_another_process_may_take_the_name_first(make, tmp_path, monkeypatch):
    """Between looking for a free name and writing the file."""
    free = job.unused

    def late(folder, name, taken, endings=("",)):
        found = free(folder, name, taken, endings)
        if found == "red-seed0":
            folder.mkdir(exist_ok=True)
            (folder / "red-seed0.png").write_bytes(b"of another process")
        return found

    monkeypatch.setattr(job, "unused", late)
    assert make("red", "--method", "none", "--steps", 1).exit_code == 0
    assert (tmp_path / "out/red-seed0.png").read_bytes() == b"of another process"
    assert Image.open(tmp_path / "out/red-seed0-2.png").text["prompt"] == "red"


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_compare(make, tmp_path, flux_path, pixart_path, family):
    path = {"flux": flux_path, "pixart": pixart_path}[family]
    result = make("red apple", "--compare", "--steps", 6, "--interval", 3, pipeline=path)
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    assert [name for name in names(out) if name.endswith(".png")] == [
        f"red-apple-seed0{end}.png" for end in ("-compare", "-full", "")
    ]
    a, b = pixels(out / "red-apple-seed0-full.png"), pixels(out / "red-apple-seed0.png")
    expected = 10 * math.log10(255**2 / ((a - b) ** 2).mean())
    comparison = json.loads((out / "red-apple-seed0-compare.json").read_text())["comparison"]
    assert comparison["psnr_db"] == pytest.approx(expected) and not comparison["identical"]
    assert f"{expected:.1f} dB" in result.stdout and f"{comparison['speedup_denoising']:.2f}x" in result.stdout
    assert json.loads((out / "red-apple-seed0-full.json").read_text())["method"] == "none"


def test_merging_alone_and_with_a_cache(make, tmp_path, pixart_path):
    options = ("--merge-ratio", 0.25, "--merge-stride", 2, 1, "--rematch-every", 3, 2, "--merge-keys-only", "--merge-mlp")
    result = make("red apple", "--compare", "--method", "token-merge", *options)
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "out/red-apple-seed0.json").read_text())
    assert record["method"] == "token-merge" and record["cache"] is None and record["work"]["tokens_merged"] == 12
    merge = record["merge"]
    assert (merge["ratio"], merge["stride"], merge["rematch_every"]) == (0.25, [2, 1], [3, 2])
    assert merge["keep_queries"] and merge["merge_mlp"] and not merge["merge_cross_attention"]
    assert "seconds merged" in result.stdout and "seconds cached" not in result.stdout
    more = ("--method", "token-cache+token-merge", "--merge-cross-attention", "--interval", 2)
    assert make("tiger", *more, pipeline=pixart_path).exit_code == 0
    record = json.loads((tmp_path / "out/tiger-seed0.json").read_text())
    assert record["method"] == "token-cache+token-merge" and record["cache"]["interval"] == 2
    assert record["merge"]["ratio"] == 0.5 and record["work"]["partial_steps"] == 1 and record["work"]["tokens_merged"] == 24


def test_compare_of_the_same_work_is_called_identical(make, tmp_path):
    result = make("red apple", "--compare", "--interval", 1)
    assert "identical" in result.stdout
    comparison = json.loads((tmp_path / "out/red-apple-seed0-compare.json").read_text())["comparison"]
    assert comparison["identical"] and comparison["psnr_db"] is None


def test_unknown_words_and_cut_prompts_are_reported(make):
    result = make("red zebra", "a a a a a a a blue tiger", "--method", "none")
    assert result.exit_code == 0
    assert re.search(r"Warning: \S*tiny-flux does not know zebra in 'red zebra'", result.stderr.replace("\n", ""))
    assert "does not see 'blue tiger'" in result.stderr.replace("\n", "").replace("  ", " ")
    assert result.stderr.count("Warning") == 2
    assert "Warning" not in make("red apple", "--method", "none").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give at least one prompt"),
        (("",), "Give at least one prompt"),
        (("red", "--interval", 0), "--interval must be"),
        (("red", "--cache-ratio", 1.5), "--cache-ratio must be"),
        (("red", "--selector", "best"), "There is no selector 'best'"),
        (
            ("red", "--method", "none", "--selector", "random"),
            "--selector needs --method token-cache or output-cache or token-cache+token-merge, not none.",
        ),
        (("red", "--method", "token-merge", "--selector", "random"), "--selector needs --method token-cache or"),
        (("red", "--method", "token-merge", "--selector-file", "x.py"), "--selector-file needs --method token-cache or"),
        (("red", "--merge-ratio", 0.5), "--merge-ratio needs --method token-merge or token-cache+token-merge, not token-cache."),
        (("red", "--method", "none", "--merge-mlp"), "--merge-mlp needs --method token-merge or"),
        (("red", "--method", "none", "--no-merge-mlp"), "--merge-mlp needs --method token-merge or"),
        (("red", "--full-steps", "0,1"), "--full-steps needs --method output-cache, not token-cache."),
        (("red", "--method", "output-cache", "--fill", "reuse"), "--fill needs --method token-cache or token-cache+token-merge"),
        (("red", *OUTPUT, "--full-steps", "0,x"), "'--full-steps': '0,x' is not a list of whole numbers, as in 0,1,2,5,9."),
        (("red", *OUTPUT, "--order", "1.5"), "'--order': '1.5' is not a list of whole numbers"),
        (("red", *OUTPUT, "--damping", ""), "'--damping': '' is not a list of numbers, as in 1,0.5."),
        (("red", *OUTPUT, "--full-steps", "3,1"), "--full-steps must be numbers of steps, counted from 0 and ascending"),
        (("red", *OUTPUT, "--full-steps", "0,1", "--tolerance", 0.1), "give one of them"),
        (("red", *OUTPUT, "--attention", "new"), "--attention must be one of reuse, fresh"),
        (("red", *OUTPUT, "--when", "mine"), "There is no rule 'mine'"),
        (("red", "--method", "token-merge", "--merge-ratio", 0.8), "--merge-ratio is the share of image tokens"),
        (("red", "--method", "none", "--compare"), "--compare needs a method other than none"),
        (("red", "--method", "none", "--preset", "fora"), "--preset needs --method token-cache"),
        (("red", "--preset", "best"), "There is no preset 'best'"),
        (("red", "--fill", "guess"), "--fill must be one of reuse, forecast"),
        (("red", "--steps", 0), "--steps must be at least 1"),
        (("red", "--height", 63), "--height and --width must be multiples of 8"),
        (("red", "--dtype", "float8"), "--dtype is 'float8'"),
        (("red", "--offload", "model", "--device", "cpu"), "--offload 'model' needs a GPU"),
        (("red", "--method", "magic"), "magic"),
        (("red", "--bogus"), "No such option"),
    ],
)
def test_wrong_usage_is_exit_code_2(make, tmp_path, arguments, message):
    result = make(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("red", "--pipeline", "emoji-flx"), "There is no pipeline 'emoji-flx'. Did you mean emoji-flux? Give one of"),
        (("red", "--pipeline", "nothing"), "There is no pipeline 'nothing'. Give one of"),
        (("red", "--pipeline", "."), "is not a pipeline in diffusers format"),
        (("--prompts-file", "none.txt"), "There is no prompt set none.txt"),
        (("--prompts-file", "empty.txt"), "empty.txt holds no prompt"),
        (("--config", "none.png"), "There is no file none.png"),
        (("--config", "plain.png"), "plain.png holds no settings"),
        (("--config", "empty.txt"), "empty.txt holds no settings"),
        (("red", "--selector-file", "none.py"), "--selector-file: there is no file none.py"),
        (("red", "--output", "plain.png"), "plain.png cannot be the folder of pictures"),
        (("red", "--output", "plain.png/in"), "plain.png is a file"),
        (("red", "--output", "x" * 300), "cannot be the folder of pictures"),
        (("\udcff",), "Give at least one prompt"),
    ],
)
def test_names_that_are_wrong_are_found_before_anything_is_loaded(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "empty.txt").write_text("# nothing\n")
    Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    result = run("generate", *arguments)
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())
    assert names(tmp_path) == ["empty.txt", "plain.png"]


def test_what_goes_wrong_is_exit_code_1_and_one_sentence(make, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the roof is leaking\nand more")

    monkeypatch.setattr(job, "save", fail)
    result = make("red")
    assert result.exit_code == 1 and "RuntimeError: the roof is leaking (--debug shows where)" in result.stderr
    debugged = make("red", "--debug")
    assert isinstance(debugged.exception, RuntimeError)


def test_a_full_disk_is_named_and_leaves_nothing(make, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = make("red", "--method", "none")
    assert result.exit_code == 1 and names(tmp_path / "out") == []
    assert result.stderr == f"Error: {tmp_path / 'out/red-seed0.png'}: No space left on device.\n"


def test_ctrl_c_keeps_whole_pictures_only(make, tmp_path, monkeypatch):
    denoise, calls = generation.denoise, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return denoise(*args, **kwargs)

    monkeypatch.setattr(generation, "denoise", interrupted)
    result = make("red apple", "blue tiger", "green teapot")
    assert result.exit_code == 130 and "Traceback" not in result.stderr
    assert names(tmp_path / "out") == ["manifest.jsonl", "red-apple-seed0.json", "red-apple-seed0.png"]
    Image.open(tmp_path / "out/red-apple-seed0.png").load()


def test_demo(run, tmp_path, flux_path, pixart_path):
    arguments = ("--prompt", "red apple!", "--prompt", "Red apple?", "--height", 64, "--width", 64, "--output", tmp_path / "demo")
    for _ in range(2):
        result = run("demo", "--pipeline", flux_path, "--pipeline", pixart_path, *arguments)
        assert result.exit_code == 0, result.stderr
    for text in ("pipeline", "prompt", "seconds uncached", "seconds cached", "speed-up", "PSNR", "picture"):
        assert text in result.stdout
    assert result.stdout.lower().count("red apple") == 4 and result.stdout.count("-compare.png") == 4
    record = json.loads((tmp_path / "demo/tiny-pixart/red-apple-seed0-2.json").read_text())
    assert record["prompt"] == "Red apple?", "every prompt must have files of its own"
    assert record["output"]["tolerance"], "tiny-pixart has no recipe"
    assert len(names(tmp_path / "demo/tiny-flux")) == 12 + 1, "running it again must replace the pictures"


OPTIONS = [  # each set can be given at once
    ("cache", dict(
        interval=2, cache_ratio=0.8, selector="attention", warmup_steps=2, interval_spread=0.1, ratio_schedule="toca",
        age_weight=0.5, spatial_bonus=0.3, spatial_tile=2, query_share=0.5, text_tokens="reuse",
        share_guidance_selection=False, seed=3, fill="forecast", forecast_order=2, cache_dtype="bfloat16", cache_device="cpu",
    )),
    ("merge", dict(
        ratio=0.25, stride=[2, 1], randomize=True, merge_attention=True, merge_cross_attention=True, merge_mlp=True,
        rematch_every=[3, 2], warmup_steps=1, keep_queries=True, proportional_attention=True, seed=4,
    )),
    ("output", dict(
        full_steps=[0, 2], warmup_steps=2, guidance_steps=[0, 2], how="taylor", order=[1, 2], guidance_order=1,
        damping=[0.5, 1.0], compute_ratio=0.3, selector="stratified", age_weight=0.5, attention="fresh", seed=5,
    )),
    ("output", dict(sampler_steps=[0, 0.25, 0.4, 0.8], full_steps=[0, 2], correct=0.5, space="data")),
    ("output", dict(full_steps=[0, 1, 2], merged_steps=[0, 1], merged_side=2)),
    ("output", dict(full_steps=[0, 1, 2], lead=[0.0, 0.1, -0.2], merged_above=0.3, merged_keep=0.5, selector="variance")),
]  # fmt: skip


def words(section: str, values: dict) -> list[object]:
    """The options of the command that set these fields."""
    method, found = {"cache": "token-cache", "merge": "token-merge", "output": "output-cache"}[section], []
    for parameter, fields in options.KNOBS.items():
        if method in fields and (name := fields[method].name) in values:
            value, flag = values[name], parameter.replace("_", "-")
            if isinstance(value, bool):
                found.append(f"--{flag}" if value else f"--no-{flag}")
            elif isinstance(value, list):
                found += [f"--{flag}", *(value if section == "merge" else [",".join(map(str, value))])]
            else:
                found += [f"--{flag}", value]
    return ["--method", method, *found]


def test_every_setting_is_an_option():
    """But for those that the pipeline or another option takes the place of."""
    left = {"cache": {"steps"}, "merge": set(), "output": {"interval", "tolerance", "when"}}
    for section, config in methods.SECTIONS.items():
        tried = {name for of, values in OPTIONS if of == section for name in values}
        assert {field.name for field in dataclasses.fields(config)} - tried == left[section]


@pytest.mark.parametrize("section, values", OPTIONS)
def test_every_setting_can_be_given(make, tmp_path, flux_path, pixart_path, section, values):
    given = words(section, values)
    result = make("red", *given, pipeline=pixart_path if section == "merge" else flux_path)
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "out/red-seed0.json").read_text())
    assert record["method"] == given[1] and record[section].items() >= values.items()
    assert json.loads(Image.open(tmp_path / "out/red-seed0.png").text[section]) == record[section]


def test_output_cache(make, tmp_path, pixart_path):
    steps = ("--steps", 8)
    given = (*OUTPUT, "--full-steps", "0,1,4", "--order", 1, "--damping", 0.5)
    result = make("red", *steps, *given, "--compare", pipeline=pixart_path)
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "out/red-seed0.json").read_text())
    assert record["method"] == "output-cache" and record["cache"] is None and record["merge"] is None
    assert (record["output"]["full_steps"], record["output"]["order"], record["output"]["damping"]) == ([0, 1, 4], 1, 0.5)
    assert (record["work"]["full_steps"], record["work"]["partial_steps"]) == (3, 5)
    assert "cached" in result.stdout
    record = OutputCacheConfig.from_dict(record["output"])
    direct = dit_accel.apply(load(str(pixart_path)), record)
    arguments = dict(height=64, width=48, num_inference_steps=8, max_sequence_length=8, use_resolution_binning=False)
    image = direct("red", generator=torch.Generator().manual_seed(0), clean_caption=False, **arguments).images[0]
    assert np.array_equal(pixels(tmp_path / "out/red-seed0.png"), np.asarray(image))


def test_output_cache_by_error_and_by_a_rule_from_a_file(make, tmp_path):
    assert make("red", "--steps", 6, *OUTPUT, "--tolerance", 1000, "--interval", 4).exit_code == 0
    record = json.loads((tmp_path / "out/red-seed0.json").read_text())
    assert record["output"]["tolerance"] == 1000 and record["work"]["partial_steps"] >= 3
    file = tmp_path / "mine.py"
    file.write_text("import dit_accel\n@dit_accel.register_when('from a file')\ndef mine(progress):\n    return 2\n")
    result = make("red", "--steps", 6, *OUTPUT, "--selector-file", file, "--when", "from a file", "--guidance-steps", 2)
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "out/red-seed0-2.json").read_text())
    assert record["output"]["guidance_steps"] == 2 and record["work"]["full_steps"] == 3
    when.WHEN.pop("from a file")


def test_numbers_of_an_option():
    assert options.numbers(int, int)("2") == 2 and options.numbers(int, int)("2,") == (2,)
    assert options.numbers(int)("2") == (2,) and options.numbers(float, float)("1, 0.5") == (1.0, 0.5)
    assert repr(options.numbers(float, int)("2")) == "2" and options.numbers(float, int)("0,0.5") == (0.0, 0.5)


def test_families(run):
    from dit_accel.families import table

    result = run("families")
    assert result.exit_code == 0
    rows = {cells[1]: cells for line in result.stdout.splitlines() if len(cells := [c.strip() for c in line.split("│")[1:-1]]) == 7}
    assert set(table.FAMILIES) < set(rows) and "of diffusers" in rows
    for name, row in table.FAMILIES.items():
        family, _, forecast, guidance, reuse, fresh, module = rows[name]
        assert name.startswith(family) and forecast == reuse == "yes"
        assert ("one batch" in guidance) == bool(row.batched_guidance)
        assert (fresh == "yes") == (not row.stale_only) and (module == "yes") == (name in table.MODULE_SCOPE)
    assert rows["of diffusers"][4:] == ["no", "no", "no"]


def test_presets_and_selectors_from_a_file(make, tmp_path):
    assert make("red", "--preset", "taylorseer", "--interval", 2).exit_code == 0
    cache = json.loads((tmp_path / "out/red-seed0.json").read_text())["cache"]
    assert (cache["fill"], cache["forecast_order"], cache["interval"]) == ("forecast", 2, 2)
    file, name = tmp_path / "mine.py", "from a file"
    file.write_text(
        f"import dit_accel\n@dit_accel.register_selector({name!r})\ndef mine(context):\n    return context.tokens.norm(dim=-1)\n"
    )
    result = make("red", "--selector-file", file, "--selector", name)
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "out/red-seed0-2.json").read_text())["cache"]["selector"] == name


def test_a_picture_is_made_again_from_its_settings(make, run, tmp_path, pixart_path):
    """All of them from the PNG or the JSON file, each changed by an option that is given as well."""
    out = tmp_path / "out"
    methods = (
        ("--interval", 2, "--cache-ratio", 0.5, "--fill", "forecast", "--no-share-guidance-selection", "--seed", 3),
        (*OUTPUT, "--full-steps", "0,2", "--damping", 0.5),
        ("--method", "token-cache+token-merge", "--merge-stride", 2, 1, "--rematch-every", 3, 2, "--merge-keys-only"),
    )
    for given, suffix in zip(methods, (".png", ".json", ".png"), strict=True):
        result = make("3 red", "--guidance", 2, *given, "--json", pipeline=pixart_path)
        assert result.exit_code == 0, result.stderr
        first = json.loads(result.stdout)
        path = Path(first.pop("picture"))
        again = run("generate", "--config", path.with_suffix(suffix), "--output", out, "--json")
        assert again.exit_code == 0, again.stderr
        second = json.loads(again.stdout)
        assert np.array_equal(pixels(path), pixels(second.pop("picture")))
        measured = {"seconds", "denoising_seconds", "saved_seconds_estimate"}
        assert {k: v for k, v in first.items() if k not in measured} == {k: v for k, v in second.items() if k not in measured}
    other = run("generate", "--config", path, "--output", out, "--json", "blue", "--seed", 5, "--method", "none")
    record = json.loads(other.stdout)
    assert (record["prompt"], record["seed"], record["method"], record["merge"]) == ("blue", 5, "none", None)
    changed = first | {"cache": {"intervall": 3}}
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    result = run("generate", "--config", tmp_path / "changed.json")
    assert result.exit_code == 2 and "changed.json cannot be made again" in " ".join(result.stderr.split())


def test_a_line_about_every_picture(make, tmp_path):
    result = make("red", "blue", "--interval", 2)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("Warning")]
    for line, name in zip(lines, ("red", "blue"), strict=True):
        path = re.escape(str(tmp_path / f"out/{name}-seed0.png"))
        assert re.fullmatch(path + r": [0-9.]+ s, about [0-9.]+ s (saved|lost), 1\.\d\d times fewer FLOPs, cache \d+\.\d MiB", line)
    plain = make("green", "--method", "none")
    assert re.fullmatch(r"\S+green-seed0.png: [0-9.]+ s\n", plain.stderr)


def test_prompts_from_standard_input_and_tables(run, flux_path, tmp_path):
    (tmp_path / "a.csv").write_bytes("id,prompt\r\n1,blue\r\n".encode("utf-16"))
    small = ("--pipeline", flux_path, "--height", 64, "--width", 48, "--steps", 1, "--output", tmp_path, "--json")
    for file, given, prompt in (("-", b"\xef\xbb\xbf# one\r\nred\r\n", "red"), (tmp_path / "a.csv", None, "blue")):
        result = run("generate", "--prompts-file", file, "--method", "none", *small, input=given)
        assert result.exit_code == 0 and json.loads(result.stdout)["prompt"] == prompt


def test_doubts_are_warnings(make, pixart_path):
    """Once each. The tiny FLUX has no embedding of guidance, as models have that were made for four steps."""
    warned = " ".join(make("red", "--interval", 9, "--steps", 5).stderr.split())
    assert "Warning: With 4 steps or fewer, or a model made for so few, little can be reused" in warned
    assert "Warning: --interval 9 is longer than the run of 5 steps" in warned and warned.count("Warning") == 2
    warned = " ".join(make("red", "--preset", "toca-flux", "--steps", 5, pipeline=pixart_path).stderr.split())
    assert "Warning: The preset toca-flux was published for another model than PixArt, for which there is toca-pixart." in warned
    assert warned.count("Warning") == 1
    warned = make("red", "--interval", 1).stderr
    assert re.search(r"^Warning: dit_accel saved nothing in a run of 3 steps", warned, re.M) and "UserWarning" not in warned


def test_a_method_that_the_pipeline_does_not_take_is_wrong_usage(make, tmp_path, pixart_path):
    result = make("red", "--text-tokens", "reuse", pipeline=pixart_path)
    assert result.exit_code == 2 and "leave --text-tokens at 'select'" in " ".join(result.stderr.replace("│", " ").split())
    result = make("red", "--selector", "cross-entropy")
    assert result.exit_code == 2 and "selector 'cross-entropy' needs entropy" in " ".join(result.stderr.split())
    result = make("red", "--method", "token-merge", "--merge-stride", 9, 9)
    assert result.exit_code == 2 and "cells of 9 x 9 leave 0 to merge" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["dit_accel.pipelines", "dit_accel.pipelines.cli"])
def test_letters_that_the_output_lacks_are_replaced(module):
    """As those of a file on Windows; `families` has lines of a box around words with accents nowhere, so one is put there."""
    code = f"""
import runpy, sys
from dit_accel.pipelines import catalog
catalog.CATALOG["x"] = catalog.Entry("\u7ea2\u82f9\u679c", "FluxPipeline", "", 1, 1.0, 8, 8)
sys.argv = ["dit-accel", "pipelines"]
runpy.run_module({module!r}, run_name="__main__")
"""
    env = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    assert b"???" in done.stdout and b"emoji-flux" in done.stdout


def test_lists(run):
    from dit_accel.pipelines.catalog import CATALOG

    result = run("pipelines")
    assert result.exit_code == 0 and all(name in result.stdout for name in CATALOG)
    result = run("selectors")
    assert result.exit_code == 0
    assert all(name in result.stdout and about in result.stdout for name, about in dit_accel.selectors().items())
    listed = {row["name"]: row["chooses"] for row in json.loads(run("selectors", "--json").stdout)}
    assert listed == dit_accel.selectors()


@pytest.mark.parametrize(
    ("module", "name", "words", "wanted"),
    [
        ("pipelines", "dit-accel", "", {"generate", "inspect", "selectors"}),
        ("pipelines", "dit-accel", "generate --se", {"--seed", "--selector"}),
        ("eval", "dit-accel-eval", "", {"run", "check", "report"}),
        ("eval", "dit-accel-eval", "run --timing", {"--timing-rounds"}),
    ],
)
def test_a_shell_completes_commands_and_options(module, name, words, wanted):
    """As bash asks after a tab."""
    asked = {f"_{name.replace('-', '_').upper()}_COMPLETE": "complete_bash", "COMP_WORDS": f"{name} {words}"}
    asked["COMP_CWORD"] = str(1 + words.count(" "))
    command = [sys.executable, "-m", f"dit_accel.{module}"]
    assert wanted <= set(subprocess.run(command, env=os.environ | asked, capture_output=True, text=True).stdout.split())


def test_help_and_version_do_not_wait_for_torch():
    for arguments in (["--help"], ["generate", "--help"], ["--version"], ["pipelines"]):
        code = f"""
import sys
sys.argv = ["dit-accel", *{arguments!r}]
from dit_accel.pipelines.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules and "diffusers" not in sys.modules
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.fixture
def recipes_of_the_tiny_flux(tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_ACCEL_RECIPES", str(tmp_path / "recipes"))
    (tmp_path / "recipes").mkdir()
    made = [
        {"speedup": speed, "config": {"full_steps": steps}, "measured": {"seconds": speed, "psnr": [psnr, psnr - 1, psnr + 1]}}
        for speed, steps, psnr in ((1.5, [0, 2], 30), (3, [0], 20))
    ]
    content = {"model": "tiny", "transformer": {"class": "FluxTransformer2DModel"}, "levels": [1, 2 / 3, 1 / 3], "measured": {}}
    (tmp_path / "recipes/tiny.json").write_text(json.dumps({**content, "recipes": made}))


@pytest.mark.parametrize(
    ("asked", "full", "said"),
    [
        (("--speedup", 1.2), [0, 2], "By the recipe of tiny for 1.5x: 1.50x measured, PSNR 30.0 dB (29.0 to 31.0)."),
        (("--speedup", 2), [0], "By the recipe of tiny for 3x"),
        (("--min-psnr", 25), [0, 2], "By the recipe of tiny for 1.5x"),
        (("--speedup", 3, "--steps", 6), [0, 3], "spread over 6 steps."),
    ],
)
def test_a_recipe_by_speed_or_likeness(make, tmp_path, recipes_of_the_tiny_flux, asked, full, said):
    result = make("red apple", *asked, "--compare")
    assert result.exit_code == 0 and said in result.stderr, result.stderr
    record = json.loads((tmp_path / "out/red-apple-seed0.json").read_text())
    assert record["method"] == "output-cache" and record["output"]["full_steps"] == full
    assert record["work"]["full_steps"] == len(full)
    again = make("--config", tmp_path / "out/red-apple-seed0.png", "--output", tmp_path / "again", *asked[2:])
    assert again.exit_code == 0, again.stderr
    assert np.array_equal(pixels(tmp_path / "again/red-apple-seed0.png"), pixels(tmp_path / "out/red-apple-seed0.png"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--speedup", 9), "speedup must lie between 1 and 3 for this model, not 9"),
        (("--min-psnr", 40), "No recipe has a PSNR of at least 40 dB on this model: the closest one has 29.0"),
        (("--speedup", 2, "--min-psnr", 20), "Give either --speedup or --min-psnr"),
        (("--speedup", 2, "--interval", 3), "--interval would change the recipe that --speedup asks for"),
        (("--min-psnr", 20, "--method", "token-cache"), "--method would change the recipe that --min-psnr asks for"),
    ],
)
def test_a_recipe_that_there_is_not(make, recipes_of_the_tiny_flux, asked, message):
    result = make("red apple", *asked)
    assert result.exit_code == 2 and message in result.stderr, result.stderr


def test_without_a_recipe_the_output_is_forecast_where_errors_allow(make, monkeypatch, tmp_path):
    monkeypatch.setenv("DIT_ACCEL_RECIPES", str(tmp_path / "none"))
    result = make("red apple", "--speedup", 2)
    assert result.exit_code == 0 and "No recipe is known for this pipeline" in result.stderr
    assert json.loads((tmp_path / "out/red-apple-seed0.json").read_text())["output"]["tolerance"] > 0
