from __future__ import annotations

import time
import types

import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline

from dit_accel import OutputCacheConfig, TokenCacheConfig
from dit_accel.pipelines.generation import DenoisingClock, Settings, compare, generate, saved, settings_for
from dit_accel.when import Mode

PROMPTS = ["red apple", "blue tiger"]
CACHE = TokenCacheConfig(interval=2, cache_ratio=0.5, selector="random")


@pytest.fixture(params=["flux", "pixart", "pixart-alpha"])
def pipe(request, tiny_flux, tiny_pixart):
    if request.param == "pixart-alpha":
        return PixArtAlphaPipeline(**tiny_pixart().components)
    return {"flux": tiny_flux, "pixart": tiny_pixart}[request.param]()


def small(pipe, **given) -> Settings:
    return settings_for(pipe, "tiny", **{"steps": 3, "height": 64, "width": 48} | given)


def first_inputs(pipe, settings: Settings) -> list[torch.Tensor]:
    """What the transformer sees first of every picture (of the conditional half, where guidance is batched)."""
    seen: list[torch.Tensor] = []
    calls = 0

    def look(module, args, kwargs):
        nonlocal calls
        if calls % settings.steps == 0:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            seen.extend(hidden[-min(settings.batch_size, len(PROMPTS) * settings.num_images - len(seen)) :].clone())
        calls += 1

    handle = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    list(generate(pipe, PROMPTS, None, settings))
    handle.remove()
    return seen


def test_noise_depends_on_the_seed_alone(pipe):
    alone = first_inputs(pipe, small(pipe, num_images=2, seed=5))
    together = first_inputs(pipe, small(pipe, num_images=2, seed=5, batch_size=3))
    assert len(alone) == len(together) == 4
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(alone[0], alone[2]) and not torch.equal(alone[0], alone[1])
    later = first_inputs(pipe, small(pipe, seed=6))
    assert torch.equal(later[0], alone[1]), "the i-th picture must have the noise of seed + i"


def test_order_of_pictures_and_seeds(pipe):
    pictures = list(generate(pipe, PROMPTS, None, small(pipe, num_images=3, batch_size=2, seed=9)))
    assert [(p.prompt, p.seed) for p in pictures] == [(prompt, 9 + i) for prompt in PROMPTS for i in range(3)]


