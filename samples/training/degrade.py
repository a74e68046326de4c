"""Worse versions of pictures, for the reward to learn from: each kind in any strength, the picture itself at strength 0."""

from __future__ import annotations

import torch
import torch.nn.functional as F

DEGRADATIONS = ("blur", "noise", "blocking", "colour", "shuffle")


def move(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A picture [3, h, w] in -1..1, a little turned, scaled, shifted and perhaps mirrored; white comes in from outside."""
    draw = torch.rand(6, generator=generator)
    angle, scale, mirror = (draw[0] - 0.5) * 0.3, ((draw[1] - 0.5) * 0.3).exp(), 1 if draw[2] < 0.5 else -1
    shift_x, shift_y = ((draw[3:5] - 0.5) * 0.2).tolist()
    cos, sin = (angle.cos() * scale).item(), (angle.sin() * scale).item()
    turn = torch.tensor([[[cos * mirror, -sin, shift_x], [sin * mirror, cos, shift_y]]])
    grid = F.affine_grid(turn, [1, *image.shape], align_corners=False)
    return 1 - F.grid_sample(1 - image[None], grid, align_corners=False)[0]


def degrade(image: torch.Tensor, kind: str, strengths: list[float], generator: torch.Generator) -> list[torch.Tensor]:
    """Versions of a picture [3, h, w] in -1..1 that differ in strength (0 to 1) alone: noise, tint and places are the same."""
    _, h, w = image.shape
    if kind == "blur":
        return [blur(image, 5 * strength) for strength in strengths]
    if kind == "noise":
        noise = torch.randn(image.shape, generator=generator)
        return [(image + 0.8 * strength * noise).clamp(-1, 1) for strength in strengths]
    if kind == "blocking":
        side = 4 * 2 ** int(torch.randint(3, (), generator=generator))
        blocks = F.interpolate(F.avg_pool2d(image[None], side), scale_factor=side)[0]
        return [image.lerp(blocks, strength) for strength in strengths]
    if kind == "colour":
        signs = 2 * torch.randint(2, (2, 3, 1, 1), generator=generator) - 1
        gain, tint = signs * (0.2 + 0.5 * torch.rand(2, 3, 1, 1, generator=generator))
        return [(1 - (1 - image) * (1 + strength * gain) + strength * tint).clamp(-1, 1) for strength in strengths]
    if kind == "shuffle":
        side = 8 * 2 ** int(torch.randint(2, (), generator=generator))
        count = h * w // side**2
        order = torch.randperm(count, generator=generator)
        patches = F.unfold(image[None], side, stride=side)
        versions = []
        for strength in strengths:
            moved = order[: max(2, round(strength * count)) if strength else 0]
            mixed = patches.clone()
            mixed[:, :, moved] = patches[:, :, moved.roll(1)]
            versions.append(F.fold(mixed, (h, w), side, stride=side)[0])
        return versions
    raise ValueError(f"There is no degradation {kind!r}; choose one of {', '.join(DEGRADATIONS)}.")


def blur(image: torch.Tensor, deviation: float) -> torch.Tensor:
    """Gaussian, with a deviation in pixels."""
    if deviation == 0:
        return image
    reach = max(1, round(3 * deviation))
    places = torch.arange(-reach, reach + 1.0)
    kernel = torch.exp(-0.5 * (places / deviation) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(image[None], (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)[0]
