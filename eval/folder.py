"""The folder of a run: what was asked, what is done already, and tables that are written whole or not at all.

spec.json                 the evaluation and the versions it was begun with
sittings/                 hardware, threads and processes of every start
timing/                   one table a pipeline and round
baselines.json            fewer steps that match a method's seconds or FLOPs, by pipeline
rows/                     one table a batch of pictures
pictures/                 PNG, in folders by pipeline and method
results.parquet, timing.parquet    everything, once the run is whole
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dit_accel.eval.spec import Spec
from dit_accel.pipelines.pictures import write_atomically

PACKAGES = ("dit-accel", "torch", "diffusers", "transformers", "accelerate", "numpy", "pillow")


class RunFolder:
    """Paths and tables of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, spec: Spec) -> None:
        """Make the folder, or go on in it.

        Raises:
            ValueError: the folder holds something else, or a run of another specification or other versions.
        """
        now = json.loads(json.dumps({"spec": spec.to_dict(), "versions": versions(spec)}))
        file = self.path / "spec.json"
        if not file.is_file():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise ValueError(f"{self.path} exists and is no run; give another --output.")
            write_json(file, now)
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [
            f"{name} was {short(before[part].get(name))} and is {short(now[part].get(name))}"
            for part in ("spec", "versions")
            for name in {**before[part], **now[part]}
            if before[part].get(name) != now[part].get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.path} was begun with something else: {'; '.join(changed)}. "
                "Pictures of both cannot be compared: change it back, or give another --output."
            )

    def read_spec(self) -> dict[str, Any]:
        """What `begin` wrote; FileNotFoundError if this is no run."""
        file = self.path / "spec.json"
        if not file.is_file():
            raise FileNotFoundError(f"{self.path} is no run: it has no spec.json. Start one with: dit-accel-eval run SPEC.yaml")
        return dict(json.loads(file.read_text(encoding="utf-8")))

    def sit_down(self, device: str, processes: int) -> int:
        """Record that the run is started or goes on here and now; the number of the sitting."""
        number = len(list((self.path / "sittings").glob("*.json")))
        record = {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "device": device, "processes": processes, **hardware(device)}
        write_json(self.path / "sittings" / f"{number:03}.json", record)
        return number

    def sittings(self) -> list[dict[str, Any]]:
        return [json.loads(file.read_text(encoding="utf-8")) for file in sorted((self.path / "sittings").glob("*.json"))]

    def baselines(self) -> dict[str, dict[str, list[str]]]:
        """By pipeline: the numbers of steps, and which methods each one matches in what."""
        file = self.path / "baselines.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def rows(self, pipeline: int, cell: int, batch: int) -> Path:
        return self.path / "rows" / f"{pipeline:02}-{cell:04}-{batch:05}.parquet"

    def timing(self, pipeline: int, number: int) -> Path:
        return self.path / "timing" / f"{pipeline:02}-{number:03}.parquet"

    def map(self, pipeline: int, cell: int) -> Path:
        return self.path / "maps" / f"{pipeline:02}-{cell:04}.json"

    def failed(self, rows: Path) -> bool:
        """Whether a picture of this batch failed."""
        return bool(pd.read_parquet(rows, columns=["error"])["error"].notna().any())

    def picture(self, pipeline: int, cell: int, prompt: int, seed: int, names: tuple[str, str]) -> Path:
        """Where a picture lies, relative to the folder; `names` of pipeline and method are for whoever looks at it."""
        first, second = (f"{number:02}-{slug(name)}" for number, name in zip((pipeline, cell), names, strict=True))
        return Path("pictures", first, second, f"{prompt:04}-{seed:02}.png")

    def table(self, kind: str) -> pd.DataFrame:
        """All tables of `rows` or `timing` as one."""
        files = sorted((self.path / kind).glob("*.parquet"))
        return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True) if files else pd.DataFrame()


def versions(spec: Spec) -> dict[str, str]:
    """What the pictures depend on besides the specification."""
    found = {package: version(package) for package in PACKAGES}
    if spec.selector_file:
        found["selector_file"] = hashlib.sha256(Path(spec.selector_file).read_bytes()).hexdigest()
    return found


def hardware(device: str) -> dict[str, Any]:
    """What the seconds depend on."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()
    return {
        "hardware": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine() or sys.platform


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_table(path: Path, rows: Iterable[dict[str, Any]] | pd.DataFrame) -> None:
    buffer = io.BytesIO()
    (rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows)).to_parquet(buffer, index=False)
    write_atomically(path, buffer.getvalue())


def slug(text: str) -> str:
    """Letters, digits, dots and hyphens of a name, for a path; different names of one slug are told apart by their numbers."""
    return re.sub(r"[^\w.=]+", "-", Path(text).name if "/" in text else text).strip("-.")[:80] or "x"


def short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
