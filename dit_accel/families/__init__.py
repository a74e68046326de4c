"""One file a transformer family: its attention processors, its token-wise blocks, where its tokens lie."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from dit_accel.state import Run

# The transformers of diffusers, by class, and the file that serves them: loaded when one is met, as diffusers does with its own.
FAMILIES = {"FluxTransformer2DModel": "flux", "PixArtTransformer2DModel": "pixart"}


class Family(Protocol):
    """What a family's file offers."""

    TRANSFORMER: Any
    OBSERVATIONS: frozenset[str]  # what its processors can observe for selectors
    TIMESTEP_SCALE: int  # scheduler timesteps per unit of the transformer's
    BATCHED_GUIDANCE: bool  # whether its pipelines put both halves of guidance into one batch

    def attach(self, transformer: Any, run: Run, processors_only: bool) -> Mapping[str, Any]:
        """Make blocks token-wise, each with its own site of the run, unless asked for processors only.

        Returns:
            The attention processors by the names of `attn_processors`, to be set by the caller.
        """

    def detach(self, transformer: Any) -> None:
        """Put back exactly what was there."""

    def grid(self, given: dict[str, Any]) -> tuple[int, int]:
        """Height and width of the picture in tokens, from the arguments of the transformer's forward."""


def family_of(transformer: Any) -> Family:
    """The family of a transformer; TypeError with the supported classes if there is none."""
    for kind in type(transformer).__mro__:
        if kind.__name__ in FAMILIES and kind.__module__.startswith("diffusers."):
            return cast(Family, importlib.import_module(f"dit_accel.families.{FAMILIES[kind.__name__]}"))
    raise TypeError(f"{type(transformer).__name__} is not supported; supported transformers are {', '.join(FAMILIES)}.")
