"""Options that would do nothing are errors; settings that are probably not meant get a warning."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

import typer

from dit_accel import doubts
from dit_accel.pipelines.methods import Config, parts
from dit_accel.pipelines.options import KNOBS, flags_of
from dit_accel.pipelines.terminal import spelled


def fields_of(method: str, given: Collection[str]) -> list[str]:
    """The fields of a method's configuration that parameters of a command stand for."""
    return [KNOBS[name][method].name for name in given if method in KNOBS.get(name, {})]


def refuse_unused(configs: Sequence[Config], given: Collection[str]) -> None:
    """BadParameter for an option that does nothing in these configurations. `given` are the parameters that were given."""
    for method, config in parts(configs).items():
        for sentence in doubts.of_options(config, fields_of(method, given)):
            raise typer.BadParameter(spelled(sentence, flags_of(method)))


def doubtful(pipe: Any, name: str, configs: Sequence[Config], given: Collection[str], steps: int) -> list[str]:
    """Sentences about what is possible, but probably not meant. The library is told not to repeat them.

    Args:
        pipe: the pipeline; name: what the user called it.
        configs: what is asked for.
        given: the parameters of the command that were given.
        steps: of the run.
    """
    from dit_accel.families.table import lookup
    from dit_accel.pipelines.generation import best_settings

    warnings.simplefilter("ignore", doubts.DoubtWarning)
    few = best_settings(pipe, name)["steps"] <= doubts.FEW
    said: list[str] = []
    for method, config in parts(configs).items():
        found = doubts.of_model(config, lookup(pipe.transformer)) + doubts.of_run(config, steps, fields_of(method, given), few)
        said += [spelled(sentence, flags_of(method)) for sentence in found]
    return said
