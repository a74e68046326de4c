"""Attention, then a feed-forward, over one sequence of text and image: Z-Image, Lumina 2, Krea 2; PRX only looks at its text.

Z-Image takes lists, puts text last and pads the image to a multiple of 32 tokens. Lumina 2 puts the image right behind each
caption, so the captions of a batch must be equally long.
"""

import math
from typing import Any

from dit_accel.families.rows import CONDITIONAL_FIRST, UNCONDITIONAL_FIRST, Family, Given, Grid, Stack, ids_grid, picture_grid

PADDING = 32  # SEQ_MULTI_OF of diffusers' transformer_z_image


def z_image_grid(config: Any, given: Given) -> Grid:
    frames, height, width = given["x"][0].shape[-3:]
    patch, patch_t = given.get("patch_size", 2), given.get("f_patch_size", 1)
    return frames // patch_t, height // patch, width // patch


def z_image_tokens(config: Any, given: Given) -> int:
    return math.ceil(math.prod(z_image_grid(config, given)) / PADDING) * PADDING


def lumina_tokens(config: Any, given: Given) -> int:
    lengths = given["encoder_attention_mask"].sum(dim=1)
    if len(lengths) > 1 and bool((lengths != lengths[0]).any()):
        raise ValueError(
            "Lumina 2 was given captions of different lengths, so the image begins at another token in each: "
            "generate them one by one, or leave compute_ratio at 0."
        )
    return math.prod(picture_grid(config, given))


FAMILIES = (
    Family(
        "ZImageTransformer2DModel",
        (
            Stack(
                "layers",
                ("attention",),
                tokens="x",
                joint=True,
                text_last=True,
                positions=("freqs_cis",),
                refused=("noise_mask",),
                example={"adaln_input": ("adaLN_modulation.0",)},
            ),
        ),
        z_image_grid,
        z_image_tokens,
        head="all_final_layer",
        batched_guidance=CONDITIONAL_FIRST,
    ),
    Family(
        "Lumina2Transformer2DModel",
        (Stack("layers", ("attn",), joint=True, positions=("image_rotary_emb",), example={"temb": ("norm1.linear",)}),),
        picture_grid,
        lumina_tokens,
        head="norm_out",
    ),
    Family(
        "Krea2Transformer2DModel",
        (Stack("transformer_blocks", ("attn",), joint=True, positions=("image_rotary_emb",), example={"temb": (1, -6)}),),
        ids_grid("position_ids"),
        head="final_layer",
    ),
    Family(
        "PRXTransformer2DModel",
        (Stack("blocks", ("attention",), positions=("image_rotary_emb",), example={"temb": ("modulation.lin",)}),),
        picture_grid,
        head="final_layer",
        batched_guidance=UNCONDITIONAL_FIRST,
    ),
)
