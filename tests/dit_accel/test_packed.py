"""Packed steps on a tiny transformer of every family, against the stock model and against a reference in plain loops."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel import OutputCacheConfig
from dit_accel.families.rows import Family, Stack
from dit_accel.families.table import lookup
from dit_accel.packed import Packed, blocks_of, parts
from dit_accel.steps import Memory
from dit_accel.subset import subset_check
from dit_accel.tokens import Selection
from tests.dit_accel import reference, tiny

ATTENTION = ("reuse", "fresh")
STALE_ONLY = {"mochi"}
CASES = [(name, how) for name in tiny.TRANSFORMERS for how in ATTENTION if how == "reuse" or name not in STALE_ONLY]
READS = ("_local_scalar_dense", "equal", "nonzero", "item", "is_nonzero", "masked_select", "unique")


class Bench:
    """A tiny transformer with packed steps on it; calls return the model's output and keep the head's rows."""

    def __init__(self, name: str, attention: str = "reuse", attach: bool = True) -> None:
        self.model, self.inputs = tiny.transformer(name)
        self.family = lookup(self.model)
        self.packed = Packed(self.model, self.family, attention)
        self.rows: Any = None
        if attach:
            self.packed.attach()
            head = self.model.get_submodule(self.family.head)
            head = next(iter(head.values())) if isinstance(head, torch.nn.ModuleDict) else head
            head.register_forward_hook(lambda module, args, output: setattr(self, "rows", output.flatten(1, -2).clone()))
        given = inspect.signature(type(self.model).forward).bind_partial(self.model, **self.inputs(0.7)).arguments
        self.tokens = self.family.count(self.model.config, given)
        self.grid = self.family.grid(self.model.config, given)

    def stock(self, time: float) -> torch.Tensor:
        return tiny.output(self.model, self.inputs(time))

    def full(self, memory: Memory, time: float) -> torch.Tensor:
        with self.packed.full(memory, self.tokens, time):
            return tiny.output(self.model, self.inputs(time))

    def partial(self, memory: Memory, time: float, index: Any, weights: Any = (1.0,)) -> torch.Tensor:
        with self.packed.partial(memory, index, weights):
            return tiny.output(self.model, self.inputs(time))

    def some(self, seed: int = 0) -> torch.Tensor:
        """A fifth of the tokens."""
        order = torch.randperm(self.tokens, generator=torch.Generator().manual_seed(seed))
        return order[: self.tokens // 5].sort().values

    def image(self, rows: torch.Tensor) -> torch.Tensor:
        """The head's rows without those of text."""
        return rows[:, : self.tokens] if self.family.stacks[-1].text_last else rows[:, -self.tokens :]


