"""The modelled GPU against formulas: FLOPs, matrix products and bytes of a FLUX of which every number is known."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from dit_accel import OutputCacheConfig, TokenCacheConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # its scripts import each other by their bare names
import gpu_model  # noqa: E402
from gpu_model import CARDS, Operation, Step, card_of, counting, flux_dev, methods, row, size, steps_of  # noqa: E402

SIDE, TEXT, HEADS, WIDTH, DOUBLE, SINGLE = 4, 6, 2, 16, 2, 3
HIDDEN, IMAGE = HEADS * WIDTH, SIDE * SIDE
TINY = dict(
    num_layers=DOUBLE, num_single_layers=SINGLE, num_attention_heads=HEADS, attention_head_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    in_channels=8, joint_attention_dim=24, pooled_projection_dim=12,
)  # fmt: skip


@pytest.fixture
def tiny():
    return flux_dev(SIDE, TEXT, **TINY)


def products(image: int, text: int, double: int, single: int, hidden: int, inputs: int, caption: int, pooled: int):
    """(rows, inputs, outputs) of every matrix product of a stock step, attention's left out."""
    found = [(1, 256, hidden), (1, hidden, hidden)] * 2 + [(1, pooled, hidden), (1, hidden, hidden)]  # time, guidance, caption
    found += [(image, inputs, hidden), (text, caption, hidden)]
    for tokens in (image, text):
        block = [(1, hidden, 6 * hidden), *4 * [(tokens, hidden, hidden)]]  # modulation; queries, keys, values, output
        found += double * [*block, (tokens, hidden, 4 * hidden), (tokens, 4 * hidden, hidden)]
    both = image + text
    found += single * [
        (1, hidden, 3 * hidden),
        *3 * [(both, hidden, hidden)],
        (both, hidden, 4 * hidden),
        (both, 5 * hidden, hidden),
    ]
    return [*found, (1, hidden, 2 * hidden), (image, hidden, inputs)]


def flops(image: int, text: int, double: int, single: int, hidden: int, **rest: int) -> int:
    matrices = sum(2 * n * k * m for n, k, m in products(image, text, double, single, hidden, **rest))
    return matrices + (double + single) * 4 * (image + text) ** 2 * hidden


def test_a_stock_step_equals_the_formula(tiny):
    [step] = steps_of(*tiny, None, calls=1)
    shapes = dict(inputs=8, caption=24, pooled=12)
    assert step.total("flops") == flops(IMAGE, TEXT, DOUBLE, SINGLE, HIDDEN, **shapes)
    names = [operation.name for operation in step.operations]
    assert names.count("addmm") == len(products(IMAGE, TEXT, DOUBLE, SINGLE, HIDDEN, **shapes))
    assert names.count("scaled_dot_product_attention") == DOUBLE + SINGLE
    assert names.count("rms_norm") == 4 * DOUBLE + 2 * SINGLE
    assert not step.reads and not step.sent and not {"view", "transpose", "expand", "empty"} & {*names}


def test_flux_dev_is_flux_dev():
    """19 double and 38 single blocks, 24 heads of 128, 4,096 image and 512 text tokens: 74.4 TFLOP and 11.9 billion weights."""
    model, given = flux_dev(64)
    assert (model.config.num_layers, model.config.num_single_layers, given["hidden_states"].shape[1]) == (19, 38, 4096)
    assert 11.85e9 < sum(parameter.numel() for parameter in model.parameters()) < 11.95e9
    assert 74.3e12 < flops(4096, 512, 19, 38, 3072, inputs=64, caption=4096, pooled=768) < 74.5e12
    assert {value.dtype for value in (*given.values(), *model.parameters())} == {torch.bfloat16}


