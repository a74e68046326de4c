"""Pictures altered at random, so that a network trained on few drawings knows them in other renderings."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(n).uniform_(low, high, generator=generator)


def turn(images: torch.Tensor, generator: torch.Generator, most: float = 1.0) -> torch.Tensor:
    """Turn, scale, stretch and shift pictures [n, 3, h, w]: by up to 20 degrees, 30 % and a tenth of the side times `most`."""
    angle, scale, stretch, x, y = (most * uniform(len(images), -limit, limit, generator) for limit in (0.35, 0.28, 0.12, 0.2, 0.2))
    scale, stretch = scale.exp(), stretch.exp()
    row_x = torch.stack([angle.cos() * scale * stretch, -angle.sin() * scale, x], 1)
    row_y = torch.stack([angle.sin() * scale * stretch, angle.cos() * scale, y], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def roughen(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Recolor, cover, blur and add noise to pictures [n, 3, h, w] in -1..1."""
    n, _, h, w = images.shape
    column = lambda low, high, channels=1: uniform(n * channels, low, high, generator).view(n, channels, 1, 1)  # noqa: E731
    x = images.mean(1, keepdim=True).lerp(images, column(0.6, 1.4))
    x = 1 - (1 - x) * column(0.75, 1.2) * column(0.85, 1.15, 3)
    x = x + column(-0.1, 0.1, 3)
    rows, columns = torch.arange(h).view(1, 1, h, 1) / h, torch.arange(w).view(1, 1, 1, w) / w
    covered = ((rows - column(0, 1)).abs() < column(-0.1, 0.12)) & ((columns - column(0, 1)).abs() < column(0.03, 0.12))
    x = torch.where(covered, column(-1, 1, 3), x)
    parts = []
    for part in x.chunk(4):
        share = uniform(1, 0.33, 1.6, generator).item()
        small = F.interpolate(part, scale_factor=share, mode="area") if share < 1 else part
        parts.append(F.interpolate(small, size=(h, w), mode="bilinear", align_corners=False))
    x = torch.cat(parts)
    return x + column(0, 0.08) * torch.randn(x.shape, generator=generator)


def augment(images: torch.Tensor, generator: torch.Generator, most: float = 1.0, mirror: bool = True) -> torch.Tensor:
    """Turn and roughen pictures [n, 3, h, w] in -1..1; `most` limits how far their subject moves, and half of them are mirrored
    unless places matter."""
    if mirror:
        chosen = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(chosen[:, None, None, None], images.flip(-1), images)
    return roughen(turn(images, generator, most), generator)
