"""What does a card make of it? Whole runs of FLUX.1-dev's or PixArt-XL's transformer, by the clock of the card.

    python benchmarks/gpu.py measure --seconds 100 --output out/gpu.json
    python benchmarks/gpu.py table out/gpu.json                             # beside the model's milliseconds; needs no GPU

Stock pipelines run around a transformer of the published size with random weights, random text and no autoencoder. Every kind of
method has a short run that warms up; every method is compared to the runs of stock before and after it. Calls of the transformer
are timed by events on the card, and nothing waits for them before the run is over; host time is how long Python took to ask for
a call. Afterwards the last two steps of a short run of every kind, one of them full, are put under torch's profiler, for kernels
(on a CPU, operators) and how long they kept the card busy, and under `meter.Meter`, for FLOPs. Efficiency is the speed-up in
seconds over the one in FLOPs.

What comes first matters most: where the seconds are not enough, the last methods are left out. A method that fails is recorded
as its error, and the others go on. The record is written whenever something was measured.
"""
# ruff: noqa: E402

from __future__ import annotations

import time

BEGAN = time.perf_counter()  # before the imports below, which may take half a minute

import gc
import json
import statistics
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import typer
from blocks import TEXT
from gpu_model import CARDS, Card, card_of, flux_dev, steps_of
from gpu_model import methods as modelled
from meter import Meter
from recording import rows_of, save
from rich import box
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import dit_accel
from dit_accel import TokenMergeConfig
from dit_accel.pipelines.terminal import quiet, show

