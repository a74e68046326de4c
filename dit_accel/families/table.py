"""All families that packed steps are known to work for, by the name of their transformer's class."""

from __future__ import annotations

from typing import Any

from dit_accel.families import cross, flux2, joint, parallel, sequence
from dit_accel.rows import Family

FAMILIES: dict[str, Family] = {
    family.transformer: family for group in (parallel, flux2, joint, sequence, cross) for family in group.FAMILIES
}


def lookup(transformer: Any) -> Family | None:
    """The family of a transformer of diffusers, or of a subclass of one; None if it is unknown."""
    for kind in type(transformer).__mro__:
        if kind.__module__.startswith("diffusers.") and kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    return None
