"""Options of the commands. Those of the methods are made from the configurations, where they have their names and their help."""

from __future__ import annotations

import dataclasses
import inspect
import runpy
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer

from dit_accel.pipelines.methods import METHODS
from dit_accel.pipelines.terminal import usage

Command = TypeVar("Command", bound=Callable[..., Any])

PICTURE, MACHINE = "Picture", "Machine"
PANELS = {"token-cache": "Token cache", "output-cache": "Output cache", "token-merge": "Token merge"}
Pipeline = Annotated[str, typer.Option(help="A name of `dit-accel pipelines`, a hub id, or a diffusers folder.")]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        help="Read more prompts from a text file, one a line, where # starts a comment; from JSON, JSON lines, CSV or TSV with a "
        "key or column prompt; or, as -, from standard input, one a line."
    ),
]
Output = Annotated[Path, typer.Option(help="Folder of the pictures; created if needed, nothing in it is overwritten.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Preset = Annotated[
    str | None,
    typer.Option(
        help="Published settings: toca-flux, toca-pixart, fora or taylorseer; options given as well replace theirs.",
        rich_help_panel=PANELS["token-cache"],
    ),
]
SelectorFile = Annotated[Path | None, typer.Option(help="A Python file that registers selectors or other rules of your own.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the pipeline's", rich_help_panel=PICTURE)]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the pipeline's", rich_help_panel=PICTURE)]
Pixels = Annotated[int | None, typer.Option(help="In pixels.", show_default="the pipeline's", rich_help_panel=PICTURE)]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MACHINE)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.", rich_help_panel=MACHINE)]
Offload = Annotated[str, typer.Option(help="none, model, group or sequential: less GPU memory, slower.", rich_help_panel=MACHINE)]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from.", rich_help_panel=MACHINE)]


class Method(str, Enum):
    none = "none"
    token_cache = "token-cache"
    output_cache = "output-cache"
    token_merge = "token-merge"
    both = "token-cache+token-merge"

    @property
    def parts(self) -> list[str]:
        return [part for part in self.value.split("+") if part in METHODS]


def written(name: str) -> str:
    """A parameter of a command, as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


# Every option of a method: parameter of the command -> method -> field. Methods share an option where the names are the same.
KNOBS: dict[str, dict[str, dataclasses.Field[Any]]] = {}
for _method, _config in METHODS.items():
    for _field in dataclasses.fields(_config):
        if _flag := _field.metadata.get("flag", _field.name):
            KNOBS.setdefault(_flag, {})[_method] = _field
# Options of generate that are no field of a configuration, and the methods that they are for.
OTHERS = {"preset": ["token-cache"], "selector_file": ["token-cache", "output-cache"]}
# What messages call the options that are no method's, and how they are written.
SETTINGS = {
    name: written(name)
    for name in "steps guidance seed num_images batch_size height width dtype device offload selector prompts_file".split()
}


def flags_of(*methods: str) -> dict[str, str]:
    """The fields of methods' configurations, and the options that they are."""
    return {fields[m].name: written(name) for m in reversed(methods) for name, fields in KNOBS.items() if m in fields}


def is_pair(method: str, field: dataclasses.Field[Any]) -> bool:
    """Whether an option takes two numbers, one after the other."""
    lists = [kind for kind in METHODS[method].kinds()[field.name] if get_origin(kind) is tuple]
    return any(... not in get_args(kind) for kind in lists)


def with_options_of(*methods: str) -> Callable[[Command], Command]:
    """Give a command the options of methods, before its `steps`, in place of its `**given`.

    They are None unless given, so that giving one without its method can be an error. What the command declares itself stays.
    """

    def declare(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        made = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=_annotation(name, of))
            for name, fields in KNOBS.items()
            if (of := {method: fields[method] for method in methods if method in fields}) and name not in signature.parameters
        ]
        at = [p.name for p in own].index("steps")
        command.__signature__ = signature.replace(parameters=[*own[:at], *made, *own[at:]])  # type: ignore[attr-defined]
        return command

    return declare


