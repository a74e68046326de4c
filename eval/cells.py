"""The methods of an evaluation, spread out: one cell for every point of their grids."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from dit_accel import how, when, which
from dit_accel.config import OutputCacheConfig, TokenCacheConfig
from dit_accel.eval.strict_yaml import SettingError, shown
from dit_accel.names import meant
from dit_accel.pipelines.methods import SECTIONS, Config
from dit_accel.recipe import SHIPPED, own_folder

# Options whose value may be a list itself: to sweep one, give a list that holds a list.
LISTS = {name for kind in SECTIONS.values() for name, kinds in kind.kinds().items() for one in kinds if get_origin(one) is tuple}
FULL, NO_OP = "full", "no-op cache"


@dataclass(frozen=True)
class Cell:
    """One method with one setting. Its label is unique within a run."""

    label: str
    configs: tuple[Config, ...] = ()
    steps: int | None = None  # None: those of the pipeline
    kind: str = "method"  # or "full", "no-op", "fewer steps"
    code: str = ""  # hash of the selector file, if the cell uses what that registers; of the recipes, if it is one
    speedup: float | None = None  # of the pipeline's recipe for it

    def options(self) -> dict[str, Any]:
        """Everything that the cell sets, as plain values."""
        found = {name: c.to_dict() for name, kind in SECTIONS.items() for c in self.configs if isinstance(c, kind)}
        return {**found, **{name: value for name in ("steps", "speedup") if (value := getattr(self, name))}}


def cells_of(methods: tuple[dict[str, Any], ...], selector_file: str | None) -> list[Cell]:
    """Full, the cache that caches nothing, and every point of every method's grid."""
    if not methods:
        raise SettingError("{name} is empty; give at least one.", "methods")
    cells = [Cell(FULL, kind="full"), Cell(NO_OP, (TokenCacheConfig(interval=1),), kind="no-op")]
    seen = {cell.label for cell in cells}
    code = hashlib.sha256(Path(selector_file).read_bytes()).hexdigest() if selector_file is not None else ""
    for number, method in enumerate(methods):
        place = ("methods", number)
        said = "A method sets cache, merge, output or steps (or several), or speedup alone"
        if not isinstance(method, dict) or not method:
            raise SettingError(f"{said}, not {shown(method)}.", *place)
        for name in method:
            if name not in (known := (*SECTIONS, "steps", "speedup")):
                raise SettingError(f"{said}, not {name}.{meant(name, known)}", *place, name)
        if "speedup" in method:
            if len(method) > 1:
                raise SettingError("speedup works alone: the recipe says everything else.", *place, "speedup")
            for speedup in _listed(method["speedup"]):
                cells.append(_new(_recipe(speedup, place), seen, place))
            continue
        if "output" in method and set(method) - {"output", "steps"}:
            raise SettingError("output works alone; make cache and merge methods of their own.", *place, "output")
        grids: list[list[Any]] = [_grid(section, method[section], place) if section in method else [None] for section in SECTIONS]
        for *options, count in itertools.product(*grids, _step_counts(method, place)):
            cells.append(_new(_cell(dict(zip(SECTIONS, options, strict=True)), count, code, place), seen, place))
    return cells


def _new(cell: Cell, seen: set[str], place: tuple[Any, ...]) -> Cell:
    """A cell whose label was not seen before."""
    if cell.label in seen:
        raise SettingError(f"The method {cell.label!r} comes twice.", *place)
    seen.add(cell.label)
    return cell


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _recipe(speedup: Any, place: tuple[Any, ...]) -> Cell:
    """Of whichever pipeline: its recipe for this speed."""
    if isinstance(speedup, bool) or not isinstance(speedup, (int, float)) or speedup < 1:
        raise SettingError(f"speedup must be a number of at least 1, not {shown(speedup)}.", *place, "speedup")
    files = [path for folder in (own_folder(), SHIPPED) for path in sorted(folder.glob("*.json"))]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return Cell(f"recipe speedup={speedup:g}", code=code, speedup=float(speedup))


def _step_counts(method: dict[str, Any], place: tuple[Any, ...]) -> list[int | None]:
    if "steps" not in method:
        return [None]
    steps = method["steps"]
    for i, count in enumerate(counts := steps if isinstance(steps, list) else [steps]):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            where = (*place, "steps", i) if isinstance(steps, list) else (*place, "steps")
            raise SettingError(f"steps must be a whole number of at least 1, not {shown(count)}.", *where)
    if not counts:
        raise SettingError("steps is an empty list; give numbers, or leave it out.", *place, "steps")
    return list(counts)


def _cell(sections: dict[str, dict[str, Any] | None], steps: int | None, code: str, place: tuple[Any, ...]) -> Cell:
    configs: list[Config] = []
    words = []
    for section, options in sections.items():
        if options is not None:
            rest = dict(options)
            preset = rest.pop("preset", None) if section == "cache" else None
            try:
                configs.append(TokenCacheConfig.preset(preset, **rest) if preset else SECTIONS[section].from_dict(rest))
            except (TypeError, ValueError) as error:
                named = [name for name in options if str(error).startswith(f"{name} ")]
                named = named or [name for name, value in options.items() if repr(value) in str(error)]
                raise SettingError(f"{error}", *place, section, *named[:1]) from None
            words.append(_label(section, options))
    if steps is not None:
        words.append(f"{steps} steps")
    kind, own = "method" if configs else "fewer steps", any(map(_uses_own_code, configs))
    return Cell(" + ".join(words), tuple(configs), steps, kind, code if own else "")


def _uses_own_code(config: Config) -> bool:
    """Whether a configuration names a function that is not dit_accel's."""
    used: list[Any] = [which.get(config.selector).score] if isinstance(config, (TokenCacheConfig, OutputCacheConfig)) else []
    if isinstance(config, OutputCacheConfig):
        used += [how.get(config.how), *([when.get(config.when)] if isinstance(config.when, str) else [])]
    return not all(str(getattr(function, "__module__", "")).startswith("dit_accel.") for function in used)


def _label(method: str, options: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return "x".join(map(str, value))
        return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else f"{value}"

    return " ".join([method, *(f"{name}={text(value)}" for name, value in options.items())])


def _grid(section: str, options: Any, place: tuple[Any, ...]) -> list[dict[str, Any]]:
    """All combinations of options whose values are lists."""
    if not isinstance(options, dict):
        raise SettingError(f"{section} must be options by name, or {{}} for its defaults, not {shown(options)}.", *place, section)
    known = [f.name for f in dataclasses.fields(SECTIONS[section])] + (["preset"] if section == "cache" else [])
    choices = []
    for name, value in options.items():
        if name not in known:
            hint = f"{meant(name, known)} Its options are {', '.join(known)}."
            raise SettingError(f"{SECTIONS[section].__name__} has no option {name}.{hint}", *place, section, name)
        if value == []:
            raise SettingError(f"{name} is an empty list; give values, or leave it out.", *place, section, name)
        sweeps = isinstance(value, list) and not (name in LISTS and not any(isinstance(part, list) for part in value))
        choices.append([(name, one) for one in (value if sweeps else [value])])
    return [dict(combination) for combination in itertools.product(*choices)]
