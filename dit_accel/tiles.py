"""The picture's tokens, tile by tile."""

import torch
import torch.nn.functional as F


def to_tiles(values: torch.Tensor, grid: tuple[int, int], side: int, fill: float) -> torch.Tensor:
    """[R, H * W] -> [R, tiles, side * side]; a row of one (H = 1) is cut into pieces of `side`. Ragged edges hold `fill`."""
    (height, width), down = grid, side if grid[0] > 1 else 1
    padded = F.pad(values.view(-1, height, width), (0, -width % side, 0, -height % down), value=fill)
    rows, columns = padded.shape[1] // down, padded.shape[2] // side
    return padded.view(-1, rows, down, columns, side).transpose(2, 3).reshape(-1, rows * columns, down * side)


def from_tiles(tiled: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
    """The inverse of `to_tiles`: [R, tiles, side * side] -> [R, H * W]."""
    (height, width), down = grid, side if grid[0] > 1 else 1
    rows, columns = -(-height // down), -(-width // side)
    padded = tiled.view(-1, rows, columns, down, side).transpose(2, 3).reshape(-1, rows * down, columns * side)
    return padded[:, :height, :width].flatten(1)
