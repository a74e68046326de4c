"""A small reward on disk, and specifications that take seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig

from dit_accel.eval.rewards.image_reward import SPECIAL, build_image_reward, build_net, original_name

VISION = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 3}
WORDS = "a red green apple cat crab tiger face table style 3d flat cartoon ,".split()


@pytest.fixture(scope="session")
def reward_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    (folder / "words.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3}
    text |= {"max_position_embeddings": 40, "vocab_size": len(SPECIAL) + len(WORDS) + 2}
    torch.manual_seed(0)
    net = build_net(VISION, BertConfig.from_dict(text))
    for weight in net.parameters():
        weight.data.normal_(0, 0.3)
    weights = {original_name(name): weight for name, weight in net.state_dict().items()}
    build_image_reward(VISION, text, weights, folder / "words.txt").save(folder / "reward")
    return folder / "reward"


@pytest.fixture(scope="session")
def spec_values(flux_path, reward_path) -> dict[str, Any]:
    """An evaluation of the tiny FLUX: three prompts, two seeds, two methods."""
    return {
        "pipelines": [str(flux_path)],
        "prompts": ["red apple", "green cat", "crab, flat style"],
        "seeds": 2,
        "scores": [f"image-reward:{reward_path}"],
        "methods": [{"cache": {"selector": ["random", "k-norm"], "interval": 2, "cache_ratio": 0.5}}],
        "steps": 4,
        "height": 64,
        "width": 48,
        "batch_size": 4,
        "timing_rounds": 2,
    }


@pytest.fixture
def spec_file(tmp_path, spec_values) -> Callable[..., Path]:
    """`spec_file(seeds=3, ...)` writes this evaluation with changes, and gives the path."""

    def write(**changes: object) -> Path:
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump(spec_values | changes, sort_keys=False))
        return path

    return write
