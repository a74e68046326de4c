"""What does a partial step of one block cost? At the real width of FLUX.1 and PixArt-XL, beside the block in full.

    python benchmarks/blocks.py --output out/blocks.json

The blocks stand in a transformer of a layer or two with random weights. In turn they run in full without the library ("stock"),
as a full step that remembers, and as a partial step. "Own work" is the matrix work of the selected tokens alone; the rest of a
partial step is the selection, gathering and scattering, the sums over all tokens, and, in FLUX, the modulation that the timestep
asks of every block (a product of a vector and a matrix of 3072 x 18432, twice in a double block).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel
from recording import fast_dtype, save
from rich.progress import track
from rich.table import Table

import dit_accel
from dit_accel import TokenCacheConfig
from dit_accel.apply import applied_to
from dit_accel.families.attention import Listening
from dit_accel.pipelines.terminal import show

# FLUX.1-dev's defaults are diffusers'; PixArt-XL's likewise.
TEXT = {"flux": 512, "pixart": 300}
WIDTHS: dict[str, Callable[[], Any]] = {
    "flux": lambda: FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True),
    "pixart": lambda: PixArtTransformer2DModel(num_layers=2, caption_channels=4096, use_additional_conditions=False),
}


def inputs(name: str, tokens: int, text: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments of the transformer for a square picture of so many tokens."""
    side = round(tokens**0.5)
    like = dict(dtype=dtype, device=device)
    caption = torch.randn(1, text, 4096, **like)
    if name == "pixart":
        return dict(
            hidden_states=torch.randn(1, 4, 2 * side, 2 * side, **like),
            encoder_hidden_states=caption,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )
    places = torch.stack(torch.meshgrid(*map(torch.arange, (1, side, side)), indexing="ij"), dim=-1)
    return dict(
        hidden_states=torch.randn(1, side * side, 64, **like),
        encoder_hidden_states=caption,
        pooled_projections=torch.randn(1, 768, **like),
        guidance=torch.ones(1, **like),
        img_ids=places.reshape(-1, 3).to(**like),
        txt_ids=torch.zeros(text, 3, **like),
    )


def own_work(model: Any, counts: dict[str, int], dtype: torch.dtype, device: str) -> dict[str, Callable[[], Any]]:
    """The matrix work of so many tokens in every block, by the block's class."""

    def rows(stream: str, width: int) -> torch.Tensor:
        return torch.randn(1, counts[stream], width, dtype=dtype, device=device)

    block = model.transformer_blocks[0]
    if isinstance(model, PixArtTransformer2DModel):
        cross, forward, width = rows("cross-attention", 1152), rows("feed-forward", 1152), 1152
        caption = torch.randn(1, 300, width, dtype=dtype, device=device)
        keys_and_values = {name: getattr(block.attn2, name)(caption) for name in ("to_k", "to_v")}  # kept from the full step

        def crossing() -> torch.Tensor:
            return block.attn2.processor(Listening(block.attn2, keys_and_values), cross, encoder_hidden_states=caption)

        return {"BasicTransformerBlock": lambda: (crossing(), block.ff(forward))}
    single = model.single_transformer_blocks[0]
    image, text, joint = rows("image", 3072), rows("text", 3072), rows("joint", 3072)

    def joint_work() -> torch.Tensor:
        return single.proj_out(torch.cat([joint, single.act_mlp(single.proj_mlp(joint))], dim=2))

    return {
        "FluxTransformerBlock": lambda: (block.ff(image), block.ff_context(text) if counts["text"] else None),
        "FluxSingleTransformerBlock": joint_work,
    }


