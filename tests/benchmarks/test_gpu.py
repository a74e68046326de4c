"""What is measured on a card, measured on the CPU: every method once, errors and time that runs out included."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dit_accel

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # its scripts import each other by their bare names
import gpu  # noqa: E402
from gpu import KINDS, ORDER, STOCK, Method, Runner, plan, summary  # noqa: E402

TINY = {
    "flux": dict(num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6), in_channels=8)
    | dict(joint_attention_dim=24, pooled_projection_dim=12),
    "pixart": dict(num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, caption_channels=24, sample_size=16),
}
STEPS = 8


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for family, changes in TINY.items():
        monkeypatch.setitem(gpu.SIZES, family, gpu.SIZES[family] | changes)
    stock = gpu.flux_dev
    monkeypatch.setattr(gpu, "flux_dev", lambda side, text, **changes: stock(side, text, **TINY["flux"], **changes))


def measure(path: Path, *options: str) -> list[dict]:
    given = ["measure", "--device", "cpu", "--layers", "1", "--size", "128", "--text", "6", "--steps", str(STEPS)]
    result = CliRunner().invoke(gpu.app, [*given, "--seconds", "1e9", "--out", str(path), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text())["rows"]


def test_every_method_on_flux(tmp_path):
    setup, *rows = measure(path := tmp_path / "gpu.json", "--single-layers", "1")
    assert setup["what"] == "setup" and setup["changes"] == {"num_layers": 1, "num_single_layers": 1}
    assert not [row["error"] for row in rows if "error" in row]
    runs, counts = ([row for row in rows if row["what"] == what] for what in ("run", "count"))
    assert [row["method"] for row in runs] == [str(method) for method in plan([])]
    assert {row["kind"] for row in counts} == {*KINDS} - {"fewer steps"}
    for row in runs:
        steps = Method(row["kind"], row["interval"]).steps(STEPS)
        assert len(row["card_ms"]) == len(row["host_ms"]) == len(row["modes"]) == row["steps"] == steps
        assert row["finite"] and 0 < sum(row["card_ms"]) < 1e3 * row["seconds"]
    lines = {line["method"]: line for line in summary([setup, *rows])}
    assert lines["fewer steps, 4x"]["flops_ratio"] == 4 and "speedup" not in lines["stock"]
    assert all(line["flops_ratio"] > 1.05 and line["speedup"] > 0 for name, line in lines.items() if name != "stock")
    shown = CliRunner().invoke(gpu.app, ["table", str(path), "--card", "H200"], catch_exceptions=False).output
    assert "| packed 10%, reuse, interval 4" in shown and "modelled, partial" in shown and "Modelled: H200" in shown


def test_some_methods_on_pixart(tmp_path):
    rows = measure(
        tmp_path / "gpu.json", "--family", "pixart", "--methods", "forecast, interval 4", "--methods", "random 10%, interval 6"
    )
    assert not [row["error"] for row in rows if "error" in row]
    names = ["stock", "output forecast, interval 4", "token cache, random 10%, interval 6", "stock"]
    assert [row["method"] for row in rows if row["what"] == "run"] == names


def test_flops_are_those_of_the_report():
    """Of what ran, against the library's count on a weightless copy."""
    runner = Runner("flux", 128, 6, torch.float32, "cpu", num_layers=1, num_single_layers=2)
    with torch.no_grad():
        for method in [STOCK, *(Method(kind, 4) for kind in KINDS if KINDS[kind] is not None)]:
            counted = runner.counted(method)
            if method is STOCK:
                [stock] = {step["flops"] for step in counted["full"]}
                continue
            report = dit_accel.report(runner.pipe)
            expected = {mode: [] for mode in counted}
            for mode, flops in zip((call.mode.value for call in report.calls[-2:]), report.flops[-2:], strict=True):
                expected[mode].append(flops)
            assert {mode: [step["flops"] for step in steps] for mode, steps in counted.items()} == expected, method
            assert report.full_flops == stock * len(report.calls)
            dit_accel.remove(runner.pipe)


