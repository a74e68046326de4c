"""The architecture, held by reading the imports of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dit_accel

ROOT = Path(__file__).parent.parent
# Folders and their import names; each may import itself and what stands before it.
LAYERS = {"dit_accel": "dit_accel", "pipelines": "dit_accel.pipelines", "eval": "dit_accel.eval"}
PURE = ("clock", "config", "how", "importance", "merging", "options", "plan", "when", "which")
MODULES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere, inside functions too; relative ones are resolved."""
    folder, *inner = path.relative_to(ROOT).parts[:-1]
    package = (*LAYERS[folder].split("."), *inner)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def top_levels(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_one_way(path: Path) -> None:
    """eval -> pipelines -> dit_accel, and nothing that ships imports the tests, the benchmarks or the training scripts."""
    layer = list(LAYERS).index(path.relative_to(ROOT).parts[0])
    above = list(LAYERS.values())[layer + 1 :]
    assert not [name for name in imports(path) if f"{name}.".startswith(tuple(f"{layer}." for layer in above))]
    assert not top_levels(path) & {"pipelines", "eval", "tests", "benchmarks", "samples"}


def test_pure_maths_imports_no_diffusers() -> None:
    """Neither directly nor through another module of dit_accel that they import."""
    for name in PURE:
        path = ROOT / "dit_accel" / f"{name}.py"
        seen, waiting = set(), [path] if path.exists() else []
        while waiting:
            module = waiting.pop()
            seen.add(module)
            assert not top_levels(module) & {"diffusers", "transformers"}, (
                f"{module.name}, which {name}.py needs, imports diffusers"
            )
            for imported in imports(module):
                target = ROOT / Path(*imported.split(".")).with_suffix(".py")
                if imported.startswith("dit_accel.") and target.exists() and target not in seen:
                    waiting.append(target)


def test_files_stay_small() -> None:
    long = {path.relative_to(ROOT).as_posix(): n for path in MODULES if (n := len(path.read_text().splitlines())) > 300}
    assert not long


def test_imports_are_light() -> None:
    """What takes diffusers seconds to load waits until something is applied; `--help` waits for no torch at all."""
    heavy = ("diffusers.hooks", "diffusers.models", "transformers")
    for code, unwanted in (
        ("from dit_accel import *", heavy),
        ("import dit_accel", ("torch", *heavy)),
        ("import dit_accel.pipelines.cli, dit_accel.eval.cli", ("torch", *heavy)),
    ):
        code += f"; import sys; print([m for m in sys.modules if m.startswith({unwanted})])"
        assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_public_names_do_not_depend_on_what_is_imported_first() -> None:
    """dit_accel/apply.py and dit_accel/report.py hold functions of the same names."""
    code = """
import dit_accel.apply, dit_accel.report
import dit_accel
names = [name for name in dit_accel.__all__ if not callable(getattr(dit_accel, name))]
assert not names and set(dit_accel.__all__) <= set(dir(dit_accel)), names
assert dit_accel.Report is sys.modules["dit_accel.report"].Report
"""
    subprocess.run([sys.executable, "-c", f"import sys{code}"], check=True)
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        _ = dit_accel.aply