def close(found: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> bool:
    return bool((found - expected).abs().max() <= relative * expected.abs().max())


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_a_full_step_and_all_tokens_selected_are_stock(name: str, attention: str) -> None:
    """Bit by bit."""
    plain = Bench(name, attach=False)
    stock = plain.stock(0.7)
    bench, memory = Bench(name, attention), Memory()
    assert torch.equal(bench.stock(0.7), stock)
    assert torch.equal(bench.full(memory, 0.7), stock)
    assert torch.equal(bench.partial(memory, 0.7, torch.arange(bench.tokens)), stock)
    if attention == "fresh":  # every key and value is refreshed: what is kept from another time does not matter
        assert torch.equal(bench.partial(memory, 0.5, torch.arange(bench.tokens)), plain.stock(0.5))


@pytest.mark.parametrize("per_picture", [False, True])
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_selected_rows_are_stock_and_the_others_the_forecast(name: str, attention: str, per_picture: bool) -> None:
    bench, memory = Bench(name, attention), Memory()
    bench.full(memory, 0.6)
    older = bench.image(bench.rows)
    bench.full(memory, 0.7)
    newest = bench.image(bench.rows)
    index = torch.stack([bench.some(seed) for seed in range(tiny.BATCH)]) if per_picture else bench.some()
    bench.partial(memory, 0.7, index, [1.5, -0.5])
    found = bench.image(bench.rows)
    selected = torch.zeros(tiny.BATCH, bench.tokens, dtype=torch.bool)
    selected[torch.arange(tiny.BATCH)[:, None], index] = True
    assert close(found[selected], newest[selected])
    assert torch.equal(found[~selected], (newest * 1.5 + older * -0.5)[~selected])


NEEDS = frozenset({"attention", "key_norms", "value_norms"})


class Heard(TorchFunctionMode):
    """Queries, keys and values [B, N, H, D] of the first attention in every mixer, and where the text lies there."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]] = []
        self.stack: Any = None
        for block, module in blocks_of(bench.model, bench.family):
            for _, mixer in parts(module, block.stack.mixers):
                mixer.register_forward_pre_hook(lambda *_, stack=block.stack: setattr(self, "stack", stack))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention and self.stack is not None:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, key, value = (given[part].transpose(1, 2) for part in ("query", "key", "value"))
            self.found.append((query, key.repeat_interleave(query.shape[2] // key.shape[2], dim=2), value, self.stack.text_last))
            self.stack = None
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", [name for name in tiny.TRANSFORMERS if name not in STALE_ONLY])
def test_what_selectors_ask_of_attention_is_the_mean_over_all_mixers(name: str, attention: str) -> None:
    bench = Bench(name, attach=False)
    with Heard(bench) as heard:
        stock = bench.stock(0.7)
    bench.packed, memory = Packed(bench.model, bench.family, attention, NEEDS), Memory()
    bench.packed.attach()
    assert torch.equal(bench.full(memory, 0.7), stock)
    for need, score in (
        ("attention", lambda query, key, value: reference.softmax_map(query, key).mean(dim=(1, 2))),
        ("key_norms", lambda query, key, value: reference.norms(key)),
        ("value_norms", lambda query, key, value: reference.norms(value)),
    ):
        rows = [(score(*given), text_last) for *given, text_last in heard.found]
        images = [seen[:, : bench.tokens] if last else seen[:, -bench.tokens :] for seen, last in rows]
        assert close(memory.observed[need], torch.stack(images).mean(0)), need
    config = OutputCacheConfig(compute_ratio=0.2, selector="attention", attention=attention)
    index = Selection(config, bench.tokens, 5, (1, bench.tokens), memory).at(1)(memory.features["entered"][0])
    assert torch.equal(index, memory.observed["attention"].topk(5).indices.sort().values)
    bench.partial(memory, 0.5, index)


@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_detach_leaves_nothing(name: str) -> None:
    def state(model: Any) -> list[Any]:
        names = [(path, type(module), sorted(vars(module))) for path, module in model.named_modules()]
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        return [names, hooks, list(model.state_dict())]

    bench = Bench(name, attach=False)
    before, stock = state(bench.model), bench.stock(0.7)
    subset_check(bench.model, bench.family)
    assert state(bench.model) == before
    bench.packed.attach()
    assert torch.equal(bench.stock(0.7), stock)
    bench.packed.detach()
    assert state(bench.model) == before
    assert torch.equal(bench.stock(0.7), stock)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", ["flux", "flux2", "pixart", "z_image", "wan_ti2v"])
def test_a_partial_step_reads_nothing_from_the_device_and_moves_nothing_kept(name: str, attention: str) -> None:
    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.reads: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.__name__.split(".")[0] in READS:
                self.reads.append(func.__name__)
            return func(*args, **(kwargs or {}))

    bench, memory = Bench(name, attention), Memory()
    with Recorder() as stock:
        bench.stock(0.6)
    for time in (0.9, 0.8, 0.7):
        bench.full(memory, time)
    kept = {key: [v.data_ptr() for v in values if v is not None] for key, values in memory.features.items()}
    with Recorder() as recorder:
        bench.partial(memory, 0.6, bench.some(), [1.5, -0.5])
    assert set(recorder.reads) <= set(stock.reads)  # Z-Image's own
    assert name == "z_image" or not recorder.reads
    bench.full(memory, 0.6)
    assert kept == {key: [v.data_ptr() for v in values if v is not None] for key, values in memory.features.items()}


@pytest.mark.parametrize(("name", "attention"), [(n, a) for n in ("flux", "pixart", "qwen") for a in ATTENTION])
def test_branches_do_not_see_each_other(name: str, attention: str) -> None:
    bench, one, other = Bench(name, attention), Memory(), Memory()
    bench.full(one, 0.7)
    alone = bench.partial(one, 0.5, bench.some())
    one = Memory()
    bench.full(one, 0.7)
    bench.full(other, 0.2)
    bench.partial(other, 0.1, bench.some(1))
    assert torch.equal(bench.partial(one, 0.5, bench.some()), alone)


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_batch_of_another_size_needs_a_full_step(attention: str) -> None:
    bench, memory = Bench("pixart", attention), Memory()
    bench.full(memory, 0.7)
    given = {n: v[1:] if isinstance(v, torch.Tensor) else v for n, v in bench.inputs(0.5).items()}
    with pytest.raises(RuntimeError, match="full step"), bench.packed.partial(memory, bench.some(), [1.0]):
        tiny.output(bench.model, given)


# ---------------------------------------------------------------- references that compute all tokens and mask afterwards
MIXERS = {"flux": ("attn",), "pixart": ("attn1",), "sd3": ("attn", "attn2"), "hunyuan": ("attn",), "wan": ("attn1",)}


def head_rows(model: Any, given: dict[str, Any]) -> torch.Tensor:
    heard: list[torch.Tensor] = []
    handle = model.proj_out.register_forward_hook(lambda module, args, output: heard.append(output))
    tiny.output(model, given)
    handle.remove()
    return heard[0]


@pytest.mark.parametrize("name", MIXERS)
def test_reused_attention_against_a_masked_stock_model(name: str) -> None:
    """What the mixers returned for all tokens at the full step is put in their place while all tokens are computed."""
    model, inputs = tiny.transformer(name)
    kept: dict[str, Any] = {}
    replay = False
    for path, module in model.named_modules():
        if "blocks." in path and path.split(".")[-1] in MIXERS[name] and path.count(".") == 2:

            def hook(module: Any, args: Any, output: Any, path: str = path) -> Any:
                return kept[path] if replay else kept.update({path: output})

            module.register_forward_hook(hook)
    older, newer = (head_rows(model, inputs(time)) for time in (0.8, 0.7))
    replay = True
    now = head_rows(model, inputs(0.55))
    bench, memory = Bench(name), Memory()
    bench.full(memory, 0.8)
    bench.full(memory, 0.7)
    index = bench.some()
    bench.partial(memory, 0.55, index, [1.5, -0.5])
    expected = 1.5 * newer - 0.5 * older
    for token in index.tolist():
        expected[:, token] = now[:, token]
    assert close(bench.rows, expected)


@pytest.mark.parametrize("name", ["flux", "pixart", "wan"])
def test_fresh_attention_against_a_masked_stock_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens are computed; every query sees what tokens that were not selected had as keys and values when last computed."""
    model, inputs = tiny.transformer(name)
    bench, memory = Bench(name, "fresh"), Memory()
    indices = {0.55: bench.some(), 0.4: bench.some(1)}
    steps = {}
    bench.full(memory, 0.7)
    for time, index in indices.items():
        bench.partial(memory, time, index)
        steps[time] = bench.rows
    kept: list[list[torch.Tensor]] = []
    turn, selected = 0, torch.arange(0)

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, **kwargs: Any) -> torch.Tensor:
        nonlocal turn
        if key.shape[-2] >= bench.tokens:  # not the cross-attention to the text
            text = key.shape[-2] - bench.tokens
            if turn == len(kept):
                kept.append([key, value])
            for place, fresh in enumerate((key, value)):
                mixed = kept[turn][place].clone()
                mixed[:, :, :text] = fresh[:, :, :text]
                for token in selected.tolist():
                    mixed[:, :, text + token] = fresh[:, :, text + token]
                kept[turn][place] = mixed
            (key, value), turn = kept[turn], turn + 1
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ value

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        newest = head_rows(model, inputs(0.7))
        for time, index in indices.items():
            turn, selected = 0, index
            now, expected = head_rows(model, inputs(time)), newest.clone()
            for token in index.tolist():
                expected[:, token] = now[:, token]
            assert close(steps[time], expected)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", ["flux", "sd3", "qwen", "z_image"])
