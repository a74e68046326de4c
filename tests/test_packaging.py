"""What an installation holds: a wheel is built from a copy of the sources, unpacked, and imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("dit_accel", "pipelines", "eval", "samples", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder into which the wheel was unpacked."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in SOURCES:  # setuptools would leave a build folder among them
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = (source / "dist").iterdir()
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def python(installed: Path, code: str) -> str:
    """What the code prints where the wheel is installed."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=installed, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_one_import_name(installed):
    assert [path.name for path in installed.iterdir() if path.suffix != ".dist-info"] == ["dit_accel"]
    files = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    code = {
        f"{'' if layer == 'dit_accel' else 'dit_accel/'}{path.relative_to(ROOT).as_posix()}"
        for layer in ("dit_accel", "pipelines", "eval")
        for path in (ROOT / layer).rglob("*.py")
    }
    assert {file for file in files if file.endswith(".py")} == code
    assert {"dit_accel/py.typed", "dit_accel/eval/report.html", "dit_accel/eval/specs/quick.yaml"} <= files


def test_the_commands_come_from_the_wheel(installed):
    code = """
import dit_accel.pipelines.cli, dit_accel.eval.cli
from importlib.metadata import distribution
for entry in distribution("dit-accel").entry_points:
    print(entry.name, entry.load().__module__)
print(dit_accel.pipelines.cli.__file__)
print(dit_accel.eval.cli.__file__)
"""
    folder = installed / "dit_accel"
    commands = ["dit-accel dit_accel.pipelines.cli", "dit-accel-eval dit_accel.eval.cli"]
    assert python(installed, code).splitlines() == [*commands, f"{folder}/pipelines/cli.py", f"{folder}/eval/cli.py"]


def test_the_embedded_pipelines_are_inside(installed):
    code = "from dit_accel.pipelines.catalog import CATALOG; print(*(e.source for e in CATALOG.values() if e.embedded), sep='\\n')"
    folders = [Path(line) for line in python(installed, code).splitlines()]
    assert [folder.name for folder in folders] == ["emoji-flux", "emoji-pixart"]
    for folder in folders:
        assert folder.parent == installed / "dit_accel" / "pipelines" / "samples"
        original = ROOT / "samples" / folder.name
        assert {p.relative_to(folder) for p in folder.rglob("*")} == {p.relative_to(original) for p in original.rglob("*")}
    assert (folder.parent / "emoji-reward" / "model.safetensors").is_file() and not (folder.parent / "training").exists()
