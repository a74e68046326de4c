"""Prompt sets: text, JSON, JSON lines, CSV or TSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

COLUMNS = ("prompt", "prompts", "caption", "text")  # in this order; their letters' case does not matter


def read_prompt_set(path: Path) -> list[str]:
    """The prompts of a file, in its order.

    A text file has one prompt a line; empty lines and those that start with # are skipped. JSON is a list of prompts, or of
    objects with a `prompt`; JSON lines have one of them a line. CSV and TSV (DrawBench, PartiPrompts) have a header with a
    column of that name. A column or key may also be called prompts, caption or text.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is malformed, with the line; for a prompt that comes twice; for a file without prompts.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no prompt set {path}; give a text, JSON or CSV file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: this is not UTF-8 text; save the file in UTF-8.") from None
    readers = {".json": _json, ".jsonl": _json_lines, ".csv": _table, ".tsv": _table}
    seen: dict[str, int] = {}
    for line, prompt in readers.get(path.suffix.lower(), _lines)(path, text):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{path}, line {line}: {prompt!r} is no prompt; give a text that is not empty.")
        prompt = prompt.strip()
        if prompt in seen:
            raise ValueError(f"{path}, line {line}: {prompt!r} is on line {seen[prompt]} already; give every prompt once.")
        seen[prompt] = line
    if not seen:
        raise ValueError(f"{path} holds no prompt.")
    return list(seen)


def _lines(path: Path, text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line


def _json(path: Path, text: str) -> Iterator[tuple[int, object]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: this is not JSON ({error.msg}).") from None
    if not isinstance(values, list):
        raise ValueError(f"{path}, line 1: the file must be a list of prompts, or of objects with a prompt.")
    decoder, place = json.JSONDecoder(), text.index("[") + 1
    for _ in values:  # once more one by one, since only so the lines come out
        while text[place].isspace() or text[place] == ",":
            place += 1
        value, end = decoder.raw_decode(text, place)
        yield text.count("\n", 0, place) + 1, _prompt_of(value)
        place = end


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield number, _prompt_of(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: this is not JSON ({error.msg}).") from None


def _table(path: Path, text: str) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        names = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
        column = next((names[name] for name in COLUMNS if name in names), None)
        if column is None:
            raise ValueError(f"{path}, line 1: none of the columns {', '.join(reader.fieldnames or ())} is called prompt.")
        for row in reader:
            if None in row:
                raise ValueError(f"{path}, line {reader.line_num}: there are more fields than columns; quote prompts with commas.")
            yield reader.line_num, row[column]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num + 1}: {error}.") from None  # where the broken row begins


def _prompt_of(value: object) -> object:
    if not isinstance(value, dict):
        return value
    keys = {str(key).lower(): key for key in value}
    return next((value[keys[name]] for name in COLUMNS if name in keys), value)
