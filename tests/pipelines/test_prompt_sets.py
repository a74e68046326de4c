"""Prompt sets in every format, and errors that name the line."""

from __future__ import annotations

import csv
import io
import json
import os
import threading
import types

import pytest

from dit_accel.eval import prompt_sets
from dit_accel.pipelines.prompt_sets import is_prompt, read_prompt_set

PROMPTS = ["a red apple", 'two cats, one "grey"', "a crab\ton sand", "café au lait"]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def in_format(path):
    if path.suffix == ".txt":
        return write(path, "# a comment\n\n" + "".join(f"  {prompt} \n" for prompt in PROMPTS))
    if path.name == "objects.json":
        return write(path, json.dumps([{"id": i, "Prompt": prompt} for i, prompt in enumerate(PROMPTS)], indent=2))
    if path.suffix == ".json":
        return write(path, json.dumps(PROMPTS))
    if path.suffix == ".jsonl":
        return write(path, "\n".join(json.dumps({"caption": p} if i % 2 else p) for i, p in enumerate(PROMPTS)) + "\n")
    with open(path, "w", newline="", encoding="utf-8-sig") as file:  # as a spreadsheet saves it
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([["Prompts", "Category"], *([prompt, "x"] for prompt in PROMPTS)])
    return path


@pytest.mark.parametrize("name", ["set.txt", "list.json", "objects.json", "lines.jsonl", "table.csv", "table.tsv"])
def test_every_format_gives_the_same_prompts(tmp_path, name):
    assert read_prompt_set(in_format(tmp_path / name)) == PROMPTS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "one\ntwo\none\n", r"line 3: 'one' is on line 1 already"),
        ("a.txt", "# nothing\n", "holds no prompt"),
        ("a.json", '["one",\n "two"\n "three"]', "line 3: this is not JSON"),
        ("a.json", '{"prompt": "one"}', "must be a list"),
        ("a.json", '["one",\n {"text": "two"},\n {"id": 3}]', r"line 3: .* is no prompt"),
        ("a.json", '["one",\n\n ""]', "line 3: '' is no prompt"),
        ("a.jsonl", '"one"\n\n{"prompt": 2}\n', "line 3: 2 is no prompt"),
        ("a.jsonl", '"one"\n"two\n', "line 2: this is not JSON"),
        ("a.csv", "id,words\n1,one\n", "line 1: none of the columns id, words is called prompt"),
        ("a.csv", "prompt,id\none,1\ntwo, three,2\n", "line 3: there are more fields than columns"),
        ("a.csv", "prompt,id\none,1\n,2\n", "line 3: '' is no prompt"),
        ("a.csv", 'prompt,id\none,1\n"two,2\n', "line 3: "),
        ("a.json", '["one",\n "\\ud800"]', "line 2: .* is no prompt"),
    ],
)
def test_a_malformed_file_names_the_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_prompt_set(write(tmp_path / name, text))


def test_what_is_no_text_and_what_is_not_there(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\nzwei\nfünf\n".encode("latin-1"))
    with pytest.raises(ValueError, match="line 3: this is not UTF-8"):
        read_prompt_set(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match="no prompt set"):
        read_prompt_set(tmp_path / "b.txt")


def test_evaluation_reads_with_the_same_function():
    assert prompt_sets.read_prompt_set is read_prompt_set


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["set.txt", "list.json", "lines.jsonl", "table.csv"])
def test_every_encoding_and_line_end(tmp_path, name, encoding, newline):
    text = in_format(tmp_path / name).read_text(encoding="utf-8-sig")
    (tmp_path / name).write_bytes(text.replace("\n", newline).encode(encoding))
    assert read_prompt_set(tmp_path / name) == PROMPTS


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_its_mark_gets_a_sentence(tmp_path, order):
    (tmp_path / "a.txt").write_bytes("crab\n".encode(order))
    with pytest.raises(ValueError, match="a.txt holds zeros, as UTF-16 without .*; save the file in UTF-8"):
        read_prompt_set(tmp_path / "a.txt")


def test_joined_files_have_marks_in_the_middle(tmp_path):
    (tmp_path / "a.txt").write_bytes("# one\ncrab\n".encode("utf-8-sig") + "# two\nfox\n".encode("utf-8-sig"))
    assert read_prompt_set(tmp_path / "a.txt") == ["crab", "fox"]


@pytest.mark.parametrize("separator", [*"\u2028\u2029\u0085\v\f\x1c\x1d\x1e"])
@pytest.mark.parametrize("name", ["set.txt", "list.json", "lines.jsonl", "table.csv", "table.tsv"])
def test_lines_end_at_newlines_only(tmp_path, name, separator):
    prompts = [f"a red{separator}apple", "crab"]
    if name.startswith("table"):
        text = "".join(f"{line}\n" for line in ["prompt", *prompts])
    elif name == "list.json":
        text = json.dumps(prompts, ensure_ascii=False)
    else:
        text = "".join(f"{json.dumps(p, ensure_ascii=False) if name == 'lines.jsonl' else p}\n" for p in prompts)
    if separator < " " and name.endswith(("json", "jsonl")):
        text = text.replace(separator, json.dumps(separator)[1:-1])
    assert read_prompt_set(write(tmp_path / name, text)) == prompts


def test_a_published_tsv_has_bare_quotes(tmp_path):
    """Rows of PartiPrompts as they are published; the second begins with a quotation mark, the last column is mostly empty."""
    prompts = [
        'A green sign that says "Very Deep Learning" and is at the edge of the Grand Canyon.',
        '"G I G G L E" painted in thick colorful lettering as graffiti on a faded red brick wall',
        "a boat with 'BLUE GROOVE' written on its hull",
        '"hello"',
    ]
    rows = ["Prompt\tCategory\tChallenge\tNote", *(f"{p}\tIllustrations\tWriting & Symbols\t" for p in prompts)]
    assert read_prompt_set(write(tmp_path / "a.tsv", "\n".join(rows) + "\n")) == prompts
    assert read_prompt_set(write(tmp_path / "b.tsv", 'Prompt\tCategory\n"hello"\tx\n')) == ['"hello"'], "nothing needs quotes"


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_quoted_tsv_loses_its_quotes(tmp_path, quoting, newline):
    prompts = ["plain", 'a sign that says "open"', '"hello"', "a\ttab", "two\nlines"]
    file = io.StringIO()
    csv.writer(file, delimiter="\t", quoting=quoting, lineterminator=newline).writerows(
        [["prompt", "id"], *([p, 1] for p in prompts)]
    )
    (tmp_path / "a.tsv").write_bytes(file.getvalue().encode())
    assert read_prompt_set(tmp_path / "a.tsv") == prompts


def test_standard_input_and_pipes(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO("\ufeff# two\ncrab\nfox\n".encode("utf-16-le"))))
    assert read_prompt_set("-") == ["crab", "fox"]
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"\n")))
    with pytest.raises(ValueError, match="standard input holds no prompt"):
        read_prompt_set("-")
    os.mkfifo(tmp_path / "pipe")  # as the shell's <(...) gives
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("crab\n"))
    writer.start()
    assert read_prompt_set(tmp_path / "pipe") == ["crab"]
    writer.join()


def test_what_is_a_prompt():
    assert is_prompt(" crab ") and is_prompt("🍎")
    assert not any(map(is_prompt, ["", " \u2028", None, 3, "\udcff"]))
