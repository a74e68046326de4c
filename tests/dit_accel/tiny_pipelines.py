"""Diffusers' own pipelines around tiny transformers: text embeddings are given and latents come out, so they need nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import diffusers as D
import torch

from tests.conftest import reinitialise
from tests.dit_accel import tiny
from tests.dit_accel.tiny import TEXT, random

Pipeline = tuple[Callable[[], Any], Callable[..., torch.Tensor]]
PIXELS = 16 * tiny.SIDE


def pipeline(kind: str, name: str, scheduler: Any = D.FlowMatchEulerDiscreteScheduler, **parts: Any) -> Any:
    """Of this class, around the transformer of this name; what else it may have is left out."""
    make = getattr(D, kind)
    given: dict[str, Any] = {part: None for part in make._get_signature_keys(make)[0]}
    given |= parts | {"transformer": tiny.transformer(name)[0], "scheduler": scheduler()}
    if "transformer_2" in parts:
        given["transformer_2"] = tiny.transformer(parts["transformer_2"])[0]
        reinitialise(given["transformer_2"], seed=2)
    pipe = make(**given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def called(**given: Any) -> Callable[..., torch.Tensor]:
    """Calls a pipeline with these arguments; keyword arguments of the call come on top."""

    def call(pipe: Any, steps: int = 4, seed: int = 0, **more: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        arguments = dict(generator=generator, num_inference_steps=steps, output_type="latent", return_dict=False)
        found = pipe(**arguments | given | more)[0]
        return torch.stack(list(found)) if isinstance(found, list) else found

    return call


def text(width: int, negative: bool = True, mask: str = "") -> dict[str, Any]:
    """Embeddings of a prompt and of a negative one, perhaps with masks of this name."""
    given: dict[str, Any] = {}
    for place, prefix in enumerate(("", "negative_") if negative else ("",)):
        given[prefix + "prompt_embeds"] = random(1, TEXT, width, seed=place)
        if mask:
            given[prefix + mask] = torch.ones(1, TEXT, dtype=torch.bool)
    return given


def pooled(text: dict[str, Any], name: str, width: int) -> dict[str, Any]:
    """The same with pooled embeddings of this name."""
    return text | {prefix + name: random(1, width, seed=place) for place, prefix in enumerate(("", "negative_"))}


def autoencoder() -> Any:
    blocks = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1))
    return tiny.finished(D.AutoencoderTiny(**blocks, num_decoder_blocks=(1, 1)))


def flux2_klein() -> Any:
    """It looks at its autoencoder's statistics even where it decodes nothing."""
    pipe = pipeline("Flux2KleinPipeline", "flux2_klein")
    pipe.vae = autoencoder()
    pipe.vae.bn = torch.nn.BatchNorm2d(16).eval()
    pipe.vae.register_to_config(batch_norm_eps=1e-4)
    return pipe


def longcat() -> Any:
    """It cannot be given embeddings."""
    pipe = pipeline("LongCatImagePipeline", "longcat")
    pipe._encode_prompt = lambda prompt: random(len(prompt), TEXT, 32, seed=len(prompt[0]))
    return pipe


def dit() -> Any:
    """It decodes, whatever is asked for."""
    return pipeline("DiTPipeline", "dit", D.DDIMScheduler, vae=autoencoder())


# A tenth of PixArt's noise: a model that predicts nothing would otherwise end in latents of several hundred.
CALM = functools.partial(D.DPMSolverMultistepScheduler, beta_start=0.0001, beta_end=0.002, beta_schedule="linear")
SQUARE = dict(height=PIXELS, width=PIXELS)
UNSQUEEZED = {"prompt_embeds": [random(TEXT, 16)], "negative_prompt_embeds": [random(TEXT, 16, seed=1)]}  # of Z-Image
KANDINSKY = {
    prefix + name: value
    for place, prefix in enumerate(("", "negative_"))
    for name, value in {
        "prompt_embeds_qwen": random(1, TEXT, 16, seed=place),
        "prompt_embeds_clip": random(1, 8, seed=place),
        "prompt_cu_seqlens": torch.tensor([0, TEXT], dtype=torch.int32),
    }.items()
}

