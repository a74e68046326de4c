"""Options that several commands of `dit-accel` share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from dit_accel.pipelines.terminal import usage

# Those of a method are None unless given, so that giving one without the method is an error.
CACHE, MERGE, PICTURE, MACHINE = "Cache", "Merge", "Picture", "Machine"
Pipeline = Annotated[str, typer.Option(help="A name of `dit-accel pipelines`, a hub id, or a diffusers folder.")]
Preset = Annotated[
    str | None, typer.Option(help="Published settings: toca-flux, toca-pixart, fora or taylorseer.", rich_help_panel=CACHE)
]
Interval = Annotated[
    int | None, typer.Option(help="Compute everything on every N-th step.", show_default="4", rich_help_panel=CACHE)
]
CacheRatio = Annotated[
    float | None,
    typer.Option(
        help="Share of tokens taken from the cache on the other steps, 0 to 1.", show_default="0.9", rich_help_panel=CACHE
    ),
]
WarmupSteps = Annotated[
    int | None, typer.Option(help="Compute everything on the first steps.", show_default="1", rich_help_panel=CACHE)
]
AgeWeight = Annotated[
    float | None,
    typer.Option(
        help="How much longer-cached tokens are preferred; 0 leaves it to the selector.", show_default="0.25", rich_help_panel=CACHE
    ),
]
RatioSchedule = Annotated[
    str | None,
    typer.Option(
        help="How the share varies with layer and step: constant or toca.", show_default="constant", rich_help_panel=CACHE
    ),
]
SpatialBonus = Annotated[
    float | None,
    typer.Option(help="Raise the best token of every tile by this share.", show_default="0", rich_help_panel=CACHE),
]
TextTokens = Annotated[
    str | None,
    typer.Option(help="Text tokens (FLUX) on other steps: select, reuse or full.", show_default="select", rich_help_panel=CACHE),
]
Fill = Annotated[
    str | None,
    typer.Option(
        help="reuse or forecast: tokens from the cache keep their last feature, or get a forecast.",
        show_default="reuse",
        rich_help_panel=CACHE,
    ),
]
ForecastOrder = Annotated[
    int | None, typer.Option(help="Order of the forecast's Taylor expansion, 0 to 3.", show_default="1", rich_help_panel=CACHE)
]
CacheDtype = Annotated[
    str | None,
    typer.Option(help="Keep features narrower, as float8_e4m3fn.", show_default="the model's", rich_help_panel=CACHE),
]
CacheDevice = Annotated[
    str | None, typer.Option(help="Keep features elsewhere, as cpu.", show_default="the model's", rich_help_panel=CACHE)
]
SelectorFile = Annotated[
    Path | None, typer.Option(help="A Python file that registers selectors of your own.", rich_help_panel=CACHE)
]
MergeRatio = Annotated[
    float | None,
    typer.Option(help="Share of the image tokens merged into others.", show_default="0.5", rich_help_panel=MERGE),
]
MergeStride = Annotated[
    tuple[int, int] | None,
    typer.Option(
        help="Width and height of the cells, in tokens, that keep one token each.", show_default="2 2", rich_help_panel=MERGE
    ),
]
RematchEvery = Annotated[
    tuple[int, int] | None,
    typer.Option(help="Steps, and layers, that share one matching.", show_default="2 1", rich_help_panel=MERGE),
]
MergeWarmupSteps = Annotated[
    int | None, typer.Option(help="Merge nothing on the first steps.", show_default="0", rich_help_panel=MERGE)
]
MergeKeysOnly = Annotated[
    bool | None, typer.Option("--merge-keys-only", help="Every token keeps its own query.", rich_help_panel=MERGE)
]
MergeMLP = Annotated[bool | None, typer.Option("--merge-mlp", help="Merge in the feed-forward as well.", rich_help_panel=MERGE)]
MergeCrossAttention = Annotated[
    bool | None,
    typer.Option("--merge-cross-attention", help="Merge in cross-attention as well (PixArt).", rich_help_panel=MERGE),
]
MergeProportional = Annotated[
    bool | None,
    typer.Option("--merge-proportional", help="A merged token counts as many as it stands for.", rich_help_panel=MERGE),
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the pipeline's", rich_help_panel=PICTURE)]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the pipeline's", rich_help_panel=PICTURE)]
Pixels = Annotated[int | None, typer.Option(help="In pixels.", show_default="the pipeline's", rich_help_panel=PICTURE)]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MACHINE)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.", rich_help_panel=MACHINE)]
Offload = Annotated[str, typer.Option(help="none, model, group or sequential: less GPU memory, slower.", rich_help_panel=MACHINE)]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from.", rich_help_panel=MACHINE)]


# Options of `dit-accel generate` and what they are called in the configurations.
OF_CACHE = (
    "selector_file preset interval cache_ratio selector warmup_steps age_weight ratio_schedule spatial_bonus text_tokens fill "
    "forecast_order cache_dtype cache_device"
).split()
OF_MERGE = {
    "merge_ratio": "ratio",
    "merge_stride": "stride",
    "rematch_every": "rematch_every",
    "merge_warmup_steps": "warmup_steps",
    "merge_keys_only": "keep_queries",
    "merge_mlp": "merge_mlp",
    "merge_cross_attention": "merge_cross_attention",
    "merge_proportional": "proportional_attention",
}


class Method(str, Enum):
    none = "none"
    token_cache = "token-cache"
    token_merge = "token-merge"
    both = "token-cache+token-merge"


def refuse_idle(method: Method, given: dict[str, Any]) -> None:
    """BadParameter for an option of a method that is not asked for, or for comparing nothing."""
    if method is Method.none and given["compare"]:
        raise typer.BadParameter("--compare needs a method other than none.")
    for names, need, kind in ((OF_CACHE, "a cache", "token-cache"), (OF_MERGE, "merging", "token-merge")):
        for name in names:
            if given[name] is not None and kind not in method.value:
                raise typer.BadParameter(
                    f"--{name.replace('_', '-')} needs {need}: leave it out, or use --method {kind} or token-cache+token-merge."
                )


def configured(method: Method, given: dict[str, Any]) -> list[Any]:
    """The configurations that the options of `generate` ask for; BadParameter if there are no such ones."""
    from dit_accel import TokenMergeConfig

    configs = []
    if "token-cache" in method.value:
        configs.append(cache_of(**{name: given[name] for name in OF_CACHE}))
    if "token-merge" in method.value:
        with usage():
            merge = {field: given[name] for name, field in OF_MERGE.items() if given[name] is not None}
            configs.append(TokenMergeConfig(**merge))
    return configs


def cache_of(selector_file: Path | None, preset: str | None, **given: Any) -> Any:
    """The cache that these options ask for; BadParameter if there is no such one."""
    import runpy

    from dit_accel import TokenCacheConfig

    if selector_file is not None:
        runpy.run_path(str(selector_file))
    with usage():
        given = {name: value for name, value in given.items() if value is not None}
        return TokenCacheConfig.preset(preset, **given) if preset else TokenCacheConfig(**given)
