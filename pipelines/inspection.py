"""Which places of the picture a selector computes: counted, drawn over the picture, and in two figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

import dit_accel
from dit_accel import Report, TokenCacheConfig, which
from dit_accel.families.table import family_of
from dit_accel.pipelines.generation import Settings, denoise
from dit_accel.pipelines.pictures import psnr, psnr_text, save, side_by_side, stem, unused
from dit_accel.pipelines.progress import denoising
from dit_accel.when import Mode

TILE = 4  # side of a tile, in tokens
COLORS = np.array([[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]], dtype=np.float64)  # rare to often
FIGURES = ("uniformity", "coverage", "row_bias", "column_bias")
STRENGTH = 0.7  # of the colors over the picture


@dataclass(frozen=True)
class Places:
    """How often each place of one picture was computed, over all layers and partial steps of a run.

    Attributes:
        share: of the selections that computed a place, [H, W] in tokens.
        uniformity: entropy of the computed tokens over the tiles of the image / log(tiles), mean of all selections: 1 when
            every tile gets equally many every time, 0 when one tile gets all.
        coverage: share of the tokens that were computed at least once between two full steps, mean of all layers and intervals.
        row_bias, column_bias: Pearson correlation of `share` with the row, and with the column; 0 where all shares are equal.
    """

    share: np.ndarray
    uniformity: float
    coverage: float
    row_bias: float
    column_bias: float


def places(report: Report, picture: int = 0) -> Places:
    """Of one picture of the batch.

    Raises:
        ValueError: if `dit_accel.apply` was not asked to record, or if no token was computed on any partial step.
    """
    height, width = report.grid
    maps, computed, intervals = [], dict[Any, np.ndarray](), _intervals(report)
    for made in report.selections:
        if made.stream == "text":
            continue
        rows = made.tokens
        image = rows[picture if len(rows) > 1 else 0].numpy() - (report.calls[made.call].text if made.stream == "joint" else 0)
        inside = image[(image >= 0) & (image < height * width)]
        maps.append(np.bincount(inside, minlength=height * width).reshape(height, width))
        once = computed.setdefault((made.stream, made.layer, *intervals[made.call]), np.zeros((height, width), bool))
        once |= maps[-1] > 0
    filled = [counts for counts in maps if counts.any()]
    if not filled:
        raise ValueError(
            "No selection was recorded: apply with record=True, a cache ratio below 1 and more steps than the interval."
        )
    share, covered = np.mean(maps, axis=0), float(np.mean([*computed.values()]))
    return Places(share, float(np.mean([uniformity(counts) for counts in filled])), covered, *position_bias(share))


def _intervals(report: Report) -> list[tuple[int, int]]:
    """Of every call, its guidance branch, and how many full steps of that have been."""
    full, found = dict[int, int](), []
    for call in report.calls:
        full[call.branch] = full.get(call.branch, 0) + (call.mode is Mode.FULL)
        found.append((call.branch, full[call.branch]))
    return found


def uniformity(counts: np.ndarray, tile: int = TILE) -> float:
    """Entropy of counts [H, W] over square tiles, each weighed by its area, / log(tiles): 1 if all are filled alike."""
    height, width = counts.shape
    filled, area = [], []
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            part = counts[top : top + tile, left : left + tile]
            filled.append(part.mean())
            area.append(part.size)
    if len(filled) == 1:
        return 1.0
    density = np.array(filled) / np.sum(filled)
    entropy = -np.sum(density * np.log(np.where(density > 0, density, 1.0)))
    return float(entropy / np.log(len(density)))


def position_bias(share: np.ndarray) -> tuple[float, float]:
    """Pearson correlations of share [H, W] with the row and with the column."""
    rows, columns = np.indices(share.shape)

    def correlation(position: Any) -> float:
        if share.std() < 1e-12 or position.std() == 0:
            return 0.0
        return float(np.corrcoef(share.ravel(), position.ravel())[0, 1])

    return correlation(rows), correlation(columns)


def overlay(image: Image.Image, share: np.ndarray, most: float) -> Image.Image:
    """Shares [H, W] from 0 to `most` in colors, dark blue to yellow, over a picture in gray."""
    level = np.clip(share / most if most else share, 0, 1) * (len(COLORS) - 1)
    below = np.minimum(level.astype(int), len(COLORS) - 2)
    colors = COLORS[below] + (level - below)[..., None] * (COLORS[below + 1] - COLORS[below])
    tint = Image.fromarray(colors.round().astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("L").convert("RGB"), tint, STRENGTH)


def usable(pipe: Any, config: TokenCacheConfig) -> list[TokenCacheConfig]:
    """The configuration with every selector that this pipeline can use."""
    known = family_of(pipe.transformer)[1].OBSERVATIONS
    return [replace(config, selector=name) for name in dit_accel.selectors() if which.get(name).needs <= known]


def draw(
    pipe: Any, name: str, prompt: str, configs: list[TokenCacheConfig], settings: Settings, output: Path, log: Console
) -> Table:
    """One picture of what each selector computes, with its figures as JSON beside it and as a table.

    Args:
        pipe: of `dit_accel.pipelines.loading.load`; name: what the user called it.
        configs: that differ in their selectors.
        output: folder of the picture.
        log: where progress goes.

    Raises:
        ValueError: for a selector that this pipeline cannot use, or if nothing is ever selected.
    """
    seen = []
    try:
        with denoising(log, (1 + len(configs)) * settings.steps) as step:
            full = denoise(pipe, [(prompt, settings.seed)], settings, step, applied=False)[0].image
            for config in configs:
                dit_accel.apply(pipe, config, record=True)
                image = denoise(pipe, [(prompt, settings.seed)], settings, step, applied=False)[0].image
                seen.append((config.selector, image, places(dit_accel.report(pipe))))
    finally:
        dit_accel.remove(pipe)
    most = max(float(found.share.max()) for _, _, found in seen)
    table = Table(
        Column("selector", no_wrap=True),
        "uniformity",
        "coverage",
        "row",
        "column",
        "PSNR to full",
        caption=escape(f"{name}, {prompt!r}, seed {settings.seed}"),
    )
    panels, figures = [(full, ["uncached"])], {}
    for selector, image, found in seen:
        likeness = psnr_text(psnr(full, image))
        uniform, row, column = f"{found.uniformity:.3f}", f"{found.row_bias:+.2f}", f"{found.column_bias:+.2f}"
        covered = f"{found.coverage:.1%}"
        table.add_row(escape(selector), uniform, covered, row, column, likeness)
        lines = [selector, f"uniformity {uniform}, coverage {covered}", f"row {row}, column {column}", likeness]
        panels.append((overlay(image, found.share, most), lines))
        figures[selector] = {name: getattr(found, name) for name in FIGURES}
    heading = (
        f"{prompt} ({name}, seed {settings.seed}, N={config.interval} R={config.cache_ratio:g}, age weight {config.age_weight:g}): "
        f"how often each place was computed between full steps, from never (dark blue) to {most:.0%} of the time (yellow)"
    )
    path = output / f"{unused(output, stem(prompt, settings.seed) + '-inspect', set())}.png"
    cache = {key: value for key, value in config.to_dict().items() if key != "selector"}
    record = {"prompt": prompt, "pipeline": name, **asdict(settings), "cache": cache, "selectors": figures, "most": most}
    save(side_by_side(heading, panels, columns=5), path, record)
    log.print(f"Picture: {escape(str(path))}", soft_wrap=True, highlight=False)
    return table
