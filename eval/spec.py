"""What an evaluation compares: a YAML file, checked and spread out into one cell for every method and setting."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel.eval.cells import FULL, NO_OP, Cell, cells_of
from dit_accel.eval.prompt_sets import read_prompt_set
from dit_accel.eval.strict_yaml import Document, SettingError, read_yaml, shown
from dit_accel.names import meant
from dit_accel.pipelines.loading import DTYPES, OFFLOAD
from dit_accel.pipelines.prompt_sets import is_prompt

__all__ = ["FULL", "NO_OP", "Cell", "Spec", "noise_seed", "option_of", "read_spec"]


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
        baselines: whether runs with fewer steps that match a method's seconds or FLOPs are added.
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
    baselines: bool = True
    dtype: str = "auto"
    device: str = "auto"
    offload: str = "none"
    selector_file: str | None = None
    cells: tuple[Cell, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("pipelines", "prompts", "scores"):
            _check_texts(name, getattr(self, name))
        for i, prompt in enumerate(self.prompts):
            if not is_prompt(prompt):
                raise SettingError("{name} holds a text that is empty or not Unicode; leave it out.", "prompts", i)
        for name in ("seeds", "batch_size", "timing_rounds", "timing_batch_size", "steps", "height", "width"):
            value, least = getattr(self, name), 1
            if value is None and name in ("steps", "height", "width"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SettingError(f"{{name}} must be a whole number of at least {least}, not {shown(value)}.", name)
        if not isinstance(self.baselines, bool):
            raise SettingError(f"{{name}} must be true or false, not {shown(self.baselines)}.", "baselines")
        if not _is_number(self.margin) or not 0 < self.margin < math.inf:
            raise SettingError(f"{{name}} must be a number above 0, not {shown(self.margin)}.", "margin")
        if self.guidance is not None and (not _is_number(self.guidance) or not 0 <= self.guidance < math.inf):
            raise SettingError(f"{{name}} must be a number of at least 0, not {shown(self.guidance)}.", "guidance")
        for name, known in (("dtype", ("auto", *DTYPES)), ("offload", OFFLOAD)):
            if (value := getattr(self, name)) not in known:
                raise SettingError(f"{{name}} must be one of {', '.join(known)}, not {shown(value)}.{meant(value, known)}", name)
        for name in ("device", "selector_file"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "selector_file" and value is None):
                raise SettingError(f"{{name}} must be text, not {shown(value)}.", name, quote=True)
        object.__setattr__(self, "cells", tuple(cells_of(self.methods, self.selector_file)))

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}


def read_spec(path: Path | None, **changes: Any) -> Spec:
    """The evaluation that a YAML file describes, with some of its settings changed; or one that is all changes, without a file.

    `prompts` may be a list, or the path of a prompt set; it and `selector_file` are looked for beside the file first.

    Args:
        path: of the file.
        changes: settings by name; those that are None are left as they are. Errors call them by the command line's options.

    Raises:
        FileNotFoundError: there is no such file or prompt set.
        ValueError: something in it is wrong; the message says what, and on which line.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    document = Document({}) if path is None else _document(path)
    values = document.value | changes
    where = "The evaluation" if path is None else f"{path}"
    try:
        return _spec(values, Path() if path is None else path.parent)
    except SettingError as error:
        name = str(error.place[0]) if error.place else ""
        if name in changes:
            option = option_of(name)
            said = error.named(option)
            raise ValueError(said if option in said else f"{option}: {said}") from None
        if path is None or name not in document.value:
            raise ValueError(f"{where}: {error}") from None
        written = document.written.get(error.place)
        hint = f" Put {written} in quotes to make it text." if error.quote and written else ""
        raise ValueError(f"{where}, line {document.line(error.place)}: {error}{hint}") from None


def _spec(values: dict[str, Any], beside: Path) -> Spec:
    known = [f.name for f in dataclasses.fields(Spec) if f.init]
    for name in values:
        if name not in known:
            raise SettingError(f"{name} is unknown.{meant(name, known)} The settings are {', '.join(known)}.", name)
    needed = ("pipelines", "prompts", "methods")
    if missing := [name for name in needed if name not in values]:
        options = ", ".join(option_of(name) for name in missing)
        raise SettingError(f"{', '.join(missing)} must be set; give a specification that does, or {options}.")
    values = dict(values)
    if isinstance(values["prompts"], str):
        values["prompts"] = read_prompt_set(_found(beside, values["prompts"]))
    if isinstance(file := values.get("selector_file"), str):
        values["selector_file"] = str(_found(beside, file))
        _run(values["selector_file"])
    for name in ("pipelines", "prompts", "methods", "scores"):
        if name in values:
            if not isinstance(values[name], (list, tuple)):
                raise SettingError(f"{{name}} must be a list, not {shown(values[name])}.", name)
            values[name] = tuple(values[name])
    return Spec(**values)


def _run(selector_file: str) -> None:
    if not Path(selector_file).is_file():
        raise SettingError(f"{{name}} is {selector_file}, which does not exist.", "selector_file")
    try:
        runpy.run_path(selector_file)
    except Exception as error:  # whatever the user's own code raises
        raise SettingError(f"{{name}} {selector_file} fails: {type(error).__name__}: {error}", "selector_file") from error


def option_of(setting: str) -> str:
    """The option of `dit-accel-eval run` that changes a setting."""
    singular = {"pipelines": "pipeline", "methods": "method", "scores": "score"}
    return f"--{singular.get(setting, setting).replace('_', '-')}"


def _document(path: Path) -> Document:
    if not path.is_file():
        raise FileNotFoundError(f"There is no specification {path}; see eval/specs/ for examples.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: this is not UTF-8 text; save the file in UTF-8.") from None
    document = read_yaml(text, f"{path}")
    if not isinstance(document.value, dict):
        raise ValueError(f"{path} must hold settings by name, as in eval/specs/.")
    return document


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_texts(name: str, values: Any) -> None:
    """At least one text, and each once."""
    if not values:
        raise SettingError("{name} is empty; give at least one.", name)
    seen: dict[str, int] = {}
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise SettingError(f"{{name}} must hold texts, not {shown(value)}.", name, i, quote=True)
        if value.strip() in seen:
            raise SettingError(f"{{name}} has {value.strip()!r} twice; give each once.", name, i)
        seen[value.strip()] = i


def _found(beside: Path, name: str) -> Path:
    return beside / name if (beside / name).is_file() else Path(name)


def noise_seed(prompt: str, seed: int) -> int:
    """The seed of a picture's initial noise: it depends on the prompt and the number of the picture and on nothing else."""
    return int.from_bytes(hashlib.sha256(json.dumps([prompt, seed]).encode()).digest()[:7], "big")