def test_partial_steps_of_every_method(tiny):
    """Fewer kernels, FLOPs and bytes than stock, and nothing read; full steps are stock and what is remembered."""
    [stock] = steps_of(*tiny, None, calls=1)
    found = {name: steps_of(*tiny, config)[-2:] for name, config in methods(0.25).items()}
    assert len(found) == 7
    for name, (full, partial) in found.items():
        assert full.total("kernels") >= stock.total("kernels") and full.total("flops") >= stock.total("flops"), name
        assert partial.total("flops") < stock.total("flops") and partial.total("bytes") < full.total("bytes"), name
        assert not partial.reads and partial.sent <= 1, name
    packed, fresh, forecast = (found[name][1] for name in ("packed 25%, reuse", "packed 25%, fresh", "output forecast"))
    kept = products(IMAGE // 4, 0, DOUBLE, SINGLE, HIDDEN, inputs=8, caption=24, pooled=12)
    kept = [(n, k, m) for n, k, m in kept if n != IMAGE // 4 or (k, m) not in ((HIDDEN, HIDDEN), (8, HIDDEN), (HIDDEN, 8))]
    whole = [(IMAGE, 8, HIDDEN), (TEXT, 24, HIDDEN), (IMAGE, HIDDEN, 8)]  # what is around the blocks sees all tokens
    kept = [product for product in kept if product[0] and product != (1, HIDDEN, 6 * HIDDEN)] + DOUBLE * [(1, HIDDEN, 6 * HIDDEN)]
    assert packed.total("flops") == sum(2 * n * k * m for n, k, m in kept + whole)
    assert fresh.total("flops") > packed.total("flops") and forecast.total("flops") == 0 and forecast.total("kernels") <= 6


def test_bytes_and_kernels_of_single_operations():
    kilo = torch.empty(256, device="meta")
    table, rows, index = (
        torch.empty(100, 64, device="meta"),
        torch.empty(10, 64, device="meta"),
        torch.empty(10, device="meta").long(),
    )
    cases = [
        (lambda: kilo + kilo, 1, 3072),
        (lambda: kilo.add_(1), 1, 2048),
        (lambda: kilo.copy_(kilo.clone()), 2, 4096),
        (lambda: kilo.new_zeros(()).expand(100, 100), 1, 4),
        (lambda: kilo.expand(8, 256) + 1, 1, 1024 + 8192),
        (lambda: kilo.view(16, 16).t()[1:], 0, 0),
        (lambda: kilo[:0] + kilo[:0], 0, 0),
        (lambda: table.index_select(0, index), 1, 2 * 2560),
        (lambda: table.index_copy_(0, index, rows), 1, 2 * 2560),
        (lambda: kilo.topk(8), 4, 1024 + 32 + 64),
        (lambda: torch.ones(256) + 1, 0, 0),
        (lambda: torch.nn.functional.rms_norm(table, (64,)), 1, 2 * 25600),
    ]
    for number, (work, kernels, moved) in enumerate(cases):
        with counting(step := Step()):
            work()
        assert (step.total("kernels"), step.total("bytes")) == (kernels, moved), number
    assert size(kilo.expand(4, 256)) == 1024


def test_reads_and_copies_are_seen():
    values = torch.empty(4, device="meta")
    for work, reads, sent in (
        (lambda: values.sum().item(), 1, 0),
        (lambda: torch.equal(values, values.clone()), 1, 0),
        (lambda: float(values[0]) + int(values[1]), 2, 0),
        (lambda: torch.ones(4).to("meta"), 0, 1),
        (lambda: values * 2, 0, 0),
    ):
        with counting(step := Step()):
            work()
        assert (step.reads, step.sent) == (reads, sent)


def test_time_and_speedup():
    """An operation takes the longest of its arithmetic, its traffic and its launch; N steps have one that is full."""
    card = (1e12, 1e9)
    assert Operation("arithmetic", 1, 6 * 10**11, 1).seconds(*card) == pytest.approx(1.0)
    assert Operation("traffic", 1, 1, 85 * 10**7).seconds(*card) == pytest.approx(1.0)
    assert Operation("launch", 4, 1, 1).seconds(*card) == pytest.approx(1e-5)
    stock, full, partial = (Step([Operation("", 1, ms * 6 * 10**8, 0)]) for ms in (100, 110, 10))
    found = row("one", stock, full, partial, {"card": card})
    assert found["full"]["milliseconds"]["card"] == pytest.approx(110)
    assert found["speedup"]["card"] == {"4": pytest.approx(400 / 140), "6": pytest.approx(600 / 160)}


def test_command(tmp_path, monkeypatch):
    app, runner = typer.Typer(), CliRunner()
    app.command()(gpu_model.main)
    monkeypatch.setattr(gpu_model, "flux_dev", lambda side, text: flux_dev(side, text, **TINY))
    given = ["--pixels", "64", "--text", "6", "--ratio", "0.25", "--output", str(path := tmp_path / "model.json")]
    result = runner.invoke(app, [*given, "--only", "packed", "--card", "mine=1e12,1e9"], catch_exceptions=False)
    rows = json.loads(path.read_text())["rows"]
    assert result.exit_code == 0 and "packed 25%, reuse" in result.output and "not measured" in result.output
    assert [found["method"] for found in rows] == ["packed 25%, reuse", "packed 25%, fresh"]
    assert all(list(found["speedup"]["mine"]) == ["4", "6"] for found in rows)
    for wrong, words in ((["--pixels", "100"], "96 would do"), (["--card", "abacus"], "H100"), (["--card", "a=1"], "L40S=")):
        refused = runner.invoke(app, [*given, *wrong])
        assert refused.exit_code == 2 and words in " ".join(refused.output.replace("│", " ").split())
    assert "no GPU is needed" in " ".join(runner.invoke(app, ["--help"]).output.split())


def test_cards():
    assert card_of("H100") == ("H100", CARDS["H100"]) and card_of("L40S=362e12,864e9") == ("L40S", (362e12, 864e9))


def test_methods_are_those_that_the_docs_show():
    """Full and partial steps take turns, so that the last two calls are one of each."""
    configs = methods(0.1)
    assert all(config.interval == 2 for config in configs.values())
    assert [type(config) for config in configs.values()] == 4 * [TokenCacheConfig] + 3 * [OutputCacheConfig]
