"""All families by the name of their transformer's class in diffusers, and the files that serve some at module scope."""

import importlib
from typing import Any

from dit_accel.families import cross, flux2, joint, parallel, sequence
from dit_accel.families.rows import Family

FAMILIES: dict[str, Family] = {
    family.transformer: family for group in (parallel, flux2, joint, sequence, cross) for family in group.FAMILIES
}
# Loaded when one is met, as diffusers does with its own.
MODULE_SCOPE = {"FluxTransformer2DModel": "flux", "PixArtTransformer2DModel": "pixart"}


def lookup(transformer: Any) -> Family | None:
    """The family of a transformer of diffusers, or of a subclass of one; None if it is unknown."""
    kinds = (kind.__name__ for kind in type(transformer).__mro__ if kind.__module__.startswith("diffusers."))
    return next((FAMILIES[name] for name in kinds if name in FAMILIES), None)


def family_of(transformer: Any) -> tuple[Family, Any]:
    """The family of a transformer and its file, with BLOCKS and OBSERVATIONS; TypeError if module scope does not serve it."""
    family = lookup(transformer)
    if family is None or family.transformer not in MODULE_SCOPE:
        raise TypeError(f"{type(transformer).__name__} is not supported; supported transformers are {', '.join(MODULE_SCOPE)}.")
    return family, importlib.import_module(f"dit_accel.families.{MODULE_SCOPE[family.transformer]}")
