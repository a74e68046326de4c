"""Every method of the table computes less, repeats itself exactly, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers.hooks import SeaCacheConfig
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from peers import FAMILIES, METHODS, RATIOS, WITHOUT, Method, applied, calibrate, enabled, family, masked, steps_of  # noqa: E402

from dit_accel.pipelines.generation import denoise, settings_for  # noqa: E402
from dit_accel.pipelines.loading import load  # noqa: E402

STEPS = 8
PAIRS = [(family, method) for method in METHODS.values() for family in method.families]


def every_method(test):
    return pytest.mark.parametrize(("name", "method"), PAIRS, ids=lambda value: getattr(value, "name", value))(test)


def latents(pipe, steps: int = STEPS, prompt: str = "a red apple", seed: int = 0) -> torch.Tensor:
    arguments = dict(height=64, width=64, max_sequence_length=8, num_inference_steps=steps, output_type="latent")
    if family(pipe) == "pixart":
        arguments |= dict(use_resolution_binning=False, clean_caption=False)
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **arguments).images


def work_of(pipe, run) -> int:
    """FLOPs of the transformer's matrix products and attention, counted as torch carries them out."""
    with FlopCounterMode(display=False) as counter:
        run()
    return sum(counter.get_flop_counts()[type(pipe.transformer).__name__].values())


def state(pipe) -> dict:
    """What a method might leave behind: classes, attributes, order of parts, forwards, hooks, processors, the pipeline's call."""
    found = {"call": type(pipe).__call__, "class": set(vars(type(pipe))), "pipe": set(vars(pipe))}
    for name, module in pipe.transformer.named_modules():
        hooks = [list(module._forward_pre_hooks.values()), list(module._forward_hooks.values())]
        registry = vars(module).get("_diffusers_hook")
        found[name] = (type(module), set(vars(module)), module.forward, hooks, registry and list(registry.hooks))
    return found | {"order": list(found), "processors": dict(pipe.transformer.attn_processors)}


def needs(method: Method) -> None:
    if method.by == "cache-dit":
        pytest.importorskip("cache_dit")


def ready(pipe):
    """The pipeline calibrated and run once, which leaves attributes of its own."""
    calibrate(pipe, STEPS, lambda: latents(pipe, prompt="tiger face"))
    latents(pipe)
    return pipe


@pytest.fixture(scope="module")
def pipes(tiny_flux, tiny_pixart) -> dict:
    return {"flux": ready(tiny_flux()), "pixart": ready(tiny_pixart())}


@pytest.fixture(scope="module")
def in_full(pipes) -> dict:
    return {name: (latents(pipe), work_of(pipe, lambda pipe=pipe: latents(pipe))) for name, pipe in pipes.items()}


@pytest.fixture(scope="module")
def half_pipes(tiny_flux, tiny_pixart) -> dict:
    return {"flux": ready(tiny_flux().to(torch.bfloat16)), "pixart": ready(tiny_pixart().to(torch.bfloat16))}


@pytest.fixture(autouse=True)
def recipes(tmp_path, monkeypatch) -> None:
    """For the tiny pipelines: every other step in full."""
    monkeypatch.setenv("DIT_ACCEL_RECIPES", str(tmp_path))
    for transformer in ("FluxTransformer2DModel", "PixArtTransformer2DModel"):
        content = {"model": "tiny", "transformer": {"class": transformer}, "levels": [1 - i / STEPS for i in range(STEPS)]}
        content["recipes"] = [{"speedup": 6, "config": {"full_steps": list(range(0, STEPS, 2))}}]
        (tmp_path / f"{transformer}.json").write_text(json.dumps(content))


@every_method
def test_a_method_computes_less_repeats_itself_and_leaves_nothing_behind(pipes, in_full, name, method) -> None:
    needs(method)
    pipe, setting = pipes[name], method.ladder[-1]
    steps, before = steps_of(method, setting, STEPS), state(pipe)
    full, full_work = in_full[name]
    with applied(pipe, method, setting, STEPS):
        first = latents(pipe, steps)
        latents(pipe, steps, prompt="tiger face", seed=1)
        again = latents(pipe, steps)
        work = work_of(pipe, lambda: latents(pipe, steps))
    assert work < (0.98 if method.name == "token merge" else 0.9) * full_work
    assert torch.equal(first, again)
    assert not torch.equal(first, full)
    assert state(pipe) == before
    assert torch.equal(latents(pipe), full)


@every_method
def test_a_method_works_in_bfloat16_and_comes_off_after_an_error(half_pipes, name, method) -> None:
    needs(method)
    pipe, setting = half_pipes[name], method.ladder[len(method.ladder) // 2]
    full, before, calls = latents(pipe), state(pipe), []

    def fail(module: torch.nn.Module, inputs: tuple) -> None:
        calls.append(module)
        if len(calls) > 4:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), applied(pipe, method, setting, STEPS):
        picture = latents(pipe, steps_of(method, setting, STEPS))
        handle = pipe.transformer.register_forward_pre_hook(fail)
        latents(pipe)
    handle.remove()
    assert picture.dtype == torch.bfloat16 and picture.isfinite().all()
    assert state(pipe) == before
    assert torch.equal(latents(pipe), full)


def test_fewer_steps_are_fewer_and_of_all_others_as_many() -> None:
    fewer = METHODS["fewer steps"]
    assert [steps_of(fewer, setting, 28) for setting in fewer.ladder] == [23, 20, 18, 16, 14, 12, 11, 10, 9, 8, 8, 7]
    assert steps_of(METHODS["token merge"], {"ratio": 0.5}, 28) == 28


