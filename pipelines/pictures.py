"""Pictures as files: written atomically, with everything they were made from inside and beside them."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

PANEL = 320  # smallest side at which a picture of a side-by-side is shown, in pixels
MARGIN, FONT = 12, 16
ORIENTATION = 0x0112  # of EXIF
MANIFEST = "manifest.jsonl"
TEXTS = ("prompt", "pipeline", "pipeline_class", "method", "dtype", "device")  # of a record, in a PNG as they are

Picture = Image.Image | NDArray[np.uint8]  # an array is [height, width, 3]


def as_shown(picture: Image.Image) -> Image.Image:
    """A picture as viewers show it: turned as its EXIF data say, its transparent places white, gray of 16 bits in 8 bits.

    A picture that has none of these is returned as it is, in its own mode.

    Raises:
        ValueError: for whole or floating-point numbers of 32 bits, whose range is unknown.
    """
    if picture.mode in ("I", "F"):
        name = getattr(picture, "filename", "") or "The picture"
        raise ValueError(f"{name} has pixels of 32 bits (mode {picture.mode}), whose range is unknown; save it in 8 bits.")
    if picture.getexif().get(ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture).astype(np.uint32) / 257).round().astype(np.uint8))
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture


def rgb(picture: Picture) -> NDArray[np.uint8]:
    """[height, width, 3] of a picture of Pillow as viewers show it, or an array that is this already."""
    array = np.asarray(as_shown(picture).convert("RGB") if isinstance(picture, Image.Image) else picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(f"An array of {array.dtype} {list(array.shape)} is no picture; give uint8 [height, width, 3].")
    return array


def rgb_pair(a: Picture, b: Picture) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Two pictures of one size, each [height, width, 3]."""
    first, second = rgb(a), rgb(b)
    if first.shape != second.shape:
        sizes = " and ".join(f"{width} x {height}" for height, width, _ in (first.shape, second.shape))
        raise ValueError(f"The pictures have {sizes} pixels; compare pictures of one size.")
    return first, second


def squared_error(a: Picture, b: Picture) -> float:
    """Mean squared error of two RGB pictures of 8 bits over all pixels and channels, from 0 to 255**2."""
    first, second = rgb_pair(a, b)
    return float(np.mean((first.astype(np.float64) - second) ** 2))


def decibels(error: float) -> float:
    """Peak signal-to-noise ratio, 10 log10(255**2 / error), in dB, of a mean squared error; infinite if there is none."""
    return 10 * math.log10(255**2 / error) if error else math.inf


def psnr(a: Picture, b: Picture) -> float:
    """Peak signal-to-noise ratio of two RGB pictures of 8 bits, in dB; infinite if they are identical."""
    return decibels(squared_error(a, b))


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


def write_atomically(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write a file atomically: whole or not at all, also when interrupted or when the disk is full.

    Args:
        path: the file; its folder is made if needed.
        data: what it will hold.
        replace: whether a file that is there is replaced.

    Raises:
        FileExistsError: if the file is there, or appears meanwhile, and is not to be replaced.
        OSError: if it cannot be written; it names the file.
    """
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(part, 0o666 & ~current_umask())  # mkstemp makes files that only their owner can read
            if replace:
                os.replace(part, path)
            else:
                _link(part, path)
        finally:
            Path(part).unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error of the system in here names this file, not a temporary one."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error


def _link(part: str, path: Path) -> None:
    """Give a file a name that no other has, in one step where the file system can."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links here
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(part, path)


def check_folder(folder: Path) -> None:
    """ValueError unless files can be written into this folder, which need not exist yet. Nothing is left behind."""
    place = folder.absolute()
    try:
        while not _is_there(place):
            place = place.parent
        if not place.is_dir():
            raise ValueError(f"{folder} cannot be the folder of pictures: {place} is a file.")
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ValueError(f"{folder} cannot be the folder of pictures: {place}: {error.strerror}.") from error


def _is_there(path: Path) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def png(image: Image.Image, record: dict[str, Any]) -> bytes:
    """A PNG with every entry of `record` as a text chunk."""
    info = PngInfo()
    for key, value in record.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def save(image: Image.Image, path: Path, record: dict[str, Any], *, replace: bool = True) -> None:
    """Write a PNG with the record in it, the record as JSON beside it, and a line about it into the folder's manifest.

    The manifest has one JSON object a line: the record, and the name of the picture's file as `file`. Of two lines about one
    file, the later one counts.

    Raises:
        FileExistsError: if there is such a PNG, and it is not to be replaced.
        OSError: if something cannot be written; it names the file.
    """
    write_atomically(path, png(image, record), replace=replace)
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path.with_suffix(".json"), text.encode())
    line = json.dumps({"file": path.name, **record}, ensure_ascii=False, allow_nan=False) + "\n"
    manifest = path.parent / MANIFEST
    with _naming(manifest), open(manifest, "ab", buffering=0) as file:  # one write, so that lines of several processes stay whole
        file.write(line.encode())


def read_record(path: Path) -> dict[str, Any]:
    """The record that `save` has put into a PNG or a JSON file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no record.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; give a picture of `dit-accel generate`, or the JSON file beside it.")
    record: Any = None
    try:
        if path.suffix.lower() == ".json":
            record = json.loads(path.read_text(encoding="utf-8-sig"))
        else:
            with Image.open(path) as image:
                texts: dict[str, str] = getattr(image, "text", {})
                record = {key: text if key in TEXTS else json.loads(text) for key, text in texts.items()}
    except (OSError, SyntaxError, ValueError):
        pass
    if not isinstance(record, dict) or not {"prompt", "pipeline", "method"} <= set(record):
        raise ValueError(f"{path} holds no settings; give a picture of `dit-accel generate`, or the JSON file beside it.")
    return record


def stem(prompt: str, seed: int) -> str:
    """A file name for a picture, without suffix: the prompt's letters and digits, then the seed."""
    slug = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-").encode()[:60].decode(errors="ignore").rstrip("-")
    return f"{slug or 'picture'}-seed{seed}"


def unused(folder: Path | None, name: str, taken: set[str], endings: Sequence[str] = ("",)) -> str:
    """`name`, or `name-2`, `name-3` and so on: the first that is not in `taken`, and that no file has with one of the endings.

    Without a folder, what is in it may be overwritten.
    """
    number = 1
    while True:
        candidate = name if number == 1 else f"{name}-{number}"
        there = folder is not None and any(any(folder.glob(f"{candidate}{ending}.*")) for ending in endings)
        if candidate not in taken and not there:
            taken.add(candidate)
            return candidate
        number += 1
