"""Pictures as files: written whole or not at all, with everything they came from inside and beside them."""

from __future__ import annotations

import io
import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

PANEL = 320  # smallest side at which a picture of a side-by-side is shown, in pixels
MARGIN, FONT = 12, 16


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB pictures of 8 bits, in dB; infinite if they are identical."""
    difference = np.asarray(a.convert("RGB"), dtype=np.float64) - np.asarray(b.convert("RGB"), dtype=np.float64)
    error = float(np.mean(difference**2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def psnr_text(value: float) -> str:
    return "identical" if math.isinf(value) else f"{value:.1f} dB"


def side_by_side(prompt: str, panels: list[tuple[Image.Image, list[str]]], columns: int | None = None) -> Image.Image:
    """One picture: the prompt on top, below it the panels (picture, lines of its label) from left to right.

    Args:
        prompt: the heading.
        panels: all of one size.
        columns: panels in a row; None puts all in one.
    """
    columns = min(columns or len(panels), len(panels))
    font = ImageFont.load_default(FONT)
    factor = max(1, math.ceil(PANEL / min(panels[0][0].size)))
    width, height = (side * factor for side in panels[0][0].size)
    line = FONT + 6
    lines = wrap(prompt, font, columns * (width + MARGIN) - MARGIN)
    top = MARGIN + line * len(lines) + MARGIN // 2
    row = height + max(len(label) for _, label in panels) * line + MARGIN + MARGIN // 2
    page = Image.new("RGB", (MARGIN + columns * (width + MARGIN), top + row * math.ceil(len(panels) / columns)), "white")
    draw = ImageDraw.Draw(page)
    for i, text in enumerate(lines):
        draw.text((MARGIN, MARGIN + i * line), text, "black", font)
    for i, (image, label) in enumerate(panels):
        left, above = MARGIN + i % columns * (width + MARGIN), top + i // columns * row
        page.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (left, above))
        for j, text in enumerate(label):
            draw.text((left, above + height + 4 + j * line), text, "black", font)
    return page


def wrap(text: str, font: Any, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, also when interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(part, 0o666 & ~current_umask())  # mkstemp makes files that only their owner can read
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save(image: Image.Image, path: Path, record: dict[str, Any]) -> None:
    """Write a PNG with every entry of `record` as a text chunk, and the record as JSON beside it."""
    info = PngInfo()
    for key, value in record.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    write_atomically(path, buffer.getvalue())
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path.with_suffix(".json"), text.encode())


def stem(prompt: str, seed: int) -> str:
    """A file name for a picture, without suffix: the prompt's letters and digits, then the seed."""
    slug = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-").encode()[:60].decode(errors="ignore").rstrip("-")
    return f"{slug or 'picture'}-seed{seed}"


def unused(folder: Path, name: str, taken: set[str]) -> str:
    """`name`, or `name-2`, `name-3` and so on: the first that is not in `taken` and that no file in `folder` begins with."""
    number = 1
    while True:
        candidate = name if number == 1 else f"{name}-{number}"
        if candidate not in taken and not any(folder.glob(f"{candidate}.*")):
            taken.add(candidate)
            return candidate
        number += 1
