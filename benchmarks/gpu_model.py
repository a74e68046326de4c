"""What would a step of FLUX.1-dev cost on a GPU? A model of it, made on any machine: nothing is measured, and no GPU is needed.

    python benchmarks/gpu_model.py --output out/gpu_model.json
    python benchmarks/gpu_model.py --only packed --pixels 2048 --ratio 0.3 --card A100 --card L40S=362e12,864e9

Real shapes run through the real code (the stock transformer in bfloat16, the library, a scheduler of diffusers) on the meta device,
whose tensors have a shape and a type but no numbers. What is dispatched is counted: kernels (operations that do work; views and
allocations do none), FLOPs (2 for every multiply-add) and bytes (what an operation reads and writes; nothing is fused, and no cache
helps). An operation takes the larger of its FLOPs at 60 % of the card's peak and its bytes at 85 % of the card's bandwidth, and at
least 2.5 microseconds, as long as a short kernel. A step is the sum of its operations, as if the host were always ahead.

So milliseconds are a lower bound in eager mode: Python may need longer for many small kernels than the card. The speed-up at N
is that of N steps, one of them full: N stock / (full + (N - 1) partial).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from meter import attention_flops
from recording import save
from rich.progress import track
from rich.table import Table
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import dit_accel
from dit_accel import OutputCacheConfig, TokenCacheConfig
from dit_accel.pipelines.terminal import show

Card = tuple[float, float]  # peak dense bfloat16 FLOPs and bytes of memory a second, from the makers' data sheets; SXM, 80 GB
CARDS: dict[str, Card] = {"H100": (989e12, 3.35e12), "A100": (312e12, 2.039e12), "4090": (165e12, 1.008e12)}
PEAK, BANDWIDTH, SHORTEST = 0.6, 0.85, 2.5e-6  # shares of a card that are reached; seconds of the shortest kernel
INTERVALS = (4, 6)

READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"}
NO_WORK = {"_unsafe_view", "_reshape_alias", "_assert_tensor_metadata", "lift_fresh", "set_", "resize_", "device", "detach"}
SEVERAL = {"topk": 4, "sort": 4}  # kernels of an operation
ROWS_ONLY = {"index_select", "gather", "index", "embedding"}  # what they leave out is not read
INTO_ROWS = {"index_copy_", "index_put_", "scatter_"}  # what they leave alone is not written
UNREAD = {"copy_", "fill_", "zero_", "new_zeros", "new_full", "zeros_like", "full_like"}  # whose first argument is not read


def size(tensor: torch.Tensor) -> int:
    """Bytes of memory that hold it; what is repeated by strides of 0 counts once."""
    spread = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return int(torch.Size(spread).numel() if tensor.numel() else 0) * tensor.element_size()


class Operation(NamedTuple):
    """One dispatched operation."""

    name: str
    kernels: int
    flops: int
    bytes: int

    def seconds(self, peak: float, bandwidth: float) -> float:
        return max(self.flops / (PEAK * peak), self.bytes / (BANDWIDTH * bandwidth), SHORTEST * self.kernels)


@dataclass
class Step:
    """What one call of the transformer asks of the device: `reads` of its numbers make the host wait; `sent` are copies to it."""

    operations: list[Operation] = field(default_factory=list)
    reads: int = 0
    sent: int = 0

    def total(self, what: str) -> int:
        return sum(getattr(operation, what) for operation in self.operations)

    def milliseconds(self, card: Card) -> float:
        return 1e3 * sum(operation.seconds(*card) for operation in self.operations)


class Dispatch(TorchDispatchMode):
    """Notes the operations of a step on the meta device; what only the host's tensors take part in is not the device's work."""

    step: Step

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name in READS and any(leaf.is_meta for leaf in given):
            self.step.reads += 1
            return name == "equal" or 0  # there are no numbers
        output = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.numel()]
        view = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        if view or name in NO_WORK or name.startswith(("empty", "new_empty")) or not any(leaf.is_meta for leaf in made):
            return output
        self.step.sent += any(not leaf.is_meta and leaf.ndim for leaf in given)
        formula = flop_registry.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=output) if formula else 0
        moved = sum(map(size, given[name in UNREAD :])) + sum(map(size, made))
        if name in ROWS_ONLY | INTO_ROWS:
            moved = 2 * sum(map(size, made if name in ROWS_ONLY else given[-1:]))
        self.step.operations.append(Operation(name, SEVERAL.get(name, 1), int(flops), moved))
        return output


class Fused(TorchFunctionMode):
    """Notes what CUDA does in one kernel and the meta device in many: attention and RMSNorm."""

    step: Step

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func not in (F.scaled_dot_product_attention, F.rms_norm):
            return func(*args, **(kwargs or {}))
        given = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, torch.Tensor)]
        output = torch.empty_like(given[0])
        flops = attention_flops(*(tensor.shape for tensor in given[:3])) if func is not F.rms_norm else 0
        self.step.operations.append(Operation(func.__name__, 1, flops, sum(map(size, given)) + size(output)))
        return output


@contextmanager
def counting(step: Step) -> Iterator[None]:
    with torch.no_grad(), Fused() as fused, Dispatch() as dispatch:
        fused.step = dispatch.step = step
        yield


def flux_dev(side: int, text: int = 512, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """FLUX.1-dev (diffusers' defaults, but for these changes) on the meta device, and arguments for side x side image tokens."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True, **changes).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    config, tokens = model.config, side * side
    shapes: dict[str, tuple[int, ...]] = dict(hidden_states=(1, tokens, config.in_channels), img_ids=(tokens, 3), txt_ids=(text, 3))
    shapes |= dict(encoder_hidden_states=(1, text, config.joint_attention_dim), guidance=(1,), timestep=(1,))
    shapes |= dict(pooled_projections=(1, config.pooled_projection_dim))
    return model, {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}


def methods(ratio: float) -> dict[str, Any]:
    """Name -> configuration, with a full step every second one."""
    found: dict[str, Any] = {"token cache, nothing computed": TokenCacheConfig(interval=2, cache_ratio=1.0)}
    for name in ("random", "attention", "drift"):
        found[f"token cache, {name} {ratio:.0%}"] = TokenCacheConfig(interval=2, cache_ratio=1 - ratio, selector=name)
    for name in ("reuse", "fresh"):
        found[f"packed {ratio:.0%}, {name}"] = OutputCacheConfig(interval=2, compute_ratio=ratio, attention=name)
    return {**found, "output forecast": OutputCacheConfig(interval=2)}


@dataclass(eq=False)
class Pipeline:
    transformer: Any
    scheduler: Any


def steps_of(model: Any, given: dict[str, Any], config: Any, calls: int = 4) -> list[Step]:
    """What the first calls of a run ask of the device: by these configurations full and partial in turn; None is stock."""
    pipeline, found = Pipeline(model, scheduler := FlowMatchEulerDiscreteScheduler()), []
    scheduler.set_timesteps(calls + 2)
    if config is not None:
        with counting(Step()):  # packed steps are checked with numbers
            dit_accel.apply(pipeline, config)
    for time in scheduler.timesteps[:calls]:
        with counting(step := Step()):
            model(**given, return_dict=False)
        found.append(step)
        scheduler.step(torch.zeros(1), time, torch.zeros(1))
    dit_accel.remove(pipeline)
    return found


def row(name: str, stock: Step, full: Step, partial: Step, cards: dict[str, Card]) -> dict[str, Any]:
    """One method's numbers."""
    found: dict[str, Any] = {"method": name}
    for kind, step in (("stock", stock), ("full", full), ("partial", partial)):
        found[kind] = {what: step.total(what) for what in Operation._fields[1:]} | {"reads": step.reads, "sent": step.sent}
        found[kind]["milliseconds"] = {card: step.milliseconds(numbers) for card, numbers in cards.items()}
    for card in cards:
        before, whole, less = (found[kind]["milliseconds"][card] for kind in ("stock", "full", "partial"))
        found.setdefault("speedup", {})[card] = {str(n): n * before / (whole + (n - 1) * less) for n in INTERVALS}
    return found


def table_of(rows: list[dict[str, Any]], cards: dict[str, Card], title: str) -> Table:
    times = ["partial (of stock)", f"N={' / '.join(map(str, INTERVALS))}"]
    columns = [
        "kernels, full",
        "partial",
        "GB",
        "TFLOP",
        "reads",
        "copies",
        *(n for card in cards for n in (f"{card} ms, full", *times)),
    ]
    table = Table("method", *columns, title=title, caption="Modelled, not measured. Reads and copies: of a partial step.")
    for found in rows:
        full, partial = found["full"], found["partial"]
        cells = [f"{full['kernels']:,}", f"{partial['kernels']:,}", f"{partial['bytes'] / 1e9:.1f}"]
        cells += [f"{partial['flops'] / 1e12:.2f}", f"{partial['reads']}", f"{partial['sent']}"]
        for card in cards:
            before, whole, less = (found[kind]["milliseconds"][card] for kind in ("stock", "full", "partial"))
            cells += [f"{whole:.1f}", f"{less:.1f} ({less / before:.3f})"]
            cells.append(" / ".join(f"{value:.2f}" for value in found["speedup"][card].values()))
        table.add_row(found["method"], *cells)
    return table


def card_of(text: str) -> tuple[str, Card]:
    """A card's name and numbers, from a known name or NAME=FLOPS,BANDWIDTH."""
    name, _, numbers = text.partition("=")
    try:
        peak, bandwidth = map(float, numbers.split(",")) if numbers else CARDS[name]
    except (KeyError, ValueError):
        raise typer.BadParameter(f"{text!r} is neither of {', '.join(CARDS)} nor like L40S=362e12,864e9.") from None
    return name, (peak, bandwidth)


def main(
    pixels: int = typer.Option(1024, min=32, help="Side of the square picture; a token is 16 pixels wide."),
    text: int = typer.Option(512, min=1, help="Tokens of text."),
    ratio: float = typer.Option(0.1, min=0.0001, max=1.0, help="Share of the tokens that a partial step computes."),
    only: list[str] = typer.Option([""], help="Methods with this in their name, 'packed' for example; may be repeated."),
    card: list[str] = typer.Option(["H100", "4090"], help="H100, A100, 4090, or NAME=FLOPS,BANDWIDTH a second; may be repeated."),
    output: Path = typer.Option(Path("out/gpu_model.json"), help="Where the numbers are written, method by method."),
) -> None:
    if pixels % 16:
        raise typer.BadParameter(f"{pixels} pixels are no whole number of tokens of 16 pixels; {pixels // 16 * 16} would do.")
    cards, (model, given) = dict(map(card_of, card)), flux_dev(pixels // 16, text)
    wanted = {name: config for name, config in methods(ratio).items() if any(part in name for part in only)}
    [stock], rows = steps_of(model, given, None, calls=1), []
    for name, config in track(wanted.items(), description="methods"):
        rows.append(row(name, stock, *steps_of(model, given, config)[-2:], cards))
        save(output, rows)
    title = (
        f"FLUX.1-dev, {pixels} px, {text} tokens of text, bfloat16, eager, one picture. Stock: {stock.total('kernels'):,} kernels"
    )
    title += f", {stock.total('flops') / 1e12:.1f} TFLOP, {stock.total('bytes') / 1e9:.0f} GB"
    show(table_of(rows, cards, title + "".join(f", {stock.milliseconds(cards[name]):.0f} ms on {name}" for name in cards)))
    typer.echo(f"Numbers: {output}")


main.__doc__ = __doc__

if __name__ == "__main__":
    typer.run(main)
