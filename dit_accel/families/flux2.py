"""FLUX.2 (dev and klein): double blocks, then single blocks over the joint sequence, text first.

Modulation is made once per model and handed to every block. A single block's attention and MLP share both projections, so its
`attn` computes more than attention: the attention is remembered and the MLP computed, out of the same matrices.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dit_accel.families.rows import Family, Stack, ids_grid


def parallel(
    attn: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], attention: torch.Tensor | None
) -> Any:
    """`Stack.fused` of a single block; the attention of the selected tokens is that before the projection out, [B, k, C]."""
    inner = attn.inner_dim
    if attention is None:
        heard: list[torch.Tensor] = []
        handle = attn.to_out.register_forward_pre_hook(lambda module, given: heard.append(given[0][..., :inner]))
        try:
            return forward(*args, **kwargs), heard[0]
        finally:
            handle.remove()
    hidden, projection = kwargs["hidden_states"], attn.to_qkv_mlp_proj
    if type(projection) is torch.nn.Linear and "forward" not in vars(projection):
        bias = projection.bias if projection.bias is None else projection.bias[3 * inner :]
        mlp = F.linear(hidden, projection.weight[3 * inner :], bias)
    else:  # quantized, with a LoRA, cast or offloaded: its weight is not all that it computes
        mlp = projection(hidden)[..., 3 * inner :]
    return attn.to_out(torch.cat([attention, attn.mlp_act_fn(mlp)], dim=-1))


FAMILIES = (
    Family(
        "Flux2Transformer2DModel",
        (
            Stack(
                "transformer_blocks",
                ("attn",),
                ("norm1_context", "norm2_context", "ff_context"),
                text="encoder_hidden_states",
                returns=("text", "tokens"),
                positions=("image_rotary_emb",),
                example={"temb_mod_img": (-6,), "temb_mod_txt": (-6,)},
            ),
            Stack(
                "single_transformer_blocks",
                ("attn",),
                joint=True,
                positions=("image_rotary_emb",),
                fused=parallel,
                example={"temb_mod": (-3,)},
            ),
        ),
        ids_grid("img_ids"),
    ),
)
