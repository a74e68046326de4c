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
    commands = ["dit-accel dit_accel.pipelines.__main__", "dit-accel-eval dit_accel.eval.__main__"]
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


WITHOUT = "import sys; sys.modules.update(dict.fromkeys({packages!r})); "  # importing None raises ModuleNotFoundError


def without(packages: tuple[str, ...], code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT.format(packages=packages) + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("package", "command", "arguments", "extra"),
    [
        ("typer", "pipelines", ["--help"], "cli"),
        ("rich", "pipelines", ["generate", "red"], "cli"),
        ("transformers", "pipelines", ["generate", "red"], "cli"),
        ("PIL", "pipelines", ["inspect", "red"], "cli"),
        ("typer", "eval", ["--help"], "eval"),
        ("yaml", "eval", ["run", ROOT / "eval/specs/quick.yaml"], "eval"),
        ("matplotlib", "eval", ["report", ROOT], "eval"),
        ("gradio", "pipelines", ["ui"], "ui"),
    ],
)
def test_a_missing_extra_is_one_sentence(package, command, arguments, extra):
    done = without((package,), f"from dit_accel.{command}.__main__ import main; main()", *arguments)
    assert done.returncode == 1 and not done.stdout
    said = " ".join(done.stderr.split())
    assert said == f'Error: {package} is not installed; install what this needs with: pip install "dit-accel[{extra}]"'


def test_the_library_needs_no_extra():
    """What only the extras bring is hidden."""
    packages = (
        "accelerate",
        "google.protobuf",
        "matplotlib",
        "pandas",
        "peft",
        "rich",
        "scipy",
        "sentencepiece",
        "transformers",
        "typer",
    )
    code = """
import diffusers, torch
import dit_accel
from dit_accel import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig
small = dict(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, in_channels=16)
model = diffusers.FluxTransformer2DModel(**small, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 6, 6])
ids = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(2.0))
given = dict(hidden_states=torch.randn(1, 4, 16), encoder_hidden_states=torch.randn(1, 3, 16), txt_ids=torch.zeros(3, 3))
given |= dict(img_ids=ids, pooled_projections=torch.randn(1, 16), timestep=torch.ones(1))
for config in (TokenCacheConfig(), [TokenCacheConfig(), TokenMergeConfig()], OutputCacheConfig()):
    dit_accel.apply(model, config)
    for time in (1.0, 0.9, 0.8):
        with torch.no_grad():
            model(**given | dict(timestep=torch.tensor([time])))
    print(dit_accel.report(model).to_dict()["partial_steps"])
"""
    done = without(packages, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "2", "2"]
