"""The embedded pipelines as they lie in samples/."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, PixArtSigmaPipeline, PixArtTransformer2DModel
from PIL import Image, ImageFilter

from dit_accel.eval.rewards import load_reward

SAMPLES = Path(__file__).parents[2] / "samples"

EMBEDDED = {
    "emoji-flux": (FluxPipeline, FluxTransformer2DModel, {}, 0.90),
    "emoji-pixart": (
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
        {"use_resolution_binning": False, "clean_caption": False},
        0.90,
    ),
}


def picture(pipe, prompt: str, extra: dict, steps: int = 2) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    length = pipe.tokenizer.model_max_length
    call = dict(height=128, width=128, num_inference_steps=steps, max_sequence_length=length, output_type="pt")
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **call, **extra).images


@pytest.mark.parametrize("name", EMBEDDED)
def test_stock_diffusers_loads_it(name, recwarn):
    pipeline_class, transformer_class, extra, _ = EMBEDDED[name]
    pipe = pipeline_class.from_pretrained(SAMPLES / name)
    assert type(pipe.transformer) is transformer_class
    tokens = []
    first = pipe.transformer.transformer_blocks[0]
    first.register_forward_pre_hook(
        lambda m, args, kwargs: tokens.append((args[0] if args else kwargs["hidden_states"]).shape[1]), with_kwargs=True
    )
    images = picture(pipe, "red apple, 3d style", extra)
    assert images.shape == (1, 3, 128, 128) and images.isfinite().all() and set(tokens) == {256}


@pytest.mark.parametrize("name", EMBEDDED)
def test_it_knows_every_word_of_its_captions(name):
    from data import all_captions

    pipe = EMBEDDED[name][0].from_pretrained(SAMPLES / name)
    captions = all_captions()
    tokenizers = {"emoji-flux": ["tokenizer", "tokenizer_2"], "emoji-pixart": ["tokenizer"]}[name]
    for tokenizer in (getattr(pipe, part) for part in tokenizers):
        for caption in captions:
            tokens = tokenizer(caption.capitalize()).input_ids
            assert len(tokens) <= tokenizer.model_max_length
            assert tokens == tokenizer(caption).input_ids, "case matters"
    assert tokenizer.unk_token_id not in tokenizer(" ".join(captions)).input_ids
    assert tokenizer.unk_token_id in tokenizer("a zeppelin").input_ids


def test_samples_stay_small():
    tracked = subprocess.run(["git", "ls-files", "-z", "samples"], cwd=SAMPLES.parent, capture_output=True, text=True).stdout
    files = [SAMPLES.parent / name for name in tracked.split("\0") if name] or [p for p in SAMPLES.rglob("*") if p.is_file()]
    assert sum(path.stat().st_size for path in files) < 80e6


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED)
def test_the_judge_names_what_was_asked_for(name, tmp_path):
    """Every concept in every style, one seed: the classifier's top-1 as recorded, and above the mark."""
    copy = tmp_path / "copy" / name
    copy.mkdir(parents=True)
    for part in (SAMPLES / name).iterdir():
        (copy / part.name).symlink_to(part)
    (copy / "measured.json").unlink()
    subprocess.run([sys.executable, SAMPLES / "training/measure.py", copy], check=True)
    again, recorded = (json.loads((folder / "measured.json").read_text()) for folder in (copy, SAMPLES / name))
    assert recorded["all"]["top1"] >= EMBEDDED[name][3]
    assert abs(again["all"]["top1"] - recorded["all"]["top1"]) < 0.02  # rounding may flip a picture or two


def tiles(name: str) -> list[Image.Image]:
    """The pictures of a contact sheet, 64 px each: every concept in 3d, flat and cartoon style."""
    sheet = Image.open(SAMPLES / f"{name}.png").convert("RGB")
    places = [(i % 18 * 64, i // 18 * 75) for i in range(330)]
    return [sheet.crop((x, y, x + 64, y + 64)).resize((128, 128), Image.Resampling.BICUBIC) for x, y in places]


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_reward_knows_what_the_pipelines_draw(name):
    """On pictures that it was not trained on in this size and palette: right prompts, right styles and sharp pictures win."""
    from data import STYLES, concepts, prompt

    reward = load_reward("emoji-reward")
    pictures = tiles(name)
    asked = [(concept, style) for concept in concepts() for style in STYLES]
    own = reward.score([prompt(concept, style) for concept, style in asked], pictures, batch_size=64)
    another = reward.score([prompt(asked[i - 90][0], style) for i, (_, style) in enumerate(asked)], pictures, batch_size=64)
    styles = {"3d": "flat", "flat": "cartoon", "cartoon": "3d"}
    other_style = reward.score([prompt(concept, styles[style]) for concept, style in asked], pictures, batch_size=64)
    blurred = [picture.filter(ImageFilter.GaussianBlur(4)) for picture in pictures]
    soft = reward.score([prompt(concept, style) for concept, style in asked], blurred, batch_size=64)
    wins = {"concept": (own > another).mean(), "style": (own > other_style).mean(), "sharp": (own > soft).mean()}
    assert min(wins.values()) >= 0.9, wins
    assert reward.cut([prompt(concept, style) for concept, style in asked]) == 0


def test_what_the_reward_was_measured_to_do():
    from reward_data import KINDS

    measured = json.loads((SAMPLES / "emoji-reward/measured.json").read_text())
    held = measured["held-out pairs"]
    assert held.keys() == {*KINDS, "mean of the kinds"} and all(held[kind]["pairs"] >= 400 for kind in KINDS)
    mean = sum(held[kind]["better first"] for kind in KINDS) / len(KINDS)
    assert held["mean of the kinds"] == pytest.approx(mean, abs=1e-4) and mean >= 0.95
    assert min(held[kind]["better first"] for kind in KINDS) > 0.8
    assert measured["prompts"] == 330 == measured["seen drawings"]["pictures"] + measured["held-out drawings"]["pictures"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_what_the_pipelines_were_measured_to_draw(name):
    """The marks of a model that is worth a benchmark: it draws what is asked for, and decides it step by step."""
    folder = SAMPLES / name
    found, real = json.loads((folder / "measured.json").read_text()), json.loads((folder / "realism.json").read_text())["measured"]
    assert found["all"]["pictures"] == 330 and found["all"]["top1"] >= EMBEDDED[name][3]
    assert found["backgrounds"]["background"] >= 0.9
    assert real["first detail"] <= 0.3 and real["fifth detail"] <= 0.75 and real["seeds"] <= 15
    assert real["half"] <= 36 and real["quarter"] <= 28 and max(real["ring"], real["next ring"]) <= 0.1
