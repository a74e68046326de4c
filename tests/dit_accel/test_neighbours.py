"""Life among the rest of diffusers: every FLUX and PixArt pipeline, adapters, offloading, quantisation, precision."""

from __future__ import annotations

import copy
import inspect
import math
import pickle

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    PixArtAlphaPipeline,
)
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image

import dit_accel
from dit_accel import TokenCacheConfig, TokenMergeConfig

CACHED = TokenCacheConfig(interval=3, cache_ratio=0.8, selector="attention", age_weight=0.1)
RANDOM = TokenCacheConfig(interval=3, cache_ratio=0.8)
MERGED = TokenMergeConfig(ratio=0.5, merge_mlp=True)
KEYS = TokenMergeConfig(ratio=0.5, keep_queries=True)
PICTURE = Image.effect_noise((64, 64), 60).convert("RGB")
MASK = Image.new("L", (64, 64), 255)
PIXART = {"use_resolution_binning": False, "clean_caption": False}


def run(pipe, seed=0, prompt="red apple, 3d style", **call):
    call = {"height": 64, "width": 64, "num_inference_steps": 7, "max_sequence_length": 8, "output_type": "latent", **call}
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **call).images


def modes(pipe, branch=0):
    return [call.mode.value for call in dit_accel.report(pipe).calls if call.branch == branch]


def check(pipe, expected=None, config=CACHED, **call):
    """Caches on schedule, merges, changes the picture but little, repeats it to the bit, and leaves nothing behind."""
    plain, made = run(pipe, **call), []
    expected = expected or ["full", "partial", "partial", "full", "partial", "partial", "full"]
    for what in (config, MERGED, [config, MERGED]):
        dit_accel.apply(pipe, what)
        made.append(run(pipe, **call))
        assert modes(pipe) == (["full"] * len(expected) if what is MERGED else expected)
        assert all(not torch.equal(made[-1], other) for other in (plain, *made[:-1])) and made[-1].isfinite().all()
        assert torch.equal(run(pipe, **call), made[-1])
    assert dit_accel.report(pipe).tokens_merged == math.prod(dit_accel.report(pipe).grid) // 2
    dit_accel.remove(pipe)
    assert torch.equal(run(pipe, **call), plain)
    return made[0]


def settings(transformer):
    return {name: value for name, value in transformer.config.items() if name[0] != "_" and name != "out_channels"}


def wider(transformer, channels):
    """A transformer of the same shape with more channels coming in."""
    return FluxTransformer2DModel(**settings(transformer) | {"in_channels": channels, "out_channels": 32}).eval()


