"""Attention as the stock code computes it: seen on its way, or of the selected tokens alone against all kept keys and values.

PyTorch's scaled_dot_product_attention is where all of diffusers' own processors meet: there, after QK-norm and rotary embedding,
selectors look at it, and the keys and values of the selected tokens refresh those that are kept.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dit_accel.config import TokenCacheConfig
from dit_accel.importance import attention_from_a_sample, norms
from dit_accel.store import put, take

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # of scaled_dot_product_attention
STALE = "set attention='reuse'"
UNSEEN = "choose a selector that looks at no attention, such as random"
Given = dict[str, Any]


class Attention(TorchFunctionMode):
    """Looks at the arguments of the first attention inside, and may change them; RuntimeError at the end if there was none."""

    def __init__(self, name: str, look: Callable[[Given], None], otherwise: str = STALE) -> None:
        super().__init__()
        self.name, self.look, self.otherwise, self.done = name, look, otherwise, False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Given | None = None) -> Any:
        if self.done or func is not F.scaled_dot_product_attention:
            if func is torch.Tensor.unflatten:  # it calls super(), which torch.compile cannot follow inside a mode
                func = torch.unflatten
            return func(*args, **(kwargs or {}))
        self.done, given = True, {**dict(zip(ARGUMENTS, args, strict=False)), **(kwargs or {})}
        self.look(given)
        return func(**given)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if error is None and not self.done:
            raise RuntimeError(
                f"{self.name} does not compute attention by PyTorch's scaled_dot_product_attention: call "
                f"transformer.set_attention_backend('native'), or {self.otherwise}."
            )


def observed(given: Given, name: str) -> torch.Tensor:
    """What a selector needs, by the names of `which.OBSERVATIONS`, [B, S]; keys are those behind QK-norm and rotary embedding."""
    query, key, value = (given[part].transpose(1, 2) for part in ("query", "key", "value"))
    if name == "attention":
        return attention_from_a_sample(query, key, TokenCacheConfig.query_share)
    return norms(key if name == "key_norms" else value)


def remembered(given: Given) -> tuple[Any, ...]:
    """Keys, values and a mask of keys, [B, 1, 1, N]; one of queries too, [B, 1, N, N], is made anew in every block."""
    mask = given.get("attn_mask")
    return given["key"], given["value"], None if mask is None or mask.shape[-2] > 1 else mask


def refresh(given: Given, kept: tuple[Any, ...], rows: torch.Tensor) -> None:
    """Let the selected queries, [B, heads, k, D], see the kept keys and values, in which these rows are now refreshed."""
    if given["key"] is kept[0]:
        return  # of a compiled graph, which has done this already
    for name, value in zip(("key", "value"), kept[:2], strict=True):
        put(value.transpose(1, 2), rows, given[name].transpose(1, 2))
        given[name] = value
    if (mask := given.get("attn_mask")) is not None:
        whole = mask.shape[-2:] == (kept[0].shape[-2],) * 2
        if not whole and kept[2] is None:
            raise ValueError("Attention has a mask of the selected queries alone; set attention='reuse'.")
        given["attn_mask"] = take(mask.transpose(1, 2), rows).transpose(1, 2) if whole else kept[2]


class PerPicture(list[Any]):
    """Tables of positions, one for each picture of the batch: stock attention takes one for all of it."""


def positions(table: Any, lengths: set[int], rows: Callable[[int], torch.Tensor]) -> Any:
    """The selected rows of rotary tables, along the first dimension that is as long as a sequence of tokens (`lengths`)."""
    if not isinstance(table, torch.Tensor):
        return table if table is None else tuple(positions(part, lengths, rows) for part in table)
    dim = next((place for place, size in enumerate(table.shape) if size in lengths), None)
    return table if dim is None else table.index_select(dim, rows(table.shape[dim]))


def picture_by_picture(compute: Callable[..., Any], batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `compute` makes of its place and its own arguments for every picture of a batch, a tensor or a tuple of them."""
    outputs = [compute(place, *picture(args, place, batch), **picture(kwargs, place, batch)) for place in range(batch)]
    return tuple(map(torch.cat, zip(*outputs, strict=True))) if isinstance(outputs[0], tuple) else torch.cat(outputs)


def picture(value: Any, place: int, batch: int) -> Any:
    """What belongs to one picture of a batch, in a nest of arguments."""
    if isinstance(value, PerPicture):
        return value[place]
    if isinstance(value, dict):
        return {key: picture(part, place, batch) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(picture(part, place, batch) for part in value)
    return value[place : place + 1] if isinstance(value, torch.Tensor) and len(value) == batch else value
