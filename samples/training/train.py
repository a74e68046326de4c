"""Train one embedded pipeline on scenes: its transformer together with its text encoders, at several sizes from 64 to 128 px.

    python samples/training/train.py flux --start samples/emoji-flux
    python samples/training/train.py pixart --start samples/emoji-pixart

Needs the drawings of prepare.py and the autoencoder of border.py. --start takes over the weights of a finished pipeline, word by
word where the vocabulary has changed; without it a training begins from random weights, and PixArt with the T5 that FLUX has
trained: its only way to the text, cross-attention, finds none to speak of in a T5 that knows nothing yet.

A checkpoint every few minutes; the same command goes on where it stopped, and --steps or --minutes may be raised to go on after the
end. Writes the finished pipeline in diffusers format.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from math import inf
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
from transformers.modeling_outputs import BaseModelOutput

from common import clean_config, copy_card, open_vae, sheet
from data import WORK, pairs, scene, scene_prompt
from loop import Text, run
from text import LENGTH, PLACES, WIDTH, clip_encoder, clip_tokenizer, roles, t5_encoder, t5_tokenizer

WAVES = (0.5, 1, 2)  # over a subject's height and width
BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}  # PixArt's


def times(n: int, early: float, generator: torch.Generator, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Times from 0, the picture, to 1, noise, and how much the loss weighs each, both [n].

    Most are logit-normal. At both ends, gradients scatter three to four times as much from picture to picture as in between
    (measured at half of the training), and drown what is learned there, which is shapes: hence the weight. A share `early` comes
    from the first steps of a picture, which decide the background's two colors and which object lies where.
    """
    t = torch.randn(n, generator=generator, device=device).sigmoid()
    first = torch.rand(n, generator=generator, device=device) < early
    starting = 1 - 0.5 * torch.rand(n, generator=generator, device=device) ** 1.5
    return torch.where(first, starting, t), torch.where(first, 1.0, 4 * t * (1 - t))


def masking(mask: torch.Tensor) -> torch.Tensor:
    """A mask [n, tokens] of ones and zeros as what T5 makes of it, [n, 1, 1, tokens]; from the mask itself it would first read on
    the host whether it masks anything."""
    return (1 - mask[:, None, None].float()) * torch.finfo(torch.float32).min


@cache
def places(height: int, width: int, device: torch.device) -> dict[str, torch.Tensor]:
    """FLUX's places of the tokens of latents of this size, and of the text's."""
    ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, device, torch.float32)
    return {"img_ids": ids, "txt_ids": torch.zeros(LENGTH, 3, device=device)}


