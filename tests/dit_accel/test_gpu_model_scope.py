"""What a GPU asks of model scope: partial steps that read nothing from it, few kernels, memory that stays in its place, graphs.

There is no GPU here. What is dispatched on a CPU is what would be launched on one; copies between host and device are seen where
the meta device stands for it, from which nothing can be read at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers as D
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dit_accel
from dit_accel import OutputCacheConfig, TokenCacheConfig, chunks, clock, importance, which
from dit_accel.apply import applied_to
from dit_accel.families.table import lookup
from dit_accel.packed import Packed
from dit_accel.steps import Memory
from dit_accel.tokens import Selection
from tests.dit_accel import tiny
from tests.dit_accel.tiny_pipelines import pipelines

PIPELINES = dict(pipelines())
READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
NO_WORK = {"_unsafe_view", "_reshape_alias", "detach", "lift_fresh", "set_"}
STEPS = 10
CONFIGS = {
    "forecast": dict(interval=3),
    "guidance": dict(interval=3, guidance_steps=2),
    "packed, attention reused": dict(interval=3, compute_ratio=0.3),
    "packed, fresh attention": dict(interval=3, compute_ratio=0.3, attention="fresh"),
    "packed, drift": dict(interval=3, compute_ratio=0.3, selector="drift"),
    "packed, attention seen": dict(interval=3, compute_ratio=0.3, selector="attention"),
}
CASES = [
    *(("forecast", name) for name in ("flux", "flux-true-guidance", "pixart", "qwen", "wan", "cogvideox", "z-image")),
    *(("guidance", name) for name in ("flux-true-guidance", "qwen", "wan", "pixart", "sd3", "ltx")),
    *(
        (f"packed, {how}", name)
        for how in ("attention reused", "fresh attention", "drift", "attention seen")
        for name in ("flux", "pixart", "sd3", "wan")
    ),
]


@dataclass
class Dispatched:
    """What was dispatched: names of kernels, of reads, and copies between devices with the shapes that were copied."""

    kernels: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    copies: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    def __init__(self, into: Dispatched) -> None:
        super().__init__()
        self.into = into

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func._schema.name.split("::")[1], tree_leaves((args, kwargs))
        if name in READS or (name == "index" and any(i is not None and i.dtype is torch.bool for i in args[1])):
            self.into.reads.append(name)
        output = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.numel()]
        view = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        if made and not view and name not in (*NO_WORK, *READS) and not name.startswith(("empty", "new_empty")):
            self.into.kernels.append(name)
        tensors = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
        if name in ("_to_copy", "copy_") and len({leaf.device.type for leaf in [*tensors, *made]}) > 1:
            self.into.copies.append((name, tuple(made[0].shape)))
        return output


@contextlib.contextmanager
def recorded(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Dispatched]]:
    """Everything that calls of the model dispatch, a list of calls; the time counts as lying on a device."""
    calls: list[Dispatched] = []
    modes: list[Recorder] = []

    def begin(*_: Any) -> None:
        calls.append(Dispatched())
        modes.append(Recorder(calls[-1]))
        modes[-1].__enter__()

    def end(*_: Any) -> None:
        modes.pop().__exit__(None, None, None)

    def noted(name: str) -> Any:
        stock = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if modes:
                calls[-1].reads.append(name)
            return stock(tensor, *args, **kwargs)

        return read

    handles = [model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True)]
    with monkeypatch.context() as patch:
        patch.setattr(clock, "_on_device", lambda timestep: isinstance(timestep, torch.Tensor))
        for name in ("tolist", "numpy", "cpu"):  # of which a CPU dispatches nothing
            patch.setattr(torch.Tensor, name, noted(name))
        yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind, name", CASES)
def test_a_partial_step_reads_nothing_from_the_device(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does a call of the unconditional branch that is left out. That reads are seen shows the first call of a run."""
    build, call = PIPELINES[name]
    pipe = build()
    with recorded(pipe.transformer, monkeypatch) as stock:
        call(pipe, steps=1)
    own = {read for calls in stock for read in calls.reads}
    dit_accel.apply(pipe, OutputCacheConfig(**CONFIGS[kind]))
    with recorded(pipe.transformer, monkeypatch) as calls:
        call(pipe, steps=STEPS)
    records = dit_accel.report(pipe).calls
    assert len(calls) == len(records) and set(calls[0].reads) - own
    saving = [(record, made) for record, made in zip(records, calls, strict=True) if record.saves]
    assert len(saving) >= STEPS // 2
    for record, made in saving:
        assert set(made.reads) <= (own if record.rows else set()), record
    assert not any(read for record, made in saving if record.branch == 0 for read in made.reads if read not in own)


