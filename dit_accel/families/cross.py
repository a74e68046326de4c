"""Self-attention, cross-attention to the text, feed-forward: PixArt, Wan 2.1 and 2.2, LTX-Video, Kandinsky 5; DiT has no text.

Cross-attention is no mixer: a token looks at the text there, not at other tokens. Wan 2.2 and LTX-Video may modulate every token
by a timestep of its own (image to video).
"""

from typing import Any

from dit_accel.families.rows import CONDITIONAL_FIRST, UNCONDITIONAL_FIRST, Family, Given, Grid, Stack, picture_grid

TEXT = {"encoder_hidden_states": (4, "attn2.to_k")}


def wan_grid(config: Any, given: Given) -> Grid:
    frames, height, width = (n // p for n, p in zip(given["hidden_states"].shape[-3:], config.patch_size, strict=True))
    return frames, height, width


def ltx_grid(config: Any, given: Given) -> Grid:
    return given["num_frames"], given["height"], given["width"]


def kandinsky_grid(config: Any, given: Given) -> Grid:
    frames, height, width = (n // p for n, p in zip(given["hidden_states"].shape[1:4], config.patch_size, strict=True))
    return frames, height, width


FAMILIES = (
    Family(
        "PixArtTransformer2DModel",
        (Stack("transformer_blocks", ("attn1",), example={"timestep": (-6,), **TEXT}),),
        picture_grid,
        batched_guidance=UNCONDITIONAL_FIRST,
    ),
    Family(
        "DiTTransformer2DModel",
        (Stack("transformer_blocks", ("attn1",), example={"timestep": (), "class_labels": ()}),),
        picture_grid,
        head="proj_out_2",
        batched_guidance=CONDITIONAL_FIRST,
    ),
    Family(
        "WanTransformer3DModel",
        (Stack("blocks", ("attn1",), per_token=("temb",), positions=("rotary_emb",), example={"temb": (6, -1), **TEXT}),),
        wan_grid,
    ),
    Family(
        "LTXVideoTransformer3DModel",
        (
            Stack(
                "transformer_blocks",
                ("attn1",),
                per_token=("temb",),
                positions=("image_rotary_emb",),
                example={"temb": (1, -6), **TEXT},
            ),
        ),
        ltx_grid,
        batched_guidance=UNCONDITIONAL_FIRST,
    ),
    Family(
        "Kandinsky5Transformer3DModel",
        (
            Stack(
                "visual_transformer_blocks",
                ("self_attention",),
                tokens="visual_embed",
                positions=("rope",),
                refused=("sparse_params",),
                example={"time_embed": ("visual_modulation.out_layer",), "text_embed": (4, "cross_attention.to_key")},
            ),
        ),
        kandinsky_grid,
        head="out_layer.out_layer",
    ),
)
