"""ImageReward through its authors' package `image-reward`, for environments that are old enough to run it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dit_accel.eval.rewards.image_reward import MAX_TOKENS
from dit_accel.eval.rewards.pictures import Picture, batches, listed


class PackageImageReward:
    """The same reward as `dit_accel.eval.rewards.ImageReward`, computed by the authors' code.

    Args:
        checkpoint: a name that the package knows, or the path of a checkpoint.
        device: where it computes.
        med_config: path of med_config.json; without, the package downloads it.

    Raises:
        ImportError: where the package cannot be imported, with the versions that it needs.
    """

    def __init__(
        self,
        checkpoint: str | Path = "ImageReward-v1.0",
        *,
        device: str | torch.device = "cpu",
        med_config: str | Path | None = None,
    ) -> None:
        try:
            package = importlib.import_module("ImageReward")
        except (ImportError, AttributeError, RuntimeError) as error:  # mismatched versions break in any of these ways
            raise ImportError(
                f"The image-reward package cannot be imported ({error}). It needs timm 0.6.13, fairscale 0.4.13, "
                "transformers below 4.56, clip, diffusers, accelerate, datasets, and a torchvision built for the installed torch. "
                "Install these in an environment of their own, or use the default backend, dit_accel.eval.rewards.ImageReward: "
                "it gives the same scores from the same checkpoint."
            ) from error
        config = None if med_config is None else str(med_config)
        self.model = package.load(str(checkpoint), device=device, med_config=config)

    @torch.inference_mode()
    def score(self, prompts: str | Sequence[str], images: Picture | Sequence[Picture]) -> np.ndarray:
        """The reward of every picture for the prompt at the same place of its list, [N]; it takes one at a time.

        A text alone serves every picture, and a picture alone every prompt. Pictures are given to the package as viewers show
        them: transparent places white, turned as their EXIF data say, 16 bits in 8.

        Raises:
            ValueError: unless there is one picture for every prompt, or for a file that is no picture.
            FileNotFoundError: for a picture that does not exist.
        """
        rewards: list[float] = []
        for texts, opened in batches(prompts, images, batch_size=1):
            rewards.append(self.model.score(texts[0], opened[0]))
        return np.array(rewards, dtype=float)

    def cut(self, prompts: str | Sequence[str]) -> int:
        """How many of the prompts exceed 35 tokens, so that their ends are not read."""
        return sum(len(self.model.blip.tokenizer(prompt)["input_ids"]) > MAX_TOKENS for prompt in listed(prompts))
