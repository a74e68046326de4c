"""Rewards: how well pictures fit their prompts."""

from eval.rewards.clip_score import ClipScore
from eval.rewards.image_reward import ImageReward, build_image_reward

__all__ = ["ClipScore", "ImageReward", "build_image_reward"]
