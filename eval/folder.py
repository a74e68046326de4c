"""The folder of a run: what was asked, what is done already, and tables that are written atomically.

spec.json                 the evaluation, what its settings became here, versions, batches
run.lock, running.json    held by the process that is at work, and its name
sessions/                 hardware, threads and processes of every start
timing/                   one table a pipeline and round
baselines.json            fewer steps that match a method's seconds or FLOPs, by pipeline
rows/                     one table a batch of pictures
maps/                     which places a method computes
pictures/                 PNG, in folders by pipeline and method
results.parquet, timing.parquet    everything, once the run is whole

Files of a method carry a hash of all that its pictures depend on, so that a run can grow: what is added gets files of its own, and
what is no longer asked for is ignored.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from dit_accel.eval.machine import hardware, locked
from dit_accel.eval.spec import Cell, Spec
from dit_accel.pipelines.pictures import write_atomically

T = TypeVar("T")
Batches = list[list[tuple[int, int]]]  # (prompt number, seed number) of pictures that are denoised together

PACKAGES = ("dit-accel", "torch", "diffusers", "transformers", "accelerate", "numpy", "pillow")
# What pictures, seconds and verdicts depend on: no change once there are any.
FIXED = ("steps", "guidance", "height", "width", "scores", "margin", "batch_size", "timing_batch_size", "offload")
CONTENTS = ("spec.json", "run.lock", "running.json", "sessions", "timing", "baselines.json", "cut.json", "rows", "maps", "pictures")


class RunFolder:
    """Paths and tables of one run.

    A file that cannot be read counts as missing, so that it is made again, and is named in `unreadable`.

    Args:
        path: the folder.
        tell: called with a sentence about every file that cannot be read.
    """

    def __init__(self, path: Path, tell: Callable[[str], None] = lambda text: None) -> None:
        self.path, self.tell = path, tell
        self.unreadable: dict[Path, str] = {}
        self._begun: dict[str, Any] | None = None

    def begin(self, spec: Spec, resolved: dict[str, str]) -> None:
        """Make the folder, go on in it, or let it grow.

        Args:
            spec: what is asked.
            resolved: what "auto" has become, see `Evaluation`.

        Raises:
            ValueError: see `compare`.
        """
        before = self.compare(spec, resolved)
        frame = {name: getattr(spec, name) for name in FIXED if name not in ("margin", "batch_size", "timing_batch_size")}
        now = {"spec": spec.to_dict(), "resolved": resolved, "versions": versions(), "frame": frame | resolved | versions()}
        self._begun = now
        now["labels"] = {name: {self.key(name, cell): cell.label for cell in spec.cells} for name in spec.pipelines}
        kept = before["batches"] if before and self.has_results() else []
        now["batches"] = grown(kept, spec)
        self._begun = json.loads(json.dumps(now))
        if self._begun != before:
            for name in ("results", "timing"):
                (self.path / f"{name}.parquet").unlink(missing_ok=True)
            write_json(self.path / "spec.json", now)

    def compare(self, spec: Spec, resolved: dict[str, str]) -> dict[str, Any] | None:
        """What the folder was begun with, or None; changes nothing.

        Raises:
            ValueError: the folder holds something else, or pictures that cannot be compared with those asked for now.
        """
        if self.path.exists() and (not self.path.is_dir() or (found := os.listdir(self.path)) and not set(found) & set(CONTENTS)):
            raise ValueError(f"{self.path} exists and is no run; give another --output.")
        before = self.read(self.path / "spec.json", read_begun)
        if before is None or not self.has_results():
            return before
        old, new = before["spec"], json.loads(json.dumps(spec.to_dict()))
        pairs = [(name, old.get(name), new[name]) for name in FIXED]
        pairs += [(name, before["resolved"].get(name), value) for name, value in resolved.items()]
        pairs += [(name, before["versions"].get(name), value) for name, value in versions().items()]
        changed = [f"{name} was {short(was)} and is {short(now)}" for name, was, now in pairs if was != now]
        changed += [
            f"{name} was {old[name]} and is {new[name]}, which is fewer"
            for name in ("seeds", "timing_rounds")
            if new[name] < old[name]
        ]
        for i, (was, now) in enumerate(zip(old["prompts"], [*new["prompts"], *[None] * len(old["prompts"])], strict=False), 1):
            if was != now:
                changed.append(f"prompt {i} was {short(was)} and is {short(now) if now is not None else 'gone'}")
                break
        if changed:
            raise ValueError(
                f"{self.path} holds results of something else: {'; '.join(changed)}. Change it back, or give another --output. "
                "Methods, pipelines, seeds, timing rounds and, at the end, prompts may be added, and methods changed."
            )
        return before

    def has_results(self) -> bool:
        return any(next((self.path / kind).glob("*.parquet"), None) for kind in ("rows", "timing"))

    def read(self, path: Path, reader: Callable[[Path], T]) -> T | None:
        """What a file holds; None if there is none, or none that can be read."""
        if not path.is_file():
            return None
        try:
            return reader(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if path not in self.unreadable:
                self.unreadable[path] = " ".join(str(error).split())[:200]
                self.tell(f"{path} cannot be read and counts as missing: {self.unreadable[path] or type(error).__name__}")
            return None

    @property
    def begun(self) -> dict[str, Any]:
        """What `begin` wrote; FileNotFoundError if this is no run."""
        if self._begun is None:
            self._begun = self.read(self.path / "spec.json", read_begun)
        if self._begun is None:
            raise FileNotFoundError(
                f"{self.path} is no run: it has no spec.json that can be read. Start one with: dit-accel-eval run SPEC.yaml"
            )
        return self._begun

    def locked(self) -> AbstractContextManager[None]:
        """See `dit_accel.eval.machine.locked`."""
        return locked(self.path)

    def record_session(self, device: str, processes: int) -> int:
        """Record that the run is started or goes on here and now; the number of the session."""
        number = len(list((self.path / "sessions").glob("*.json")))
        record = {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "device": device, "processes": processes, **hardware(device)}
        write_json(self.path / "sessions" / f"{number:03}.json", record)
        return number

    def sessions(self) -> list[dict[str, Any]]:
        found = (self.read(file, read_json) for file in sorted((self.path / "sessions").glob("*.json")))
        return [one for one in found if one is not None]

    def baselines(self) -> dict[str, dict[str, list[str]]]:
        """By pipeline for which they were looked for: the numbers of steps, and which methods each one matches in what."""
        return {name: one["steps"] for name, one in self.probed().items() if one["methods"] or one["steps"]}

    def probed(self) -> dict[str, dict[str, Any]]:
        """By pipeline: `steps`, see `baselines`, and `methods`, the keys of those for which they were looked for, by label."""
        return self.read(self.path / "baselines.json", read_baselines) or {}

    def key(self, pipeline: str, cell: Cell) -> str:
        """A hash of all that the pictures of a method depend on besides prompt and seed."""
        parts = [self.begun.get("frame"), pipeline, cell.kind, cell.options(), cell.code]
        return hashed(json.dumps(parts, sort_keys=True, default=str))

    def rows(self, pipeline: str, cell: Cell, batch: int) -> Path:
        return self.path / "rows" / f"{named(pipeline)}-{self.key(pipeline, cell)}-{batch:05}.parquet"

    def timing(self, pipeline: str, number: int) -> Path:
        return self.path / "timing" / f"{named(pipeline)}-{number:03}.parquet"

    def map(self, pipeline: str, cell: Cell) -> Path:
        return self.path / "maps" / f"{named(pipeline)}-{self.key(pipeline, cell)}.json"

    def picture(self, pipeline: str, cell: Cell, prompt: int, seed: int) -> Path:
        """Where a picture lies, relative to the folder; the method's label is for whoever looks at it."""
        return Path("pictures", named(pipeline), f"{slug(cell.label)}-{self.key(pipeline, cell)}", f"{prompt:04}-{seed:02}.png")

    def batches(self) -> Batches:
        """The same for every method, whatever the number of processes: so are the pictures, to the last bit."""
        return [[(prompt, seed) for prompt, seed in batch] for batch in self.begun["batches"]]

    def labels(self) -> dict[str, str]:
        """By key, all methods that are asked for, and the fewer steps that match them. Options in another order change a label."""
        found = {key: label for labels in self.begun["labels"].values() for key, label in labels.items()}
        for pipeline, counts in self.baselines().items():
            cells = [fewer_steps(int(count)) for count in counts]
            found |= {self.key(pipeline, cell): cell.label for cell in cells}
        return found

    def table(self, kind: str) -> pd.DataFrame:
        """All tables of `rows` or `timing` as one, of what is asked for."""
        read = (self.read(file, read_table) for file in sorted((self.path / kind).glob("*.parquet")))
        tables = [table for table in read if table is not None]
        if not tables:
            return pd.DataFrame()
        found = pd.concat(tables, ignore_index=True)
        labels = self.labels()
        found = found[found["cell"].isin(labels)]
        found = found.assign(method=found["cell"].map(labels))
        if kind == "timing":
            return found[found["round"] <= self.begun["spec"]["timing_rounds"]].reset_index(drop=True)
        return found.drop_duplicates(["cell", "prompt", "seed"]).reset_index(drop=True)

    def maps(self) -> list[dict[str, Any]]:
        """The selection maps of what is asked for."""
        read = (self.read(file, read_json) for file in sorted((self.path / "maps").glob("*.json")))
        labels = self.labels()
        return [one | {"method": labels[one["cell"]]} for one in read if one is not None and one.get("cell") in labels]


