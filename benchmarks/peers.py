"""Every published method that a user might pick instead of this library's, put on a diffusers pipeline by the same few lines.

    method = METHODS["DBCache"]
    for setting in method.ladder:
        with applied(pipe, method, setting, steps):
            pipe(..., num_inference_steps=steps_of(method, setting, steps))

From other projects are diffusers' own caches, cache-dit (https://github.com/vipshop/cache-dit) and what `WITHOUT` says cannot be
run. `pip install -e ".[bench]"` installs them; each is imported only when one of its methods is put.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any
from weakref import WeakKeyDictionary

import torch

import dit_accel
from dit_accel import TokenCacheConfig, TokenMergeConfig
from dit_accel.pipelines.generation import is_flux

Undo = Callable[[], None]
Setting = dict[str, Any]
Put = Callable[[Any, Setting, int], Undo]
Arguments = Callable[[Any, Setting, int], Setting]
FAMILIES = ("flux", "pixart")
HOOKS = ("pyramid_attention_broadcast", "faster_cache", "fbc_", "mag_cache", "taylorseer")  # of diffusers, how they begin
LAYERS = {  # that TaylorSeer forecasts as published
    "flux": {
        "cache_identifiers": [r"transformer_blocks\.\d+\.(attn|ff|ff_context)", r"single_transformer_blocks\.\d+\.proj_out"],
        "skip_predict_identifiers": [r"single_transformer_blocks\.\d+\.(attn|proj_mlp)"],
    },
    "pixart": {"cache_identifiers": [r"transformer_blocks\.\d+\.(attn1|attn2|ff)"]},
}
RATIOS: WeakKeyDictionary[torch.nn.Module, dict[int, list[float]]] = WeakKeyDictionary()  # of MagCache, by number of steps


@dataclass(frozen=True)
class Method:
    """One method.

    by: whose code runs, "stock", "dit-accel", "diffusers" or "cache-dit".
    families: where it can be put; `WITHOUT` has the reason for every other.
    ladder: settings from slow to fast, each the method's own keyword arguments.
    put: (pipeline, setting, number of steps of the runs to come) -> what takes it off again.
    """

    name: str
    by: str
    families: tuple[str, ...]
    ladder: tuple[Setting, ...]
    put: Put


def family(pipe: Any) -> str:
    return "flux" if is_flux(pipe) else "pixart"


@contextmanager
def applied(pipe: Any, method: Method, setting: Setting, steps: int) -> Iterator[None]:
    """Inside the block every call of the pipeline is made with the method; after it, even after an error, with nothing at all.

    Raises:
        ValueError: if the method cannot be put on this family.
        LookupError: if MagCache was not calibrated, see `calibrate`.
    """
    if family(pipe) not in method.families:
        raise ValueError(f"{method.name} cannot be put on {family(pipe)}: {WITHOUT[family(pipe)][method.name]}")
    restore = snapshot(pipe.transformer)
    try:
        undo = method.put(pipe, setting, steps)
        try:
            yield
        finally:
            undo()
    finally:
        restore()


def snapshot(model: torch.nn.Module) -> Undo:
    """What gives every module the attributes it has now, and its parts in their order.

    diffusers leaves some attributes behind; cache-dit its copy of FLUX's forward, and both lists of blocks in the other order,
    after which FirstBlockCache takes a single block for the first one.
    """
    saved = [(module, dict(vars(module)), dict(module._modules)) for module in model.modules()]

    def restore() -> None:
        for module, attributes, parts in saved:
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(parts)

    return restore


def steps_of(method: Method, setting: Setting, steps: int) -> int:
    """The number of steps to run where the run in full has `steps`: fewer for "fewer steps", the same for all others."""
    return max(1, round(steps / setting["speedup"])) if method.name == "fewer steps" else steps


def accelerated(configure: Callable[[Setting], Any]) -> Put:
    """`put` for this library, by what makes its configuration, or several, of a setting."""

    def put(pipe: Any, setting: Setting, steps: int) -> Undo:
        dit_accel.apply(pipe, configure(setting))
        return lambda: dit_accel.remove(pipe)

    return put


def cached(**fixed: Any) -> Put:
    return accelerated(lambda setting: TokenCacheConfig(**fixed | setting))


def recipe(pipe: Any, setting: Setting, steps: int) -> Undo:
    dit_accel.apply(pipe, speedup=setting["speedup"])
    return lambda: dit_accel.remove(pipe)


class Guide:
    """Tells diffusers' caches on PixArt what FluxPipeline tells them itself: the timestep, the context, and where a run begins.

    Every call is in one context, both halves of guidance being one batch; a run begins where the timestep rises.
    """

    def __init__(self) -> None:
        self.timestep = 0.0

    def look(self, transformer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        from diffusers.hooks import hooks

        before, self.timestep = self.timestep, float(kwargs["timestep"][0])
        if self.timestep > before:
            hooks.HookRegistry.check_if_exists_or_initialize(transformer).reset_stateful_hooks()
        hooks._set_cache_context(transformer, hooks.CacheContext("both halves"))


def hooked(apply: str, config: str, arguments: Arguments = lambda pipe, setting, steps: setting, timed: bool = False) -> Put:
    """`put` for a cache of `diffusers.hooks`, by the names of its function and its configuration."""

    def put(pipe: Any, setting: Setting, steps: int) -> Undo:
        from diffusers import hooks

        guide, transformer, given = Guide(), pipe.transformer, arguments(pipe, setting, steps)
        if timed:
            given |= {"current_timestep_callback": lambda: pipe.current_timestep if is_flux(pipe) else guide.timestep}
        # FluxTransformer2DModel.enable_cache does no more than this; PixArt's transformer has no enable_cache.
        getattr(hooks, apply)(transformer, getattr(hooks, config)(**given))
        hooks.HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()
        if is_flux(pipe):
            return lambda: unhook(transformer)
        handle = transformer.register_forward_pre_hook(guide.look, with_kwargs=True)
        return lambda: (handle.remove(), unhook(transformer))

    return put


def unhook(transformer: torch.nn.Module) -> None:
    """Take off the hooks of diffusers' caches, and no other, offloading's for example."""
    for module in transformer.modules():
        if registry := vars(module).get("_diffusers_hook"):
            for name in [name for name in registry.hooks if name.startswith(HOOKS)]:
                registry.remove_hook(name, recurse=False)
            registry._child_registries_cache = None


def broadcast(pipe: Any, setting: Setting, steps: int) -> Setting:
    crossing = {name.replace("spatial", "cross"): value for name, value in setting.items()}
    return setting | crossing


def faster(pipe: Any, setting: Setting, steps: int) -> Setting:
    """`until` and `alpha` of a setting stand for both timestep ranges and both weights of the paper."""
    logging.getLogger("diffusers.hooks.faster_cache").setLevel(logging.ERROR)  # it warns every time that it is experimental
    ranges = ("spatial_attention_timestep_skip_range", "unconditional_batch_timestep_skip_range")
    alphas = ("alpha_low_frequency", "alpha_high_frequency")
    given = {name: value for name, value in setting.items() if name not in ("until", "alpha")}
    given |= dict.fromkeys(ranges, (-1, setting["until"])) | dict.fromkeys(alphas, setting["alpha"])
    # FLUX has no batch of two halves to take one from: what is left is attention, predicted from its last two outputs.
    return given | {
        "tensor_format": "BCHW",
        "is_guidance_distilled": is_flux(pipe),
        "attention_weight_callback": lambda module: 0.5,
    }


def forecast(pipe: Any, setting: Setting, steps: int) -> Setting:
    # By default attention alone is forecast on FLUX, and nothing at all on PixArt, whose names do not match.
    chosen = {} if "use_lite_mode" in setting else LAYERS[family(pipe)]
    return chosen | {"taylor_factors_dtype": torch.float32} | setting


def calibrate(pipe: Any, steps: int, run: Callable[[], Any]) -> None:
    """Measure what MagCache has to know of a pipeline before it can be put: how the residual's length changes from step to step.

    `run` makes one picture of so many steps, of a prompt that is not among those compared.
    """
    printing = hooked("apply_mag_cache", "MagCacheConfig", lambda *_: {"calibrate": True, "num_inference_steps": steps})
    with applied(pipe, Method("MagCache", "diffusers", FAMILIES, (), printing), {}, steps), redirect_stdout(StringIO()) as printed:
        run()  # at whose end the ratios are printed; there is no other way to have them
    # With two calls a step, one for each half of guidance, two lists are printed; the first is of the prompt.
    line = next(line for line in printed.getvalue().splitlines() if line.startswith("[") and not line.startswith("[MagCache]"))
    RATIOS.setdefault(pipe.transformer, {})[steps] = ast.literal_eval(line)


def magnitudes(pipe: Any, setting: Setting, steps: int) -> Setting:
    if steps not in RATIOS.get(pipe.transformer, {}):
        raise LookupError(f"MagCache needs the ratios of this pipeline at {steps} steps; call peers.calibrate(pipe, {steps}, run).")
    return {"mag_ratios": RATIOS[pipe.transformer][steps], "num_inference_steps": steps} | setting


def enabled(config: str, arguments: Callable[[Setting, int], Setting] = lambda setting, steps: setting) -> Put:
    """`put` for cache-dit, by the name of its configuration. A `taylorseer_order` of a setting adds its calibrator.

    The first block alone is computed on every step after the warm-up. Both halves of PixArt's guidance are one batch
    to it and take one decision; it takes FLUX to be called once a step, as it is without a negative prompt.
    """

    def put(pipe: Any, setting: Setting, steps: int) -> Undo:
        import cache_dit

        for handler in logging.getLogger("CACHE_DIT").handlers:  # one, which all of its loggers share
            handler.setLevel(logging.ERROR)
        given = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 4, "num_inference_steps": steps}
        given |= arguments({name: value for name, value in setting.items() if name != "taylorseer_order"}, steps)
        order = setting.get("taylorseer_order")
        calibrator = None if order is None else cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
        cache_dit.enable_cache(pipe, cache_config=getattr(cache_dit, config)(**given), calibrator_config=calibrator)
        return lambda: cache_dit.disable_cache(pipe)

    return put


def masked(setting: Setting, steps: int) -> Setting:
    import cache_dit

    # A mask that cache-dit itself shortens to 20 steps caches up to 15 in a row; the beginning of its mask of 28 does not.
    mask = cache_dit.steps_mask(total_steps=28 if 16 <= steps < 28 else steps, **setting)
    return {"steps_computation_mask": [*mask[: steps - 1], 1], "steps_computation_policy": "static"}


def ladder(names: str, *rows: Any, **fixed: Any) -> tuple[Setting, ...]:
    """A setting for every row of values of the arguments named."""
    keys = names.split()
    return tuple(dict(zip(keys, row if len(keys) > 1 else (row,), strict=True)) | fixed for row in rows)


INTERVALS = ladder("interval", 2, 3, 4, 5, 6, 8, 10, 12)
FORECAST = {"cache_ratio": 1.0, "fill": "forecast", "warmup_steps": 3}
BOTH = accelerated(lambda setting: [TokenCacheConfig(**setting), TokenMergeConfig(ratio=0.5, keep_queries=True)])
MERGES = ladder("ratio", 0.25, 0.5, 0.7, keep_queries=True)
BROADCAST = "spatial_attention_block_skip_range spatial_attention_timestep_skip_range"
BROADCASTS = ladder(BROADCAST, (2, [100, 800]), *((every, [0, 1000]) for every in (2, 3, 4, 6, 12)))
# The paper's alpha of 1.1 is multiplied in on every step without the unconditional half: of ten in a row nothing good comes.
FASTER = "spatial_attention_block_skip_range unconditional_batch_skip_range until alpha"
FASTERS = ladder(FASTER, (2, 5, 681, 1.1), *((every, 5, 990, 1.1) for every in (2, 3, 4, 6)), (8, 20, 990, 1.0))
MAGNITUDES = [(0.06, 3, 0.2), (0.12, 3, 0.2), (0.24, 4, 0.2), (0.24, 5, 0.1), (0.5, 6, 0.1), (1.0, 8, 0.1)]
FIRST = ladder("threshold", 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)
SEERS = ladder("cache_interval", 2, 3, 4, 5, 6, 8, 12)
THRESHOLDS = [*((value, 4) for value in (0.08, 0.12, 0.16, 0.2, 0.24, 0.3, 0.4, 0.5)), (0.5, 2), (0.8, 2)]
RESIDUALS = ladder("residual_diff_threshold max_warmup_steps", *THRESHOLDS)
STEPS = (1.2, 1.4, 1.55, 1.75, 2, 2.3, 2.55, 2.8, 3, 3.3, 3.7, 4.2)  # at most three steps apart, of 20 or 28
POLICIES = ladder("mask_policy", "slow", "medium", "fast", "ultra")
LITE, ORDER = {"use_lite_mode": True}, {"taylorseer_order": 1}
PAB = hooked("apply_pyramid_attention_broadcast", "PyramidAttentionBroadcastConfig", broadcast, timed=True)
FASTER_CACHE = hooked("apply_faster_cache", "FasterCacheConfig", faster, timed=True)
SEER = hooked("apply_taylorseer_cache", "TaylorSeerCacheConfig", forecast)
MAG = hooked("apply_mag_cache", "MagCacheConfig", magnitudes)
DBCACHE, MASK = enabled("DBCacheConfig"), enabled("DBCacheConfig", masked)
ALL = (
    Method("fewer steps", "stock", FAMILIES, ladder("speedup", *STEPS), lambda *_: lambda: None),
    Method("recipe", "dit-accel", FAMILIES, ladder("speedup", 1.5, 2, 2.5, 3, 4, 6), recipe),
    Method("token cache, random", "dit-accel", FAMILIES, INTERVALS, cached(cache_ratio=0.9, selector="random")),
    Method("token cache, drift", "dit-accel", FAMILIES, INTERVALS, cached(cache_ratio=0.9, selector="drift")),
    Method("token cache, attention", "dit-accel", FAMILIES, INTERVALS, cached(cache_ratio=0.9, selector="attention")),
    Method("token cache, nothing computed", "dit-accel", FAMILIES, INTERVALS, cached(cache_ratio=1.0)),
    Method("token cache, forecast", "dit-accel", FAMILIES, INTERVALS, cached(**FORECAST)),
    Method("token cache, forecast 2", "dit-accel", FAMILIES, INTERVALS, cached(**FORECAST, forecast_order=2)),
    Method("token merge", "dit-accel", FAMILIES, MERGES, accelerated(lambda setting: TokenMergeConfig(**setting))),
    Method("token cache + merge", "dit-accel", FAMILIES, INTERVALS, BOTH),
    Method("PyramidAttentionBroadcast", "diffusers", FAMILIES, BROADCASTS, PAB),
    Method("FasterCache", "diffusers", FAMILIES, FASTERS, FASTER_CACHE),
    Method("FirstBlockCache", "diffusers", FAMILIES, FIRST, hooked("apply_first_block_cache", "FirstBlockCacheConfig")),
    Method("TaylorSeer", "diffusers", FAMILIES, SEERS, SEER),
    Method("TaylorSeer lite", "diffusers", FAMILIES, tuple(rung | LITE for rung in SEERS), SEER),
    Method("MagCache", "diffusers", FAMILIES, ladder("threshold max_skip_steps retention_ratio", *MAGNITUDES), MAG),
    Method("DBCache", "cache-dit", FAMILIES, RESIDUALS, DBCACHE),
    Method("DBCache + TaylorSeer", "cache-dit", FAMILIES, tuple(rung | ORDER for rung in RESIDUALS), DBCACHE),
    Method("DBPrune", "cache-dit", ("flux",), RESIDUALS, enabled("DBPruneConfig")),
    Method("step mask", "cache-dit", FAMILIES, POLICIES, MASK),
    Method("step mask + TaylorSeer", "cache-dit", FAMILIES, tuple(rung | ORDER for rung in POLICIES), MASK),
)
METHODS: dict[str, Method] = {method.name: method for method in ALL}

# Found by trying each of them on the embedded pipelines, with diffusers 0.42.1, cache-dit 1.5.3 and tomesd 0.1.3.
SEA = "SeaCache needs the step, sigma and number of steps, which this pipeline does not tell it: it warns and computes everything."
WITHOUT: dict[str, dict[str, str]] = {
    "flux": {"ToMe-SD": "tomesd looks for the latents among positional arguments, and FLUX has none: IndexError.", "SeaCache": SEA},
    "pixart": {
        "ToMe-SD": "tomesd's copy of the block's forward calls norm3, which PixArt's blocks do not have: AttributeError.",
        "DBPrune": "cache-dit gives its own _process_block_outputs for this kind of block an argument too many: TypeError.",
        "SeaCache": SEA,
    },
}