def test_magcache_without_ratios_says_what_to_do_and_leaves_nothing(tiny_flux) -> None:
    pipe, method = tiny_flux(), METHODS["MagCache"]
    latents(pipe)
    before = state(pipe)
    with pytest.raises(LookupError, match=r"peers\.calibrate\(pipe, 8, run\)"):
        with applied(pipe, method, method.ladder[0], STEPS):
            pass
    assert state(pipe) == before


def test_the_ratios_of_magcache_are_those_of_the_residuals(pipes) -> None:
    """Against residuals taken by hooks on the first and the last block, at every step of the run that is calibrated on."""
    pipe = pipes["pixart"]
    first, last = pipe.transformer.transformer_blocks[0], pipe.transformer.transformer_blocks[-1]
    ins, outs = [], []
    handles = [
        first.register_forward_pre_hook(lambda module, inputs: ins.append(inputs[0])),
        last.register_forward_hook(lambda module, inputs, output: outs.append(output)),
    ]
    latents(pipe, prompt="tiger face")
    for handle in handles:
        handle.remove()
    lengths = [(output - given).norm(dim=-1) for given, output in zip(ins, outs, strict=True)]
    expected = [1.0, *((now / then).mean().item() for then, now in pairwise(lengths))]
    assert RATIOS[pipe.transformer][STEPS] == pytest.approx(expected, rel=1e-4)


def test_what_is_not_of_a_family_is_refused_with_the_reason(pipes) -> None:
    method = METHODS["DBPrune"]
    with pytest.raises(ValueError, match=r"DBPrune cannot be put on pixart: cache-dit"):
        with applied(pipes["pixart"], method, method.ladder[0], STEPS):
            pass


def test_every_family_without_a_method_has_the_reason() -> None:
    for method in METHODS.values():
        assert set(method.families) | {name for name in FAMILIES if method.name in WITHOUT[name]} == set(FAMILIES)
        assert all(len(method.ladder) >= 3 and method.name not in WITHOUT[name] for name in method.families)


def test_settings_are_the_same_when_they_are_read_again() -> None:
    """From a record, or what was measured is not recognised when a benchmark goes on."""
    settings = [setting for method in METHODS.values() for setting in method.ladder]
    assert json.loads(json.dumps(settings)) == settings


@pytest.mark.parametrize("name", FAMILIES)
def test_tomesd_fails_as_the_table_says(tiny_flux, tiny_pixart, name) -> None:
    tomesd = pytest.importorskip("tomesd")
    pipe, error = {"flux": (tiny_flux, IndexError), "pixart": (tiny_pixart, AttributeError)}[name]
    pipe = pipe()
    tomesd.apply_patch(pipe.transformer)
    with pytest.raises(error):
        latents(pipe)
    assert error.__name__ in WITHOUT[name]["ToMe-SD"]


def test_dbprune_fails_on_pixart_as_the_table_says(tiny_pixart) -> None:
    pytest.importorskip("cache_dit")
    pipe, setting = tiny_pixart(), METHODS["DBPrune"].ladder[-1]
    method = Method("DBPrune", "cache-dit", FAMILIES, (setting,), enabled("DBPruneConfig"))
    with pytest.raises(TypeError, match="_process_block_outputs"), applied(pipe, method, setting, STEPS):
        latents(pipe)


@pytest.mark.parametrize("steps", [20, 28])
def test_a_step_mask_has_its_last_step_and_no_long_gap(steps) -> None:
    pytest.importorskip("cache_dit")
    for setting in METHODS["step mask"].ladder:
        mask = masked(setting, steps)["steps_computation_mask"]
        assert len(mask) == steps and mask[-1] == 1
        assert "0" * 8 not in "".join(map(str, mask))


def test_seacache_saves_nothing_as_the_table_says(tiny_flux) -> None:
    pipe = tiny_flux()
    full = work_of(pipe, lambda: latents(pipe))
    pipe.transformer.enable_cache(SeaCacheConfig(threshold=1e6))
    assert work_of(pipe, lambda: latents(pipe)) == full


def test_the_table_can_be_read_without_the_other_projects(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cache_dit", None)  # an import of it would raise
    monkeypatch.setitem(sys.modules, "tomesd", None)
    specification = importlib.util.spec_from_file_location("peers_alone", BENCHMARKS / "peers.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "peers_alone", module)
    specification.loader.exec_module(module)
    assert list(module.METHODS) == list(METHODS)


@pytest.mark.slow
@every_method
def test_the_rungs_of_a_ladder_compute_less_and_less_on_the_embedded_pipelines(embedded, name, method) -> None:
    needs(method)
    pipe, settings = embedded(name)

    def work(steps: int) -> int:
        shorter = settings_for(pipe, f"emoji-{name}", steps=steps)
        return work_of(pipe, lambda: denoise(pipe, [("red apple, 3d style", 0)], shorter, lambda: None, applied=False))

    shares, full = [], work(settings.steps)
    for setting in method.ladder:
        with applied(pipe, method, setting, settings.steps):
            shares.append(work(steps_of(method, setting, settings.steps)) / full)
    assert shares[-1] < 0.92 and max(shares) <= 1.02  # comparing costs a percent, also where nothing is reused
    assert all(faster <= slower * 1.01 for slower, faster in pairwise(shares)), shares


@pytest.fixture(scope="module")
def embedded():
    loaded = {}

    def get(name: str):
        if name not in loaded:
            pipe = load(f"emoji-{name}", dtype="bfloat16")
            settings = settings_for(pipe, f"emoji-{name}")
            run = [("tiger face, flat style", 1)]
            calibrate(pipe, settings.steps, lambda: denoise(pipe, run, settings, lambda: None, applied=False))
            loaded[name] = pipe, settings
        return loaded[name]

    return get
