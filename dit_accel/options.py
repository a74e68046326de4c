"""What configurations share: options with help texts, checked, and round-tripped through plain dicts.

The command line and the docs are made from the fields, so every option is described once.
"""

from __future__ import annotations

import dataclasses
import inspect
import numbers
import textwrap
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

Config = TypeVar("Config", bound="Options")


def option(default: Any, help: str, flag: str | None = None) -> Any:
    """A field of a configuration.

    Args:
        help: what it does, for the class's docstring and for the command line.
        flag: its name on the command line if that differs, "" if it has none.
    """
    return dataclasses.field(default=default, metadata={"help": help} | ({} if flag is None else {"flag": flag}))


@dataclass(frozen=True)
class Options:
    """Base of the configurations."""

    def __init_subclass__(cls) -> None:
        """Complete the docstring with the options' help."""
        lines = [
            textwrap.fill(f"{name}: {field.metadata['help']}", 120, initial_indent="    ", subsequent_indent="        ")
            for name, field in vars(cls).items()
            if isinstance(field, dataclasses.Field)
        ]
        cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:", *lines])

    def to_dict(self) -> dict[str, Any]:
        """All options by name; a function given as an option stays one."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`; an unknown key raises ValueError."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"{cls.__name__} has no option {', '.join(unknown)}; its options are {', '.join(known)}.")
        return cls(**values)

    @classmethod
    def kinds(cls) -> dict[str, tuple[Any, ...]]:
        """The types that the value of each option may have."""
        hints = typing.get_type_hints(cls)
        unions = (typing.Union, types.UnionType)
        return {name: typing.get_args(hint) if typing.get_origin(hint) in unions else (hint,) for name, hint in hints.items()}

    def _whole(self, name: str, least: int) -> None:
        if not is_whole(value := getattr(self, name), least):
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        self._set(name, int(value))

    def _numbers(self, *names: str) -> None:
        for name in names:
            if not is_number(value := getattr(self, name)):
                raise ValueError(f"{name} must be a number, not {value!r}.")
            if not isinstance(value, (int, float)):  # of numpy
                self._set(name, float(value))

    def _switches(self, *names: str) -> None:
        for name in names:
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {value!r}.")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def known_selector(name: str) -> None:
    """ValueError with the known names if there is no such selector."""
    from dit_accel import which  # which loads torch, and the commands show their help without it

    which.get(name)


def is_whole(value: Any, least: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
