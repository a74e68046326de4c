"""What configurations share: options with help texts and checks, converted to plain dicts and JSON files and back.

The command line and the docs are made from the fields, so that every option is described once.
"""

import dataclasses
import inspect
import json
import math
import numbers
import os
import textwrap
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dit_accel.names import meant

Config = TypeVar("Config", bound="Options")


def option(default: Any, help: str, least: float = -math.inf, most: float = math.inf, flag: str | None = None, **more: Any) -> Any:
    """A field of a configuration.

    Args:
        help: what it does, for the class's docstring and for the command line.
        least, most: of a number, or of every number.
        flag: its name on the command line if that differs, "" if it has none.
        more: `choices`, the only values allowed; or `known`, a function that raises ValueError for an unknown name.
    """
    metadata = {"help": help, "least": least, "most": most, **more} | ({} if flag is None else {"flag": flag})
    return dataclasses.field(default=default, metadata=metadata)


def selector_known(name: str) -> None:
    from dit_accel import which  # which loads torch, and the commands show their help without it

    which.get(name)


def device_known(name: str) -> None:
    import torch

    try:
        torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"cache_device must name a device of torch, not {name!r}.") from error


def _plain(value: Any) -> Any:
    """A value of Python for one of numpy, and the name of a type or a device of torch."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return str(value).removeprefix("torch.") if type(value).__name__ in ("dtype", "device") else value


def _as(kind: Any, value: Any, least: float, most: float) -> Any:
    """The value as one of this kind; ValueError with what is valid if it is none."""
    ends = f"of at least {least}" if most == math.inf else f"between {least} and {most}"
    if typing.get_origin(kind) is tuple:
        inner, *others = typing.get_args(kind)
        length = len(others) + 1 if Ellipsis not in others else 0
        try:
            if isinstance(value, (tuple, list, range)) and value and (not length or len(value) == length):
                return tuple(_as(inner, part, least, most) for part in value)
        except ValueError:
            pass
        what = "whole numbers" if inner is int else "numbers"
        raise ValueError(f"{'two' if length == 2 else 'a list of one or more'} {what} {ends}")
    if kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= int(value) <= most:
        return int(value)
    if kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        if math.isfinite(value) and least <= float(value) <= most:
            return value
    if kind in (bool, str, type(None)) and isinstance(value, kind):
        return value
    if kind not in (int, float, bool, str, type(None)) and callable(value):
        return value
    words = {int: f"a whole number {ends}", float: f"a number {ends}", bool: "True or False", str: "a name", type(None): "None"}
    raise ValueError(words.get(kind, "a function"))


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

    def __new__(cls, *args: Any, **values: Any) -> "Options":
        """TypeError for an option that does not exist, with the one that was probably meant."""
        if wrong := cls._unknown(values):
            raise TypeError(wrong)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value, limits, words = field.name, _plain(getattr(self, field.name)), field.metadata, []
            choices, known = limits.get("choices"), limits.get("known")
            if choices is not None and value not in choices and not callable(value):
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}.{meant(value, choices)}")
            for kind in self.kinds()[name]:
                try:
                    object.__setattr__(self, name, _as(kind, value, limits["least"], limits["most"]))
                    break
                except ValueError as error:
                    words.append(str(error))
            else:
                raise ValueError(f"{name} must be {' or '.join(words)}, not {value!r}.")
            if known is not None and isinstance(value, str):
                known(value)

    def to_dict(self) -> dict[str, Any]:
        """All options by name; a function given as an option stays one."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`; an unknown key raises ValueError."""
        if wrong := cls._unknown(values):
            raise ValueError(wrong)
        return cls(**values)

    @classmethod
    def _unknown(cls, values: typing.Iterable[str]) -> str:
        """A sentence about the names that are no options; nothing if all are."""
        known = [field.name for field in dataclasses.fields(cls)]
        wrong = [name for name in values if name not in known]
        hint = meant(wrong[0], known) if wrong else ""
        return f"{cls.__name__} has no option {', '.join(wrong)}.{hint} Its options are {', '.join(known)}." if wrong else ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all options to a JSON file, which is replaced as a whole or not at all; `load` is the inverse.

        Raises:
            ValueError: if an option is a function, which a file cannot hold.
        """
        values = {"config": type(self).__name__, **self.to_dict()}
        if functions := [name for name, value in values.items() if callable(value)]:
            raise ValueError(f"{functions[0]} is a function, which a file cannot hold; register it and give its name.")
        part = Path(f"{os.fspath(path)}.{os.getpid()}.part")
        try:
            part.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls: type[Config], path: str | os.PathLike[str]) -> Config:
        """The configuration that `save` wrote to a file; `dit_accel.load_config` reads any kind.

        Raises:
            ValueError: if the file holds none, or one of another class.
        """
        try:
            values = json.loads(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is no JSON: {error}.") from error
        kinds = {kind.__name__: kind for kind in cls.__subclasses__() or [cls]}
        name = values.pop("config", None) if isinstance(values, dict) else None
        if name not in kinds:
            raise ValueError(f"{os.fspath(path)} holds {name or 'no configuration'}; expected {' or '.join(kinds)}.")
        return kinds[name].from_dict(values)

    @classmethod
    def kinds(cls) -> dict[str, tuple[Any, ...]]:
        """The types that the value of each option may have."""
        hints = typing.get_type_hints(cls)
        unions = (typing.Union, types.UnionType)
        return {name: typing.get_args(hint) if typing.get_origin(hint) in unions else (hint,) for name, hint in hints.items()}
