"""What the judge says as a score: what a prompt asks for, and one thing of each picture."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_accel.eval.rewards import judge as judging
from dit_accel.eval.rewards import load_reward
from dit_accel.eval.rewards.judge import ASPECTS, FINE, Asked, JudgeScore, Verdict
from dit_accel.eval.spec import noise_seed, read_spec
from dit_accel.eval.statistics import paired
from dit_accel.pipelines.catalog import samples_folder
from dit_accel.pipelines.generation import call_arguments, settings_for
from dit_accel.pipelines.loading import load
from dit_accel.pipelines.prompt_sets import read_prompt_set

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "samples" / "training"))

from data import concepts, pairs, scene, scene_caption, scene_prompt  # noqa: E402


def asked_of(made):
    return Asked(tuple(concept.code for concept in made.subjects), made.relation, made.background)


def test_prompts_are_read_as_the_training_writes_them():
    """Every concept in every style, alone and two together; and other ways to say it, where they name what the plainest does."""
    reward, rng, seen = JudgeScore.of(), random.Random(0), set()
    for _ in range(400):
        made = scene(rng, pairs()[0], 0.5)
        assert reward.asked(scene_prompt(made)) == asked_of(made)
        read = reward.asked(scene_caption(made, rng))
        assert read in (None, asked_of(made))
        seen |= {bool(made.relation), read is not None, *map(len, (made.subjects, made.background))}
    assert seen == {False, True, 2}
    assert {concept.name for concept in concepts()} >= FINE
    for text in ("a photo of a cat on a mat", "red apple, 3d style, on a beige background", "zebra, 3d style", ""):
        assert reward.asked(text) is None


def verdict(**parts):
    return Verdict(**{"named": (), "object": None, "both": None, "places": None, "background": None, "odds": {}, **parts})


def test_every_aspect_is_of_the_prompts_that_ask_for_it():
    config = judging.config_of(samples_folder() / "judge")
    codes = dict(zip(config["labels"], config["codes"], strict=True))
    said = {
        "single": verdict(object=True, background=False, odds={codes["lion"]: 2.5}),
        "two": verdict(both=True, places=False, odds={codes["lion"]: 2.0, codes["key"]: 9.0, codes["owl"]: -1.0}),
        "plain": verdict(object=True, odds={codes["key"]: 4.0}),
    }
    expected = {
        "scene": (0, 0, 1),
        "object": (1, None, 1),
        "background": (0, None, None),
        "both": (None, 1, None),
        "places": (None, 0, None),
        "detail": (2.5, 0.5, None),
    }
    assert set(expected) == set(ASPECTS)
    for aspect, values in expected.items():
        reward = JudgeScore.of(aspect)
        found = [reward.value(one) for one in said.values()]
        assert [None if np.isnan(value) else value for value in found] == list(values), aspect
    with pytest.raises(ValueError, match="Did you mean places"):
        load_reward("judge:place")


def test_pictures_of_the_contact_sheet_are_what_their_prompts_say():
    """Tiles of 64 px; a picture under another picture's prompt is wrong. What is not asked for is NaN."""
    sheet = Image.open(samples_folder() / "emoji-flux.png").convert("RGB")
    rows = [(concept, style, i) for i, (concept, style) in enumerate((c, s) for c in concepts() for s in ("3d", "flat", "cartoon"))]
    tiles = [sheet.crop((i % 18 * 64, i // 18 * 75, i % 18 * 64 + 64, i // 18 * 75 + 64)) for _, _, i in rows[::7]]
    prompts = [f"{concept.name}, {style} style" for concept, style, _ in rows[::7]]
    right, wrong = (load_reward("judge:object").score(texts, tiles) for texts in (prompts, prompts[1:] + prompts[:1]))
    assert right.mean() >= 0.85 and wrong.mean() <= 0.1
    assert np.isnan(load_reward("judge:places").score(prompts, tiles)).all()
    odds = [load_reward("judge:detail").score(texts, tiles) for texts in (prompts, prompts[1:] + prompts[:1])]
    assert np.nanmean(odds[0]) > 1 and np.nanmean(odds[1]) < -3


def test_odds_are_those_of_the_surest_cell():
    class Seen(torch.nn.Module):
        codes = ["a", "b"]

        def forward(self, images):
            probabilities = torch.tensor([[0.7, 0.2], [0.1, 0.1], [0.2, 0.7]])  # of a, b and nothing, in two cells
            return probabilities.log().view(1, 3, 1, 2).expand(len(images), -1, -1, -1)

    (found,) = judging.verdicts(Seen(), torch.zeros(1, 3, 96, 96), [Asked(("a", "b"), "left of")], {"red": (255, 0, 0)})
    assert found.odds == pytest.approx({"a": np.log(0.7 / 0.3), "b": np.log(0.1 / 0.9)})


@pytest.mark.slow
def test_pictures_with_a_twentieth_of_their_tokens_replaced_score_lower():
    """What an evaluation of compression has to notice: tokens of another picture, 13 of 256, in place of a picture's own."""
    prompts = read_prompt_set(ROOT / "eval" / "specs" / "compression.txt")[::4]
    pipe = load("emoji-flux", "float32")
    settings, latents = settings_for(pipe, "emoji-flux"), []
    arguments = call_arguments(pipe, settings, lambda: None) | {"output_type": "latent"}
    for start in range(0, len(prompts), 8):
        some = prompts[start : start + 8]
        noise = [torch.Generator().manual_seed(noise_seed(prompt, 0)) for prompt in some]
        latents.append(pipe(some, generator=noise, **arguments).images)
    whole, random_ = torch.cat(latents), torch.Generator().manual_seed(0)
    replaced, count = whole.clone(), round(0.05 * whole.shape[1])
    for i in range(len(whole)):
        places = torch.randperm(whole.shape[1], generator=random_)[:count]
        replaced[i, places] = whole[(i + 1) % len(whole), places]

    def decoded(packed):
        unpacked = pipe._unpack_latents(packed, settings.height, settings.width, pipe.vae_scale_factor)
        scaled = unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        with torch.inference_mode():
            return pipe.image_processor.postprocess(pipe.vae.decode(scaled, return_dict=False)[0], output_type="pil")

    pictures = decoded(whole), decoded(replaced)
    reward = read_spec(ROOT / "eval" / "specs" / "compression.yaml").scores[0]
    before, after = (load_reward(reward).score(prompts, some) for some in pictures)
    lost = paired(after - before)
    assert lost.high < 0 and lost.p < 0.01, lost
