"""Train one embedded pipeline: its transformer together with its text encoders, first at 64 px, then at 128 px.

    python samples/training/train.py flux
    python samples/training/train.py pixart

Needs the pictures of prepare.py and the autoencoder of autoencoder.py. PixArt starts with the T5 that FLUX has trained: its only
way to the text, cross-attention, finds none to speak of in a T5 that knows nothing yet.

A checkpoint every few minutes; the same command goes on where it stopped, and --samples-128 may be raised to go on after the end.
Without its checkpoint, a finished pipeline is trained on with --start FOLDER, --samples-64 0 and a lower --lr.
Writes the finished pipeline in diffusers format.
"""

from __future__ import annotations

import json
import random
import time
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
from rich.progress import Progress, TimeElapsedColumn
from transformers import T5EncoderModel

from common import copy_card, load_checkpoint, save_checkpoint, sheet
from data import STYLES, WORK, caption, pairs, pictures, prompt
from text import LENGTH, WIDTH, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer

DROPOUT = 0.07  # share of empty captions, for classifier-free guidance
BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}  # PixArt's


class Flux(torch.nn.Module):
    """Rectified flow: velocity = noise - picture, logit-normal times."""

    steps, guidance = 28, 1.0

    def __init__(self) -> None:
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
            guidance_embeds=False,
            axes_dims_rope=(16, 24, 24),
        )

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
        ids = image_places(latents.shape[-1] // 2)
        output = self.transformer(noisy, text, pooled, t, img_ids=ids, txt_ids=torch.zeros(LENGTH, 3), return_dict=False)[0]
        return F.mse_loss(output, noise - x)

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
        return F.mse_loss(output, alpha.sqrt() * noise - (1 - alpha).sqrt() * latents)

    def pipeline(self, vae: AutoencoderTiny) -> PixArtSigmaPipeline:
        scheduler = DPMSolverMultistepScheduler(**BETAS, prediction_type="v_prediction")
        return PixArtSigmaPipeline(self.tokenizer, self.text_encoder, vae, self.transformer, scheduler)


def image_places(side: int) -> torch.Tensor:
    """RoPE ids [side * side, 3]: a small picture lies on the grid of the 16 x 16 one and keeps its place when it grows."""
    place = (torch.arange(side) + 0.5) * (16 / side) - 0.5
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = place[:, None], place[None, :]
    return ids.flatten(0, 1)


def sample(model: Flux | PixArt, vae: AutoencoderTiny, prompts: list[str], size: int, seed: int = 0) -> torch.Tensor:
    """Pictures [n, 3, size, size] in -1..1 from the stock pipeline, each from its own seed."""
    pipe = model.pipeline(vae)
    pipe.set_progress_bar_config(disable=True)
    extra = {"use_resolution_binning": False} if isinstance(model, PixArt) else {}
    pipe._prepare_latent_image_ids = lambda batch, height, width, *args: image_places(height)  # FLUX alone asks for it
    images = pipe(
        prompts,
        height=size,
        width=size,
        num_inference_steps=model.steps,
        guidance_scale=model.guidance,
        max_sequence_length=LENGTH,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
        output_type="pt",
        **extra,
    ).images
    return images * 2 - 1


@torch.no_grad()
def encode_pictures(vae: AutoencoderTiny, rows: list, size: int) -> torch.Tensor:
    """Latents [n, 8, size / 4, size / 4] of (concept, style) pairs."""
    images, order = pictures(), json.loads((WORK / "order.json").read_text())
    pixels = torch.stack([images[STYLES[style]][order[STYLES[style]].index(c.code)] for c, style in rows])
    pixels = F.interpolate(pixels.float() / 127.5 - 1, size=(size, size), mode="area")
    return torch.cat([vae.encode(part).latents for part in pixels.split(32)])


def save_pipeline(pipe: FluxPipeline | PixArtSigmaPipeline, folder: Path) -> None:
    """In diffusers format, with its model card; the transformer in bfloat16, which halves the folder."""
    pipe.transformer.to(torch.bfloat16)
    for tokenizer in (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)):
        if tokenizer is not None:
            tokenizer.backend_tokenizer.no_padding()
    pipe.save_pretrained(folder)
    config = folder / "vae/config.json"  # AutoencoderTiny writes a key that it then warns about when it is loaded
    settings = json.loads(config.read_text())
    settings.pop("block_out_channels", None)
    config.write_text(json.dumps(settings, indent=2) + "\n")
    copy_card(folder)