app = typer.Typer(no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
SIZES: dict[str, dict[str, Any]] = {  # what is published and not diffusers' default
    "flux": {"guidance_embeds": True},
    "pixart": {"caption_channels": 4096, "use_additional_conditions": False, "sample_size": 128},
}
KINDS: dict[str, Any] = {"stock": None, "fewer steps": None, **modelled(0.1), "token merge 50%": TokenMergeConfig(ratio=0.5)}
# The most important first: of which kind, and every how many steps a full one; of fewer steps, by how much fewer.
ORDER = [
    ("output forecast", 4),
    ("packed 10%, reuse", 4),
    ("token cache, random 10%", 4),
    ("packed 10%, fresh", 4),
    ("fewer steps", 4),
    ("token cache, nothing computed", 4),
    ("token cache, attention 10%", 4),
    ("token cache, drift 10%", 4),
    ("token merge 50%", 1),
    ("output forecast", 6),
    ("packed 10%, reuse", 6),
    ("packed 10%, fresh", 6),
    ("token cache, random 10%", 6),
    ("fewer steps", 2),
    ("fewer steps", 3),
    ("output forecast", 2),
    ("output forecast", 3),
]
TOGETHER = 9  # methods between two runs of stock
RUNS = 0.85  # share of the time in which runs begin; the rest is for counting
ALL_CARDS = CARDS | {"H200": (989e12, 4.8e12)}


@dataclass(frozen=True)
class Method:
    """A kind of method at an interval."""

    kind: str
    interval: int = 1

    def __str__(self) -> str:
        how = "{}x" if self.kind == "fewer steps" else "interval {}"
        return f"{self.kind}, {how.format(self.interval)}" if self.interval > 1 else self.kind

    @property
    def config(self) -> Any:
        config = KINDS[self.kind]
        return replace(config, interval=self.interval) if hasattr(config, "interval") else config

    def steps(self, steps: int) -> int:
        return max(round(steps / self.interval), 1) if self.kind == "fewer steps" else steps


STOCK = Method("stock")


def plan(only: list[str]) -> list[Method]:
    """The methods with one of these in their names, in order, between runs of stock."""
    chosen = [method for place in ORDER if any(part in str(method := Method(*place)) for part in only or [""])]
    return [STOCK, *(one for i, method in enumerate(chosen, 1) for one in (method, *[STOCK] * (i % TOGETHER == 0))), STOCK]


class Runner:
    """A stock pipeline around random weights, and runs of it."""

    def __init__(self, family: str, pixels: int, text: int, dtype: torch.dtype, device: str, **changes: int) -> None:
        self.cuda, self.device, self.warm = device == "cuda", device, set[str]()
        began = time.perf_counter()
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):  # where weights are made at once
                kind = diffusers.FluxTransformer2DModel if family == "flux" else diffusers.PixArtTransformer2DModel
                self.transformer: Any = kind(**SIZES[family], **changes).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        config, nothing = self.transformer.config, dict(vae=None, text_encoder=None, tokenizer=None)
        like = dict(dtype=dtype, device=device)
        self.given: dict[str, Any] = dict(height=pixels, width=pixels, output_type="latent")
        if family == "flux":
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)  # FLUX.1-dev's
            rest = dict(transformer=self.transformer, text_encoder_2=None, tokenizer_2=None)
            self.pipe: Any = diffusers.FluxPipeline(scheduler=scheduler, **nothing, **rest)
            self.given["prompt_embeds"] = torch.randn(1, text, config.joint_attention_dim, **like)
            self.given["pooled_prompt_embeds"] = torch.randn(1, config.pooled_projection_dim, **like)
        else:
            scheduler = diffusers.DPMSolverMultistepScheduler()
            self.pipe = diffusers.PixArtSigmaPipeline(transformer=self.transformer, scheduler=scheduler, **nothing)
            for side in ("", "negative_"):
                self.given[f"{side}prompt_embeds"] = torch.randn(1, text, config.caption_channels, **like)
                self.given[f"{side}prompt_attention_mask"] = torch.ones(1, text, device=device)
            self.given |= dict(negative_prompt=None, use_resolution_binning=False)
        self.pipe.set_progress_bar_config(disable=True)
        self.synchronize()
        self.built, self.weights = time.perf_counter() - began, self.allocated()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else 0

    def moment(self) -> Any:
        """Now, in the card's queue."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.cuda else 1e3 * (end - start)

    def run(self, steps: int, before: Callable[[], Any] = lambda: None, after: Callable[[], Any] = lambda: None) -> torch.Tensor:
        """One picture's latents, from the same noise every time, with something before and after every call of the transformer."""
        hooks = [
            self.transformer.register_forward_pre_hook(lambda *_: before(), prepend=True),
            self.transformer.register_forward_hook(lambda *_: after()),
        ]
        try:
            generator = torch.Generator(self.device).manual_seed(0)
            return self.pipe(generator=generator, num_inference_steps=steps, **self.given).images
        finally:
            for hook in hooks:
                hook.remove()

    def timed(self, steps: int) -> dict[str, Any]:
        """Seconds of a whole run, and milliseconds of its calls on the card and on the host."""
        events: list[Any] = []
        asked: list[float] = []

        def now() -> None:
            asked.append(time.perf_counter())
            events.append(self.moment())

        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.synchronize()
        start = time.perf_counter()
        latents = self.run(steps, now, now)
        self.synchronize()
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "peak_bytes": torch.cuda.max_memory_allocated() - self.weights if self.cuda else 0,
            "card_ms": [self.milliseconds(a, b) for a, b in zip(events[::2], events[1::2], strict=True)],
            "host_ms": [1e3 * (b - a) for a, b in zip(asked[::2], asked[1::2], strict=True)],
            "finite": bool(latents.isfinite().all()),
        }

    def modes(self, method: Method, calls: int) -> list[str]:
        """Of the calls of the last run."""
        return ["full"] * calls if method.config is None else [call.mode.value for call in dit_accel.report(self.pipe).calls]

    def measured(self, method: Method, steps: int) -> dict[str, Any]:
        """A run by the clock, the first of a kind after a short one."""
        began, steps = time.perf_counter(), method.steps(steps)
        if method.config is not None:
            dit_accel.apply(self.pipe, method.config)
        self.synchronize()
        applied = time.perf_counter() - began
        kind = method.kind if method.config else "stock"
        if kind not in self.warm:
            self.run(method.interval + 2)
            self.warm.add(kind)
        found = self.timed(steps)
        held = dit_accel.report(self.pipe).cache_bytes if method.config else 0
        return {"steps": steps, "apply_seconds": applied, "held_bytes": held, **found, "modes": self.modes(method, steps)}

    def counted(self, method: Method) -> dict[str, Any]:
        """Kernels and FLOPs of the last two calls of a short run, by whether they are full or partial."""
        if method.config is not None:
            dit_accel.apply(self.pipe, method.config)
        activity = ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU
        tools: list[tuple[Any, Meter]] = []
        steps = method.interval + 2
        calls = iter(range(steps))

        with ExitStack() as within:

            def before() -> None:
                if next(calls) >= steps - 2:
                    self.synchronize()
                    profiler = within.enter_context(profile(activities=[activity]))
                    within.callback(self.synchronize)
                    tools.append((profiler, within.enter_context(Meter())))

            self.run(steps, before, within.close)
        found: dict[str, Any] = defaultdict(list)
        for mode, (profiler, meter) in zip(self.modes(method, steps)[-2:], tools, strict=True):
            kernels = [event for event in profiler.events() if event.device_type.name == self.device.upper()]
            longest, number = Counter[str](), Counter[str](event.name for event in kernels)
            for event in kernels:
                longest[event.name] += event.time_range.elapsed_us() / 1e3
            most = [{"kernel": name[:120], "number": number[name], "ms": ms} for name, ms in longest.most_common(8)]
            found[mode].append({"kernels": len(kernels), "busy_ms": longest.total(), "flops": meter.flops, "longest": most})
        return found