@dataclass(eq=False)
class Pipeline:
    transformer: Any
    scheduler: Any


@pytest.mark.parametrize(
    "kind, sent",
    [
        ("forecast", []),
        ("packed, attention reused", [("index",)]),
        ("packed, fresh attention", [("index",)]),
        ("packed, drift", [("noise",)]),
    ],
)
@torch.no_grad()
def test_a_partial_step_sends_to_the_device_no_more_than_its_selection(kind: str, sent: Any, monkeypatch: Any) -> None:
    """And nothing comes back: the device is meta here, where reading raises."""
    model, inputs = tiny.transformer("flux")
    scheduler = D.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    dit_accel.apply(Pipeline(model, scheduler), config := OutputCacheConfig(**CONFIGS[kind]))
    model.to("meta")
    given, found = {name: value.to("meta") for name, value in inputs(0.5).items()}, []
    for time in scheduler.timesteps[:6]:
        with Recorder(made := Dispatched()):
            model(**given, return_dict=False)
        found.append(made)
        scheduler.step(torch.zeros(1), time, torch.zeros(1))
    records = dit_accel.report(model).calls
    assert "".join(record.mode.value[0] for record in records) == "fppfpp"
    shapes = {"index": (round(config.compute_ratio * tiny.N),), "noise": (1, tiny.N)}
    for record, made in zip(records, found, strict=True):
        if record.saves:
            assert made.copies == [("_to_copy", shapes[what]) for (what,) in sent] and not made.reads


# ---------------------------------------------------------------- kernels
def flux(double: int, single: int) -> Any:
    return D.FluxTransformer2DModel(
        **{**tiny.FLUX, "num_layers": double, "num_single_layers": single}, **tiny.ROPE, pooled_projection_dim=32
    )


def kernels(model: Any, inputs: Any, config: OutputCacheConfig | TokenCacheConfig, partial: bool = True) -> int:
    """Of a partial step on which two full steps lie behind, or of the first full step."""
    tiny.finished(model)
    scheduler, text = D.FlowMatchEulerDiscreteScheduler(), inputs(0.5)["encoder_hidden_states"]
    scheduler.set_timesteps(STEPS)
    dit_accel.apply(Pipeline(model, scheduler), config)
    for time in scheduler.timesteps[: 5 if partial else 1]:
        given = {**inputs(float(time) / 1000), "encoder_hidden_states": text}
        with Recorder(made := Dispatched()), torch.no_grad():
            model(**given, return_dict=False)
        scheduler.step(torch.zeros(1), time, torch.zeros(1))
    assert dit_accel.report(model).calls[-1].saves is partial
    return len(made.kernels)


@pytest.mark.parametrize(
    "kind, double, single, most", [("packed, attention reused", 19, 14, 50), ("packed, fresh attention", 86, 43, 120)]
)
def test_kernels_of_a_packed_step_of_flux(kind: str, double: int, single: int, most: int) -> None:
    """By block, and around the blocks; the 19 double and 38 single blocks of FLUX.1-dev make it about a thousand."""
    inputs, config = tiny.TRANSFORMERS["flux"]()[1], OutputCacheConfig(**CONFIGS[kind])
    base = kernels(flux(1, 1), inputs, config)
    doubles, singles = kernels(flux(2, 1), inputs, config) - base, kernels(flux(1, 2), inputs, config) - base
    assert doubles <= double and singles <= single, (doubles, singles)
    assert base - doubles - singles <= most, base - doubles - singles