class Flux(torch.nn.Module):
    """Rectified flow: velocity = noise - picture, logit-normal times. `guided`: with a guidance embedding, for distill.py."""

    steps, guidance = 28, 3.5

    def __init__(self, guided: bool = False) -> None:
        super().__init__()
        self.early = 0.0
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

    @property
    def t5(self) -> T5EncoderModel:
        return self.text_encoder_2

    def tokens(self, captions: list[str]) -> Text:
        settings = dict(padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
        return self.tokenizer(captions, **settings).input_ids, self.tokenizer_2(captions, **settings).input_ids

    def encode(self, clip: torch.Tensor, t5: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.text_encoder_2(t5, attention_mask=masking(torch.ones_like(t5)))[0], self.text_encoder(clip).pooler_output

    def loss(self, latents: torch.Tensor, tokens: Text, generator: torch.Generator) -> torch.Tensor:
        text, pooled = self.encode(*tokens)
        x = FluxPipeline._pack_latents(latents, *latents.shape)
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        t, weight = times(len(x), self.early, generator, x.device)
        noisy = torch.lerp(x, noise, t[:, None, None])
        output = self.transformer(noisy, text, pooled, t, **places(*latents.shape[2:], latents.device), return_dict=False)[0]
        return (weight * (output - noise + x).square().mean((1, 2))).mean()

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
        self.early = 0.0
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
        alphas = DPMSolverMultistepScheduler(**BETAS).alphas_cumprod
        self.register_buffer("alphas", alphas, persistent=False)
        self.register_buffer("levels", ((1 - alphas) / alphas).sqrt(), persistent=False)  # noise per picture, rising

    @property
    def middle(self) -> torch.nn.Module:
        return self.transformer.transformer_blocks[3]

    @property
    def t5(self) -> T5EncoderModel:
        return self.text_encoder

    def tokens(self, captions: list[str]) -> Text:
        tokens = self.tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
        return tokens.input_ids, tokens.attention_mask

    def loss(self, latents: torch.Tensor, tokens: Text, generator: torch.Generator) -> torch.Tensor:
        words, mask = tokens
        text = self.text_encoder(words, attention_mask=masking(mask))[0]
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        wanted, weight = times(len(latents), self.early, generator, latents.device)
        t = torch.searchsorted(self.levels, wanted / (1 - wanted)).clamp(max=len(self.levels) - 1)
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
        return (weight * error.square().mean((1, 2, 3))).mean()

    def pipeline(self, vae: AutoencoderTiny) -> PixArtSigmaPipeline:
        scheduler = DPMSolverMultistepScheduler(**BETAS, prediction_type="v_prediction")
        return PixArtSigmaPipeline(self.tokenizer, self.text_encoder, vae, self.transformer, scheduler)


@torch.no_grad()
def unguided(transformer: FluxTransformer2DModel) -> None:
    """Without its guidance embedding, which becomes a part of the time's: what it says of guidance 1 is the same at every time."""
    times = transformer.time_text_embed
    one = torch.tensor([1000.0])  # diffusers' guidance, times 1000 like its times
    times.timestep_embedder.linear_2.bias += times.guidance_embedder(times.time_proj(one))[0]
    del times.guidance_embedder


def take_over(model: Flux | PixArt, folder: Path) -> None:
    """The weights of a finished pipeline; those of words by the word, whatever its place in either vocabulary. Of a FLUX whose
    guidance is distilled, those that it has at guidance 1."""
    for name, part in model.named_children():
        finished = type(part).from_pretrained(folder / name, torch_dtype=torch.float32)
        if isinstance(finished, FluxTransformer2DModel) and finished.config.guidance_embeds:
            unguided(finished)
        old, new = finished.state_dict(), part.state_dict()
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
    """A model and two heads that do not ship: on the middle of its transformer, one that tells which part of which subject a token
    shows; on T5, one that tells in which half of the picture a word belongs.

    The denoising loss alone teaches both, slowly: they follow from the caption and the picture. Aligning the middle of the
    transformer with what is known about the picture is REPA's idea (Yu et al., ICLR 2025); there it is a pretrained encoder's
    features, here what the scene was composed of.
    """

    def __init__(self, model: Flux | PixArt, weight: float) -> None:
        super().__init__()
        self.model, self.weight = model, weight
        self.head = torch.nn.Linear(256, 3 + 4 * len(WAVES))
        self.words = torch.nn.Linear(WIDTH, len(PLACES))
        self.seen: torch.Tensor | None = None
        self.read: torch.Tensor | None = None
        model.middle.register_forward_hook(self.see)
        model.t5.register_forward_hook(self.listen)

    def see(self, block: torch.nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> None:
        """A single block of FLUX returns text and picture, a block of PixArt the picture."""
        self.seen = output[1] if isinstance(output, tuple) else output

    def listen(self, encoder: torch.nn.Module, args: object, output: BaseModelOutput) -> None:
        self.read = output.last_hidden_state

    def tokens(self, captions: list[str]) -> Text:
        """The model's, and where its words belong."""
        return *self.model.tokens(captions), roles(captions)

    def loss(self, latents: torch.Tensor, layouts: torch.Tensor, tokens: Text, generator: torch.Generator) -> torch.Tensor:
        """The model's own loss and the heads': cross-entropy of the subject, squared error of its size and of which part of it the
        token shows, as sines and cosines: what maps a place to a color learns fine structure from these alone; and cross-entropy
        of where words belong."""
        *tokens, belong = tokens
        loss = self.model.loss(latents, tuple(tokens), generator)
        if not self.weight:
            return loss
        told, layout = self.head(self.seen).float(), layouts.flatten(2).transpose(1, 2)
        subjects, inside = layout[..., :2], layout[..., :2].amax(-1, keepdim=True)
        turns = torch.cat([2 * torch.pi * wave * layout[..., 2:4] for wave in WAVES], -1)
        parts = torch.cat([layout[..., 4:], turns.sin(), turns.cos()], -1)
        missed = (inside * (told[..., 2:] - parts) ** 2).sum() / inside.sum().clamp(min=1) / parts.shape[-1]
        words = F.cross_entropy(self.words(self.read).float().flatten(0, 1), belong.flatten())
        return loss + self.weight * (F.binary_cross_entropy_with_logits(told[..., :2], subjects) + missed + words)


def main(
    family: str = typer.Argument(help="flux or pixart"),
    steps: int = typer.Option(40_000, help="Steps in all."),
    minutes: float = typer.Option(inf, help="Minutes in all: the learning rate falls over the last third of what ends first."),
    tokens: int = typer.Option(1024, help="Image tokens a step: four pictures of 128 px, or sixteen of 64 px."),
    lr: float = typer.Option(4e-4),
    layout: float = typer.Option(0.1, help="Weight of the losses of the two heads that do not ship."),
    early: float = typer.Option(0.5, help="Share of the times that lie in the first steps of a picture."),
    device: str = typer.Option("cpu", help="cpu or cuda"),
    workers: int = typer.Option(0, help="Processes that compose scenes, for a GPU that would wait for them."),
    threads: int = typer.Option(torch.get_num_threads(), help="CPU threads; two trainings side by side want one each."),
    bf16: bool = typer.Option(False, help="Multiply in bfloat16: faster on a GPU, or on a CPU with AMX or AVX512-BF16."),
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
    model.early = early
    vae = open_vae(vae_path, device)
    learner = Learner(model, layout).to(device)
    settings = {"steps": steps, "minutes": minutes, "tokens": tokens, "lr": lr, "bf16": bf16, "workers": workers}
    settings["checkpoint_minutes"] = checkpoint_minutes
    said = run(family, out.with_suffix(".pt"), learner, learner.tokens, learner.loss, sheets(model, vae), vae, **settings)
    save_pipeline(model.eval().pipeline(vae), out)
    typer.echo(f"{said}, saved to {out}")


if __name__ == "__main__":
    typer.run(main)