def test_same_seed_same_picture_and_other_seed_other_picture(pipe):
    a, b, c = (np.asarray(next(generate(pipe, ["red apple"], None, small(pipe, seed=s))).image) for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert a.shape == (64, 48, 3)


def test_compare_starts_both_from_the_same_noise(pipe):
    everything = TokenCacheConfig(interval=1)
    for full, cached in compare(pipe, PROMPTS, everything, small(pipe)):
        assert np.array_equal(np.asarray(full.image), np.asarray(cached.image))
    settings = small(pipe, steps=6)
    full, cached = next(compare(pipe, PROMPTS, CACHE, settings))
    assert np.array_equal(np.asarray(full.image), np.asarray(next(generate(pipe, PROMPTS, None, settings)).image))
    assert np.array_equal(np.asarray(cached.image), np.asarray(next(generate(pipe, PROMPTS, CACHE, settings)).image))
    assert not np.array_equal(np.asarray(full.image), np.asarray(cached.image)), "the cache did nothing"
    assert full.work is None and cached.work["partial_steps"] > 0


def test_the_pipeline_is_plain_again_afterwards(pipe):
    before = {name: type(module) for name, module in pipe.transformer.named_modules()}
    for pictures in (generate(pipe, PROMPTS, CACHE, small(pipe)), compare(pipe, PROMPTS, CACHE, small(pipe))):
        next(pictures)
        pictures.close()  # stopped half-way, as by Ctrl-C
        assert {name: type(module) for name, module in pipe.transformer.named_modules()} == before
        assert not pipe.transformer._forward_pre_hooks and not pipe.transformer._forward_hooks


def test_every_step_is_announced(pipe):
    steps = []
    list(generate(pipe, PROMPTS, None, small(pipe, num_images=2, batch_size=3), lambda: steps.append(1)))
    assert len(steps) == 3 * 2
    steps.clear()
    list(compare(pipe, PROMPTS, CACHE, small(pipe), lambda: steps.append(1)))
    assert len(steps) == 3 * 2 * 2, "the warm-up must not be counted"
    steps.clear()
    list(generate(pipe, PROMPTS, OutputCacheConfig(sampler_steps=2, interval=1), small(pipe), lambda: steps.append(1)))
    assert len(steps) == 3 * 2, "a run of fewer steps than it was asked for ends the bar, too"


def test_the_clock_covers_the_denoising_alone(pipe, monkeypatch):
    decode, forward = pipe.vae.decode, pipe.transformer.forward
    monkeypatch.setattr(pipe.vae, "decode", lambda *args, **kwargs: (time.sleep(0.3), decode(*args, **kwargs))[1])
    monkeypatch.setattr(pipe.transformer, "forward", lambda *args, **kwargs: (time.sleep(0.1), forward(*args, **kwargs))[1])
    picture = next(generate(pipe, ["red"], None, small(pipe)))
    assert picture.seconds >= picture.denoising_seconds + 0.3
    assert picture.denoising_seconds >= 0.3
    with DenoisingClock(pipe) as clock:
        pass
    assert not clock.calls


def test_the_seconds_saved_are_those_of_partial_calls():
    def call(mode, merged=0, rows=1.0):
        return types.SimpleNamespace(mode=mode, merged=merged, rows=rows)

    full, partial = call(Mode.FULL), call(Mode.PARTIAL)
    assert saved([full, partial, full, partial, full], [9.0, 1.0, 3.0, 2.0, 4.0]) == (4 - 1) + (4 - 2), "the median of full ones"
    assert saved([full, call(Mode.FULL, merged=3), call(Mode.FULL, rows=0.5)], [4.0, 3.0, 2.0]) == 1 + 2
    assert saved([full, partial], [4.0, 5.0]) == -1
    assert saved([full, full], [1.0, 1.0]) is saved([partial], [1.0]) is saved([full, partial], [1.0]) is saved([], []) is None


def test_the_clock_times_every_call(pipe, monkeypatch):
    waits, forward = iter([0.2, 0.0, 0.1]), pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda *args, **kwargs: (time.sleep(next(waits)), forward(*args, **kwargs))[1])
    with DenoisingClock(pipe) as clock:
        list(generate(pipe, ["red"], None, small(pipe)))
    assert len(clock.calls) == 3 and clock.calls[0] >= 0.2 and clock.calls[2] >= 0.1
    assert sum(clock.calls) <= clock.seconds


def test_guidance_reaches_the_model(tiny_flux, tiny_pixart):
    """Embedded where the model has an embedding, otherwise two calls (FLUX) or a doubled batch (PixArt)."""

    def look(pipe, guidance):
        calls = []
        handle = pipe.transformer.register_forward_pre_hook(lambda m, a, k: calls.append(k | {"args": a}), with_kwargs=True)
        list(generate(pipe, ["red apple"], None, small(pipe, guidance=guidance)))
        handle.remove()
        return calls

    embedded = look(tiny_flux(guidance_embeds=True), 2.5)
    assert len(embedded) == 3 and embedded[0]["guidance"].tolist() == [2.5]
    assert len(look(tiny_flux(), 1.0)) == 3
    assert len(look(tiny_flux(), 2.5)) == 6
    assert [len(look(tiny_pixart(), g)[0]["args"][0]) for g in (1.0, 3.0)] == [1, 2]


def test_settings_come_from_the_catalog_then_from_the_model(tiny_flux, tiny_pixart):
    flux, distilled, pixart = tiny_flux(), tiny_flux(guidance_embeds=True), tiny_pixart()
    known = settings_for(flux, "emoji-flux")
    assert (known.steps, known.guidance, known.height, known.width) == (28, 3.5, 128, 128)
    assert known.max_sequence_length == 8, "never longer than the tokenizer allows"
    assert (settings_for(flux, "x").steps, settings_for(distilled, "x").guidance) == (4, 3.5)
    assert settings_for(pixart, "x").height == 64
    assert settings_for(pixart, "x", steps=7, guidance=None).steps == 7


@pytest.mark.parametrize(
    "given",
    [{"height": 60}, {"width": 12}, {"steps": 0}, {"guidance": -1.0}, {"guidance": float("nan")}, {"seed": -1}, {"num_images": 0}],
)
def test_impossible_settings_are_refused(pipe, given):
    with pytest.raises(ValueError, match=next(iter(given))):
        small(pipe, **given)
