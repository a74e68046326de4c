"""Contact sheets: pictures with captions, small enough to keep in a repository."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont


def contact_sheet(pictures: torch.Tensor, captions: list[str], wrong: list[bool], columns: int, side: int, path: Path) -> None:
    """Square pictures [n, 3, h, w] in -1..1 with their captions, red where the judge disagrees; PNG of 256 colors."""
    small = F.interpolate(pictures, size=(side, side), mode="area")
    tiles = ((small.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
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
