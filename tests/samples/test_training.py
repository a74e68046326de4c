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

from dit_accel.eval.rewards import ImageReward

SCRIPTS = Path(__file__).parents[2] / "samples" / "training"
SETS = ("noto", "fluent-flat", "fluent-3d", "noto-v1", "twemoji", "emojione")
CONCEPTS = 24
SHORT = ("--tokens", 256, "--threads", 1)
MINIATURE = f"""
import data
few = data.concepts()[:{CONCEPTS}]
data.concepts = lambda: few
import train
train.Flux.steps = train.PixArt.steps = 2
import stopped
stopped.EACH = 4
"""

pytestmark = pytest.mark.slow


def codes() -> list[str]:
    lines = (SCRIPTS / "concepts.txt").read_text().splitlines()
    return [line.split()[0] for line in lines if line and line[0] != "#"]


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
            self.run("train", family, *SHORT, "--steps", 1)
        return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A work folder with blobs of a color per concept in place of emoji, and an autoencoder trained on them for seconds."""
    work = tmp_path_factory.mktemp("training")
    rng = random.Random(0)
    tensors, drawings, order = {}, {}, {}
    for name in SETS:
        order[name] = codes()[: 12 if name == "emojione" else 40]
        pictures = torch.full((len(order[name]), 3, 128, 128), 255, dtype=torch.uint8)
        opaque = torch.zeros(len(order[name]), 1, 128, 128, dtype=torch.uint8)
        for i, picture in enumerate(pictures):
            side = rng.randint(50, 90)
            color = torch.tensor([(37 * i) % 256, (91 * i) % 256, (149 * i) % 256], dtype=torch.uint8)
            picture[:, 20 : 20 + side, 20 : 20 + side] = color[:, None, None]
            opaque[i, :, 20 : 20 + side, 20 : 20 + side] = 255
        tensors[name], drawings[name] = pictures, torch.cat([pictures, opaque], 1)
    save_file(tensors, work / "pictures-128.safetensors")
    save_file(drawings, work / "drawings-128.safetensors")
    (work / "order.json").write_text(json.dumps(order))
    recipe = Recipe(work)
    assert "held-out PSNR" in recipe.run("autoencoder", "--minutes", 0.05, "--batch", 2)
    assert "rings" in recipe.run("border", "--minutes", 0.05, "--batch", 2, "--threads", 1)
    assert (work / "vae/config.json").exists() and (work / "vae-cured/config.json").exists()
    return recipe


@pytest.mark.parametrize(("family", "pipeline"), [("flux", FluxPipeline), ("pixart", PixArtSigmaPipeline)])
def test_interrupted_training_goes_on_and_yields_a_stock_pipeline(recipe, family, pipeline):
    checkpoint, sheets = recipe.work / f"emoji-{family}.pt", recipe.work / "sheets"
    settings = (family, *SHORT, "--checkpoint-minutes", 0)
    if family == "pixart":
        recipe.pipeline("flux")
    process = recipe.start("train", *settings, "--steps", 1_000_000)
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.kill()
    process.communicate()
    before = torch.load(checkpoint, weights_only=True)
    for path in sheets.glob(f"{family}-*.png"):
        path.unlink()

    step = before["step"]
    recipe.run("train", *settings, "--steps", step + 2)

    after = torch.load(checkpoint, weights_only=True)
    assert after["step"] == step + 2 and after["done"] > before["done"] and after["spent"] > before["spent"]
    # One sheet a checkpoint: none for the steps before the interruption.
    assert sorted(path.name for path in sheets.glob(f"{family}-*.png")) == [f"{family}-{step + n:06d}.png" for n in (1, 2)]
    pipe = pipeline.from_pretrained(recipe.work / f"emoji-{family}")
    pipe.set_progress_bar_config(disable=True)
    extra = {"use_resolution_binning": False} if family == "pixart" else {}
    picture = pipe(
        "red apple, 3d style", height=128, width=128, num_inference_steps=2, max_sequence_length=24, output_type="pt", **extra
    ).images
    assert picture.shape == (1, 3, 128, 128)
    assert picture.isfinite().all()
    # What ships is the average of the weights, not the last ones.
    shipped = dict(pipe.transformer.named_parameters())
    names = [name for name in after["model"] if name.startswith("model.transformer.")]
    last = {name.removeprefix("model.transformer."): after["model"][name].bfloat16().float() for name in names}
    assert any(not torch.equal(shipped[name], value) for name, value in last.items() if name in shipped)


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_a_shipped_pipeline_is_trained_further(recipe, tmp_path, family):
    """Its vocabulary is not that of this recipe, which has fewer concepts."""
    out, shipped = tmp_path / f"emoji-{family}", SCRIPTS.parent / f"emoji-{family}"
    recipe.run("train", family, *SHORT, "--start", shipped, "--steps", 2, "--out", out)
    state = torch.load(out.with_suffix(".pt"), weights_only=True)
    assert state["step"] == 2
    before = load_file(shipped / "transformer/diffusion_pytorch_model.safetensors")
    after = {name.removeprefix("model.transformer."): value for name, value in state["model"].items()}
    # A guidance embedding becomes a part of the time's: tests/samples/test_train.py.
    folded = ("guidance_embedder", "timestep_embedder.linear_2.bias")
    before = {name: value for name, value in before.items() if not any(part in name for part in folded)}
    assert all(torch.allclose(value.float(), after[name], atol=1e-3) for name, value in before.items())
    assert any(not torch.equal(value.float(), after[name]) for name, value in before.items())
    assert (out / "model_index.json").exists()


def test_guidance_is_distilled_into_flux(recipe):
    teacher, out = recipe.pipeline("flux"), recipe.work / "emoji-flux-guided"
    settings = (*SHORT, "--checkpoint-minutes", 0, "--teacher", teacher)
    process = recipe.start("distill", *settings, "--steps", 1_000_000)
    while not (recipe.work / "distilled.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.kill()
    process.communicate()
    before = torch.load(recipe.work / "distilled.pt", weights_only=True)
    recipe.run("distill", *settings, "--steps", before["step"] + 1)
    after = torch.load(recipe.work / "distilled.pt", weights_only=True)
    assert after["step"] == before["step"] + 1 and after["done"] > before["done"]
    pipe = FluxPipeline.from_pretrained(out)
    assert pipe.transformer.config.guidance_embeds
    assert pipe.transformer.time_text_embed.guidance_embedder.linear_2.weight.abs().max() > 0
    old, new = (load_file(folder / "text_encoder_2/model.safetensors") for folder in (teacher, out))
    assert all(torch.equal(value, new[name]) for name, value in old.items()), "the text encoders stay as they are"


def test_judge_is_trained_twice_and_measures_pipelines(recipe):
    folder = recipe.work / "judge"
    settings = ("--batch", 16, "--count", 24, "--threads", 1, "--out", folder)
    recipe.run("judge", "--samples", 32, *settings)
    assert torch.load(recipe.work / "judge.pt", weights_only=True)["done"] == 32
    output = recipe.run("judge", "--samples", 48, *settings)
    assert torch.load(recipe.work / "judge.pt", weights_only=True)["done"] == 48
    assert "never seen" in output

    config = json.loads((folder / "config.json").read_text())
    assert config["codes"] == codes()[:CONCEPTS]
    assert {"object", "background", "both", "places"} < set(config["accuracy"]["unseen_style"]["plain"])
    assert "emojione" not in config["accuracy"]["unseen_style"]["trained_on"]
    weights = load_file(folder / "judge.safetensors")
    assert weights["head.1.weight"].shape[0] == CONCEPTS + 1

    output = recipe.run("measure", recipe.pipeline("flux"), "--every", 9, "--threads", 1, "--judge", folder)
    assert "trained" in output and "held_out" in output and "held-out pairs" in output
    for sheet in ("", "-seeds", "-backgrounds", "-pairs"):
        assert (recipe.work / f"sheets/measured-emoji-flux{sheet}.png").exists()

    settings = ("--count", 3, "--pairs", 2, "--batch", 2, "--threads", 1, "--judge", folder, "--steps", 4)
    output = recipe.run("realism", recipe.pipeline("pixart"), *settings)
    assert "two seeds of a prompt" in output
    result = json.loads((recipe.work / "emoji-pixart/realism.json").read_text())
    assert {"first detail", "fifth detail", "ring", "seeds", "half", "quarter", "object", "background", "both", "places"} < {
        *result["measured"]
    }
    assert len(result["fine detail by step"]) == 4

    prompts, out = recipe.work / "prompts.txt", recipe.work / "own.json"
    prompts.write_text("grapes\nlemon, 3d style\n")
    recipe.run("realism", "--checkpoint", "flux", *settings, "--prompts", prompts, "--out", out)
    result = json.loads(out.read_text())
    assert result["prompts"] == ["grapes", "lemon, 3d style"] and not {"object", "background"} & set(result["measured"])


def test_reward_learns_from_scenes_and_from_samples_that_were_stopped(recipe):
    for family in ("flux", "pixart"):
        recipe.pipeline(family)
    recipe.run("stopped", "--batch", 28, "--threads", 1, "--folder", recipe.work)
    for name in ("flux", "pixart"):
        samples = load_file(recipe.work / f"stopped-{name}.safetensors")["pictures"]
        assert samples.shape == (3 * CONCEPTS + 12, 5, 3, 128, 128) and samples.dtype == torch.uint8
        assert not torch.equal(samples[:, 0], samples[:, -1])

    folder = recipe.work / "emoji-reward"
    settings = ("--naming", 8, "--batch", 4, "--threads", 1, "--count", 4, "--out", folder)
    recipe.run("reward", "--ranking", 0, "--no-samples", *settings)
    kinds = {"wrong object", "wrong background", "swapped places", "missing object", "wrong style"}
    kinds |= {"mean of the kinds", "blur", "noise", "blocking", "color", "shuffle"}
    assert set(json.loads((folder / "measured.json").read_text())["held-out pairs"]) == kinds
    recipe.run("reward", "--ranking", 8, *settings)
    assert torch.load(recipe.work / "emoji-reward.pt", weights_only=True)["done"] == 16
    measured = json.loads((folder / "measured.json").read_text())
    assert measured["prompts"] == 3 * CONCEPTS == sum(measured[f"{part} drawings"]["pictures"] for part in ("seen", "held-out"))
    assert set(measured["held-out pairs"]) == kinds | {"stopped early"}
    assert all(measured["held-out pairs"][kind]["pairs"] >= 4 for kind in kinds - {"mean of the kinds"})
    picture = Image.fromarray(samples[0, 0].permute(1, 2, 0).numpy())
    (score,) = ImageReward.from_checkpoint(folder).score(["grapes, 3d style"], [picture])
    assert -10 < score < 10

    out = recipe.work / "emoji-reward-further"
    recipe.run("reward", "--naming", 4, "--ranking", 0, *settings[2:-1], out, "--start", folder, "--no-samples")
    assert (out / "model.safetensors").exists()
