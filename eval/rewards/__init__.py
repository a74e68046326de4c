"""Rewards: how well pictures fit their prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dit_accel.eval.rewards.clip_score import ClipScore
from dit_accel.eval.rewards.image_reward import ImageReward, build_image_reward
from dit_accel.eval.rewards.judge import JudgeScore, check_aspect
from dit_accel.eval.rewards.package import PackageImageReward
from dit_accel.names import meant
from dit_accel.pipelines.catalog import samples_folder

__all__ = ["ClipScore", "ImageReward", "JudgeScore", "PackageImageReward", "build_image_reward", "check_reward", "load_reward"]

KINDS: dict[str, Callable[..., Any]] = {
    "image-reward": ImageReward.from_checkpoint,
    "clip-score": ClipScore.from_checkpoint,
    "image-reward-package": PackageImageReward,
    "judge": JudgeScore.of,
}


def load_reward(name: str, *, device: str = "cpu") -> Any:
    """A reward by name: something with `score(prompts, images)` and `cut(prompts)`.

    Args:
        name: "emoji-reward", which comes along and knows the embedded pipelines' prompts; "image-reward", "clip-score" or
            "image-reward-package", each with its published checkpoint or, after a colon, another path or hub id:
            "clip-score:openai/clip-vit-large-patch14"; "judge" or, after a colon, one aspect of what the judge of the embedded
            pipelines says: "judge:places".
        device: where it computes.

    Raises:
        ValueError: there is no such reward.
    """
    check_reward(name)
    kind, _, checkpoint = name.partition(":")
    if name == "emoji-reward":
        kind, checkpoint = "image-reward", str(samples_folder() / "emoji-reward")
    return KINDS[kind](*([checkpoint] if checkpoint else []), device=device)


def check_reward(name: str) -> None:
    """ValueError if there is no reward of this name; whether it can be loaded, `load_reward` tells."""
    kind, _, detail = name.partition(":")
    if kind == "judge" and detail:
        check_aspect(detail)
    if kind not in KINDS and name != "emoji-reward":
        raise ValueError(
            f"There is no reward {name!r}.{meant(kind, ('emoji-reward', *KINDS))} Choose one of emoji-reward, {', '.join(KINDS)}, "
            "or one of these with a checkpoint, as in clip-score:openai/clip-vit-large-patch14."
        )
