"""Prompt sets in every format, and errors that name the line."""

from __future__ import annotations

import csv
import json

import pytest

from dit_accel.eval.prompt_sets import read_prompt_set

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
