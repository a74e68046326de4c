"""Tiny random FLUX and PixArt pipelines, whole (tokenizers, text encoders, autoencoder), built in a fraction of a second.

Both run at 64x64 (an 8x8 token grid) or at any multiple of 8, rectangles included: width 48 gives 8x6 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from tokenizers import normalizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dit_accel import which

TEXT_LENGTH = 8  # words and punctuation marks
CLIP_LENGTH = 32  # characters
WORDS = "a red green blue apple tiger teapot face 3d flat style drawing of the".split()


def reinitialise(module: torch.nn.Module, seed: int) -> None:
    """Random weights under which every gate, text token and block matters, the same for the same seed.

    The weights that modules are born with make gates of a few percent: a wrong feature would then hardly show.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "scale_shift_table" in name:
            value = 0.5 * noise
        elif parameter.ndim == 1:
            value = (1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.1 * noise
        else:
            value = noise / math.sqrt(parameter[0].numel())
        parameter.data.copy_(value)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0), (",", -3.0)]
    backend = T5Tokenizer(vocab=pieces + [("▁" + word, -4.0) for word in WORDS], extra_ids=0).backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_LENGTH
    )


def clip_tokenizer() -> CLIPTokenizer:
    characters = [chr(c) for c in range(33, 127)]
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=CLIP_LENGTH)


def t5_encoder(tokenizer: PreTrainedTokenizerFast, seed: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return T5EncoderModel(config).eval()


def clip_encoder(tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return CLIPTextModel(config).eval()


def autoencoder(seed: int) -> AutoencoderTiny:
    """8 latent channels at a quarter of the picture's side."""
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=8,
        scaling_factor=1.0,
        shift_factor=0.0,
    ).eval()
    reinitialise(vae, seed)
    return vae


def build_flux(layers: int = 2, single_layers: int = 2, guidance_embeds: bool = False, seed: int = 0) -> FluxPipeline:
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    reinitialise(transformer, seed)
    return quiet(
        FluxPipeline(
            FlowMatchEulerDiscreteScheduler(shift=1.0),
            autoencoder(seed),
            clip_encoder(tokenizer, seed),
            tokenizer,
            t5_encoder(tokenizer_2, seed),
            tokenizer_2,
            transformer,
        )
    )


def build_pixart(layers: int = 4, sample_size: int = 16, seed: int = 0) -> PixArtSigmaPipeline:
    tokenizer = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=sample_size,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        use_additional_conditions=False,
    ).eval()
    reinitialise(transformer, seed)
    # A tenth of PixArt's noise: a model that predicts nothing would otherwise end in latents of several hundred.
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.002, beta_schedule="linear")
    return quiet(PixArtSigmaPipeline(tokenizer, t5_encoder(tokenizer, seed), autoencoder(seed), transformer, scheduler))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def selectors_of_a_test_end_with_it(monkeypatch) -> None:
    monkeypatch.setattr(which, "_SELECTORS", dict(which._SELECTORS))


@pytest.fixture(scope="session")
def tiny_flux() -> Callable[..., FluxPipeline]:
    """`tiny_flux(layers=2, single_layers=2, guidance_embeds=False, seed=0)` is a new FluxPipeline, float32, on the CPU.

    Call it with `height=64, width=64, max_sequence_length=8`; 64 image tokens of width 32.
    """
    return build_flux


@pytest.fixture(scope="session")
def tiny_pixart() -> Callable[..., PixArtSigmaPipeline]:
    """`tiny_pixart(layers=4, sample_size=16, seed=0)` is a new PixArtSigmaPipeline, float32, on the CPU.

    Call it with `height=64, width=64, max_sequence_length=8, use_resolution_binning=False`; 64 image tokens of width 32.
    """
    return build_pixart


@pytest.fixture(scope="session")
def flux_path(tiny_flux, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "tiny-flux"
    tiny_flux().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pixart_path(tiny_pixart, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "tiny-pixart"
    tiny_pixart().save_pretrained(path)
    return path