def test_what_fails_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    stock = dit_accel.apply

    def fail(pipe, config):
        if config == Method("packed 10%, reuse", 4).config:
            raise RuntimeError("no such card")
        return stock(pipe, config)

    monkeypatch.setattr(dit_accel, "apply", fail)
    rows = measure(
        tmp_path / "gpu.json", "--single-layers", "1", "--methods", "reuse, interval 4", "--methods", "forecast, interval 4"
    )
    failed = {row["method"]: row["error"] for row in rows if "error" in row}
    assert failed == {"packed 10%, reuse, interval 4": "RuntimeError: no such card"}
    lines = summary(rows)
    assert [line["method"] for line in lines if "error" in line] == [*failed] and len(lines) == 3
    assert "no such card" in str(gpu.table_of(rows).columns[1]._cells)


def test_nothing_stays_after_an_error_while_counting():
    runner = Runner("flux", 128, 6, torch.float32, "cpu", num_layers=1, num_single_layers=1)

    def fail(module, inputs):
        calls.append(module)
        if len(calls) == 2:  # the first that is counted
            raise RuntimeError("out of luck")

    calls: list = []
    handle = runner.transformer.proj_out.register_forward_pre_hook(fail)
    assert gpu.once(runner, STOCK, lambda: runner.counted(STOCK))["error"] == "RuntimeError: out of luck"
    handle.remove()
    assert not runner.transformer._forward_hooks and len(runner.counted(STOCK)["full"]) == 2


def test_nothing_is_begun_when_the_time_is_over(tmp_path):
    assert [row["what"] for row in measure(tmp_path / "gpu.json", "--single-layers", "1", "--seconds", "0")] == ["setup"]


def test_where_time_is_short_stock_and_the_counts_are_left(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RUNS", 0)
    _, *rows = measure(tmp_path / "gpu.json", "--single-layers", "1", "--methods", "forecast")
    found = [(row["what"], row["method"]) for row in rows]
    assert found == [("run", "stock"), ("count", "stock"), ("count", "output forecast, interval 4")]


def test_names_and_order():
    names = [str(method) for method in plan([])]
    assert names[0] == names[-1] == "stock" and names.count("stock") == 3 and len({*names}) == len(ORDER) + 1
    assert [str(method) for method in plan(["fewer steps, 2x"])] == ["stock", "fewer steps, 2x", "stock"]
    assert Method("fewer steps", 3).steps(28) == 9 and Method("output forecast", 3).steps(28) == 28
    assert Method("output forecast", 3).config.interval == 3 and Method("token merge 50%").config.ratio == 0.5


def test_a_method_is_compared_to_the_runs_of_stock_around_it():
    def run(kind, seconds, *modes, **more):
        common = {"what": "run", "method": kind, "kind": kind, "steps": len(modes), "peak_bytes": 0, "held_bytes": 0}
        times = {"card_ms": [1.0] * len(modes), "host_ms": [1.0] * len(modes)}
        return common | times | {"seconds": seconds, "modes": modes} | more

    def count(kind, **flops):
        steps = {mode: [{"flops": n, "kernels": n, "busy_ms": n}] for mode, n in flops.items()}
        return {"what": "count", "kind": kind, "method": kind, **steps}

    full = ["full"] * 4
    rows = [run("stock", 8.0, *full), run("a", 3.0, "full", "partial", "partial", "partial"), run("stock", 10.0, *full)]
    rows += [run("b", 5.0, "full", "full"), run("stock", 90.0, *full), count("stock", full=10), count("a", full=10, partial=2)]
    lines = {line["method"]: line for line in summary([*rows, {"what": "model", "kind": "a", "full": 9, "partial": 4}])}
    assert lines["a"]["speedup"] == 3.0 and lines["a"]["flops_ratio"] == 2.5 and lines["a"]["efficiency"] == pytest.approx(1.2)
    assert lines["b"]["speedup"] == 10.0 and "flops_ratio" not in lines["b"]
    assert lines["a"]["partial_modelled_ms"] == 4 and lines["a"]["partial_kernels"] == 2
