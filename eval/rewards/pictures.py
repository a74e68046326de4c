"""Pictures as the CLIP family of models reads them, and pairs of a prompt and a picture in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dit_accel.pipelines.pictures import as_shown

Picture = Image.Image | str | Path

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def batches(
    prompts: str | Sequence[str], pictures: Picture | Sequence[Picture], batch_size: int
) -> Iterator[tuple[list[str], list[Image.Image]]]:
    """Prompts with their pictures, at most batch_size at a time; pictures are opened when their turn comes.

    One prompt serves every picture, and one picture serves every prompt.

    Raises:
        ValueError: unless there is one picture for every prompt, or for a file that is no picture.
        FileNotFoundError: for a picture that does not exist.
    """
    if isinstance(pictures, (str, Path, Image.Image)):
        pictures = [pictures] * len(listed(prompts))
    if isinstance(prompts, str):
        prompts = [prompts] * len(pictures)
    if len(prompts) != len(pictures):
        raise ValueError(f"There are {len(prompts)} prompts and {len(pictures)} pictures; give one picture for every prompt.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give 1 or more.")
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        yield list(prompts[part]), [open_picture(picture) for picture in pictures[part]]


def listed(prompts: str | Sequence[str]) -> Sequence[str]:
    """One prompt as a list of one: a string is never read letter by letter."""
    return [prompts] if isinstance(prompts, str) else prompts


def open_picture(picture: Picture) -> Image.Image:
    """The picture of this path, or one that is open already, as viewers show it; see `dit_accel.pipelines.pictures.as_shown`.

    The original code of CLIP and ImageReward turns every picture to RGB at once: it does not turn photographs by their EXIF
    data, shows the color beneath transparent places, and cuts gray of 16 bits off at 255, so that nearly all of it is white.
    """
    if isinstance(picture, Image.Image):
        return as_shown(picture)
    if not Path(picture).is_file():
        raise FileNotFoundError(f"There is no picture {picture}; generate it first or correct its path.")
    try:
        with Image.open(picture) as opened:
            opened.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL raises any of them for some files
        raise ValueError(f"{picture} cannot be read as a picture: {error}; generate it again.") from error
    return as_shown(opened)


def preprocess(picture: Image.Image, size: int) -> torch.Tensor:
    """The middle of a picture as CLIP prepares it, [3, size, size].

    The short side is resized to `size` with PIL's bicubic filter in the mode of the picture itself (a palette has no
    colors between its entries, so there PIL takes the nearest), the long side in proportion, rounded down. Only the square
    that is cut from the middle is turned into RGB. Sizes and offsets are rounded as torchvision rounds them.
    """
    short = min(picture.size)
    width, height = (int(size * side / short) for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    square = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(square.convert("RGB"))).permute(2, 0, 1)
    return (pixels / 255 - MEAN) / STD