def grown(batches: list[Any], spec: Spec) -> Batches:
    """Batches that are there already, and after them new ones of all pictures that are in none."""
    found: Batches = [[(prompt, seed) for prompt, seed in batch] for batch in batches]
    have = {place for batch in found for place in batch}
    places = [(prompt, seed) for prompt in range(len(spec.prompts)) for seed in range(spec.seeds)]
    left = [place for place in places if place not in have]
    return found + [left[i : i + spec.batch_size] for i in range(0, len(left), spec.batch_size)]


def fewer_steps(count: int) -> Cell:
    """The uncached run with fewer steps."""
    return Cell(f"{count} steps", (), count, "fewer steps")


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def read_begun(path: Path) -> dict[str, Any]:
    begun = read_json(path)
    if missing := [name for name in ("spec", "resolved", "versions", "labels", "batches") if name not in begun]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return begun


def read_baselines(path: Path) -> dict[str, dict[str, Any]]:
    found = read_json(path)
    for one in found.values():
        one["methods"], [int(count) for count in one["steps"]]
    return found


def read_table(path: Path) -> pd.DataFrame:
    table = pd.read_parquet(path)
    if table.empty or not {"cell", "method", "error"} <= set(table):
        raise ValueError("it lacks rows or columns")
    return table


def versions() -> dict[str, str]:
    """What the pictures depend on besides the specification."""
    return {package: version(package) for package in PACKAGES}


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_table(path: Path, rows: Iterable[dict[str, Any]] | pd.DataFrame) -> None:
    buffer = io.BytesIO()
    (rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows)).to_parquet(buffer, index=False)
    write_atomically(path, buffer.getvalue())


def slug(text: str) -> str:
    """Letters, digits, dots and hyphens of a name, for a path."""
    return re.sub(r"[^\w.=]+", "-", Path(text).name if "/" in text else text).strip("-.")[:60] or "x"


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def named(pipeline: str) -> str:
    """What files of a pipeline are called: those of one name in two folders differ."""
    return f"{slug(pipeline)[:30]}-{hashed(pipeline)[:6]}"


def short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
