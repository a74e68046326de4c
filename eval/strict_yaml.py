"""YAML in which nothing is lost: a key given twice is an error, and every value knows its line and how it was written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

Place = tuple[Any, ...]  # keys and positions, from the outermost on: ("methods", 0, "cache", "interval")


class SettingError(ValueError):
    """A setting that is wrong.

    Args:
        message: a sentence, in which {name} stands for the outermost setting as the user spells it.
        place: which setting.
        quote: whether text was expected, so that quotation marks may help.
    """

    def __init__(self, message: str, *place: Any, quote: bool = False) -> None:
        self.message, self.place, self.quote = message, place, quote
        super().__init__(self.named(str(place[0]) if place else ""))

    def named(self, name: str) -> str:
        return self.message.replace("{name}", name)


@dataclass
class Document:
    """The value of a YAML text, and where its parts stand in it."""

    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    written: dict[Place, str] = field(default_factory=dict)  # numbers, truth values and dates as they stand in the text

    def line(self, place: Place) -> int:
        """Of a setting, or of the innermost one around it that is written down."""
        while place not in self.lines and place:
            place = place[:-1]
        return self.lines.get(place, 1)


def read_yaml(text: str, name: str) -> Document:
    """Read one YAML document.

    Args:
        name: of the file or option, for errors.

    Raises:
        ValueError: it is not YAML, or a mapping has a key twice; with the line.
    """
    document = Document()
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            _walk(loader, node, (), document, name, ())
            document.value = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{name}{line}: this is not YAML: {error.problem or error.context}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        raise ValueError(f"{name}: this is not YAML: {' '.join(str(error).split())}.") from None
    return document


def _walk(loader: yaml.SafeLoader, node: yaml.Node, place: Place, document: Document, name: str, around: tuple[int, ...]) -> None:
    line = node.start_mark.line + 1
    document.lines.setdefault(place, line)
    if id(node) in around:
        raise ValueError(f"{name}, line {line}: an alias stands inside what it refers to.")
    around = (*around, id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, part in enumerate(node.value):
            _walk(loader, part, (*place, number), document, name, around)
    elif isinstance(node, yaml.MappingNode):
        first: dict[Any, int] = {}
        for key_node, part in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"{name}, line {line}: a key must be a word.")
            if key in first:
                also = f"line {first[key]}" if first[key] != line else "this line"
                raise ValueError(f"{name}, line {line}: {key} comes twice, on {also} already; give each key once.")
            first[key] = line
            document.lines[(*place, key)] = line
            _walk(loader, part, (*place, key), document, name, around)
    elif node.tag != "tag:yaml.org,2002:str":
        document.written[place] = node.value


def shown(value: Any) -> str:
    """A value as YAML has it."""
    return "empty" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
