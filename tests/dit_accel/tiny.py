"""Tiny random transformers of every family, with inputs for them, and diffusers' own pipelines around them.

All pictures are 8 x 8 tokens, videos a few frames of that. Weights are such that every gate, text token and block matters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as D
import torch

from tests.conftest import reinitialise

BATCH, TEXT, SIDE = 2, 6, 8
N = SIDE * SIDE
Inputs = Callable[[float], dict[str, Any]]


def finished(model: Any) -> Any:
    reinitialise(model, seed=1)
    return model.eval()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def times(t: float) -> torch.Tensor:
    return torch.full((BATCH,), t)


def whole_times(t: float) -> torch.Tensor:
    return torch.full((BATCH,), int(1000 * t))


def ids(axes: int = 3) -> torch.Tensor:
    """(time, height, width, ...) of every token."""
    grid = torch.zeros(SIDE, SIDE, axes)
    grid[..., 1] += torch.arange(SIDE)[:, None]
    grid[..., 2] += torch.arange(SIDE)
    return grid.reshape(N, axes)


def sequence(t: float, axes: int = 3, width: int = 32, channels: int = 16) -> dict[str, Any]:
    """What models of packed latents take."""
    return dict(
        hidden_states=random(BATCH, N, channels, seed=int(100 * t)),
        encoder_hidden_states=random(BATCH, TEXT, width),
        timestep=times(t),
        img_ids=ids(axes),
        txt_ids=torch.zeros(TEXT, axes),
    )


def picture(t: float, width: int = 16, *size: int) -> dict[str, Any]:
    """What models of latents of 16 x 16 take, in patches of 2 x 2; `size` stands before it."""
    return dict(
        hidden_states=random(BATCH, *(size or (4,)), 2 * SIDE, 2 * SIDE, seed=int(100 * t)),
        encoder_hidden_states=random(BATCH, TEXT, width),
    )


SMALL = dict(num_layers=2, attention_head_dim=16, num_attention_heads=2)
FLUX = dict(SMALL, patch_size=1, in_channels=16, num_single_layers=2, joint_attention_dim=32)
ROPE = dict(axes_dims_rope=(4, 6, 6))


def flux() -> tuple[Any, Inputs]:
    model = D.FluxTransformer2DModel(**FLUX, **ROPE, pooled_projection_dim=32)
    return model, lambda t: {**sequence(t), "pooled_projections": random(BATCH, 32)}


def flux2() -> tuple[Any, Inputs]:
    model = D.Flux2Transformer2DModel(**FLUX, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16, guidance_embeds=True)
    return model, lambda t: {**sequence(t, 4), "guidance": times(3.0)}


def flux2_klein() -> tuple[Any, Inputs]:
    model = D.Flux2Transformer2DModel(**FLUX, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16, guidance_embeds=False)
    return model, lambda t: sequence(t, 4)


def chroma() -> tuple[Any, Inputs]:
    approximator = dict(approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1)
    return D.ChromaTransformer2DModel(**FLUX, **ROPE, **approximator), sequence


def ovis() -> tuple[Any, Inputs]:
    return D.OvisImageTransformer2DModel(**{**FLUX, "in_channels": 64}, **ROPE), lambda t: sequence(t, channels=64)


def longcat() -> tuple[Any, Inputs]:
    model = D.LongCatImageTransformer2DModel(**{**FLUX, "in_channels": 64}, **ROPE, pooled_projection_dim=32)
    return model, lambda t: sequence(t, channels=64)


def sd3() -> tuple[Any, Inputs]:
    model = D.SD3Transformer2DModel(
        **{**SMALL, "num_layers": 3},
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return model, lambda t: {**picture(t, 32), "pooled_projections": random(BATCH, 64), "timestep": times(1000 * t)}


def qwen(**extra: Any) -> tuple[Any, Inputs]:
    model = D.QwenImageTransformer2DModel(
        **SMALL, patch_size=2, in_channels=16, out_channels=4, joint_attention_dim=32, **ROPE, **extra
    )
    given = "hidden_states", "encoder_hidden_states", "timestep"

    def inputs(t: float) -> dict[str, Any]:
        kept = {name: value for name, value in sequence(t).items() if name in given}
        return {**kept, "encoder_hidden_states_mask": None, "img_shapes": [[(1, SIDE, SIDE)]] * BATCH}

    return model, inputs


def qwen_edit() -> tuple[Any, Inputs]:
    """A reference image behind the picture, modulated as if it were clean."""
    model, inputs = qwen(zero_cond_t=True)
    shapes = [[(1, SIDE, SIDE), (1, SIDE, SIDE)]] * BATCH
    return model, lambda t: {**inputs(t), "hidden_states": random(BATCH, 2 * N, 16, seed=int(100 * t)), "img_shapes": shapes}


def auraflow() -> tuple[Any, Inputs]:
    model = D.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    return model, lambda t: {**picture(t, 32), "timestep": times(t)}


def cogview4() -> tuple[Any, Inputs]:
    model = D.CogView4Transformer2DModel(
        **SMALL, patch_size=2, in_channels=4, out_channels=4, text_embed_dim=8, time_embed_dim=8, condition_dim=4
    )
    size = torch.full((BATCH, 2), 128.0)
    sizes = dict(original_size=size, target_size=size, crop_coords=0 * size)
    return model, lambda t: {**picture(t, 8), "timestep": times(1000 * t), **sizes}


def cogvideox() -> tuple[Any, Inputs]:
    model = D.CogVideoXTransformer3DModel(
        **SMALL,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        sample_width=16,
        sample_height=16,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=TEXT,
    )
    return model, lambda t: {**picture(t, 8, 2, 4), "timestep": whole_times(t)}


def hunyuan(**extra: Any) -> tuple[Any, Inputs]:
    model = D.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        **extra,
    )
    rest = dict(encoder_attention_mask=torch.ones(BATCH, TEXT), pooled_projections=random(BATCH, 8), guidance=times(3.0))
    return model, lambda t: {**picture(t, 16, 4, 2), "timestep": whole_times(t), **rest}


def mochi() -> tuple[Any, Inputs]:
    model = D.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        out_channels=12,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    mask = torch.ones(BATCH, TEXT).bool()
    return model, lambda t: {**picture(t, 16, 12, 2), "timestep": whole_times(t), "encoder_attention_mask": mask}


def pixart() -> tuple[Any, Inputs]:
    model = D.PixArtTransformer2DModel(
        **SMALL,
        sample_size=16,
        patch_size=2,
        caption_channels=16,
        cross_attention_dim=32,
        in_channels=4,
        out_channels=8,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    )
    sizes = {"resolution": None, "aspect_ratio": None}
    return model, lambda t: {**picture(t), "timestep": whole_times(t), "added_cond_kwargs": sizes}


def dit() -> tuple[Any, Inputs]:
    model = D.DiTTransformer2DModel(
        **SMALL,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        sample_size=16,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
    )
    labels = torch.arange(BATCH)
    return model, lambda t: {"hidden_states": picture(t)["hidden_states"], "timestep": whole_times(t), "class_labels": labels}


def wan() -> tuple[Any, Inputs]:
    model = D.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    return model, lambda t: {**picture(t, 16, 4, 3), "timestep": times(1000 * t)}


def wan_ti2v() -> tuple[Any, Inputs]:
    """Wan 2.2 with a timestep for every token."""
    model, inputs = wan()
    return model, lambda t: {**inputs(t), "timestep": 1000 * t * torch.linspace(0, 1, 3 * N).expand(BATCH, -1)}


def ltx() -> tuple[Any, Inputs]:
    model = D.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )
    extra = dict(encoder_attention_mask=torch.ones(BATCH, TEXT).bool(), num_frames=2, height=SIDE, width=SIDE)

    def inputs(t: float) -> dict[str, Any]:
        tokens, text = random(BATCH, 2 * N, 8, seed=int(100 * t)), random(BATCH, TEXT, 16)
        return dict(hidden_states=tokens, encoder_hidden_states=text, timestep=whole_times(t), **extra)

    return model, inputs


def ltx_image() -> tuple[Any, Inputs]:
    """LTX-Video from an image, with a timestep for every token."""
    model, inputs = ltx()
    return model, lambda t: {**inputs(t), "timestep": 1000 * t * torch.linspace(0, 1, 2 * N).expand(BATCH, -1)}


def kandinsky5() -> tuple[Any, Inputs]:
    model = D.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=False,
    )
    extra = dict(
        pooled_projections=random(BATCH, 8),
        visual_rope_pos=[torch.arange(2), torch.arange(SIDE), torch.arange(SIDE)],
        text_rope_pos=torch.arange(TEXT),
    )

    def inputs(t: float) -> dict[str, Any]:
        given = picture(t, 16, 2, 4)
        return {**given, "hidden_states": given["hidden_states"].movedim(2, -1), "timestep": whole_times(t), **extra}

    return model, inputs


def prx() -> tuple[Any, Inputs]:
    model = D.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8]
    )
    return model, lambda t: {**picture(t), "timestep": times(t)}


def lumina2() -> tuple[Any, Inputs]:
    model = D.Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64),
        cap_feat_dim=16,
    )
    mask = torch.ones(BATCH, TEXT).bool()
    return model, lambda t: {**picture(t), "timestep": times(t), "encoder_attention_mask": mask}


def krea2() -> tuple[Any, Inputs]:
    model = D.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )

    def inputs(t: float) -> dict[str, Any]:
        tokens, text = random(BATCH, N, 16, seed=int(100 * t)), random(BATCH, TEXT, 2, 16)
        positions = torch.cat([torch.zeros(TEXT, 3), ids()])
        return dict(hidden_states=tokens, encoder_hidden_states=text, timestep=times(t), position_ids=positions)

    return model, inputs


def z_image() -> tuple[Any, Inputs]:
    model = D.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )

    def inputs(t: float) -> dict[str, Any]:
        given = picture(t, 16, 4, 1)
        return dict(x=list(given["hidden_states"]), t=times(t), cap_feats=list(given["encoder_hidden_states"]))

    return model, inputs


def sana() -> tuple[Any, Inputs]:
    """Not a family: its feed-forward is a convolution."""
    model = D.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        patch_size=1,
        attention_head_dim=8,
        num_attention_heads=4,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
    )
    return model, lambda t: {**picture(t), "timestep": whole_times(t)}


TRANSFORMERS: dict[str, Callable[[], tuple[Any, Inputs]]] = {
    make.__name__: make
    for make in (
        flux, flux2, flux2_klein, chroma, ovis, longcat, sd3, qwen, qwen_edit, auraflow, cogview4, cogvideox, hunyuan, mochi,
        pixart, dit, wan, wan_ti2v, ltx, ltx_image, kandinsky5, prx, lumina2, krea2, z_image,
    )
}  # fmt: skip


def transformer(name: str) -> tuple[Any, Inputs]:
    """A new one of this name, and what makes its arguments for a time between 0 and 1."""
    model, inputs = (sana if name == "sana" else TRANSFORMERS[name])()
    return finished(model), inputs


def output(model: Any, given: dict[str, Any]) -> torch.Tensor:
    """Of a call without gradients."""
    with torch.no_grad():
        found = model(**given, return_dict=False)
    found = found[0] if isinstance(found, tuple) else found
    return torch.stack(list(found)) if isinstance(found, list) else found.clone()
