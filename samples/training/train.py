"""Train one embedded pipeline on scenes: its transformer together with its text encoders, at several sizes from 64 to 128 px.

    python samples/training/train.py flux --start samples/emoji-flux
    python samples/training/train.py pixart --start samples/emoji-pixart

Needs the drawings of prepare.py and the autoencoder of border.py. --start takes over the weights of a finished pipeline, word by
word where the vocabulary has changed; without it a training begins from random weights, and PixArt with the T5 that FLUX has
trained: its only way to the text, cross-attention, finds none to speak of in a T5 that knows nothing yet.

The first part sees small pictures, the second one mostly 128 px. Scenes are encoded once and kept on disk for both families. A
checkpoint every few minutes; the same command goes on where it stopped, and --samples-large may be raised to go on after the end.
Writes the finished pipeline in diffusers format.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
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

from common import clean_config, copy_card, load_checkpoint, save_checkpoint, sheet
from data import WORK, Scene, compose, pairs, scene, scene_caption, scene_prompt
from text import LENGTH, WIDTH, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer

DROPOUT = 0.1  # share of empty captions, for classifier-free guidance
SIZES = {  # of pictures, height and width in pixels, and how often each comes; the first part of a training and the second
    "small": ([(64, 64), (64, 96), (96, 64), (96, 96)], [6, 1, 1, 3]),
    "large": ([(128, 128), (128, 96), (96, 128), (128, 64), (96, 96), (64, 64)], [12, 1, 1, 1, 2, 2]),
}
BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}  # PixArt's


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


class Scenes:
    """The training's scenes: the n-th one of a size is always the same, and is composed and encoded when it is first asked for.

    Latents are kept in float16 in files beside the checkpoints, so that the other family and a resumed training find them there.
    """

    def __init__(self, vae: AutoencoderTiny, count: int, folder: Path = WORK / "scenes") -> None:
        self.vae, self.count, self.folder, self.rows = vae, count, folder, pairs()[0]
        self.files: dict[tuple[int, int], tuple[np.memmap, np.memmap]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def open(self, size: tuple[int, int]) -> tuple[np.memmap, np.memmap]:
        if size not in self.files:
            shape = (self.count, self.vae.config.latent_channels, size[0] // 4, size[1] // 4)
            arrays = []
            for kind, dtype, extent in (("latents", np.float16, shape), ("made", np.bool_, shape[:1])):
                path = self.folder / f"{size[0]}x{size[1]}-{self.count}.{kind}"
                arrays.append(np.memmap(path, dtype, "r+" if path.exists() else "w+", shape=extent))
            self.files[size] = arrays[0], arrays[1]
        return self.files[size]

    def __call__(self, places: list[int], size: tuple[int, int]) -> tuple[torch.Tensor, list[Scene]]:
        """Latents [n, 8, height / 4, width / 4] of the scenes at these places, and what they show."""
        latents, made = self.open(size)
        generators = [random.Random(f"{size} {place}") for place in places]
        scenes = [scene(rng, self.rows) for rng in generators]
        if new := [i for i, place in enumerate(places) if not made[place]]:
            images = torch.stack([compose(scenes[i], *size, generators[i])[0] for i in new])
            with torch.no_grad():
                encoded = self.vae.encode(images.contiguous(memory_format=torch.channels_last)).latents
            where = [places[i] for i in new]
            latents[where] = encoded.half().numpy()
            made[where] = True
        return torch.from_numpy(latents[places]).float(), scenes


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


def learning_rate(done: float, total: float) -> float:
    """Share of the peak: constant after a short rise, then falling in a line to a fiftieth over the last quarter."""
    return min(1.0, done / 1600, 0.02 + 0.98 * (total - done) / (0.25 * total))


def main(
    family: str = typer.Argument(help="flux or pixart"),
    samples_small: int = typer.Option(200_000, help="Pictures seen in the first part, of 64 to 96 px."),
    samples_large: int = typer.Option(150_000, help="Pictures seen after that, most of them of 128 px."),
    batch: int = typer.Option(32, help="Pictures of 128 px at a time; twice as many of small ones."),
    lr: float = typer.Option(8e-4),
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
    pool = Scenes(vae, scenes)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    average = [p.detach().clone() for p in parameters]
    path, done, step, spent = out.with_suffix(".pt"), 0, 0, 0.0
    if state := load_checkpoint(path):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for a, b in zip(average, state["average"], strict=True):
            a.copy_(b)
        done, step, spent = state["done"], state["step"], state["spent"]
    total = samples_small + samples_large
    rng = random.Random(1)
    shown = [scene(rng, pairs()[0]) for _ in range(18)]

    def swap_average() -> None:
        for p, a in zip(parameters, average, strict=True):
            p.data, a.data = a.data, p.data

    def write_sheet() -> None:
        swap_average()
        model.eval()
        pages = sample(model, vae, [scene_prompt(s) for s in shown], (96, 96) if done < samples_small else (128, 128))
        sheet(pages, 6, out.parent / f"sheets/{family}-{done:07d}.png")
        model.train()
        swap_average()

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), "{task.fields[note]}") as progress:
        bar = progress.add_task(family, total=total, completed=done, note="")
        clock = time.monotonic()
        saved, running = clock, 0.0
        while done < total:
            generator, rng = torch.Generator().manual_seed(step), random.Random(step)
            sizes, shares = SIZES["small" if done < samples_small else "large"]
            size = rng.choices(sizes, shares)[0]
            count = batch if size[0] * size[1] > 96 * 96 else 2 * batch
            latents, rows = pool([rng.randrange(scenes) for _ in range(count)], size)
            captions = ["" if rng.random() < DROPOUT else scene_caption(row, rng) for row in rows]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model.loss(latents, captions, generator)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.param_groups[0]["lr"] = lr * learning_rate(done, total)
            optimizer.step()
            optimizer.zero_grad()
            step, done = step + 1, done + count
            torch._foreach_lerp_(average, [p.data for p in parameters], 1 - min(0.999, step / (step + 10)))
            running = 0.98 * running + 0.02 * loss.item() if running else loss.item()
            progress.update(bar, completed=done, note=f"{size[0]} x {size[1]} px, loss {running:.4f}")
            if (now := time.monotonic()) - saved > checkpoint_minutes * 60 or done >= total:
                state = {"model": model.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
                save_checkpoint(path, **state, done=done, step=step, spent=spent + now - clock)
                write_sheet()
                progress.console.print(f"{family}: {done} pictures, {(spent + now - clock) / 60:.0f} minutes, loss {running:.4f}")
                saved = time.monotonic()
    swap_average()
    save_pipeline(model.eval().pipeline(vae), out)
    typer.echo(f"{family}: {done} samples, {(spent + time.monotonic() - clock) / 60:.0f} minutes, saved to {out}")


if __name__ == "__main__":
    typer.run(main)