def learning_rate(done: float, stage_one: float, total: float) -> float:
    """Share of the peak: flat through stage one, then falling in a line to a fiftieth."""
    if done < 1600:
        return done / 1600
    return 1.0 if done < stage_one else 0.02 + 0.98 * (total - done) / (total - stage_one)


def main(
    family: str = typer.Argument(help="flux or pixart"),
    samples_64: int = typer.Option(60_000, help="Pictures seen at 64 px (64 image tokens)."),
    samples_128: int = typer.Option(50_000, help="Pictures seen after that at 128 px (256 image tokens)."),
    batch: int = typer.Option(32),
    lr: float = typer.Option(1e-3),
    threads: int = typer.Option(torch.get_num_threads(), help="CPU threads; two trainings side by side want one each."),
    bf16: bool = typer.Option(False, help="Multiply in bfloat16: 2.5 times faster on a CPU with AMX, slower on an old one."),
    checkpoint_minutes: float = typer.Option(4.0),
    vae_path: Path = typer.Option(WORK / "vae"),
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
        for name in ("tokenizer", "tokenizer_2") if family == "flux" else ("tokenizer",):
            setattr(model, name, type(getattr(model, name)).from_pretrained(start / name))
        for name, part in model.named_children():
            part.load_state_dict(type(part).from_pretrained(start / name, torch_dtype=torch.float32).state_dict())
    elif family == "pixart":
        model.text_encoder.load_state_dict(T5EncoderModel.from_pretrained(t5_path).state_dict())
    vae = AutoencoderTiny.from_pretrained(vae_path).eval()
    train, held = pairs()
    latents = {size: encode_pictures(vae, train, size) for size in (64, 128)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    path, done, step, spent = out.with_suffix(".pt"), 0, 0, 0.0
    if state := load_checkpoint(path):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for a, b in zip(average, state["average"], strict=True):
            a.copy_(b)
        done, step, spent = state["done"], state["step"], state["spent"]
    sheet_rows = [*random.Random(1).sample(train, 12), *held[:6]]
    total = samples_64 + samples_128

    def swap_average() -> None:
        for p, a in zip(parameters, average, strict=True):
            p.data, a.data = a.data, p.data

    def write_sheet(size: int) -> None:
        swap_average()
        model.eval()
        pages = sample(model, vae, [prompt(c, s) for c, s in sheet_rows], size)
        sheet(pages, 6, out.parent / f"sheets/{family}-{done:07d}.png")
        model.train()
        swap_average()

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), "{task.fields[note]}") as progress:
        bar = progress.add_task(family, total=total, completed=done, note="")
        clock = time.monotonic()
        saved, running = clock, {}
        while done < total:
            size = 64 if done < samples_64 else 128
            generator, rng = torch.Generator().manual_seed(step), random.Random(step)
            rows = torch.randint(len(train), (batch,), generator=generator)
            captions = ["" if rng.random() < DROPOUT else caption(*train[i], rng) for i in rows]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model.loss(latents[size][rows], captions, generator)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.param_groups[0]["lr"] = lr * learning_rate(done, samples_64, total)
            optimizer.step()
            optimizer.zero_grad()
            step, done = step + 1, done + batch
            torch._foreach_lerp_(average, [p.data for p in parameters], 1 - min(0.999, step / (step + 10)))
            running[size] = 0.98 * running.get(size, loss.item()) + 0.02 * loss.item()
            progress.update(bar, completed=done, note=f"{size} px, loss {running[size]:.4f}")
            if (now := time.monotonic()) - saved > checkpoint_minutes * 60 or done >= total:
                state = {"model": model.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
                save_checkpoint(path, **state, done=done, step=step, spent=spent + now - clock)
                write_sheet(size)
                saved = time.monotonic()
    swap_average()
    save_pipeline(model.eval().pipeline(vae), out)
    typer.echo(f"{family}: {done} samples, {(spent + time.monotonic() - clock) / 60:.0f} minutes, saved to {out}")


if __name__ == "__main__":
    typer.run(main)
