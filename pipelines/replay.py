"""The settings of a picture that was made before, as defaults of the command's options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_accel.pipelines.methods import METHODS, SECTIONS
from dit_accel.pipelines.options import KNOBS, Method, is_pair
from dit_accel.pipelines.pictures import read_record

SETTINGS = ("pipeline", "steps", "guidance", "seed", "height", "width", "dtype")


def defaults_of(path: Path) -> dict[str, Any]:
    """What the picture of a PNG or JSON file was made with, by the names of the parameters of `generate`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no settings, or some that this version does not know.
    """
    record = read_record(path)
    found = {name: record[name] for name in SETTINGS if name in record}
    try:
        found["method"] = Method(record["method"]).value
        for section, kind in SECTIONS.items():
            if record.get(section):
                kind.from_dict(record[section])
                found |= _options(next(name for name, config in METHODS.items() if config is kind), record[section])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be made again: {error}") from error
    return found


def _options(method: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values that are not the defaults, as the options take them; a list becomes the text that it is given as."""
    found: dict[str, Any] = {}
    for parameter, fields in KNOBS.items():
        field = fields.get(method)
        value = values.get(field.name) if field else None
        if field is None or value is None or _plain(value) == _plain(field.default):
            continue
        if is_pair(method, field):
            found[parameter] = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
        elif isinstance(value, (list, tuple)):
            found[parameter] = ",".join(map(str, value)) + ","
        else:
            found[parameter] = value if isinstance(value, bool) else str(value)
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
