"""Measure a pipeline: one picture for every (concept, style) pair, named by the judge.

    python samples/training/measure.py samples/emoji-flux
    python samples/training/measure.py --checkpoint flux --every 6 --size 64      # how far is the training?

Writes measured.json into the pipeline's folder and a labelled contact sheet beside it. With --checkpoint it only prints, and
saves the sheet with the training's sample sheets.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import torch
import typer
from diffusers import AutoencoderTiny, DiffusionPipeline, PixArtSigmaPipeline
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

from common import load_checkpoint
from data import STYLES, WORK, Concept, concepts, pairs, prompt
from judge import OUT, load_judge
from train import Flux, PixArt, image_places

SIZE, LENGTH = 128, 16
FAMILIES = {"flux": Flux, "pixart": PixArt}


def from_checkpoint(family: str) -> tuple[DiffusionPipeline, int]:
    """The pipeline of the averaged weights so far, and how many pictures they have seen."""
    path = WORK / f"emoji-{family}.pt"
    state = load_checkpoint(path)
    if state is None:
        raise SystemExit(f"There is no {path}: start train.py {family} first.")
    model = FAMILIES[family]()
    for p, average in zip(model.parameters(), state["average"], strict=True):
        p.data.copy_(average)
    return model.eval().pipeline(AutoencoderTiny.from_pretrained(WORK / "vae").eval()), state["done"]


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline, rows: list[tuple[int, Concept, str]], size: int, steps: int, guidance: float, seed: int
) -> torch.Tensor:
    """Pictures [n, 3, size, size] in 0..1; row (index, concept, style) starts from the noise of seed + index."""
    extra = {"use_resolution_binning": False, "clean_caption": False} if isinstance(pipe, PixArtSigmaPipeline) else {}
    return pipe(
        [prompt(concept, style) for _, concept, style in rows],
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=LENGTH,
        generator=[torch.Generator().manual_seed(seed + index) for index, _, _ in rows],
        output_type="pt",
        **extra,
    ).images


def contact_sheet(pictures: torch.Tensor, captions: list[str], wrong: list[bool], columns: int, side: int, path: Path) -> None:
    """Pictures [n, 3, h, w] in 0..1 with their captions, red where the judge disagrees; PNG of 256 colours."""
    small = torch.nn.functional.interpolate(pictures, size=(side, side), mode="area")
    tiles = (small.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    font = ImageFont.load_default(8)
    height = side + 11
    page = Image.new("RGB", (columns * side, -(-len(tiles) // columns) * height), "white")
    draw = ImageDraw.Draw(page)
    for i, tile in enumerate(tiles):
        x, y = i % columns * side, i // columns * height
        page.paste(Image.fromarray(tile), (x, y))
        text = captions[i]
        while draw.textlength(text, font) > side - 2:
            text = text[:-1]
        draw.text((x + (side - draw.textlength(text, font)) / 2, y + side), text, "#c00000" if wrong[i] else "#404040", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def shares(ranks: list[int]) -> dict[str, float]:
    return {
        "top1": round(sum(r < 1 for r in ranks) / max(1, len(ranks)), 4),
        "top5": round(sum(r < 5 for r in ranks) / max(1, len(ranks)), 4),
        "pictures": len(ranks),
    }


def main(
    folder: Path = typer.Argument(None, help="Pipeline folder in diffusers format."),
    checkpoint: str = typer.Option(None, help="flux or pixart: measure the training's latest checkpoint instead."),
    every: int = typer.Option(1, help="Take one pair in K, whatever concepts and styles come."),
    seed: int = typer.Option(0),
    size: int = typer.Option(SIZE, help="Side in pixels; a checkpoint that has only seen 64 px wants 64."),
    steps: int = typer.Option(None, help="[default: the family's]"),
    guidance: float = typer.Option(None, help="[default: the family's]"),
    batch: int = typer.Option(15),
    threads: int = typer.Option(torch.get_num_threads()),
    judge_path: Path = typer.Option(OUT, "--judge"),
) -> None:
    torch.set_num_threads(threads)
    if (folder is None) == (checkpoint is None):
        raise SystemExit("Give either a pipeline folder or --checkpoint flux or --checkpoint pixart.")
    done = None
    if checkpoint:
        pipe, done = from_checkpoint(checkpoint)
        if checkpoint == "flux":
            pipe._prepare_latent_image_ids = lambda batch, height, width, *args: image_places(height)
    else:
        pipe = DiffusionPipeline.from_pretrained(folder)
    family = FAMILIES["pixart" if isinstance(pipe, PixArtSigmaPipeline) else "flux"]
    steps, guidance = steps or family.steps, family.guidance if guidance is None else guidance
    pipe.set_progress_bar_config(disable=True)
    judge, codes = load_judge(judge_path)

    held = {(c.code, style) for c, style in pairs()[1]}
    everything = [(c, style) for c in concepts() for style in STYLES]
    chosen = sorted(random.Random(0).sample(range(len(everything)), len(everything) // every))
    rows = [(index, *everything[index]) for index in chosen]
    parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    pictures = torch.cat([generate(pipe, part, size, steps, guidance, seed) for part in track(parts, "pictures")])
    with torch.no_grad():
        order = torch.cat([judge(part * 2 - 1) for part in pictures.split(64)]).argsort(1, descending=True)
    ranks = [order[i].tolist().index(codes.index(c.code)) for i, (_, c, _) in enumerate(rows)]
    names = {c.code: c.name for c in concepts()}
    mistakes = Counter((c.name, names[codes[order[i, 0]]]) for i, (_, c, _) in enumerate(rows) if ranks[i])
    pick = lambda wanted: shares([r for r, row in zip(ranks, rows, strict=True) if wanted(row)])  # noqa: E731
    result = {
        "seed": seed,
        "size": size,
        "steps": steps,
        "guidance_scale": guidance,
        "all": pick(lambda row: True),
        "trained": pick(lambda row: (row[1].code, row[2]) not in held),
        "held_out": pick(lambda row: (row[1].code, row[2]) in held),
        **{f"style_{style}": pick(lambda row, style=style: row[2] == style) for style in STYLES},
        "mistakes": [{"asked": a, "named": b, "pictures": n} for (a, b), n in mistakes.most_common()],
    }
    for name, value in result.items():
        if isinstance(value, dict):
            typer.echo(f"{name:14} top-1 {value['top1']:6.1%}  top-5 {value['top5']:6.1%}  of {value['pictures']}")
    typer.echo("most confused: " + ", ".join(f"{a} as {b} ({n})" for (a, b), n in mistakes.most_common(10)))
    if folder and every == 1:
        (folder / "measured.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    page = folder.with_suffix(".png") if folder else WORK / f"sheets/measured-{checkpoint}-{done:07d}.png"
    contact_sheet(pictures, [c.name for _, c, _ in rows], [r > 0 for r in ranks], 18 if every == 1 else 12, 64, page)
    typer.echo(f"contact sheet: {page}" + ("" if done is None else f" ({done} pictures seen)"))


if __name__ == "__main__":
    typer.run(main)