# Name of the case: class of the pipeline, transformer, scheduler and other parts, arguments of the call.
TABLE: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "flux": ("FluxPipeline", "flux", {}, SQUARE | pooled(text(32, negative=False), "pooled_prompt_embeds", 32)),
    "flux-true-guidance": (
        "FluxPipeline",
        "flux",
        {},
        SQUARE | pooled(text(32), "pooled_prompt_embeds", 32) | {"true_cfg_scale": 3.0},
    ),
    "flux2": ("Flux2Pipeline", "flux2", {}, SQUARE | text(32, negative=False)),
    "chroma": ("ChromaPipeline", "chroma", {}, SQUARE | text(32, mask="prompt_attention_mask")),
    "sd3": ("StableDiffusion3Pipeline", "sd3", {}, SQUARE | pooled(text(32), "pooled_prompt_embeds", 64)),
    "qwen": ("QwenImagePipeline", "qwen", {}, SQUARE | text(32, mask="prompt_embeds_mask")),
    "z-image": ("ZImagePipeline", "z_image", {}, SQUARE | UNSQUEEZED),
    "auraflow": ("AuraFlowPipeline", "auraflow", {}, SQUARE | text(32, mask="prompt_attention_mask")),
    "lumina2": ("Lumina2Pipeline", "lumina2", {}, SQUARE | text(16, mask="prompt_attention_mask")),
    "cogview4": ("CogView4Pipeline", "cogview4", {}, SQUARE | text(8)),
    "wan": ("WanPipeline", "wan", {}, SQUARE | text(16) | {"num_frames": 9}),
    "wan2.2": ("WanPipeline", "wan", {"transformer_2": "wan", "boundary_ratio": 0.5}, SQUARE | text(16) | {"num_frames": 9}),
    "wan2.2-ti2v": ("WanPipeline", "wan", {"expand_timesteps": True}, SQUARE | text(16) | {"num_frames": 9}),
    "ltx": (
        "LTXPipeline",
        "ltx",
        {},
        dict(height=32 * tiny.SIDE, width=32 * tiny.SIDE, num_frames=9) | text(16, mask="prompt_attention_mask"),
    ),
    "hunyuan-video": (
        "HunyuanVideoPipeline",
        "hunyuan",
        {},
        SQUARE | pooled(text(16, mask="prompt_attention_mask"), "pooled_prompt_embeds", 8) | dict(num_frames=5, true_cfg_scale=3.0),
    ),
    "cogvideox": ("CogVideoXPipeline", "cogvideox", {"scheduler": D.CogVideoXDDIMScheduler}, SQUARE | text(8) | {"num_frames": 5}),
    "mochi": ("MochiPipeline", "mochi", {}, SQUARE | text(16, mask="prompt_attention_mask") | {"num_frames": 7}),
    "kandinsky5": ("Kandinsky5T2VPipeline", "kandinsky5", {}, SQUARE | KANDINSKY | {"num_frames": 5}),
    "prx": (
        "PRXPipeline",
        "prx",
        {},
        SQUARE | text(16, mask="prompt_attention_mask") | {"use_resolution_binning": False},
    ),
    "ovis": ("OvisImagePipeline", "ovis", {}, SQUARE | text(32) | {"negative_prompt": None}),
    "krea2": (
        "Krea2Pipeline",
        "krea2",
        {},
        SQUARE
        | {n: v[:, :, None].expand(-1, -1, 2, -1) if v.ndim > 2 else v for n, v in text(16, mask="prompt_embeds_mask").items()},
    ),
    "pixart": (
        "PixArtSigmaPipeline",
        "pixart",
        {"scheduler": CALM},
        SQUARE | text(16, mask="prompt_attention_mask") | dict(use_resolution_binning=False, negative_prompt=None),
    ),
}


def pipelines() -> Iterator[tuple[str, Pipeline]]:
    """name -> (build, call): `call(build(), steps=4, seed=0, **more)` is what the pipeline makes, as latents."""
    for name, (kind, transformer, parts, given) in TABLE.items():
        yield name, (functools.partial(pipeline, kind, transformer, **parts), called(**given))
    yield "flux2-klein", (flux2_klein, called(**SQUARE, **text(32)))
    yield "longcat", (longcat, called(prompt="a", negative_prompt="none", enable_prompt_rewrite=False, **SQUARE))
    yield "dit", (dit, called(class_labels=[3], output_type="pt"))
