"""Train one embedded pipeline on scenes: its transformer together with its text encoders, at several sizes from 64 to 128 px.

    python samples/training/train.py flux --start samples/emoji-flux
    python samples/training/train.py pixart --start samples/emoji-pixart

Needs the drawings of prepare.py and the autoencoder of border.py. --start takes over the weights of a finished pipeline, word by
word where the vocabulary has changed; without it a training begins from random weights, and PixArt with the T5 that FLUX has
trained: its only way to the text, cross-attention, finds none to speak of in a T5 that knows nothing yet.

Scenes are encoded once and kept on disk for both families. A checkpoint every few minutes; the same command goes on where it
stopped, and --steps may be raised to go on after the end. Writes the finished pipeline in diffusers format.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from diffusers import (
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5EncoderModel

from common import clean_config, copy_card, sheet
from data import WORK, pairs, scene, scene_prompt
from loop import Scenes, run
from text import LENGTH, WIDTH, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer

WAVES = (0.5, 1, 2)  # over a subject's height and width
BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}  # PixArt's


def at_times(t: torch.Tensor) -> torch.Tensor:
    """Weight of the loss at times 0 to 1. At both ends, gradients scatter three to four times as much from picture to picture as in
    between (measured at half of the training), and drown what is learned there, which is shapes."""
    return 4 * t * (1 - t)


class Flux(torch.nn.Module):
    """Rectified flow: velocity = noise - picture, logit-normal times. `guided`: with a guidance embedding, for distill.py."""

    steps, guidance = 28, 3.5

    def __init__(self, guided: bool = False) -> None:
        super().__init__()
        self.tokenizer, self.tokenizer_2 = clip_tokenizer(), t5_tokenizer()
        self.text_encoder, self.text_encoder_2 = clip_encoder(self.tokenizer), t5_encoder(self.tokenizer_2)
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=32,
            num_layers=2,
            num_single_layers=6,
            attention_head_dim=64,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=128,
            guidance_embeds=guided,
            axes_dims_rope=(16, 24, 24),
        )

    @property
    def middle(self) -> torch.nn.Module:
        return self.transformer.single_transformer_blocks[1]

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        settings = dict(padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
        pooled = self.text_encoder(self.tokenizer(captions, **settings).input_ids).pooler_output
        return self.text_encoder_2(self.tokenizer_2(captions, **settings).input_ids)[0], pooled

    def loss(self, latents: torch.Tensor, captions: list[str], generator: torch.Generator) -> torch.Tensor:
        text, pooled = self.encode(captions)
        x = FluxPipeline._pack_latents(latents, *latents.shape)
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randn(len(x), generator=generator).sigmoid()
        noisy = torch.lerp(x, noise, t[:, None, None])
        ids = FluxPipeline._prepare_latent_image_ids(1, latents.shape[2] // 2, latents.shape[3] // 2, "cpu", torch.float32)
        output = self.transformer(noisy, text, pooled, t, img_ids=ids, txt_ids=torch.zeros(LENGTH, 3), return_dict=False)[0]
        return (at_times(t) * (output - noise + x).square().mean((1, 2))).mean()

    def pipeline(self, vae: AutoencoderTiny) -> FluxPipeline:
        return FluxPipeline(
            FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae,
            self.text_encoder,
            self.tokenizer,
            self.text_encoder_2,
            self.tokenizer_2,
            self.transformer,
        )


class PixArt(torch.nn.Module):
    """PixArt's 1000 linear steps; the network predicts v = alpha noise - sigma picture (Salimans & Ho, ICLR 2022).

    PixArt itself predicts the noise. With so few samples that learns hardly any shape: at the steps where shapes are decided
    the noise is nearly the whole input, so an error of the picture costs next to nothing. Times follow FLUX's noise levels.
    """

    steps, guidance = 20, 3.0

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = t5_tokenizer()
        self.text_encoder = t5_encoder(self.tokenizer)
        self.transformer = PixArtTransformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=8,
            out_channels=8,
            num_layers=8,
            num_attention_heads=4,
            attention_head_dim=64,
            cross_attention_dim=256,
            caption_channels=WIDTH,
            use_additional_conditions=False,
        )
        self.alphas = DPMSolverMultistepScheduler(**BETAS).alphas_cumprod
        self.levels = ((1 - self.alphas) / self.alphas).sqrt()  # noise per picture, rising

    @property
    def middle(self) -> torch.nn.Module:
        return self.transformer.transformer_blocks[3]

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0], tokens.attention_mask

    def loss(self, latents: torch.Tensor, captions: list[str], generator: torch.Generator) -> torch.Tensor:
        text, mask = self.encode(captions)
        noise = torch.randn(latents.shape, generator=generator)
        wanted = torch.randn(len(latents), generator=generator).exp()  # t / (1 - t) of a logit-normal t
        t = torch.searchsorted(self.levels, wanted).clamp(max=len(self.levels) - 1)
        alpha = self.alphas[t][:, None, None, None]
        output = self.transformer(
            alpha.sqrt() * latents + (1 - alpha).sqrt() * noise,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        error = output - alpha.sqrt() * noise + (1 - alpha).sqrt() * latents
        return (at_times(wanted / (1 + wanted)) * error.square().mean((1, 2, 3))).mean()

    def pipeline(self, vae: AutoencoderTiny) -> PixArtSigmaPipeline:
        scheduler = DPMSolverMultistepScheduler(**BETAS, prediction_type="v_prediction")
        return PixArtSigmaPipeline(self.tokenizer, self.text_encoder, vae, self.transformer, scheduler)


def take_over(model: Flux | PixArt, folder: Path) -> None:
    """The weights of a finished pipeline; those of words by the word, whatever its place in either vocabulary."""
    for name, part in model.named_children():
        old, new = type(part).from_pretrained(folder / name, torch_dtype=torch.float32).state_dict(), part.state_dict()
        tokenizer = name.replace("text_encoder", "tokenizer")
        for key, value in old.items():
            if key.endswith(("token_embedding.weight", "embed_tokens.weight", "shared.weight")):
                places = getattr(model, tokenizer).get_vocab()
                known = type(getattr(model, tokenizer)).from_pretrained(folder / tokenizer).get_vocab()
                both = [word for word in places if word in known]
                new[key][[places[word] for word in both]] = value[[known[word] for word in both]]
            elif key.endswith("position_embedding.weight"):
                new[key][: len(value)] = value
            else:
                new[key].copy_(value)
        part.load_state_dict(new)


def sample(model: Flux | PixArt, vae: AutoencoderTiny, prompts: list[str], size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Pictures [n, 3, height, width] in -1..1 from the stock pipeline, each from its own seed."""
    pipe = model.pipeline(vae)
    pipe.set_progress_bar_config(disable=True)
    extra = {"use_resolution_binning": False} if isinstance(model, PixArt) else {}
    images = pipe(
        prompts,
        height=size[0],
        width=size[1],
        num_inference_steps=model.steps,
        guidance_scale=model.guidance,
        max_sequence_length=LENGTH,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
        output_type="pt",
        **extra,
    ).images
    return images * 2 - 1


