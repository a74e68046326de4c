"""Files of prompts: text, JSON, JSON lines, CSV or TSV, read alike by every command."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

STANDARD_INPUT = "-"
COLUMNS = ("prompt", "prompts", "caption", "text")  # in this order; their letters' case does not matter
MARKS = (  # the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
FIELD = re.compile(r'("(?:[^"]|"")*"|[^"\t\n][^\t\n]*|)(?:[\t\n]|$)')  # of a table with tabs, perhaps in quotation marks


class PlainTabs(csv.excel_tab):
    """Fields between tabs, in which quotation marks are text."""

    quoting = csv.QUOTE_NONE


def read_prompt_set(path: str | Path) -> list[str]:
    """The prompts of a file, in its order; "-" is standard input, read as a text file.

    A text file has one prompt a line; empty lines and those that start with # are skipped. JSON is a list of prompts, or of
    objects with a `prompt`; JSON lines have one of them a line. CSV and TSV (DrawBench, PartiPrompts) have a header with a
    column of that name. A column or key may also be called prompts, caption or text. The suffix of the file's name tells which
    it is. In a TSV, quotation marks are text, as PartiPrompts is published, unless the whole file is quoted as spreadsheets do.

    The text is UTF-8, or UTF-16 or UTF-32 with a byte-order mark. Lines end at newlines only: other separators of Unicode are
    part of a prompt.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is malformed, with the line; for a prompt that comes twice; for a file without prompts.
    """
    if str(path) == STANDARD_INPUT:
        name, suffix, data = "standard input", "", sys.stdin.buffer.read()
    else:
        path = Path(path)
        if path.is_dir() or not path.exists():
            raise FileNotFoundError(f"There is no prompt set {path}; give a text, JSON or CSV file.")
        name, suffix, data = str(path), path.suffix.lower(), path.read_bytes()
    readers = {".json": _json, ".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _csv, ".tsv": _tsv}
    seen: dict[str, int] = {}
    for line, prompt in readers.get(suffix, _lines)(name, _decoded(name, data)):
        if not is_prompt(prompt):
            raise ValueError(f"{name}, line {line}: {prompt!r} is no prompt; give a text that is not empty.")
        prompt = str(prompt).strip()
        if prompt in seen:
            raise ValueError(f"{name}, line {line}: {prompt!r} is on line {seen[prompt]} already; give every prompt once.")
        seen[prompt] = line
    if not seen:
        raise ValueError(f"{name} holds no prompt.")
    return list(seen)


def is_prompt(value: object) -> bool:
    """Whether this is a text that is not empty, and that can be written in UTF-8: half a surrogate pair cannot."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)


def _decoded(name: str, data: bytes) -> str:
    """The text, every line of which ends in a newline, without byte-order marks: joined files have them in the middle, too."""
    encoding = next((encoding for mark, encoding in MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{name}, line {line}: this is not {encoding.upper()} text; save the file in UTF-8.") from None
    if "\0" in text:
        raise ValueError(f"{name} holds zeros, as UTF-16 without a byte-order mark does; save the file in UTF-8.")
    return text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")


def _lines(name: str, text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line


def _json(name: str, text: str) -> Iterator[tuple[int, object]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {error.lineno}: this is not JSON ({error.msg}).") from None
    if not isinstance(values, list):
        raise ValueError(f"{name}, line 1: the file must be a list of prompts, or of objects with a prompt.")
    decoder, place = json.JSONDecoder(), text.index("[") + 1
    for _ in values:  # once more one by one, since only so the lines come out
        while text[place].isspace() or text[place] == ",":
            place += 1
        value, end = decoder.raw_decode(text, place)
        yield text.count("\n", 0, place) + 1, _prompt_of(value)
        place = end


def _json_lines(name: str, text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, _prompt_of(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}, line {number}: this is not JSON ({error.msg}).") from None


def _csv(name: str, text: str) -> Iterator[tuple[int, object]]:
    return _table(name, csv.DictReader(io.StringIO(text), strict=True))


def _tsv(name: str, text: str) -> Iterator[tuple[int, object]]:
    dialect = csv.excel_tab if _is_quoted(text) else PlainTabs
    return _table(name, csv.DictReader(io.StringIO(text), dialect=dialect, strict=True))


def _is_quoted(text: str) -> bool:
    """Whether the quotation marks of a TSV are those of a spreadsheet: around all fields, or around all that need them."""
    fields, place = [], 0
    while place < len(text):
        field = FIELD.match(text, place)
        if field is None:
            return False
        fields.append(field[1])
        place = field.end()
    inner = [field[1:-1] for field in fields if field.startswith('"')]
    return all(re.search('["\t\n,]', field) for field in inner) or all(field.startswith('"') for field in fields if field)


def _table(name: str, reader: csv.DictReader[str]) -> Iterator[tuple[int, object]]:
    try:
        names = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
        column = next((names[name] for name in COLUMNS if name in names), None)
        if column is None:
            raise ValueError(f"{name}, line 1: none of the columns {', '.join(reader.fieldnames or ())} is called prompt.")
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{name}, line {reader.line_num}: there are more fields than columns; quote prompts that hold the separator."
                )
            yield reader.line_num, row[column]
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num + 1}: {error}.") from None  # where the broken row begins


def _prompt_of(value: object) -> object:
    if not isinstance(value, dict):
        return value
    keys = {str(key).lower(): key for key in value}
    return next((value[keys[name]] for name in COLUMNS if name in keys), value)
