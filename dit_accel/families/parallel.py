"""Double blocks with joint attention, then single blocks in which attention and MLP share one projection out.

FLUX, Ovis and LongCat keep two streams throughout; Chroma joins them between its stacks, text first. HunyuanVideo has text last
and fails without a single text token. Chroma's single blocks take ControlNet residuals in place, which a partial step refuses.
"""

import dataclasses
from typing import Any

from dit_accel.families.rows import Family, Given, Grid, Stack, ids_grid

double = Stack(
    "transformer_blocks",
    ("attn",),
    ("norm1_context", "norm2_context", "ff_context"),
    text="encoder_hidden_states",
    returns=("text", "tokens"),
    positions=("image_rotary_emb",),
    example={"temb": ("norm1.linear",)},
)
single = dataclasses.replace(double, blocks="single_transformer_blocks", idle=(), example={"temb": ("norm.linear",)})
video: dict[str, Any] = dict(idle=(), returns=("tokens", "text"), text_last=True)


def hunyuan_grid(config: Any, given: Given) -> Grid:
    frames, height, width = given["hidden_states"].shape[-3:]
    return frames // config.patch_size_t, height // config.patch_size, width // config.patch_size


FAMILIES = (
    *(
        Family(name, (double, single), ids_grid("img_ids"), rotary="pos_embed")
        for name in ("FluxTransformer2DModel", "OvisImageTransformer2DModel", "LongCatImageTransformer2DModel")
    ),
    Family(
        "ChromaTransformer2DModel",
        (
            dataclasses.replace(double, masks=("attention_mask",), example={"temb": (12, -1)}),
            dataclasses.replace(
                single, text=None, returns=("tokens",), joint=True, masks=("attention_mask",), example={"temb": (3, -1)}
            ),
        ),
        ids_grid("img_ids"),
        rotary="pos_embed",
    ),
    Family(
        "HunyuanVideoTransformer3DModel",
        (dataclasses.replace(double, positions=("freqs_cis",), **video), dataclasses.replace(single, **video)),
        hunyuan_grid,
        rotary="rope",
        least_text=1,
    ),
)