def test_residuals_of_a_controlnet_are_added(name: str, attention: str) -> None:
    """To the selected tokens, between the blocks; so with all of them selected the output is stock's."""
    bench, memory = Bench(name, attention), Memory()
    width = {"flux": 32, "sd3": 32, "qwen": 32, "z_image": 32}[name]
    residual = 0.1 * tiny.random(tiny.BATCH, bench.tokens, width)
    extra: dict[str, Any] = {
        "flux": dict(controlnet_block_samples=[residual], controlnet_single_block_samples=[residual, -residual]),
        "sd3": dict(block_controlnet_hidden_states=[residual]),
        "qwen": dict(controlnet_block_samples=[residual]),
        "z_image": dict(controlnet_block_samples={0: 0.1 * tiny.random(tiny.BATCH, bench.tokens + 32, width)}),
    }[name]
    given, without = {**bench.inputs(0.7), **extra}, bench.stock(0.7)
    stock = tiny.output(bench.model, given)
    rows = bench.image(bench.rows)
    with bench.packed.full(memory, bench.tokens, 0.7):
        assert torch.equal(tiny.output(bench.model, given), stock)
    with bench.packed.partial(memory, torch.arange(bench.tokens), [1.0]):
        assert torch.equal(tiny.output(bench.model, given), stock) and not torch.equal(stock, without)
    index = bench.some()
    with bench.packed.partial(memory, index, [0.0]):
        tiny.output(bench.model, given)
    assert close(bench.image(bench.rows)[:, index], rows[:, index])


