"""Fetch the public emoji sets from npm and render them at 128 px: pictures on white, and the concepts' drawings with transparency.

    python samples/training/prepare.py

Needs npm, and resvg-py from the `training` extra. Fluent and Noto are what the generators see; Noto v1 joins them for the
autoencoder; Twemoji and EmojiOne (CC BY 4.0) are seen by the judge and the reward.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import resvg_py
import torch
import typer
from PIL import Image
from rich.progress import track
from safetensors.torch import save_file

from data import WORK, concepts

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "emojibase": "emojibase-data@17.0.0",
}
AUTOENCODER_SETS = ("noto", "noto-v1", "fluent-flat", "fluent-3d")


def fetch(name: str) -> Path:
    """Download and unpack one npm package; returns its folder."""
    folder = WORK / "npm" / name
    if not (folder / "package.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(
            ["npm", "pack", "--silent", PACKAGES[name]], cwd=folder.parent, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        with tarfile.open(folder.parent / archive) as tar:
            for member in tar.getmembers():
                member.name = member.name.split("/", 1)[-1]
                tar.extract(member, folder, filter="data")
    return folder


def svg_of(icons: dict, name: str) -> str | None:
    icon = icons["icons"].get(name)
    if icon is None and name in icons.get("aliases", {}):
        icon = icons["icons"].get(icons["aliases"][name]["parent"])
    if icon is None:
        return None
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">{icon["body"]}</svg>'
    )


def resized(data: bytes, size: int) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)


def on_white(picture: Image.Image) -> np.ndarray:
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))


def stacked(rows: list[np.ndarray]) -> torch.Tensor:
    """[n, channels, size, size]"""
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def main(size: int = typer.Option(128, help="Side of the rendered pictures in pixels.")) -> None:
    folders = {name: fetch(name) for name in PACKAGES}
    plain = lambda code: code.lower().replace("-fe0f", "")  # noqa: E731
    labels = [entry for entry in json.loads((folders["emojibase"] / "en/data.json").read_text()) if "group" in entry]
    icons = {n: json.loads((folders[n] / "icons.json").read_text()) for n in PACKAGES if (folders[n] / "icons.json").exists()}
    chars = {n: {plain(k): v for k, v in json.loads((folders[n] / "chars.json").read_text()).items()} for n in icons}
    webp = {plain(path.stem): path for path in (folders["fluent-3d"] / "assets").glob("*.webp")}

    def render(name: str, code: str) -> Image.Image | None:
        if name == "fluent-3d":
            return resized(webp[code].read_bytes(), size) if code in webp else None
        icon = chars[name].get(code) or chars["noto"].get(code, "")  # sets without code points share Noto's names
        svg = svg_of(icons[name], icon)
        if svg is None:
            return None
        png = resvg_py.svg_to_bytes(svg_string=svg, width=4 * size // 2, height=4 * size // 2)
        return resized(bytes(png), size)

    chosen = [concept.code for concept in concepts()]
    tensors, drawings, order = {}, {}, {}
    for name in (*AUTOENCODER_SETS, "twemoji", "emojione"):
        rows, drawn, codes = [], [], []
        others = [plain(entry["hexcode"]) for entry in labels] if name in AUTOENCODER_SETS else []
        for code in track(list(dict.fromkeys([*chosen, *others])), description=f"{name:12}"):
            picture = render(name, code)
            if picture is not None:
                rows.append(on_white(picture))
                codes.append(code)
                if code in chosen:  # they come first
                    drawn.append(np.asarray(picture))
            elif code in chosen and name in ("noto", "fluent-flat", "fluent-3d"):
                raise SystemExit(f"{name} has no picture of {code}: take it out of concepts.txt.")
        tensors[name], drawings[name], order[name] = stacked(rows), stacked(drawn), codes
    save_file(tensors, WORK / f"pictures-{size}.safetensors")
    save_file(drawings, WORK / f"drawings-{size}.safetensors")
    (WORK / "order.json").write_text(json.dumps(order))
    typer.echo(", ".join(f"{name}: {len(codes)}" for name, codes in order.items()))


if __name__ == "__main__":
    typer.run(main)