def sheets(model: Flux | PixArt, vae: AutoencoderTiny) -> Callable[[Path], None]:
    """Writes a sheet of the same 18 scenes to a file, each time with the weights of the moment."""
    rng = random.Random(1)
    shown = [scene_prompt(scene(rng, pairs()[0])) for _ in range(18)]

    def show(path: Path) -> None:
        model.eval()
        sheet(sample(model, vae, shown, (128, 128)), 6, path)
        model.train()

    return show


def save_pipeline(pipe: FluxPipeline | PixArtSigmaPipeline, folder: Path) -> None:
    """In diffusers format, with its model card; the transformer in bfloat16, which halves the folder."""
    pipe.transformer.to(torch.bfloat16)
    for tokenizer in (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)):
        if tokenizer is not None:
            tokenizer.backend_tokenizer.no_padding()
    pipe.save_pretrained(folder)
    for config in (folder / "model_index.json", *folder.glob("*/config.json")):
        clean_config(config)
    copy_card(folder)


class Learner(torch.nn.Module):
    """A model, and a head on the middle of its transformer that tells which part of which subject a token shows.

    The denoising loss alone teaches that too, slowly: what a token shows follows from the caption and from where in its subject it
    lies. Aligning the middle of the transformer with what is known about the picture is REPA's idea (Yu et al., ICLR 2025); there
    it is a pretrained encoder's features, here what the scene was composed of. The head does not ship.
    """

    def __init__(self, model: Flux | PixArt, weight: float) -> None:
        super().__init__()
        self.model, self.weight = model, weight
        self.head = torch.nn.Linear(256, 3 + 4 * len(WAVES))
        self.seen: torch.Tensor | None = None
        model.middle.register_forward_hook(self.see)

    def see(self, block: torch.nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> None:
        """A single block of FLUX returns text and picture, a block of PixArt the picture."""
        self.seen = output[1] if isinstance(output, tuple) else output

    def loss(self, latents: torch.Tensor, layouts: torch.Tensor, captions: list[str], generator: torch.Generator) -> torch.Tensor:
        """The model's own loss, and the head's: cross-entropy of the subject, squared error of its size and of which part of it the
        token shows, as sines and cosines: what maps a place to a color learns fine structure from these alone."""
        loss = self.model.loss(latents, captions, generator)
        if not self.weight:
            return loss
        told, layout = self.head(self.seen).float(), layouts.flatten(2).transpose(1, 2)
        subjects, inside = layout[..., :2], layout[..., :2].amax(-1, keepdim=True)
        turns = torch.cat([2 * torch.pi * wave * layout[..., 2:4] for wave in WAVES], -1)
        parts = torch.cat([layout[..., 4:], turns.sin(), turns.cos()], -1)
        missed = (inside * (told[..., 2:] - parts) ** 2).sum() / inside.sum().clamp(min=1) / parts.shape[-1]
        return loss + self.weight * (F.binary_cross_entropy_with_logits(told[..., :2], subjects) + missed)


def main(
    family: str = typer.Argument(help="flux or pixart"),
    steps: int = typer.Option(40_000, help="Steps in all; the learning rate falls over the last quarter of them."),
    tokens: int = typer.Option(1024, help="Image tokens a step: four pictures of 128 px, or sixteen of 64 px."),
    lr: float = typer.Option(4e-4),
    layout: float = typer.Option(0.1, help="Weight of the loss that tells tokens which part of which subject they show."),
    scenes: int = typer.Option(30_000, help="Different scenes of each size."),
    threads: int = typer.Option(torch.get_num_threads(), help="CPU threads; two trainings side by side want one each."),
    bf16: bool = typer.Option(False, help="Multiply in bfloat16: faster on a CPU with AMX or AVX512-BF16, slower on an old one."),
    checkpoint_minutes: float = typer.Option(4.0),
    vae_path: Path = typer.Option(WORK / "vae-cured"),
    start: Path = typer.Option(None, help="Folder of a pipeline whose weights to start from, instead of random ones."),
    t5_path: Path = typer.Option(WORK / "emoji-flux/text_encoder_2", help="The T5 that PixArt starts with."),
    out: Path = typer.Option(None, help="Folder of the finished pipeline [default: the checkpoints' folder]"),
) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # decayed optimizer states become numbers that x86 multiplies slowly
    torch.manual_seed(0)
    out = out or WORK / f"emoji-{family}"
    model = {"flux": Flux, "pixart": PixArt}[family]()
    if start:
        take_over(model, start)
    elif family == "pixart":
        model.text_encoder.load_state_dict(T5EncoderModel.from_pretrained(t5_path).state_dict())
    vae = AutoencoderTiny.from_pretrained(vae_path).to(memory_format=torch.channels_last).eval()
    learner = Learner(model, layout)
    settings = {"steps": steps, "tokens": tokens, "lr": lr, "bf16": bf16, "checkpoint_minutes": checkpoint_minutes}
    said = run(family, out.with_suffix(".pt"), learner, learner.loss, sheets(model, vae), Scenes(vae, scenes), **settings)
    save_pipeline(model.eval().pipeline(vae), out)
    typer.echo(f"{said}, saved to {out}")


if __name__ == "__main__":
    typer.run(main)
