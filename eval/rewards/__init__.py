"""Rewards: how well pictures fit their prompts."""

from __future__ import annotations

from typing import Any

from dit_accel.eval.rewards.clip_score import ClipScore
from dit_accel.eval.rewards.image_reward import ImageReward, build_image_reward
from dit_accel.eval.rewards.package import PackageImageReward
from dit_accel.pipelines.catalog import samples_folder

__all__ = ["ClipScore", "ImageReward", "PackageImageReward", "build_image_reward", "load_reward"]

KINDS = {
    "image-reward": ImageReward.from_checkpoint,
    "clip-score": ClipScore.from_checkpoint,
    "image-reward-package": PackageImageReward,
}


def load_reward(name: str, *, device: str = "cpu") -> Any:
    """A reward by name: something with `score(prompts, images)` and `cut(prompts)`.

    Args:
        name: "emoji-reward", which comes along and knows the embedded pipelines' prompts; "image-reward", "clip-score" or
            "image-reward-package", each with its published checkpoint or, after a colon, another path or hub id:
            "clip-score:openai/clip-vit-large-patch14".
        device: where it computes.

    Raises:
        ValueError: there is no such reward.
    """
    kind, _, checkpoint = name.partition(":")
    if name == "emoji-reward":
        kind, checkpoint = "image-reward", str(samples_folder() / "emoji-reward")
    if kind not in KINDS:
        raise ValueError(
            f"There is no reward {name!r}; choose one of emoji-reward, {', '.join(KINDS)}, or one of these with a checkpoint, "
            "as in clip-score:openai/clip-vit-large-patch14."
        )
    return KINDS[kind](*([checkpoint] if checkpoint else []), device=device)
