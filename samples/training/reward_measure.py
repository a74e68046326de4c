"""How often a reward has the better one of two pictures first, on what its training never saw."""

from __future__ import annotations

import random

import torch
from diffusers import AutoencoderTiny
from PIL import Image
from rich.progress import track
from torch import Tensor

from data import STYLES, Scene, compose, concepts, pairs, scene_prompt
from degrade import DEGRADATIONS
from dit_accel.eval.rewards import ImageReward
from dit_accel.eval.rewards.pictures import preprocess
from reward_data import FAILURES, SIDE, STOPPED, Sample, comparison


def to_image(picture: Tensor) -> Image.Image:
    """Of a picture [3, h, w] in -1..1."""
    return Image.fromarray(((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def better_first(reward: ImageReward, vae: AutoencoderTiny, samples: list[Sample], count: int) -> dict[str, dict[str, float | int]]:
    """By kind, the share of at least `count` held-out pairs in which the better picture has the higher reward.

    Of a failure the right picture against the wrong one; of a degradation the clean one, the weaker and the stronger against each
    other; of samples the finished one and two stopped ones likewise.
    """
    shares: dict[str, dict[str, float | int]] = {}
    for kind in (*FAILURES, *DEGRADATIONS, *([STOPPED] if samples else [])):
        rng, generator = random.Random(f"measured {kind}"), torch.Generator().manual_seed(0)
        won: list[bool] = []
        while len(won) < count:
            each = comparison(kind, rng, generator, samples if kind == STOPPED else [], vae, unseen=True)
            of_one_prompt = each.better[:1] if kind in FAILURES else each.better
            prompts, pictures = (
                [text for text, _, _ in each.scored],
                [to_image(each.pictures[place]) for _, place, _ in each.scored],
            )
            scores = reward.score(prompts, pictures)
            won += [bool(scores[a] > scores[b]) for a, b in of_one_prompt]
        shares[kind] = {"better first": round(sum(won) / len(won), 4), "pairs": len(won)}
    return shares


@torch.inference_mode()
def right_prompt_first(reward: ImageReward) -> dict[str, dict[str, float | int]]:
    """How often a drawing scores higher for its own prompt than for that of any other concept and style: of those that training
    shows, and of those that it does not."""
    rows = [(concept, style) for concept in concepts() for style in STYLES]
    prompts = [scene_prompt(Scene((concept,), style)) for concept, style in rows]
    tokens = reward.tokenizer(prompts, padding=True, return_token_type_ids=False, return_tensors="pt")
    first: dict[str, list[bool]] = {"seen drawings": [], "held-out drawings": []}
    for place, (concept, style) in enumerate(track(rows, "all prompts")):
        picture = to_image(compose(Scene((concept,), style), SIDE, SIDE, random.Random(place))[0])
        seen = reward.net["vision"](pixel_values=preprocess(picture, SIDE)[None]).last_hidden_state
        read = reward.net["text"](**tokens, encoder_hidden_states=seen.expand(len(prompts), -1, -1), is_decoder=False)
        scores = reward.net["head"](read.last_hidden_state[:, 0])
        first["held-out drawings" if (concept, style) in pairs()[1] else "seen drawings"].append(int(scores.argmax()) == place)
    return {part: {"right prompt first": round(sum(won) / len(won), 4), "pictures": len(won)} for part, won in first.items()}


def measure(reward: ImageReward, vae: AutoencoderTiny, samples: list[Sample], count: int) -> dict[str, object]:
    """The content of measured.json."""
    shares = better_first(reward, vae, samples, count)
    mean = sum(share["better first"] for share in shares.values()) / len(shares)
    return {
        "held-out pairs": {"mean of the kinds": round(mean, 4), **shares},
        "prompts": len(STYLES) * len(concepts()),
        **right_prompt_first(reward),
    }
