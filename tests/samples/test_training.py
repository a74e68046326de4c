"""The whole recipe in miniature, on synthetic pictures: each script is run as a person would run it, only shorter."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, PixArtSigmaPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from eval.rewards import ImageReward

SCRIPTS = Path(__file__).parents[2] / "samples" / "training"
SETS = ("noto", "fluent-flat", "fluent-3d", "noto-v1", "twemoji", "emojione")
BATCH, CONCEPTS = 4, 24
MINIATURE = f"""
import data
everything = data.concepts()
data.concepts = lambda: everything[:{CONCEPTS}]
import train
train.Flux.steps = train.PixArt.steps = 2
"""

pytestmark = pytest.mark.slow


def codes() -> list[str]:
    lines = (SCRIPTS / "concepts.txt").read_text().splitlines()
    return [line.split()[0] for line in lines if line and not line.startswith("#")]


class Recipe:
    """The training scripts in subprocesses that share one work folder, with fewer concepts and sampling steps."""

    def __init__(self, work: Path) -> None:
        self.work = work
        paths = os.pathsep.join([str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = {
            **os.environ,
            "DIT_ACCEL_TRAINING": str(work),
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def start(self, script: str, *arguments: object) -> subprocess.Popen[str]:
        code = f"{MINIATURE}\nimport typer, {script}\ntyper.run({script}.main)"
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, script: str, *arguments: object) -> str:
        output, _ = (process := self.start(script, *arguments)).communicate()
        assert process.returncode == 0, output
        return output

    def pipeline(self, family: str) -> Path:
        """A trained pipeline, made in a moment if there is none yet; PixArt starts with FLUX's T5."""
        folder = self.work / f"emoji-{family}"
        if not folder.exists():
            if family == "pixart":
                self.pipeline("flux")
            self.run("train", family, "--batch", BATCH, "--threads", 1, "--samples-64", BATCH, "--samples-128", 0)
        return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A work folder with blobs of a colour per concept in place of emoji, and an autoencoder trained on them for seconds."""
    work = tmp_path_factory.mktemp("training")
    rng = random.Random(0)
    tensors, order = {}, {}
    for name in SETS:
        order[name] = codes()[: 12 if name == "emojione" else 40]
        pictures = torch.full((len(order[name]), 3, 128, 128), 255, dtype=torch.uint8)
        for i, picture in enumerate(pictures):
            side = rng.randint(50, 90)
            color = torch.tensor([(37 * i) % 256, (91 * i) % 256, (149 * i) % 256], dtype=torch.uint8)
            picture[:, 20 : 20 + side, 20 : 20 + side] = color[:, None, None]
        tensors[name] = pictures
    save_file(tensors, work / "pictures-128.safetensors")
    (work / "order.json").write_text(json.dumps(order))
    recipe = Recipe(work)
    assert "held-out PSNR" in recipe.run("autoencoder", "--minutes", 0.05, "--batch", 2)
    return recipe


@pytest.mark.parametrize(("family", "pipeline"), [("flux", FluxPipeline), ("pixart", PixArtSigmaPipeline)])
def test_interrupted_training_goes_on_and_yields_a_stock_pipeline(recipe, family, pipeline):
    checkpoint, sheets = recipe.work / f"emoji-{family}.pt", recipe.work / "sheets"
    settings = (family, "--batch", BATCH, "--threads", 1, "--checkpoint-minutes", 0)
    if family == "pixart":
        recipe.pipeline("flux")
    process = recipe.start("train", *settings, "--samples-64", 1_000_000)
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.kill()
    process.communicate()
    before = torch.load(checkpoint, weights_only=True)
    for path in sheets.glob(f"{family}-*.png"):
        path.unlink()

    done = before["done"]
    recipe.run("train", *settings, "--samples-64", done + BATCH, "--samples-128", BATCH)

    after = torch.load(checkpoint, weights_only=True)
    assert (after["done"], after["step"]) == (done + 2 * BATCH, before["step"] + 2)
    assert after["spent"] > before["spent"]
    # One sheet a checkpoint: none for the samples seen before the interruption.
    assert sorted(path.name for path in sheets.glob(f"{family}-*.png")) == [
        f"{family}-{done + BATCH:07d}.png",
        f"{family}-{done + 2 * BATCH:07d}.png",
    ]
    pipe = pipeline.from_pretrained(recipe.work / f"emoji-{family}")
    pipe.set_progress_bar_config(disable=True)
    extra = {"use_resolution_binning": False} if family == "pixart" else {}
    picture = pipe(
        "red apple, 3d style", height=128, width=128, num_inference_steps=2, max_sequence_length=16, output_type="pt", **extra
    ).images
    assert picture.shape == (1, 3, 128, 128)
    assert picture.isfinite().all()
    # What ships is the average of the weights, not the last ones.
    shipped = dict(pipe.transformer.named_parameters())
    names = [name for name in after["model"] if name.startswith("transformer.")]
    last = {name.removeprefix("transformer."): after["model"][name].bfloat16().float() for name in names}
    assert any(not torch.equal(shipped[name], value) for name, value in last.items() if name in shipped)


def test_judge_is_trained_twice_and_measures_a_pipeline(recipe):
    folder = recipe.work / "judge"
    settings = ("--batch", 16, "--threads", 1, "--out", folder)
    recipe.run("judge", "--samples", 32, *settings)
    assert torch.load(recipe.work / "judge.pt", weights_only=True)["done"] == 32
    output = recipe.run("judge", "--samples", 48, *settings)
    assert torch.load(recipe.work / "judge.pt", weights_only=True)["done"] == 48
    assert "never seen" in output

    config = json.loads((folder / "config.json").read_text())
    assert config["codes"] == codes()[:CONCEPTS]
    assert config["accuracy"]["unseen_style"]["pictures"] == 12
    assert "emojione" not in config["accuracy"]["unseen_style"]["trained_on"]
    weights = load_file(folder / "judge.safetensors")
    assert weights["head.1.weight"].shape[0] == CONCEPTS

    output = recipe.run("measure", recipe.pipeline("flux"), "--every", 9, "--threads", 1, "--judge", folder)
    assert "trained" in output
    assert "held_out" in output
    assert (recipe.work / "emoji-flux.png").exists()


def test_reward_learns_from_samples_that_were_stopped(recipe):
    for family in ("flux", "pixart"):
        recipe.pipeline(family)
    recipe.run("stopped", "--batch", 36, "--threads", 1, "--folder", recipe.work)
    for name in ("flux", "pixart"):
        samples = load_file(recipe.work / f"stopped-{name}.safetensors")["pictures"]
        assert samples.shape == (3 * CONCEPTS, 5, 3, 128, 128) and samples.dtype == torch.uint8
        assert not torch.equal(samples[:, 0], samples[:, -1])

    folder, settings = recipe.work / "emoji-reward", ("--batch", BATCH, "--threads", 1, "--draws", 1)
    settings += ("--vae-path", recipe.work / "vae", "--out", recipe.work / "emoji-reward")
    recipe.run("reward", "--naming", 8, "--ranking", 0, *settings)
    recipe.run("reward", "--naming", 8, "--ranking", 8, *settings)
    assert torch.load(recipe.work / "emoji-reward.pt", weights_only=True)["done"] == 16
    measured = json.loads((folder / "measured.json").read_text())
    assert measured["prompts"] == 3 * CONCEPTS
    assert {"concept", "style", "blur", "noise", "blocking", "colour", "shuffle", "stopped early"} < set(measured["held-out pairs"])
    picture = Image.fromarray(samples[0, 0].permute(1, 2, 0).numpy())
    (score,) = ImageReward.from_checkpoint(folder).score(["grapes, 3d style"], [picture])
    assert -10 < score < 10


def test_degradations_grow_with_their_strength():
    sys.path.append(str(SCRIPTS))
    from degrade import DEGRADATIONS, degrade

    image = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image = torch.nn.functional.avg_pool2d(image[None], 9, stride=1, padding=4)[0] * 2
    for kind in DEGRADATIONS:
        versions = degrade(image, kind, [0.0, 0.1, 0.4, 0.9], torch.Generator().manual_seed(1))
        errors = [(version - image).square().mean().item() for version in versions]
        assert errors[0] < 1e-12 and errors == sorted(errors) and errors[1] > 1e-5, (kind, errors)
        assert all(version.shape == image.shape for version in versions)
