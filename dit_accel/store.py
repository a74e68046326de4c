"""What is remembered of a model, rows of it, and sums of it.

The output of a transformer is the list of its leaves, of which only floating tensors are remembered; any other is passed on.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only


def take(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of [B, N, ...]; rows are [k] or [1, k], the same in all of the batch, or [B, k]."""
    if rows.ndim == 1 or len(rows) == 1:
        return values.index_select(1, rows.flatten())
    values = values.expand(len(rows), *values.shape[1:])
    return values.gather(1, rows.reshape(*rows.shape, *[1] * (values.ndim - 2)).expand(*rows.shape, *values.shape[2:]))


def put(target: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The inverse of `take`, in place and in the target's type; returns the target."""
    source, rows, into = narrow(values, target.dtype, target.device), rows.to(target.device), target
    if target.dtype.itemsize == 1:  # torch moves float8 about as bytes only
        into, source = target.view(torch.uint8), source.view(torch.uint8)
    if rows.ndim == 1 or len(rows) == 1:
        into.index_copy_(1, rows.flatten(), source)
    else:
        into.scatter_(1, rows.reshape(*rows.shape, *[1] * (values.ndim - 2)).expand_as(source), source)
    return target


def narrow(features: torch.Tensor, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """To a type and a device; numbers beyond the type's range become its largest."""
    if features.dtype == dtype or (most := torch.finfo(dtype).max) >= torch.finfo(features.dtype).max:
        return features.to(device, dtype)
    if dtype.itemsize == 1:  # float8 has no infinity that could be clamped afterwards
        return features.clamp(-most, most).to(device, dtype)
    return features.to(device, dtype).clamp_(-most, most)  # before, bfloat16 would round float16's largest up


def sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Values of the host on a device; the host does not wait for it."""
    pinned = device.type == "cuda"
    return (values.pin_memory() if pinned else values).to(device, non_blocking=pinned)


def each(function: Callable[..., torch.Tensor], *features: Any) -> Any:
    """A function of tensors, applied to features that may be tuples of them."""
    if isinstance(features[0], tuple):
        return tuple(function(*parts) for parts in zip(*features, strict=True))
    return function(*features)


def size_in_bytes(nest: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(nest) if isinstance(leaf, torch.Tensor))


def counts(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def push(kept: list[list[Any]], times: list[float], time: float, leaves: list[Any], most: int) -> bool:
    """Keep a copy as the newest of `most` + 1, in the memory of the oldest; whether the time is new (Heun's second call is not)."""
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


def _alike(a: Any, b: Any) -> bool:
    return not counts(a) or (counts(b) and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device)


def numbers(weights: Sequence[float]) -> tuple[torch.Tensor, ...]:
    """Weights that a compiled graph takes as they come, on the host; it would hold for the values of floats alone."""
    return torch.tensor(weights, device="cpu").unbind()


def combined(kept: Sequence[list[Any]], weights: Sequence[float | torch.Tensor]) -> list[Any]:
    """The weighted sum of remembered leaves, newest first, in float32."""
    total = []
    for parts in zip(*kept, strict=True):
        if not counts(parts[0]):
            total.append(parts[0])
            continue
        leaf = parts[0].float() * weights[0]
        for part, weight in zip(parts[1:], weights[1:], strict=False):
            leaf += part.float() * weight
        total.append(leaf.to(parts[0].dtype))
    return total


def paired(function: Callable[..., torch.Tensor], *leaves: list[Any]) -> list[Any]:
    """A function of floating tensors, applied leaf by leaf."""
    return [function(*parts) if counts(parts[0]) else parts[0] for parts in zip(*leaves, strict=True)]


def relative_error(guess: list[Any], leaves: list[Any]) -> float:
    """RMS of the difference over that of the leaves; reads one number from the device."""
    pairs = [(g.float(), leaf.float()) for g, leaf in zip(guess, leaves, strict=True) if counts(leaf)]
    off = torch.stack([(g - leaf).square().sum() for g, leaf in pairs]).sum()
    return float((off / torch.stack([leaf.square().sum() for _, leaf in pairs]).sum()).sqrt())


def on_meta(nest: Any) -> Any:
    """The same for counting FLOPs: floating tensors without numbers and in float32, as the copy's weights; others on the CPU."""

    def known(tensor: torch.Tensor) -> torch.Tensor:
        floating = tensor.is_floating_point()
        if not floating and not tensor.is_meta:
            return tensor.detach().cpu()
        return torch.empty_like(tensor, device="meta", dtype=torch.float32 if floating else tensor.dtype)

    return tree_map_only(torch.Tensor, known, nest)


def later_rows(value: Any, batch: int, share: float) -> Any:
    """The last rows of an argument that has one for every picture of a batch: the conditional half of guidance."""
    per_picture = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == batch
    return value[round(batch * (1 - share)) :] if per_picture else value