@pytest.mark.parametrize("per_picture", [False, True])
@pytest.mark.parametrize(
    ("name", "mask", "length"),
    [("chroma", "attention_mask", tiny.TEXT + tiny.N), ("qwen", "encoder_hidden_states_mask", tiny.TEXT)]
    + [
        ("hunyuan", "encoder_attention_mask", tiny.TEXT),
        ("prx", "attention_mask", tiny.TEXT),
        ("krea2", "encoder_attention_mask", tiny.TEXT),
    ],
)
def test_fresh_attention_under_a_mask(name: str, mask: str, length: int, per_picture: bool) -> None:
    bench, memory = Bench(name, "fresh"), Memory()
    seen = torch.ones(tiny.BATCH, length, dtype=torch.bool)
    seen[0, tiny.TEXT - 2 : tiny.TEXT] = False
    given = {**bench.inputs(0.7), mask: seen}
    assert not torch.equal(tiny.output(bench.model, given), bench.stock(0.7))
    stock = tiny.output(bench.model, given)
    expected = bench.image(bench.rows)
    with bench.packed.full(memory, bench.tokens, 0.7):
        assert torch.equal(tiny.output(bench.model, given), stock)
    index = torch.stack([bench.some(seed) for seed in range(tiny.BATCH)])
    with bench.packed.partial(memory, index if per_picture else index[0], [0.0]):
        tiny.output(bench.model, given)
    found = bench.image(bench.rows)
    for picture in range(tiny.BATCH):
        rows = index[picture if per_picture else 0]
        assert close(found[picture, rows], expected[picture, rows])
    with bench.packed.partial(memory, torch.arange(bench.tokens), [1.0]):
        assert close(tiny.output(bench.model, given), stock)


def test_an_index_may_depend_on_the_tokens() -> None:
    bench, memory = Bench("flux"), Memory()
    bench.full(memory, 0.7)
    seen = []

    def moved(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens)
        drift = (tokens - memory.features["entered"][0]).norm(dim=-1).mean(0)
        return drift.topk(9).indices.sort().values

    chosen = bench.partial(memory, 0.5, moved)
    assert seen[0].shape == (tiny.BATCH, bench.tokens, 32)
    drift = (seen[0] - memory.features["entered"][0]).norm(dim=-1).mean(0)
    assert torch.equal(chosen, bench.partial(memory, 0.5, drift.topk(9).indices.sort().values))