class Stopwatch:
    """Seconds of a call, and of every block of a model that is called meanwhile, by the block's class."""

    def __init__(self, device: str) -> None:
        self.device = device

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def call(self, work: Callable[[], Any]) -> float:
        start = self.now()
        work()
        return self.now() - start

    def blocks(self, model: Any, work: Callable[[], Any]) -> dict[str, float]:
        seconds: dict[str, float] = {}
        starts: list[float] = []
        handles = []

        def end(block: Any, *_: Any) -> None:
            seconds[type(block).__name__] = self.now() - starts[-1]

        for block in (*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())):
            handles.append(block.register_forward_pre_hook(lambda *_: starts.append(self.now())))
            handles.append(block.register_forward_hook(end))
        work()
        for handle in handles:
            handle.remove()
        return seconds


def measure(
    name: str, tokens: int, config: TokenCacheConfig, dtype: torch.dtype, device: str, repeats: int
) -> list[dict[str, Any]]:
    """One row a block, with the seconds of all repeats and the median shares of the stock block."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = WIDTHS[name]().eval()
    torch.set_default_dtype(torch.float32)
    arguments, watch = inputs(name, tokens, TEXT[name], dtype, device), Stopwatch(device)

    def step(number: int) -> dict[str, float]:
        time = torch.full((1,), 1 - number / 100, device=device)
        return watch.blocks(model, lambda: model(**arguments, timestep=time, return_dict=False))

    seconds: dict[str, dict[str, list[float]]] = {}
    for repeat in track(range(repeats + 1), description=f"{name}, {tokens} tokens"):
        kinds = {"stock": step(0)}
        run = applied_to(dit_accel.apply(model, config))
        assert run is not None
        kinds |= {"full": step(1), "partial": step(2)}
        counts = {site.stream: site.count for site in run.sites}
        dit_accel.remove(model)
        kinds["own work"] = {block: watch.call(work) for block, work in own_work(model, counts, dtype, device).items()}
        for kind, blocks in kinds.items() if repeat else ():  # the first round warms up
            for block, value in blocks.items():
                seconds.setdefault(block, {}).setdefault(kind, []).append(value)
    rows = []
    for block, kinds in seconds.items():
        shares = {kind: [v / stock for v, stock in zip(values, kinds["stock"], strict=True)] for kind, values in kinds.items()}
        shares["rest"] = [partial - own for partial, own in zip(shares["partial"], shares["own work"], strict=True)]
        share = {kind: statistics.median(values) for kind, values in shares.items()}
        rows.append({"block": block, "tokens": tokens, "config": config.to_dict(), "seconds": kinds, "share": share})
    return rows


@torch.no_grad()
def main(
    models: list[str] = typer.Option(list(WIDTHS), "--model", help="flux or pixart; may be repeated."),
    tokens: list[int] = typer.Option([1024, 4096], help="Image tokens; may be repeated."),
    selectors: list[str] = typer.Option(["random"], "--selector", help="May be repeated."),
    repeats: int = typer.Option(7, min=1, help="Rounds after the first, which warms up."),
    dtype: str = typer.Option(fast_dtype(), help="What is computed in; by default what the machine is fast in."),
    device: str = typer.Option("cuda" if torch.cuda.is_available() else "cpu"),
    output: Path = typer.Option(Path("out/blocks.json"), help="Where the measurements are written."),
) -> None:
    columns = ("block", "image tokens", "selector", "text", "stock s", "full step", "partial step", "own work", "rest")
    table = Table(*columns, caption="Shares of the stock block's time, medians. Rest: partial step less own work.")
    rows = []
    for name in models:
        for number in tokens:
            for selector in selectors:
                for text in ("select", "reuse") if name == "flux" else ("select",):
                    config = TokenCacheConfig(interval=2, cache_ratio=0.9, selector=selector, text_tokens=text)
                    for row in measure(name, number, config, getattr(torch, dtype), device, repeats):
                        rows.append(row)
                        share, stock = row["share"], statistics.median(row["seconds"]["stock"])
                        shares = [f"{share[kind]:.3f}" for kind in ("full", "partial", "own work", "rest")]
                        table.add_row(row["block"], f"{number}", selector, text, f"{stock:.3f}", *shares)
    save(output, rows)
    show(table)
    typer.echo(f"Measurements: {output}")


if __name__ == "__main__":
    typer.run(main)
