"""What the training scripts share: resumable checkpoints, the autoencoder and sample sheets."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from PIL import Image


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write all of it or nothing: an interrupted run keeps the checkpoint before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    return torch.load(path, device, weights_only=True) if path.exists() else None


def open_vae(path: Path, device: str = "cpu") -> AutoencoderTiny:
    """The autoencoder in the layout that convolutions like."""
    return AutoencoderTiny.from_pretrained(path).to(device, memory_format=torch.channels_last).eval()


def write_json(path: Path, content: Any) -> None:
    """All of it or nothing, as a checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(part, path)


def clean_config(path: Path) -> None:
    """Take out of a saved config where it was loaded from, and a key that AutoencoderTiny writes and then warns about."""
    settings = json.loads(path.read_text())
    for key in ("_name_or_path", "block_out_channels"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def copy_card(folder: Path) -> None:
    """A finished model gets the card that lies beside its folder in samples/, if its name has one."""
    card = Path(__file__).parent.parent / f"{folder.name}.md"
    if card.exists():
        shutil.copy(card, folder / "README.md")


def sheet(pictures: torch.Tensor, columns: int, path: Path) -> None:
    """Save pictures [n, 3, h, w] in -1..1 as one PNG, row by row."""
    pixels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    h, w = pixels.shape[1:3]
    page = Image.new("RGB", (columns * w, -(-len(pixels) // columns) * h), "white")
    for i, tile in enumerate(pixels):
        page.paste(Image.fromarray(tile), (i % columns * w, i // columns * h))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
