"""What an evaluation compares: a YAML file, checked and spread out into one cell for every method and setting."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

import yaml

from dit_accel.config import TokenCacheConfig
from dit_accel.eval.prompt_sets import read_prompt_set
from dit_accel.pipelines.methods import SECTIONS, Config

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

    def options(self) -> dict[str, Any]:
        """Everything that the cell sets, as plain values."""
        found = {name: c.to_dict() for name, kind in SECTIONS.items() for c in self.configs if isinstance(c, kind)}
        return {**found, **({"steps": self.steps} if self.steps else {})}


@dataclass(frozen=True)
class Spec:
    """One evaluation.

    Attributes:
        pipelines: names, hub ids or folders.
        prompts: in the order in which they are made.
        seeds: pictures of every prompt.
        methods: each a grid of `cache`, `merge`, `output` and `steps`, whose options may be lists.
        scores: rewards by name, path or hub id; see `dit_accel.eval.rewards.load_reward`. The first is what the report is about.
        margin: the largest loss of the first score that does not matter, declared before the results are seen.
        steps, guidance, height, width: for all pipelines, if not their own.
        batch_size: pictures denoised together where time is not measured.
        timing_rounds: how often every cell's time is measured, in turn with all others, after one round of warm-up.
        timing_batch_size: pictures denoised together where time is measured.
        dtype, device, offload: as `dit-accel generate`.
        selector_file: a Python file that registers selectors of your own.
    """

    pipelines: tuple[str, ...]
    prompts: tuple[str, ...]
    methods: tuple[dict[str, Any], ...]
    seeds: int = 3
    scores: tuple[str, ...] = ("emoji-reward",)
    margin: float = 0.1
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 8
    timing_rounds: int = 5
    timing_batch_size: int = 1
    dtype: str = "auto"
    device: str = "auto"
    offload: str = "none"
    selector_file: str | None = None
    cells: tuple[Cell, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("pipelines", "prompts", "methods", "scores"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one.")
        for name in ("pipelines", "prompts", "scores"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} has an entry twice; give each once.")
        for name in ("seeds", "batch_size", "timing_rounds", "timing_batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}.")
        if isinstance(self.margin, bool) or not isinstance(self.margin, (int, float)) or not self.margin > 0:
            raise ValueError(f"margin must be a number above 0, not {self.margin!r}.")
        object.__setattr__(self, "cells", tuple(_cells(self.methods)))

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}


def read_spec(path: Path | None, **changes: Any) -> Spec:
    """The evaluation that a YAML file describes, with some of its settings changed; or one that is all changes, without a file.

    `prompts` may be a list, or the path of a prompt set; it and `selector_file` are looked for beside the file first.

    Raises:
        FileNotFoundError: there is no such file or prompt set.
        ValueError: something in it is wrong; the message says what.
    """
    values = {} if path is None else _values(path)
    values |= {name: value for name, value in changes.items() if value is not None}
    where = "The evaluation" if path is None else f"{path}"
    known = [f.name for f in dataclasses.fields(Spec) if f.init]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{where} sets {', '.join(unknown)}, which is unknown; there are {', '.join(known)}.")
    if missing := sorted({"pipelines", "prompts", "methods"} - set(values)):
        raise ValueError(f"{where} does not set {', '.join(missing)}; give a specification, or the options for these.")
    beside = Path() if path is None else path.parent
    if isinstance(values["prompts"], str):
        values["prompts"] = read_prompt_set(_found(beside, values["prompts"]))
    if values.get("selector_file"):
        values["selector_file"] = str(_found(beside, values["selector_file"]))
        runpy.run_path(values["selector_file"])
    for name in ("pipelines", "prompts", "methods", "scores"):
        if name in values:
            if not isinstance(values[name], (list, tuple)):
                raise ValueError(f"{where}: {name} must be a list, not {values[name]!r}.")
            values[name] = tuple(values[name])
    try:
        return Spec(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _values(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no specification {path}; see eval/specs/ for examples.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings by name, as in eval/specs/.")
    return values


def _found(beside: Path, name: str) -> Path:
    return beside / name if (beside / name).is_file() else Path(name)


def _cells(methods: tuple[dict[str, Any], ...]) -> list[Cell]:
    """Full, the cache that caches nothing, and every point of every method's grid."""
    cells = [Cell(FULL, kind="full"), Cell(NO_OP, (TokenCacheConfig(interval=1),), kind="no-op")]
    for method in methods:
        if not isinstance(method, dict) or not method or set(method) - {*SECTIONS, "steps"}:
            raise ValueError(f"A method sets cache, merge, output or steps (or several), not {method!r}.")
        if "output" in method and set(method) - {"output", "steps"}:
            raise ValueError("output works alone; make cache and merge methods of their own.")
        grids = [_grid(method.get(section) or {}) if section in method else [None] for section in SECTIONS]
        steps = method.get("steps")
        for *options, count in itertools.product(*grids, steps if isinstance(steps, list) else [steps]):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise ValueError(f"steps must be a whole number of at least 1, not {count!r}.")
            cells.append(_cell(dict(zip(SECTIONS, options, strict=True)), count))
    seen: set[str] = set()
    for cell in cells:
        if cell.label in seen:
            raise ValueError(f"The method {cell.label!r} comes twice.")
        seen.add(cell.label)
    return cells


def _cell(sections: dict[str, dict[str, Any] | None], steps: int | None) -> Cell:
    configs: list[Config] = []
    words = []
    for section, options in sections.items():
        if options is not None:
            rest = dict(options)
            preset = rest.pop("preset", None) if section == "cache" else None
            configs.append(TokenCacheConfig.preset(preset, **rest) if preset else SECTIONS[section].from_dict(rest))
            words.append(_label(section, options))
    if steps is not None:
        words.append(f"{steps} steps")
    return Cell(" + ".join(words), tuple(configs), steps, "method" if configs else "fewer steps")


def _label(method: str, options: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        return (
            "x".join(map(str, value))
            if isinstance(value, (list, tuple))
            else f"{value:g}"
            if isinstance(value, float)
            else f"{value}"
        )

    return " ".join([method, *(f"{name}={text(value)}" for name, value in options.items())])


def _grid(options: dict[str, Any]) -> list[dict[str, Any]]:
    """All combinations of options whose values are lists."""
    choices = []
    for name, value in options.items():
        sweeps = isinstance(value, list) and not (name in LISTS and not any(isinstance(part, list) for part in value))
        choices.append([(name, one) for one in (value if sweeps else [value])])
    return [dict(combination) for combination in itertools.product(*choices)]


def noise_seed(prompt: str, seed: int) -> int:
    """The seed of a picture's initial noise: it depends on the prompt and the number of the picture and on nothing else."""
    return int.from_bytes(hashlib.sha256(json.dumps([prompt, seed]).encode()).digest()[:7], "big")