@pytest.mark.parametrize(("name", "module"), [("flux", "norm1_context.linear"), ("sd3", "ff_context.net.0"), ("qwen", "txt_mod.1")])
def test_text_is_not_computed_while_attention_is_reused(name: str, module: str) -> None:
    bench, memory, calls = Bench(name), Memory(), []
    bench.full(memory, 0.7)
    bench.model.transformer_blocks[0].get_submodule(module).register_forward_hook(lambda *args: calls.append(args))
    bench.partial(memory, 0.6, bench.some())
    assert not calls
    bench.partial(memory, 0.6, torch.arange(bench.tokens))
    assert calls


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("pixart", "reuse"),
        ("flux", "fresh"),
        pytest.param("pixart", "fresh", marks=pytest.mark.slow),
        pytest.param("flux", "reuse", marks=pytest.mark.slow),
        pytest.param("qwen", "fresh", marks=pytest.mark.slow),
    ],
)
def test_compiled(name: str, attention: str) -> None:
    """Into whole graphs; a run compiles nothing that the runs before it have compiled."""
    bench, memory, counter = Bench(name, attention, attach=False), Memory(), CompileCounter()
    bench.packed.attach()
    eager = Memory()
    torch._dynamo.reset()
    compiled, frames = torch.compile(bench.model, backend=counter, fullgraph=True), []
    for _ in range(3):
        for time in (0.9, 0.8, 0.7, 0.6):
            bench.full(eager, time)
            with bench.packed.full(memory, bench.tokens, time):
                tiny.output(compiled, bench.inputs(time))
        with bench.packed.partial(memory, bench.some(), [1.5, -0.5]):
            assert close(tiny.output(compiled, bench.inputs(0.5)), bench.partial(eager, 0.5, bench.some(), [1.5, -0.5]))
        frames.append(counter.frame_count)
        eager.times, memory.times = [2.0] * len(eager.times), [2.0] * len(memory.times)  # of another run
    assert frames[2] == frames[1]


def test_inference_mode_now_and_then() -> None:
    """What was remembered in inference mode cannot be written to outside of it, and so is forgotten."""
    bench, memory = Bench("flux"), Memory()
    with torch.inference_mode():
        bench.full(memory, 0.7)
        inside = bench.partial(memory, 0.5, bench.some())
    bench.full(memory, 0.7)
    assert torch.equal(bench.partial(memory, 0.5, bench.some()), inside)


def test_a_second_output_at_the_same_time_replaces_the_first() -> None:
    bench, memory = Bench("pixart"), Memory()
    for time in (0.9, 0.8, 0.7, 0.6, 0.6):
        bench.full(memory, time)
    assert memory.times == [0.6, 0.7, 0.8] and len(memory.outputs) == 3
    assert torch.equal(memory.outputs[0][0], bench.rows)


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_the_subset_check_accepts_the_families(name: str) -> None:
    bench = Bench(name, attach=False)
    state = torch.get_rng_state()
    subset_check(bench.model, bench.family)
    assert torch.equal(torch.get_rng_state(), state)
    subset_check(bench.model.to(torch.bfloat16), bench.family)