def test_a_forecast_takes_three_kernels() -> None:
    """Of the two outputs that it is made of; narrower types than float32 have casts as well."""
    model, inputs = tiny.TRANSFORMERS["flux"]()
    assert kernels(model, inputs, OutputCacheConfig(interval=3)) <= 3


def test_kernels_of_a_full_step_whose_attention_is_looked_at() -> None:
    """By block, beside those of a full step without: sample the queries, and sum up the columns of the map."""

    inputs = tiny.TRANSFORMERS["flux"]()[1]

    def by_block(selector: str) -> int:
        config = TokenCacheConfig(interval=5, selector=selector)
        return kernels(flux(1, 2), inputs, config, partial=False) - kernels(flux(1, 1), inputs, config, partial=False)

    assert by_block("attention") <= by_block("random") + 24


def test_what_is_large_comes_in_few_pieces_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as in the small pieces of a CPU, in fewer kernels."""
    query, key = tiny.random(1, 600, 2, 8), tiny.random(1, 700, 2, 8)  # asked 64 at a time on a CPU
    tokens, last = tiny.random(1, 2100, 8), tiny.random(1, 2100, 8, seed=1)
    noise, ages = torch.rand(1, 2100), torch.zeros(1, 2100)

    def score(name: str) -> torch.Tensor:
        where = type("Where", (), dict(layer=0, stream="image", step=1))
        context = which.SelectionContext(tokens, ages, noise, 1800, (42, 50), 0, where, observed={"last_tokens": last})
        return which.get(name).score(context)

    work = {
        "attention": lambda: importance.attention_received(query, key),
        "entropy": lambda: importance.attention_entropy(query, key, None, False),
        "drift": lambda: score("drift"),
        "similarity": lambda: score("similarity"),
    }
    for name, compute in work.items():
        found, counts = [], []
        for small in (("cpu",), ()):
            monkeypatch.setattr(chunks, "SMALL", small)
            with Recorder(made := Dispatched()):
                found.append(compute())
            counts.append(len(made.kernels))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
        assert counts[1] < (0.8 if name == "similarity" else 0.5) * counts[0], (name, counts)


# ---------------------------------------------------------------- what is remembered
def addresses(pipe: Any) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Where what every branch remembers lies, and a copy of it."""
    where: dict[Any, Any] = {}
    what: dict[Any, Any] = {}
    for number, branch in applied_to(pipe).branches.items():
        kept = {"outputs": branch.outputs, "differences": branch.differences, "rows": branch.tokens.outputs}
        kept |= {key: value for key, value in branch.tokens.features.items() if key[0] != -1}  # but positions, always the same
        for key, values in kept.items():
            leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.numel()]
            where[number, key] = sorted(leaf.data_ptr() for leaf in leaves)
            what[number, key] = [leaf.clone() for leaf in leaves]
    return where, what


@pytest.mark.parametrize("kind, name", [case for case in CASES if case[1] in ("flux", "flux-true-guidance", "pixart", "wan")])
def test_what_is_remembered_stays_in_its_place_from_the_second_interval_on(kind: str, name: str) -> None:
    build, call = PIPELINES[name]
    pipe, seen = build(), []
    dit_accel.apply(pipe, OutputCacheConfig(**{**CONFIGS[kind], "guidance_steps": CONFIGS[kind].get("guidance_steps") and 1}))
    pipe.transformer.register_forward_hook(lambda *_: seen.append(addresses(pipe)))
    call(pipe, steps=STEPS)
    branches = 1 + max(record.branch for record in dit_accel.report(pipe).calls)
    places, values = zip(*seen[4 * branches : (STEPS - 1) * branches], strict=True)  # after the second full step, before the last
    assert any(places[0].values()) and all(place == places[0] for place in places)
    changed = {key for key, leaves in values[0].items() if not all(map(torch.equal, leaves, values[-1][key]))}
    assert changed == {key for key, leaves in values[0].items() if leaves}, "and is written to"


