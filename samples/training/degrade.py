"""Worse versions of pictures, for the reward to learn from: each kind in any strength, the picture itself at strength 0."""

from __future__ import annotations

import torch
import torch.nn.functional as F

DEGRADATIONS = ("blur", "noise", "blocking", "color", "shuffle")
FLAT = 0.02  # standard deviation of the pixels of a patch that shows nothing


def degrade(image: torch.Tensor, kind: str, strengths: list[float], generator: torch.Generator) -> list[torch.Tensor]:
    """Versions of a picture [3, h, w] in -1..1 that differ in strength (0 to 1) alone: noise, tint and places are the same.

    Height and width are multiples of 16.
    """
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
    if kind == "color":
        mean = image.mean((1, 2), keepdim=True)
        gain = (torch.randint(2, (3, 1, 1), generator=generator) * 2 - 1) * (0.5 + 0.5 * torch.rand(3, 1, 1, generator=generator))
        cast = torch.rand(3, 1, 1, generator=generator)
        tint = -mean.sign() * cast / cast.max()  # away from where a channel cannot go further
        return [((image - mean) * (1 + strength * gain) + mean + strength * tint).clamp(-1, 1) for strength in strengths]
    if kind == "shuffle":
        side = 8 * 2 ** int(torch.randint(2, (), generator=generator))
        patches = F.unfold(image[None], side, stride=side)
        detailed = (patches[0].unflatten(0, (3, -1)).std(1).amax(0) > FLAT).nonzero()[:, 0]
        places = detailed if len(detailed) > 1 else torch.arange(patches.shape[2])  # exchanging flat patches would show nothing
        order = places[torch.randperm(len(places), generator=generator)]
        versions = []
        for strength in strengths:
            moved = order[: max(2, round(strength * len(order))) if strength else 0]
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
