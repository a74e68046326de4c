"""Joint attention of text and image, then a feed-forward for each stream: SD3, Qwen-Image, AuraFlow, CogView4, CogVideoX, Mochi.

SD3 has a second attention of the image alone (`attn2`) and a last block that drops the text. Qwen-Image-Edit modulates the
tokens of its reference images otherwise. AuraFlow's text begins with eight register tokens and goes on in one sequence with
the image.
"""

import dataclasses
from typing import Any

from dit_accel.families.rows import UNCONDITIONAL_FIRST, Family, Given, Grid, Stack, picture_grid

MODULATED = {"temb": ("norm1.linear",)}
IDLE = ("norm1_context", "norm2_context", "ff_context")
TEXT_FIRST, TOKENS_FIRST = ("text", "tokens"), ("tokens", "text")
double = Stack("transformer_blocks", ("attn",), IDLE, text="encoder_hidden_states", returns=TEXT_FIRST, example=MODULATED)
cog = dataclasses.replace(double, mixers=("attn1",), idle=(), returns=TOKENS_FIRST, positions=("image_rotary_emb",))


def qwen_grid(config: Any, given: Given) -> Grid:
    shape = given["img_shapes"][0]
    frames, height, width = shape[0] if isinstance(shape, list) else shape
    return frames, height, width


def cogvideox_grid(config: Any, given: Given) -> Grid:
    _, frames, _, height, width = given["hidden_states"].shape
    patch, patch_t = config.patch_size, config.patch_size_t or 1
    return (frames + patch_t - 1) // patch_t, height // patch, width // patch


def mochi_grid(config: Any, given: Given) -> Grid:
    frames, height, width = given["hidden_states"].shape[-3:]
    return frames, height // config.patch_size, width // config.patch_size


FAMILIES = (
    Family(
        "SD3Transformer2DModel",
        (dataclasses.replace(double, mixers=("attn", "attn2"), text_last=True),),
        picture_grid,
        batched_guidance=UNCONDITIONAL_FIRST,
    ),
    Family(
        "QwenImageTransformer2DModel",
        (
            dataclasses.replace(
                double,
                idle=("txt_mod", "txt_norm1", "txt_norm2", "txt_mlp"),
                per_token=("modulate_index",),
                positions=("image_rotary_emb",),
                example={"temb": ("img_mod.1",)},
            ),
        ),
        qwen_grid,
    ),
    Family(
        "AuraFlowTransformer2DModel",
        (
            dataclasses.replace(double, blocks="joint_transformer_blocks"),
            Stack("single_transformer_blocks", ("attn",), joint=True, example=MODULATED),
        ),
        picture_grid,
        batched_guidance=UNCONDITIONAL_FIRST,
    ),
    Family("CogView4Transformer2DModel", (cog,), picture_grid),
    Family("CogVideoXTransformer3DModel", (cog,), cogvideox_grid, batched_guidance=UNCONDITIONAL_FIRST),
    Family(
        "MochiTransformer3DModel",
        (dataclasses.replace(cog, idle=IDLE, positions=()),),
        mochi_grid,
        batched_guidance=UNCONDITIONAL_FIRST,
        stale_only="its attention takes every picture of the batch by itself and reads the length of its text from the device",
    ),
)
