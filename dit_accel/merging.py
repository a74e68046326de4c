"""Bipartite soft matching of image tokens, and what it takes to merge and unmerge them.

Source: ToMe-SD, Bolya and Hoffman, CVPRW 2023, arXiv 2303.17604. Pure functions of tensors on an explicit grid.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

CHUNK = 1024  # sources whose similarities to all destinations exist at the same time


@dataclass(frozen=True)
class Matching:
    """Which tokens become one. Merged tokens keep the order of the tokens whose place they take.

    Attributes:
        group: the merged token that every token is part of, [B, N].
        order: the tokens, group by group, [B, N].
        starts: where each group begins in the order, [B, M].
        sizes: tokens in each group, [B, M].
        places: the token whose place, and position, each merged token takes, [B, M].
    """

    group: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor
    sizes: torch.Tensor
    places: torch.Tensor


def destinations(grid: tuple[int, int], stride: tuple[int, int], noise: torch.Tensor | None = None) -> torch.Tensor:
    """One token of every whole cell of the grid, [D], in rising order; tokens of ragged cells at the edges are none.

    Args:
        grid: height and width of the image in tokens.
        stride: height and width of a cell.
        noise: uniform numbers in 0..1, one for every whole cell, [D]; the top-left token of each without.
    """
    (height, width), (down, right) = grid, stride
    rows, columns = height // down, width // right
    inside = torch.zeros(rows * columns, dtype=torch.long) if noise is None else (noise * down * right).long()
    cell = torch.arange(rows * columns, device=inside.device)
    row, column = cell // columns * down + inside // right, cell % columns * right + inside % right
    return (row * width + column).sort().values


def merged_away(tokens: int, grid: tuple[int, int], stride: tuple[int, int], ratio: float) -> int:
    """r = int(tokens * ratio), the number of tokens that merge into others.

    Raises:
        ValueError: if there are not so many tokens that are no destinations, with the largest ratio that would do.
    """
    cells = (grid[0] // stride[0]) * (grid[1] // stride[1])
    sources = tokens - cells if cells else 0
    count = int(round(tokens * ratio, 6))
    if not 0 <= count <= sources:
        raise ValueError(
            f"A merge ratio of {ratio:g} would merge {count} of {tokens} tokens, but cells of {stride[0]} x {stride[1]} leave "
            f"{sources} to merge: the ratio can be at most {sources / tokens:.4g}."
        )
    return count


def match(tokens: torch.Tensor, into: torch.Tensor, count: int) -> Matching:
    """Merge the `count` tokens that are most similar (by cosine) to a destination, each into its best one.

    Args:
        tokens: what is compared, [B, N, C].
        into: destinations, [D], in rising order; all other tokens are sources.
        count: how many sources are merged.
    """
    batch, total, _ = tokens.shape
    is_source = torch.ones(total, dtype=torch.bool, device=tokens.device).scatter(0, into, False)
    sources = is_source.to(torch.int8).argsort(descending=True, stable=True)[: total - len(into)]
    unit = F.normalize(tokens.float(), dim=-1)
    others = unit[:, into].transpose(1, 2)
    likeness, best = zip(*(((unit[:, part] @ others).max(dim=-1)) for part in sources.split(CHUNK)), strict=True)
    chosen = torch.cat(likeness, dim=1).topk(count, dim=-1).indices  # [B, count], into sources
    away = sources[chosen]
    target = into[torch.cat(best, dim=1).gather(1, chosen)]
    head = torch.arange(total, device=tokens.device).expand(batch, -1).scatter(1, away, target)  # whom each token follows
    stays = torch.ones(batch, total, dtype=torch.int8, device=tokens.device).scatter(1, away, 0)
    places = stays.argsort(dim=-1, descending=True, stable=True)[:, : total - count]
    group = (stays.long().cumsum(dim=-1) - 1).gather(1, head)
    sizes = torch.zeros_like(places).scatter_add(1, group, torch.ones_like(group))
    return Matching(group, group.argsort(dim=-1, stable=True), sizes.cumsum(dim=-1) - sizes, sizes, places)


def merge(tokens: torch.Tensor, matching: Matching) -> torch.Tensor:
    """Means of the groups: [B, N, C] -> [B, M, C]. The same sums in the same order every time, on GPUs as well."""
    batch, total, _ = tokens.shape
    first = torch.arange(batch, device=tokens.device)[:, None] * total
    bags, starts = (matching.order + first).flatten(), (matching.starts + first).flatten()
    means: torch.Tensor = F.embedding_bag(bags, tokens.flatten(0, 1), starts, mode="mean").unflatten(0, (batch, -1))
    return means


def unmerge(merged: torch.Tensor, matching: Matching) -> torch.Tensor:
    """Every token gets what its group has: [B, M, C] -> [B, N, C]."""
    batch, groups, _ = merged.shape
    first = torch.arange(batch, device=merged.device)[:, None] * groups
    return F.embedding(matching.group + first, merged.flatten(0, 1))