def flux_variant(pipeline_class, pipe, **more):
    wanted = inspect.signature(pipeline_class.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in wanted}
    made = pipeline_class(**{**parts, **more})
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("true_cfg", [{}, {"true_cfg_scale": 2.0, "negative_prompt": "a teapot"}], ids=["", "true cfg"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("pipeline_class", [FluxImg2ImgPipeline, FluxInpaintPipeline])
def test_flux_from_a_picture(tiny_flux, pipeline_class, strength, true_cfg):
    pipe = flux_variant(pipeline_class, tiny_flux())
    extra = {"mask_image": MASK} if pipeline_class is FluxInpaintPipeline else {}
    expected = ["full", "partial", "partial", "full", "partial", "partial", "full"][: 7 if strength == 1 else 5]
    check(pipe, expected, image=PICTURE, strength=strength, **extra, **true_cfg)


def test_flux_img2img_knows_its_number_of_steps(tiny_flux):
    """A schedule that depends on the number of steps starts where img2img starts."""

    def expected(steps):  # ToCa's formula, with an interval of 3 and a spread of 0.5
        full = [0]
        while (following := full[-1] + round(3 / (0.5 + full[-1] / steps))) < steps:
            full.append(following)
        return ["full" if step in full else "partial" for step in range(steps)]

    pipe = flux_variant(FluxImg2ImgPipeline, tiny_flux())
    dit_accel.apply(pipe, TokenCacheConfig(interval=3, interval_spread=0.5))
    assert expected(12) != expected(20)[:12]
    for strength, steps in ((0.6, 12), (1.0, 20)):
        run(pipe, image=PICTURE, strength=strength, num_inference_steps=20)
        assert modes(pipe) == expected(steps)


@pytest.mark.parametrize("true_cfg", [{}, {"true_cfg_scale": 2.0, "negative_prompt": "a teapot"}], ids=["", "true cfg"])
def test_flux_controlnet(tiny_flux, true_cfg):
    pipe = tiny_flux()
    control = FluxControlNetModel(**settings(pipe.transformer) | {"num_layers": 1, "num_single_layers": 1})
    for parameter in control.parameters():
        parameter.data.normal_(std=0.1)
    check(flux_variant(FluxControlNetPipeline, pipe, controlnet=control), control_image=PICTURE, **true_cfg)


def test_flux_control_and_fill(tiny_flux):
    """Their extra pictures come in as more channels of every token."""
    pipe = tiny_flux()
    pipe.vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=[8, 8, 8],
        norm_num_groups=4, latent_channels=8, shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    wide = wider(pipe.transformer, 64)
    check(flux_variant(FluxControlPipeline, pipe, transformer=wide), control_image=PICTURE)
    wide = wider(pipe.transformer, 32 + 32 + 16 * 4)
    check(flux_variant(FluxFillPipeline, pipe, transformer=wide), image=PICTURE, mask_image=MASK)


@pytest.mark.parametrize("selector", ["attention", "stratified"])
def test_flux_kontext(tiny_flux, selector):
    """The tokens of the reference picture follow those of the new one and are selected like them."""
    pipe = flux_variant(FluxKontextPipeline, tiny_flux())
    config = TokenCacheConfig(interval=3, cache_ratio=0.8, selector=selector, spatial_bonus=0.4)
    check(pipe, config=config, image=PICTURE, max_area=64 * 48, width=48, _auto_resize=False)
    dit_accel.apply(pipe, config)
    run(pipe, image=PICTURE, max_area=64 * 48, width=48, _auto_resize=False)
    assert dit_accel.report(pipe).grid == (8, 6)


def test_pixart_alpha(tiny_pixart):
    parts = tiny_pixart().components
    pipe = PixArtAlphaPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    check(pipe, **PIXART)


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_several_pictures_a_prompt(tiny_flux, tiny_pixart, family):
    pipe, call = (tiny_flux(), {}) if family == "flux" else (tiny_pixart(), PIXART)
    many = check(pipe, num_images_per_prompt=2, prompt=["a tiger", "a teapot"], **call)
    assert len(many) == 4


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_size_steps_and_scheduler_change_between_calls(tiny_flux, tiny_pixart, family):
    pipe, call = (tiny_flux(), {}) if family == "flux" else (tiny_pixart(), PIXART)
    dit_accel.apply(pipe, CACHED)
    first = run(pipe, **call)
    run(pipe, width=48, **call)
    assert dit_accel.report(pipe).grid == (8, 6)
    run(pipe, num_inference_steps=4, **call)
    assert modes(pipe) == ["full", "partial", "partial", "full"]
    usual = pipe.scheduler
    if family == "pixart":
        pipe.scheduler = HeunDiscreteScheduler.from_config(usual.config)  # repeats timesteps
        run(pipe, num_inference_steps=4, **call)
        assert modes(pipe) == ["full", "partial", "partial", "full", "partial", "partial", "full"]
        pipe.scheduler = usual
    assert torch.equal(run(pipe, **call), first)


def test_two_pipelines_share_a_transformer(tiny_flux):
    pipe = tiny_flux()
    other = flux_variant(FluxImg2ImgPipeline, pipe)
    dit_accel.apply(pipe, CACHED)
    first, second = run(pipe), run(other, image=PICTURE, strength=0.6)
    assert torch.equal(run(pipe), first) and torch.equal(run(other, image=PICTURE, strength=0.6), second)
    dit_accel.remove(other)
    with pytest.raises(RuntimeError, match="call dit_accel.apply first"):
        dit_accel.report(pipe)


LORA = LoraConfig(r=2, target_modules=["to_k", "to_out.0", "net.0.proj", "net.2", "proj_mlp", "proj_out"], init_lora_weights=False)


@pytest.mark.parametrize("config", [CACHED, MERGED, [CACHED, KEYS]], ids=["cached", "merged", "both"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(tiny_flux, when, config):
    """Loaded, switched off and on, fused, unfused and deleted, before or after apply."""
    pipe = tiny_flux()
    model, bare = pipe.transformer, run(dit_accel.apply(pipe, config))
    dit_accel.remove(pipe)
    torch.manual_seed(0)
    steps = [lambda: model.add_adapter(LORA, "tiny"), lambda: dit_accel.apply(pipe, config)]
    for step in steps if when == "before" else reversed(steps):
        step()
    adapted = run(pipe)
    assert modes(pipe).count("partial") == (0 if config is MERGED else 4) and not torch.allclose(adapted, bare, atol=1e-3)
    model.disable_adapters()
    assert torch.equal(run(pipe), bare)
    model.enable_adapters()
    assert torch.equal(run(pipe), adapted)
    model.fuse_lora()
    torch.testing.assert_close(run(pipe), adapted, atol=2e-3, rtol=2e-3)
    model.unfuse_lora()
    model.delete_adapters("tiny")
    torch.testing.assert_close(run(pipe), bare, atol=2e-3, rtol=2e-3)
    dit_accel.remove(pipe)
    assert all("dit_accel" not in type(module).__module__ for module in model.modules())


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_on_pixart(tiny_pixart, when):
    """diffusers offers no adapters there; peft's own injection works."""
    pipe, plain = tiny_pixart(), run(dit_accel.apply(tiny_pixart(), CACHED), **PIXART)
    torch.manual_seed(0)
    steps = [lambda: inject_adapter_in_model(LORA, pipe.transformer), lambda: dit_accel.apply(pipe, CACHED)]
    for step in steps if when == "before" else reversed(steps):
        step()
    assert not torch.allclose(run(pipe, **PIXART), plain, atol=1e-3) and modes(pipe).count("partial") == 4


def test_fused_projections(tiny_flux, tiny_pixart):
    """The same tokens are chosen and the same pictures made when fused before apply; PixArt's fusing afterwards is noticed."""
    for pipe, call in ((tiny_flux(), {}), (tiny_pixart(), PIXART)):
        selectors = [TokenCacheConfig(interval=3, cache_ratio=0.8, selector=name) for name in ("attention", "k-norm", "v-norm")]
        for config in (*selectors, MERGED, KEYS, [RANDOM, MERGED], [RANDOM, KEYS]):
            separate = run(dit_accel.apply(pipe, config), **call)
            dit_accel.remove(pipe)
            pipe.transformer.fuse_qkv_projections()
            torch.testing.assert_close(run(dit_accel.apply(pipe, config), **call), separate, atol=1e-3, rtol=1e-3)
            dit_accel.remove(pipe)
            pipe.transformer.unfuse_qkv_projections()
    pipe, separate = tiny_flux(), run(dit_accel.apply(tiny_flux(), CACHED))
    dit_accel.apply(pipe, CACHED)
    pipe.transformer.fuse_qkv_projections()
    torch.testing.assert_close(run(pipe), separate, atol=1e-3, rtol=1e-3)
    pipe = dit_accel.apply(tiny_pixart(), CACHED)
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match=r"call dit_accel\.apply again"):
        run(pipe, **PIXART)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_half_precision(tiny_flux, tiny_pixart, family, dtype):
    pipe, call = (tiny_flux(), {}) if family == "flux" else (tiny_pixart(), PIXART)
    pipe.to(dtype)
    assert check(pipe, **call).isfinite().all()


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_copies_and_pickles_are_refused_while_applied(tiny_flux, tiny_pixart, family):
    pipe = dit_accel.apply(tiny_flux() if family == "flux" else tiny_pixart(), CACHED)
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"call dit_accel\.remove first"):
            attempt(pipe.transformer)
    dit_accel.remove(pipe)
    copied = copy.deepcopy(pipe.transformer)
    assert copied.state_dict().keys() == pipe.transformer.state_dict().keys()


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_gradient_checkpointing(tiny_flux, tiny_pixart, family):
    """With gradients on, everything is computed, and the gradients are those of the plain model."""
    pipe = tiny_flux() if family == "flux" else tiny_pixart()
    model = pipe.transformer.train()
    model.enable_gradient_checkpointing()
    g = torch.Generator().manual_seed(0)
    if family == "flux":
        inputs = dict(
            hidden_states=torch.randn(1, 16, 32, generator=g), encoder_hidden_states=torch.randn(1, 8, 32, generator=g),
            pooled_projections=torch.randn(1, 32, generator=g), timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(8, 3),
        )  # fmt: skip
    else:
        inputs = dict(
            hidden_states=torch.randn(1, 8, 8, 8, generator=g), encoder_hidden_states=torch.randn(1, 8, 32, generator=g),
            timestep=torch.tensor([500]), added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )  # fmt: skip

    def gradients():
        model.zero_grad()
        for _ in range(2):
            model(**inputs, return_dict=False)[0].square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    dit_accel.apply(model, CACHED)
    for ours, theirs in zip(gradients(), plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_int8_weights(tiny_flux, tiny_pixart, family):
    from optimum.quanto import freeze, qint8, quantize

    pipe, call = (tiny_flux(), {}) if family == "flux" else (tiny_pixart(), PIXART)
    quantize(pipe.transformer, weights=qint8)
    freeze(pipe.transformer)
    check(pipe, **call)


def test_ip_adapter(tiny_flux):
    """Before apply its processors are wrapped; after apply it replaces ours, which is noticed."""
    pipe = tiny_flux()
    add_ip_adapter(pipe.transformer)
    embeds = [torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0))]
    both = lambda shift: dict.fromkeys(("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds"), [embeds[0].roll(shift)])
    cached, other = check(pipe, **both(1)), check(pipe, **both(2))
    assert not torch.allclose(cached, other, atol=1e-3), "the picture is ignored"
    pipe = dit_accel.apply(tiny_flux(), CACHED)
    add_ip_adapter(pipe.transformer)
    with pytest.raises(RuntimeError, match=r"call dit_accel\.apply again"):
        run(pipe, **both(1))


def add_ip_adapter(model):
    """An IP-Adapter of random weights, put in by diffusers' own loader."""
    g, inner = torch.Generator().manual_seed(1), model.inner_dim
    weights = lambda *shape: torch.randn(*shape, generator=g) / shape[-1] ** 0.5
    layers = {}
    for i in range(len(model.transformer_blocks)):
        for part in ("k", "v"):
            layers[f"{i}.to_{part}_ip.weight"] = weights(inner, model.config.joint_attention_dim)
            layers[f"{i}.to_{part}_ip.bias"] = torch.zeros(inner)
    width = model.config.joint_attention_dim
    projection = {"proj.weight": weights(4 * width, 16), "proj.bias": torch.zeros(4 * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    model._load_ip_adapter_weights([{"ip_adapter": layers, "image_proj": projection}])


@pytest.mark.parametrize("family", ["flux", "pixart"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_model_offload(tiny_flux, tiny_pixart, family, when):
    """The hooks of model offload come off and on again after every call; `remove` leaves them in place."""
    from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module

    pipe, call = (tiny_flux(), {}) if family == "flux" else (tiny_pixart(), PIXART)
    plain, cached = run(pipe, **call), run(dit_accel.apply(pipe, CACHED), **call)
    dit_accel.remove(pipe)
    offload = lambda: add_hook_to_module(pipe.transformer, CpuOffload(execution_device="cpu"))
    steps = [offload, lambda: dit_accel.apply(pipe, CACHED)]
    for step in steps if when == "before" else reversed(steps):
        step()
    hook = pipe.transformer._hf_hook
    for _ in range(2):
        assert torch.equal(run(pipe, **call), cached) and modes(pipe).count("partial") == 4
        remove_hook_from_module(pipe.transformer, recurse=True)
        add_hook_to_module(pipe.transformer, hook)
    dit_accel.remove(pipe)
    assert pipe.transformer._hf_hook is hook and "dit_accel" not in str(vars(pipe.transformer)["_old_forward"])
    assert torch.equal(run(pipe, **call), plain)


@pytest.mark.parametrize("family", ["flux", "pixart"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_group_offload(tiny_flux, tiny_pixart, family, kind, when):
    """Applied after it and before it, and gone without a trace from under it."""
    pipe, call = (tiny_flux(), {}) if family == "flux" else (tiny_pixart(), PIXART)
    plain, cached = run(pipe, **call), run(dit_accel.apply(pipe, CACHED), **call)
    dit_accel.remove(pipe)
    model, cpu = pipe.transformer, torch.device("cpu")
    extra = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    offload = lambda: model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **extra)
    steps = [offload, lambda: dit_accel.apply(pipe, CACHED)]
    for step in steps if when == "before" else reversed(steps):
        step()
    for _ in range(2):
        assert torch.equal(run(pipe, **call), cached) and modes(pipe).count("partial") == 4
    dit_accel.remove(pipe)
    assert torch.equal(run(pipe, **call), plain)
    assert torch.equal(run(dit_accel.apply(pipe, CACHED), **call), cached)


@pytest.mark.parametrize("family", ["flux", "pixart"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_sequential_offload(tiny_flux, tiny_pixart, family, when):
    """Accelerate's hooks on every module, whose weights lie elsewhere between calls."""
    from accelerate import cpu_offload

    pipe, call = (tiny_flux(), {}) if family == "flux" else (tiny_pixart(), PIXART)
    plain, cached = run(pipe, **call), run(dit_accel.apply(pipe, CACHED), **call)
    dit_accel.remove(pipe)
    steps = [lambda: cpu_offload(pipe.transformer, torch.device("cpu")), lambda: dit_accel.apply(pipe, CACHED)]
    for step in steps if when == "before" else reversed(steps):
        step()
    assert torch.equal(run(pipe, **call), cached) and modes(pipe).count("partial") == 4
    dit_accel.remove(pipe)
    assert torch.equal(run(pipe, **call), plain)


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_a_forward_replaced_by_something_unknown_raises(tiny_flux, tiny_pixart, family):
    pipe = tiny_flux() if family == "flux" else tiny_pixart()
    block = pipe.transformer.transformer_blocks[1]
    block.forward = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs)
    with pytest.raises(TypeError, match=r"transformer_blocks\.1\.forward was replaced.*Call dit_accel\.apply before"):
        dit_accel.apply(pipe, CACHED)
    assert not hasattr(pipe.transformer.transformer_blocks[0], "_dit_accel_sites")
