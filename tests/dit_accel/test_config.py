"""Configurations take the values of numpy and torch, and are saved to files and loaded from them."""

from __future__ import annotations

import inspect
import json
import os
import pickle
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dit_accel
from dit_accel import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (TokenCacheConfig(interval=np.int64(5), cache_ratio=np.float32(0.5)), TokenCacheConfig(interval=5, cache_ratio=0.5)),
        (TokenCacheConfig(share_guidance_selection=np.False_), TokenCacheConfig(share_guidance_selection=False)),
        (TokenCacheConfig(cache_dtype=torch.float16), TokenCacheConfig(cache_dtype="float16")),
        (TokenCacheConfig(cache_dtype=torch.float8_e4m3fn), TokenCacheConfig(cache_dtype="float8_e4m3fn")),
        (TokenCacheConfig(cache_device=torch.device("cuda:1")), TokenCacheConfig(cache_device="cuda:1")),
        (OutputCacheConfig(full_steps=np.array([0, 3])), OutputCacheConfig(full_steps=(0, 3))),
        (OutputCacheConfig(full_steps=range(0, 9, 4), order=(np.int32(1),)), OutputCacheConfig(full_steps=(0, 4, 8), order=(1,))),
        (TokenMergeConfig(ratio=np.float64(0.25), stride=[np.int8(2), 2]), TokenMergeConfig(ratio=0.25)),
    ],
)
def test_values_of_numpy_and_torch_become_plain_ones(config, plain):
    assert config == plain and repr(config) == repr(plain)
    assert json.loads(json.dumps(config.to_dict()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cache_dtype=torch.int8), "cache_dtype must be one of None, float32.* not 'int8'"),
        (dict(interval=np.float64(4)), "interval must be a whole number of at least 1, not 4.0"),
        (dict(interval=torch.tensor(4)), "interval must be a whole number"),
        (dict(cache_ratio=np.bool_(True)), "cache_ratio must be a number between 0 and 1, not True"),
    ],
)
def test_others_are_not_taken_for_them(options, message):
    with pytest.raises(ValueError, match=message):
        TokenCacheConfig(**options)


CONFIGS = [
    TokenCacheConfig(interval=np.int64(5), cache_ratio=0.3, selector="attention", cache_dtype=torch.float16),
    TokenMergeConfig(ratio=0.25, stride=(4, 2), rematch_every=3),
    OutputCacheConfig(full_steps=(0, 1, 5), order=(1, 2), damping=0.5),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_what_was_saved_is_loaded(config, tmp_path):
    path = tmp_path / "config.json"
    config.save(path)
    assert type(config).load(path) == config == dit_accel.load_config(str(path)) and os.listdir(tmp_path) == ["config.json"]
    assert json.loads(path.read_text())["config"] == type(config).__name__
    other = next(kind for kind in (TokenCacheConfig, TokenMergeConfig) if kind is not type(config))
    with pytest.raises(ValueError, match=f"config.json holds {type(config).__name__}; expected {other.__name__}"):
        other.load(path)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    CONFIGS[0].save(path)
    before = path.read_bytes()

    def full(self, text, **how):
        self.write_bytes(text[:5].encode())
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        CONFIGS[1].save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "broken.json is no JSON: Expecting"),
        ("[1]", "broken.json holds no configuration; expected TokenMergeConfig or TokenCacheConfig or OutputCacheConfig"),
        ('{"interval": 3}', "broken.json holds no configuration"),
        ('{"config": "TokenCacheConfig", "intervall": 3}', "has no option intervall. Did you mean interval"),
        ('{"config": "TokenCacheConfig", "interval": 0}', "interval must be"),
    ],
)
def test_a_file_that_holds_none_is_explained(text, message, tmp_path):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        dit_accel.load_config(tmp_path / "broken.json")


@pytest.mark.parametrize("name", ["selector", "ratio_schedule"])
def test_a_function_is_not_saved(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is a function, which a file cannot hold; register it and give its name"):
        TokenCacheConfig(**{name: lambda _: 1.0}).save(tmp_path / "config.json")
    assert os.listdir(tmp_path) == []


def test_configurations_are_ordinary_dataclasses():
    """Pickled, replaced, and with a signature for completion in a notebook."""
    for config in CONFIGS:
        assert pickle.loads(pickle.dumps(config)) == config == replace(config)
        assert list(inspect.signature(type(config)).parameters) == [field.name for field in fields(config)]