# ---------------------------------------------------------------- selections
def test_a_selector_sees_the_tokens_of_the_picture() -> None:
    """Z-Image has its text behind them: with the same input again, nothing has drifted."""
    for name in ("z_image", "lumina2", "flux"):
        model, inputs = tiny.transformer(name)
        family = lookup(model)
        packed, memory, seen = Packed(model, family), Memory(), []
        packed.attach()

        @dit_accel.register_selector(f"listening to {name}", needs={"last_tokens"})
        def listening(context: Any) -> torch.Tensor:
            seen.append((context.tokens.clone(), context.last_tokens.clone()))
            return context.noise.expand(len(context.tokens), -1)

        with packed.full(memory, tiny.N, 0.7):
            tiny.output(model, inputs(0.7))
        config = OutputCacheConfig(compute_ratio=0.25, selector=f"listening to {name}")
        selection = Selection(config, tiny.N, tiny.N // 4, (tiny.SIDE, tiny.SIDE), memory)
        with packed.partial(memory, selection.at(1), [1.0]):
            tiny.output(model, inputs(0.7))
        assert len(seen) == 1 and torch.equal(*seen[0])


def test_random_tokens_are_those_of_the_seed_whatever_the_step_before() -> None:
    memory = Memory(tiny.N, features={"entered": (torch.zeros(2, tiny.N, 4),)})
    for seed, step in ((0, 1), (7, 3)):
        config = OutputCacheConfig(compute_ratio=0.25, seed=seed)
        index = Selection(config, tiny.N, 16, (tiny.SIDE, tiny.SIDE), memory).at(step)
        noise = torch.rand(1, tiny.N, generator=torch.Generator().manual_seed(100_003 * seed + step))[0].tolist()
        assert index.tolist() == sorted(sorted(range(tiny.N), key=lambda token: -noise[token])[:16])


# ---------------------------------------------------------------- graphs
@pytest.mark.parametrize(
    "kind, name, graphs",
    [
        ("forecast", "pixart", 3),  # full steps, a forecast of one output, of two
        ("guidance", "pixart", 4),  # full steps of both halves, and of one; the same forecasts
        ("guidance", "qwen", 3),  # full steps, two forecasts
        ("packed, attention reused", "pixart", 3),  # the first full step, the others, partial steps
        pytest.param("packed, drift", "pixart", 3, marks=pytest.mark.slow),
        pytest.param("packed, attention seen", "flux", 3, marks=pytest.mark.slow),
        pytest.param("packed, fresh attention", "pixart", 3, marks=pytest.mark.slow),
        pytest.param("packed, attention reused", "flux", 3, marks=pytest.mark.slow),
    ],
)
def test_few_graphs_whatever_the_steps_and_none_in_the_second_run(kind: str, name: str, graphs: int) -> None:
    """Whole graphs, also where a call runs no block at all."""
    torch._dynamo.reset()
    build, call = PIPELINES[name]
    eager, compiled, counter = build(), build(), CompileCounter()
    for pipe in (eager, compiled):
        dit_accel.apply(pipe, OutputCacheConfig(**CONFIGS[kind]))
    compiled.transformer.compile(fullgraph=True, backend=counter)
    first = call(compiled, steps=STEPS)
    assert counter.frame_count == graphs
    expected = call(eager, steps=STEPS)
    assert (first - expected).norm() < 1e-5 * expected.norm()
    assert not torch.equal(call(compiled, steps=STEPS + 5, seed=1), first)
    assert torch.equal(call(compiled, steps=STEPS), first) and counter.frame_count == graphs