def test_the_subset_check_names_what_mixes_tokens() -> None:
    sana, _ = tiny.transformer("sana")
    assert lookup(sana) is None
    wrong = Family("SanaTransformer2DModel", (Stack("transformer_blocks", ("attn1",)),), lambda config, given: (1, 1, 1))
    with pytest.raises(TypeError, match=r"transformer_blocks\.0\.ff\.conv_depth \(Conv2d\) mixes tokens"):
        subset_check(sana, wrong)

    class Centered(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens - tokens.mean(dim=1, keepdim=True)

    for name, place in (("flux", "single_transformer_blocks.0.act_mlp"), ("pixart", "transformer_blocks.0.ff.net.1")):
        bench = Bench(name, attach=False)
        bench.model.set_submodule(place, Centered())
        with pytest.raises(TypeError, match=place.replace(".", r"\.") + r" \(Centered\) mixes tokens"):
            subset_check(bench.model, bench.family)


def test_the_subset_check_refuses_blocks_that_count_on_a_tokens_place() -> None:
    """HunyuanVideo from an image modulates the first frame's tokens otherwise, whichever they are."""
    model, _ = tiny.hunyuan(image_condition_type="token_replace")
    with pytest.raises(TypeError, match=r"transformer_blocks\.0 "):
        subset_check(model, lookup(model))


def test_what_cannot_be_served_says_so() -> None:
    bench = Bench("mochi", attach=False)
    with pytest.raises(ValueError, match="Mochi.* cannot be computed afresh"):
        Packed(bench.model, bench.family, "fresh")
    with pytest.raises(ValueError, match="must be 'reuse' or 'fresh'"):
        Packed(bench.model, bench.family, "new")
    bench, memory = Bench("sd3"), Memory()
    with pytest.raises(RuntimeError, match="full step"):
        bench.partial(memory, 0.7, bench.some())
    bench.full(memory, 0.7)
    with pytest.raises(ValueError, match="2 weights for 1 outputs"):
        bench.partial(memory, 0.5, bench.some(), [1.5, -0.5])
    for skipped, memory_of in ((2, memory), (1, Memory())):
        given = {**bench.inputs(0.5), "skip_layers": [skipped]}
        context = bench.packed.full(memory_of, bench.tokens, 0.7) if skipped == 1 else contextlib.nullcontext()
        with context:
            tiny.output(bench.model, given)
        with pytest.raises(RuntimeError, match="skipped|did not run"), bench.packed.partial(memory_of, bench.some(), [1.0]):
            tiny.output(bench.model, given if skipped == 2 else bench.inputs(0.5))
    bench, memory = Bench("chroma"), Memory()
    given = {**bench.inputs(0.7), "controlnet_single_block_samples": [torch.ones(tiny.BATCH, bench.tokens, 32)] * 2}
    with bench.packed.full(memory, bench.tokens, 0.7):
        tiny.output(bench.model, given)
    with pytest.raises(RuntimeError, match="memory location"), bench.packed.partial(memory, bench.some(), [1.0]):
        tiny.output(bench.model, given)


def test_fresh_attention_needs_pytorchs_own() -> None:
    bench = Bench("pixart", "fresh")
    for block in bench.model.transformer_blocks:
        block.attn1.set_processor(diffusers.models.attention_processor.AttnProcessor())
    with pytest.raises(RuntimeError, match="scaled_dot_product_attention"):
        bench.full(Memory(), 0.7)


@pytest.mark.parametrize("name", ["flux", "flux2", "pixart", "wan"])
def test_offloading_before_or_after(name: str) -> None:
    def run(bench: Bench) -> torch.Tensor:
        memory = Memory()
        bench.full(memory, 0.7)
        return bench.partial(memory, 0.5, bench.some())

    expected, stock = run(Bench(name)), Bench(name, attach=False).stock(0.7)
    for before in (True, False):
        bench = Bench(name, attach=False)
        for attach in (False, True) if before else (True, False):
            if attach:
                subset_check(bench.model, bench.family)
                bench.packed.attach()
            else:
                accelerate.cpu_offload(bench.model, execution_device="cpu")
        assert torch.equal(run(bench), expected)
        bench.packed.detach()
        assert torch.equal(bench.stock(0.7), stock)
        assert all(p.is_meta for p in bench.model.parameters())  # offloading is still there


def test_layerwise_casting() -> None:
    bench = Bench("flux2", attach=False)
    bench.model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    stock, memory = bench.stock(0.7), Memory()
    subset_check(bench.model, bench.family)
    bench.packed.attach()
    assert torch.equal(bench.full(memory, 0.7), stock)
    assert bench.partial(memory, 0.5, bench.some()).isfinite().all()
    assert torch.equal(bench.partial(memory, 0.7, torch.arange(bench.tokens)), stock)


def test_kernels_of_flux_dev() -> None:
    """A partial step of a tenth of 4,096 tokens launches at most a thousand kernels; a stock step launches 4,479."""

    class Kernels(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
            made = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.numel()]
            self.count += bool(made) and not view and not func.__name__.startswith(("empty", "detach"))
            return output

    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(guidance_embeds=True).eval()
        given = dict(
            hidden_states=torch.empty(1, 4096, 64),
            encoder_hidden_states=torch.empty(1, 512, 4096),
            pooled_projections=torch.empty(1, 768),
            timestep=torch.empty(1),
            guidance=torch.empty(1),
            img_ids=torch.empty(4096, 3),
            txt_ids=torch.empty(512, 3),
        )
        packed, memory = Packed(model, lookup(model)), Memory()
        packed.attach()
        with packed.full(memory, 4096, 0.7):
            tiny.output(model, given)
        with Kernels() as kernels, packed.partial(memory, torch.empty(410, dtype=torch.long), [1.0]):
            tiny.output(model, given)
    assert kernels.count <= 1000


def test_hooks_of_others_survive() -> None:
    bench = Bench("flux", attach=False)
    calls = []

    class Other(ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    mixers = [block.attn for block in bench.model.transformer_blocks]
    HookRegistry.check_if_exists_or_initialize(mixers[0]).register_hook(Other(), "before")
    bench.packed.attach()
    HookRegistry.check_if_exists_or_initialize(mixers[1]).register_hook(Other(), "after")
    bench.packed.detach()
    bench.stock(0.7)
    assert calls == mixers
