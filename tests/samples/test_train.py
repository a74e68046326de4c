"""Pieces of the trainings that take no training: weights taken over, guidance distilled, what is saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline

import distill
from train import Flux, PixArt, masking, save_pipeline, take_over, times

SAMPLES = Path(__file__).parents[2] / "samples"

FAMILIES = {"flux": Flux, "pixart": PixArt}


def paths_in(folder: Path) -> list[str]:
    """Settings of the configs in a folder that name a place on some machine."""

    def texts(value: object) -> list[str]:
        if isinstance(value, dict):
            return [text for key, inner in value.items() for text in (key, *texts(inner))]
        return [text for inner in value for text in texts(inner)] if isinstance(value, list) else [value] * isinstance(value, str)

    configs = [path for path in folder.rglob("*.json") if path.name != "tokenizer.json"]
    assert configs
    marks = ("_name_or_path", "/root", "/home", "/tmp", "\\", "~")
    return [
        f"{path}: {text}"
        for path in configs
        for text in texts(json.loads(path.read_text()))
        if text.startswith("/") or any(mark in text for mark in marks)
    ]


def test_shipped_configs_hold_no_paths():
    assert paths_in(SAMPLES) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_configs_hold_no_paths(family, tmp_path):
    vae = AutoencoderTiny.from_pretrained(SAMPLES / f"emoji-{family}/vae")
    save_pipeline(FAMILIES[family]().pipeline(vae), tmp_path / "saved")
    assert paths_in(tmp_path / "saved") == []
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again = tmp_path / "again"
    save_pipeline(pipe, again)
    assert paths_in(again) == [], "what was loaded from a folder is saved to another"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shipped_pipeline_is_taken_over_word_by_word(family):
    model, shipped = FAMILIES[family](), DiffusionPipeline.from_pretrained(SAMPLES / f"emoji-{family}")
    take_over(model, SAMPLES / f"emoji-{family}")
    ours, theirs = model.transformer.state_dict(), shipped.transformer.state_dict()
    folded = "time_text_embed.timestep_embedder.linear_2.bias"  # with what a distilled guidance adds to it
    assert all(torch.equal(ours[name], value.float()) for name, value in theirs.items() if name in ours and name != folded)
    assert all("guidance_embedder" in name for name in theirs.keys() - ours.keys())
    tokenizers = [name for name in ("tokenizer", "tokenizer_2") if hasattr(model, name)]
    for name in tokenizers:
        encoder = name.replace("tokenizer", "text_encoder")
        new, old = (getattr(owner, encoder).get_input_embeddings().weight for owner in (model, shipped))
        known, places = getattr(shipped, name).get_vocab(), getattr(model, name).get_vocab()
        both = [word for word in places if word in known]
        assert len(both) > 100
        assert torch.equal(new[[places[word] for word in both]], old[[known[word] for word in both]].float())


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    vae = AutoencoderTiny.from_pretrained(SAMPLES / "emoji-flux/vae")
    return Flux().eval().requires_grad_(False).pipeline(vae)


def test_the_student_starts_as_the_teacher_without_guidance(teacher, monkeypatch):
    student = distill.student_of(teacher)
    latents, captions = torch.randn(3, 8, 16, 16, generator=torch.Generator().manual_seed(1)), ["red apple", "owl, 3d style", ""]
    losses = []
    for guidance in (1.0, 2.0, 3.0):
        monkeypatch.setattr(distill, "GUIDANCE", (guidance, guidance))
        generator = torch.Generator().manual_seed(0)
        tokens = student.tokens([*captions, ""])
        losses.append(distill.distillation_loss(teacher.transformer, student, latents, tokens, generator).item())
    assert losses[0] < 1e-10 < losses[1]
    assert losses[2] == pytest.approx(4 * losses[1], rel=1e-3), "the target is uncond + g (cond - uncond)"


def test_a_distilled_pipeline_is_distilled_further(teacher, tmp_path):
    """From its own transformer, with the words of the new teacher."""
    student = distill.student_of(teacher)
    torch.nn.init.normal_(student.transformer.time_text_embed.guidance_embedder.linear_2.weight, std=0.1)
    student.transformer.save_pretrained(tmp_path / "transformer")
    again = distill.student_of(teacher, tmp_path).transformer.state_dict()
    assert all(torch.equal(again[name], value) for name, value in student.transformer.state_dict().items())


def test_a_distilled_pipeline_is_taken_over_at_guidance_1(teacher, tmp_path):
    """What goes on learning then is a FLUX without a guidance embedding: the next teacher."""
    student = distill.student_of(teacher)
    torch.nn.init.normal_(student.transformer.time_text_embed.guidance_embedder.linear_2.weight, std=0.5)
    distilled = student.eval().pipeline(teacher.vae)
    distilled.save_pretrained(tmp_path)
    model = Flux().eval()
    take_over(model, tmp_path)
    call = dict(height=64, width=64, num_inference_steps=2, max_sequence_length=24, output_type="latent")
    pictures = []
    for pipe, guidance in ((distilled, 1.0), (model.pipeline(teacher.vae), 1.0), (distilled, 3.0)):
        pipe.set_progress_bar_config(disable=True)
        pictures.append(pipe("owl", guidance_scale=guidance, generator=torch.Generator().manual_seed(0), **call).images)
    assert torch.allclose(pictures[0], pictures[1], atol=1e-5) and not torch.allclose(pictures[0], pictures[2], atol=1e-3)


def test_times_of_the_first_steps():
    """Without early ones, logit-normal with the weight 4 t (1 - t); early ones lie above a half and weigh one."""
    n, generator = 20_000, torch.Generator().manual_seed(0)
    t, weight = times(n, 0.0, generator, torch.device("cpu"))
    assert torch.allclose(weight, 4 * t * (1 - t)) and abs(t.logit().mean()) < 0.03 and abs(t.logit().std() - 1) < 0.03
    t, weight = times(n, 1.0, generator, torch.device("cpu"))
    assert t.min() >= 0.5 and t.max() <= 1 and (weight == 1).all()
    assert abs((t > 0.9).float().mean() - 0.2 ** (1 / 1.5)) < 0.02
    t, weight = times(n, 0.3, generator, torch.device("cpu"))
    assert abs((weight == 1).float().mean() - 0.3) < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_t5_reads_a_mask_without_looking_at_it_on_the_host(family):
    model = FAMILIES[family]()
    encoder = model.text_encoder_2 if family == "flux" else model.text_encoder
    words = model.tokens(["a red apple, 3d style", "owl"])[1 if family == "flux" else 0]
    mask = torch.ones_like(words)
    mask[1, 3:] = 0
    assert torch.equal(encoder(words, attention_mask=masking(mask))[0], encoder(words, attention_mask=mask)[0])


def test_guidance_is_what_the_pipeline_tells_the_student(teacher):
    """Once its embedding says something, the pipeline's guidance_scale is the loss's g."""
    student = distill.student_of(teacher)
    torch.nn.init.normal_(student.transformer.time_text_embed.guidance_embedder.linear_2.weight, std=0.1)
    told = []
    student.transformer.register_forward_pre_hook(lambda m, args, kwargs: told.append(kwargs["guidance"]), with_kwargs=True)
    pipe = student.eval().pipeline(teacher.vae)
    pipe.set_progress_bar_config(disable=True)
    call = dict(height=64, width=64, num_inference_steps=1, max_sequence_length=24, output_type="pt")
    first, second = (pipe("owl", guidance_scale=g, generator=torch.Generator().manual_seed(0), **call).images for g in (2.0, 5.0))
    assert [guidance.item() for guidance in told] == [2.0, 5.0] and not torch.equal(first, second)
