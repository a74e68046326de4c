"""What is remembered of a model's outputs, and sums of it. An output is the list of its leaves; only floating tensors count."""

from __future__ import annotations

from typing import Any

import torch


def counts(leaf: Any) -> bool:
    """Whether a leaf is remembered and forecast; any other is passed on as it is."""
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def push(kept: list[list[Any]], times: list[float], time: float, leaves: list[Any], most: int) -> bool:
    """Keep a copy of these leaves as the newest of at most `most` + 1, in the memory of the oldest where there is one.

    Returns:
        Whether this is another time than the newest's. Heun calls twice at one time: the second replaces the first.
    """
    if kept and not all(map(_alike, kept[0], leaves)):
        kept.clear()
        times.clear()
    new = not times or times[0] != time
    if not new or len(kept) > most:
        place = 0 if not new else -1
        times.pop(place)
        memory = kept.pop(place)
    else:
        memory = [torch.empty_like(leaf) if counts(leaf) else leaf for leaf in leaves]
    for target, leaf in zip(memory, leaves, strict=True):
        if counts(leaf):
            target.copy_(leaf)  # pipelines write into what they are given
    kept.insert(0, memory)
    times.insert(0, time)
    return new


def combined(kept: list[list[Any]], weights: tuple[float, ...]) -> list[Any]:
    """The weighted sum of remembered leaves, newest first, in float32."""
    total = []
    for parts in zip(*kept, strict=True):
        if not counts(parts[0]):
            total.append(parts[0])
            continue
        leaf = parts[0].float() * weights[0]
        for part, weight in zip(parts[1:], weights[1:], strict=False):
            leaf = leaf.add_(part, alpha=weight)
        total.append(leaf.to(parts[0].dtype))
    return total


def minus(leaves: list[Any], others: list[Any]) -> list[Any]:
    return [a - b if counts(a) else a for a, b in zip(leaves, others, strict=True)]


def halves(leaves: list[Any]) -> tuple[list[Any], list[Any]]:
    """First and second half of a batch."""
    first, second = zip(*(leaf.chunk(2) if counts(leaf) else (leaf, leaf) for leaf in leaves), strict=True)
    return list(first), list(second)


def joined(first: list[Any], second: list[Any]) -> list[Any]:
    """The inverse of `halves`."""
    return [torch.cat([a, b]) if counts(a) else a for a, b in zip(first, second, strict=True)]


def copied(leaves: list[Any]) -> list[Any]:
    return [leaf.clone() if counts(leaf) else leaf for leaf in leaves]


def relative_error(guess: list[Any], leaves: list[Any]) -> float:
    """RMS of the difference over that of the leaves; reads one number from the device."""
    pairs = [(g.float(), leaf.float()) for g, leaf in zip(guess, leaves, strict=True) if counts(leaf)]
    off = torch.stack([(g - leaf).square().sum() for g, leaf in pairs]).sum()
    return float((off / torch.stack([leaf.square().sum() for _, leaf in pairs]).sum()).sqrt())


def size_in_bytes(leaves: list[Any]) -> int:
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))


def _alike(a: Any, b: Any) -> bool:
    return not counts(a) or (counts(b) and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device)


def on_meta(value: Any) -> Any:
    """The same nest of lists, tuples and dicts with tensors without numbers; floating ones are float32, as the copy is."""
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value, device="meta", dtype=torch.float32 if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {key: on_meta(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_meta(part) for part in value)
    return value


def forget_numbers(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call of the transformer, as the counter keeps them."""
    return {name: on_meta(value) for name, value in given.items() if name != "self"}


def later_rows(value: Any, batch: int, share: float) -> Any:
    """The last rows of an argument that has one for every picture of a batch: the conditional half of guidance."""
    per_picture = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == batch
    return value[round(batch * (1 - share)) :] if per_picture else value