def _annotation(name: str, fields: dict[str, dataclasses.Field[Any]]) -> Any:
    """What typer makes an option of: for one or several methods, with one or several defaults and explanations."""
    method, field = next(iter(fields.items()))
    helps = {other.metadata["help"]: f"[{name}] " for name, other in reversed(fields.items())}
    text = " ".join((f"\\{where}" if len(helps) > 1 else "") + help for help, where in reversed(helps.items()))
    defaults = {name: _text(other.default) for name, other in fields.items()}
    if len(set(defaults.values())) > 1:
        default = ", ".join(f"{value} for {name}" for name, value in defaults.items())
    else:
        default = defaults[method]
    panel = " and ".join(PANELS[name] for name in fields)
    about: dict[str, Any] = dict(help=text, show_default=default or False, rich_help_panel=panel)
    kinds = METHODS[method].kinds()[field.name]
    lists = [kind for kind in kinds if get_origin(kind) is tuple]
    simple = [kind for kind in kinds if kind in (bool, int, float, str)]
    if not lists:
        return Annotated[simple[0] | None, typer.Option(**about)]
    if is_pair(method, field):
        return Annotated[lists[0] | None, typer.Option(**about)]
    about |= dict(parser=numbers(get_args(lists[0])[0], simple[0] if simple else None), metavar="N,N,...")
    return Annotated[Any, typer.Option(**about)]


def _text(default: Any) -> str:
    if default is None or isinstance(default, bool):
        return {None: "", True: "on", False: "off"}[default]
    return (
        " ".join(map(str, default))
        if isinstance(default, tuple)
        else f"{default:g}"
        if isinstance(default, float)
        else f"{default}"
    )


def numbers(kind: type, one: type | None = None) -> Callable[[str], Any]:
    """A parser of "0,1,2": a tuple of numbers of a kind; where `one` is allowed, a single number is itself, of that kind."""

    def parse(text: str) -> Any:
        try:
            return one(text) if one and "," not in text else tuple(kind(part) for part in text.rstrip(",").split(","))
        except ValueError:
            what = "whole numbers, as in 0,1,2,5,9" if kind is int else "numbers, as in 1,0.5"
            raise typer.BadParameter(f"{text!r} is not a list of {what}.") from None

    return parse


def refuse_idle(method: Method, given: dict[str, Any]) -> None:
    """BadParameter for an option of a method that is not asked for."""
    for name, owners in {**OTHERS, **KNOBS}.items():
        if given.get(name) is not None and not set(owners) & set(method.parts):
            able = [f"{other.value}" for other in Method if set(owners) & set(other.parts)]
            raise typer.BadParameter(f"{written(name)} needs --method {' or '.join(able)}, not {method.value}.")


def refuse_beside_recipe(speedup: float | None, min_psnr: float | None, given: dict[str, Any]) -> None:
    """BadParameter for an option of a method beside a recipe, which has its own."""
    if speedup is not None and min_psnr is not None:
        raise typer.BadParameter("Give either --speedup or --min-psnr.")
    if other := next((name for name, value in given.items() if value is not None), None):
        asked = "--speedup" if speedup is not None else "--min-psnr"
        raise typer.BadParameter(f"{written(other)} would change the recipe that {asked} asks for; leave one of them out.")


def given(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
    """Those of a command's options that were written on the command line, whatever --config says of the others."""
    sources = {name: context.get_parameter_source(name) for name in values}
    return {name: value for name, value in values.items() if (source := sources[name]) and source.name == "COMMANDLINE"}


def configured(method: Method, given: dict[str, Any]) -> list[Any]:
    """The configurations that the options of a command ask for; BadParameter if they are invalid."""
    file = given.get("selector_file")
    if file is not None:
        if not file.is_file():
            raise typer.BadParameter(f"--selector-file: there is no file {file}.")
        runpy.run_path(str(file))
    configs = []
    for part in method.parts:
        own = {fields[part].name: given[name] for name, fields in KNOBS.items() if part in fields and given.get(name) is not None}
        with usage(flags_of(part)):
            preset = given.get("preset") if part == "token-cache" else None
            configs.append(METHODS[part].preset(preset, **own) if preset else METHODS[part](**own))  # type: ignore[union-attr]
    return configs