def once(runner: Runner, method: Method, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the work gives, or why it fails; nothing is left on the pipeline."""
    row: dict[str, Any] = {"method": str(method), "kind": method.kind, "interval": method.interval}
    try:
        row |= work()
    except Exception as error:  # one method's, which is recorded
        row["error"] = f"{type(error).__name__}: {error}"[:1000]
        row["trace"] = traceback.format_exc()[-3000:]
    dit_accel.remove(runner.pipe)
    return row


@app.command()
@torch.no_grad()
def measure(
    family: str = typer.Option("flux", help="flux or pixart."),
    size: int = typer.Option(1024, min=32, help="Side of the square picture in pixels."),
    text: int | None = typer.Option(None, min=1, help="Tokens of text; by default 512 for FLUX and 300 for PixArt."),
    steps: int = typer.Option(28, min=2),
    layers: int | None = typer.Option(None, help="Of FLUX, double blocks; as many as published without."),
    single_layers: int | None = typer.Option(None, help="Single blocks of FLUX."),
    methods: list[str] = typer.Option([], "--methods", help="Methods with this in their name; may be repeated."),
    rounds: int = typer.Option(1, min=1, help="Runs of every method."),
    seconds: float = typer.Option(100.0, help="Since the start of the program, imports included: later nothing more is begun."),
    dtype: str = typer.Option("bfloat16"),
    device: str = typer.Option("cuda" if torch.cuda.is_available() else "cpu"),
    output: Path = typer.Option(Path("out/gpu.json"), "--output", "--out", help="Where the measurements are written."),
) -> None:
    """Seconds, kernels, FLOPs and memory of whole runs."""
    if family not in SIZES:
        raise typer.BadParameter(f"{family!r} is neither flux nor pixart.")
    quiet()

    def gone() -> float:
        return time.perf_counter() - BEGAN

    changes = {name: n for name, n in (("num_layers", layers), ("num_single_layers", single_layers)) if n is not None}
    imported, text = gone(), text or TEXT[family]
    runner = Runner(family, size, text, getattr(torch, dtype), device, **changes)
    setup = {"family": family, "pixels": size, "text": text, "steps": steps, "dtype": dtype, "device": device, "changes": changes}
    setup |= {"import_seconds": imported, "build_seconds": runner.built, "weight_bytes": runner.weights}
    rows: list[dict[str, Any]] = [{"what": "setup", **setup}]
    gc.freeze()  # so that no collection during a run takes long

    def note(row: dict[str, Any], says: str) -> None:
        rows.append(row | {"at": gone()})
        save(output, rows)
        typer.echo(f"{gone():6.1f} s  {row['what']}, {row['method']}: {row.get('error', says)}")

    save(output, rows)
    typer.echo(f"{gone():6.1f} s  {family} is built, in {runner.built:.1f} s: {runner.weights / 1e9:.1f} GB")
    for number in range(rounds):
        for method in plan(methods):
            again = rows[-1].get("kind") == method.kind == "stock"
            if gone() < seconds * (RUNS if method != STOCK else 1) and not again:
                row = once(runner, method, lambda method=method: runner.measured(method, steps))
                note({"what": "run", "round": number, **row}, f"{row.get('seconds', 0):.3f} s")
    for kind in dict.fromkeys(method.kind for method in plan(methods) if method.kind != "fewer steps"):
        method = next(method for method in plan(methods) if method.kind == kind)
        if gone() < seconds:
            row = once(runner, method, lambda method=method: runner.counted(method))
            last = row.get("partial", row.get("full", [{}]))[-1]
            note({"what": "count", **row}, f"{last.get('kernels')} kernels, busy for {last.get('busy_ms', 0):.2f} ms")
    show(table_of(rows))
    typer.echo(f"{gone():.1f} s. Measurements: {output}")


@app.command()
def table(
    record: Path = typer.Argument(exists=True, help="What `measure` wrote."),
    card: str = typer.Option("", help="H100, H200, A100, 4090, or NAME=FLOPS,BANDWIDTH a second; by default the one measured on."),
) -> None:
    """What was measured, beside the milliseconds that benchmarks/gpu_model.py gives."""
    machine, rows = json.loads(record.read_text())["machine"], rows_of(record)
    name = card or next((name for name in ALL_CARDS if name in machine.get("gpu", "")), "H100")
    numbers = ALL_CARDS[name] if name in ALL_CARDS else card_of(name)[1]
    show(table_of([*rows, *model_of(rows, numbers)], f"Modelled: {name.partition('=')[0]}."))


def model_of(rows: list[dict[str, Any]], card: Card) -> Iterator[dict[str, Any]]:
    """Modelled milliseconds of the kinds of method that were measured; there is a model of FLUX, and none of merging."""
    setup = rows[0]
    if setup["family"] != "flux":
        return
    model, given = flux_dev(setup["pixels"] // 16, setup["text"], **setup["changes"])
    for kind, config in {"stock": None, **modelled(0.1)}.items():
        if any(row.get("kind") == kind for row in rows):
            steps = steps_of(model, given, config)[-2:]
            found = {mode: step.milliseconds(card) for mode, step in zip(("full", "partial"), steps, strict=True)}
            yield {"what": "model", "kind": kind, **(found if config else {"full": found["full"]})}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a method: medians of its runs, each beside the mean of the runs of stock before and after it."""
    runs = [row for row in rows if row["what"] == "run"]
    stock = [i for i, row in enumerate(runs) if row["kind"] == "stock" and "error" not in row]
    counts = {row["kind"]: row for row in rows if row["what"] == "count" and "error" not in row}
    models = {row["kind"]: row for row in rows if row["what"] == "model"}
    found = []
    for name in dict.fromkeys(row["method"] for row in runs):
        places = [i for i, row in enumerate(runs) if row["method"] == name and "error" not in row]
        if not places:
            found.append({"method": name, "error": next(row["error"] for row in runs if row["method"] == name)})
            continue
        own = [runs[i] for i in places]
        one = {key: statistics.median(row[key] for row in own) for key in ("seconds", "peak_bytes", "held_bytes")}
        kind = own[0]["kind"]
        for mode in ("full", "partial"):
            for clock in ("card_ms", "host_ms"):
                calls = [ms for row in own for ms, which in zip(row[clock], row["modes"], strict=True) if which == mode]
                one |= {f"{mode}_{clock}": statistics.median(calls)} if calls else {}
            for key in ("kernels", "busy_ms") if mode in counts.get(kind, ()) else ():
                one[f"{mode}_{key}"] = mean_of(counts[kind], mode, key)
            one |= {f"{mode}_modelled_ms": models[kind][mode]} if mode in models.get(kind, ()) else {}
        if kind != "stock" and stock:
            near = [{*[j for j in stock if j < i][-1:], *[j for j in stock if j > i][:1]} for i in places]
            before = [statistics.mean(runs[j]["seconds"] for j in around) for around in near]
            one["speedup"] = statistics.median(a / row["seconds"] for a, row in zip(before, own, strict=True))
            work = counts.get("stock" if kind == "fewer steps" else kind)
            if work and "stock" in counts:
                whole = mean_of(counts["stock"], "full", "flops") * runs[stock[0]]["steps"]
                one["flops_ratio"] = whole / sum(mean_of(work, mode, "flops") for mode in own[0]["modes"])
                one["efficiency"] = one["speedup"] / one["flops_ratio"]
        found.append({"method": name, **one})
    return found


def mean_of(count: dict[str, Any], mode: str, key: str) -> float:
    return statistics.mean(step[key] for step in count[mode])


COLUMNS = {  # header -> key, format, unit
    "s": ("seconds", ".3f", 1),
    "speed-up": ("speedup", ".2f", 1),
    "FLOPs ratio": ("flops_ratio", ".2f", 1),
    "efficiency": ("efficiency", ".2f", 1),
    "full step ms": ("full_card_ms", ".1f", 1),
    "modelled": ("full_modelled_ms", ".1f", 1),
    "busy": ("full_busy_ms", ".1f", 1),
    "kernels": ("full_kernels", ",.0f", 1),
    "partial step ms": ("partial_card_ms", ".2f", 1),
    "modelled, partial": ("partial_modelled_ms", ".2f", 1),
    "busy, partial": ("partial_busy_ms", ".2f", 1),
    "host, partial": ("partial_host_ms", ".2f", 1),
    "kernels, partial": ("partial_kernels", ",.0f", 1),
    "peak GB": ("peak_bytes", ".2f", 1e-9),
    "held GB": ("held_bytes", ".2f", 1e-9),
}


def table_of(rows: list[dict[str, Any]], caption: str = "") -> Table:
    lines = summary(rows)
    columns = {head: how for head, how in COLUMNS.items() if any(how[0] in line for line in lines)}
    shown = Table("method", *columns, box=box.MARKDOWN, caption=f"Medians; the peak is over the weights. {caption}")
    for line in lines:
        cells = [format(line[key] * unit, how) if key in line else "" for key, how, unit in columns.values()]
        shown.add_row(line["method"], *cells[: len(columns)] if "error" not in line else [line["error"][:60]][: len(columns)])
    return shown


if __name__ == "__main__":
    app()
