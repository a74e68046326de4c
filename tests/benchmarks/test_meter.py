"""The meter of the benchmarks against torch's counter, the report, and allocations counted by hand."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import dit_accel
from dit_accel import TokenCacheConfig
from dit_accel.store import on_meta
from dit_accel.when import Mode

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # its scripts import each other by their bare names
from meter import Meter  # noqa: E402

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
KILO = 1024  # bytes of a float32 tensor of 256


def arguments(family: str, pipe) -> dict:
    """Inputs of the tiny transformer, a picture of 48 tokens."""
    if family == "pixart":
        return dict(
            hidden_states=torch.randn(2, 8, 16, 12),
            encoder_hidden_states=torch.randn(2, 8, 32),
            encoder_attention_mask=torch.ones(2, 8),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(6.0))
    return dict(
        hidden_states=torch.randn(2, 48, 32),
        encoder_hidden_states=torch.randn(2, 8, 32),
        pooled_projections=torch.randn(2, 32),
        img_ids=ids,
        txt_ids=torch.zeros(8, 3),
    )


def timestep(family: str, step: int) -> torch.Tensor:
    return torch.full((2,), 1 - step / 10 if family == "flux" else 900.0 - 100 * step)


@pytest.fixture(params=["flux", "pixart"])
def family(request) -> str:
    return request.param


@pytest.fixture
def pipe(family, tiny_flux, tiny_pixart):
    return tiny_flux() if family == "flux" else tiny_pixart()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_flops_of_a_transformer_are_those_on_the_meta_device(family, pipe, mode, dtype):
    model, given = pipe.transformer, arguments(family, pipe) | {"timestep": timestep(family, 0)}
    with torch.device("meta"):
        copy = type(model).from_config(model.config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy(**on_meta(given))
    model.to(dtype)
    cast = {n: v.to(dtype) if isinstance(v, torch.Tensor) and not n.endswith("_ids") else v for n, v in given.items()}
    with MODES[mode](), Meter() as meter:
        model(**cast)
    assert meter.flops == counter.get_total_flops() > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("selector", ["random", "similarity", "attention"])
def test_flops_of_a_cached_run_are_those_reported(family, pipe, selector, mode):
    model = dit_accel.apply(pipe.transformer, TokenCacheConfig(interval=3, cache_ratio=0.7, selector=selector))
    given, counts = arguments(family, pipe), []
    for step in range(4):
        with MODES[mode](), Meter() as meter:
            model(**given, timestep=timestep(family, step))
        counts.append(meter.flops)
    report = dit_accel.report(model)
    assert [call.mode for call in report.calls] == [Mode.FULL, Mode.PARTIAL, Mode.PARTIAL, Mode.FULL]
    assert tuple(counts) == report.flops and counts[1] < counts[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "work, flops",
    [
        (lambda a: F.linear(a, torch.ones(5, 8), torch.ones(5)), 2 * 12 * 8 * 5),
        (lambda a: F.linear(a.transpose(1, 2), torch.ones(5, 4)), 2 * 24 * 4 * 5),
        (lambda a: torch.einsum("bik,bjk->bij", a, a), 2 * 3 * 4 * 8 * 4),
        (lambda a: torch.baddbmm(torch.ones(1), a, a.transpose(1, 2)), 2 * 3 * 4 * 8 * 4),
        (lambda a: a @ a[0].T, 2 * 12 * 8 * 4),
        (lambda a: a @ a[0, 0], 2 * 12 * 8),
        (lambda a: F.conv2d(a[None], torch.ones(5, 3, 2, 2)), 2 * 3 * 7 * 5 * 3 * 4),
        (lambda a: F.scaled_dot_product_attention(a[None], a[None], a[None]), 2 * 3 * 4 * 4 * 16),
        (lambda a: F.scaled_dot_product_attention(a[None], a[None, :, :2], a[None, :, :2]), 2 * 3 * 4 * 2 * 16),
        (lambda a: F.scaled_dot_product_attention(a[None], a[None], a[None], torch.ones(4, 4) > 0), 2 * 3 * 4 * 4 * 16),
        (lambda a: (a * a).sum().exp(), 0),
    ],
    ids=["linear", "transposed", "einsum", "baddbmm", "matmul", "vector", "convolution", "sdpa", "cross", "masked", "none"],
)
def test_flops_by_formula(work, flops, mode):
    """Of a [3, 4, 8]."""
    a = torch.ones(3, 4, 8)
    with MODES[mode](), Meter() as meter:
        work(a)
    assert meter.flops == flops


def chain(x):
    for _ in range(5):
        x = x + 1  # the one before is still there while the next is made
    return x


def deleted(x):
    a = x + 1
    del a
    b, c = x + 1, x + 2
    del b
    return c


def in_place(x):
    y = x.clone()
    y.add_(1).mul_(2)
    y[:7].fill_(3)
    torch.add(x, 1, out=y)
    return y


def joined(x):
    halves = (x + 1).split(128)  # one storage
    return torch.cat([*halves, x])


def returned_in_a_list(x):
    return torch._foreach_add([x, x], 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "work, peak, live",
    [
        (chain, 2, 1),
        (deleted, 2, 1),
        (in_place, 1, 1),
        (joined, 3, 2),
        (returned_in_a_list, 2, 2),
        (lambda x: x.view(16, 16).T[2:].expand(3, 14, 16).flatten()[1:], 2.625, 2.625),  # a view keeps all of its storage
        (lambda x: x.view(16, 16).t()[None].unbind(), 0, 0),
        (lambda x: (x + 1).view(16, 16)[0, :1].detach(), 1, 1),
        (lambda x: x.max(dim=0), 0.00390625 * 3, 0.00390625 * 3),  # a float and an index of 8 bytes
        (lambda x: torch.tensor([1.0] * 256), 1, 1),
        (lambda x: torch.empty(256).uniform_(), 1, 1),
        (lambda x: x.to(torch.float32).contiguous(), 0, 0),
        (lambda x: x.to(torch.bfloat16), 0.5, 0.5),
        (lambda x: x.view(16, 16) @ x.view(16, 16), 1, 1),
    ],
)
def test_bytes_by_hand(work, peak, live, mode):
    """In tensors of 1 KiB; x was there before and costs nothing."""
    with MODES[mode]():
        x = torch.ones(256)
        with Meter() as meter:
            kept = work(x)
    assert (meter.peak_bytes / KILO, meter.live_bytes / KILO) == (peak, live)
    del kept
    assert meter.live_bytes == 0 and meter.peak_bytes / KILO == peak


def test_a_cycle_is_alive_until_it_is_collected():
    gc.disable()
    try:
        with Meter() as meter:
            cycle = [torch.ones(256)]
            cycle.append(cycle)
            del cycle
            assert meter.live_bytes == KILO
            gc.collect()
            assert meter.live_bytes == 0
            torch.ones(256)
    finally:
        gc.enable()
    assert meter.peak_bytes == KILO


def test_what_was_there_before_does_not_count():
    linear, x = torch.nn.Linear(16, 16, bias=False), torch.ones(4, 16)
    with torch.no_grad():
        before = linear(x)
        with Meter() as meter:
            views = (
                before.view(2, 32),
                before[1:],
                torch.ops.aten._unsafe_view(before, [64]),
                before.unsafe_split(2),
                before.add_(1),
            )
            assert meter.live_bytes == meter.peak_bytes == 0
            after = linear(x)
    assert meter.peak_bytes == meter.live_bytes == after.untyped_storage().nbytes()
    assert len(views) == 5


def test_a_storage_that_an_operation_returns_twice_counts_once():
    library = torch.library.Library("meter_test", "FRAGMENT")
    library.define("twice(Tensor x) -> (Tensor, Tensor)")
    library.impl("twice", lambda x: ((y := x.clone()), y[1:]), "CPU")
    with torch.no_grad(), Meter() as meter:
        kept = torch.ops.meter_test.twice(torch.empty(256))
        assert meter.live_bytes == KILO and meter.peak_bytes == 2 * KILO
    del kept
    assert meter.live_bytes == 0
    library._destroy()


def test_storages_that_only_autograd_keeps_are_alive():
    x = torch.ones(256, requires_grad=True)
    with Meter() as meter:
        y = x.exp().exp().sum()
    assert meter.live_bytes == 2 * KILO + 4  # both factors of the gradient, and the sum
    del y
    assert meter.live_bytes == 0


def test_the_meter_changes_no_number(family, pipe):
    given = arguments(family, pipe) | {"timestep": timestep(family, 0), "return_dict": False}
    with torch.inference_mode():
        expected = pipe.transformer(**given)[0]
        with Meter():
            assert torch.equal(pipe.transformer(**given)[0], expected)
