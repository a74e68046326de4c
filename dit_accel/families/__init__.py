"""One file a transformer family: its attention processors, its token-wise blocks, where its tokens lie."""

from __future__ import annotations

from typing import Any, Protocol

from dit_accel.families import flux, pixart
from dit_accel.state import Run


class Family(Protocol):
    """What a family's file offers."""

    TRANSFORMER: type

    def attach(self, transformer: Any, run: Run) -> None:
        """Put processors and token-wise blocks in, each with its own site of the run."""

    def detach(self, transformer: Any) -> None:
        """Put back exactly what was there."""


FAMILIES: tuple[Family, ...] = (flux, pixart)


def family_of(transformer: Any) -> Family:
    """The family of a transformer; TypeError with the supported classes if there is none."""
    for family in FAMILIES:
        if isinstance(transformer, family.TRANSFORMER):
            return family
    known = ", ".join(family.TRANSFORMER.__name__ for family in FAMILIES)
    raise TypeError(f"{type(transformer).__name__} is not supported; supported transformers are {known}.")
