"""Options that several commands of `dit-accel` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.terminal import usage

# Those of the cache are None unless given, so that giving one without a cache is an error.
CACHE, PICTURE, MACHINE = "Cache", "Picture", "Machine"
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
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the pipeline's", rich_help_panel=PICTURE)]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the pipeline's", rich_help_panel=PICTURE)]
Pixels = Annotated[int | None, typer.Option(help="In pixels.", show_default="the pipeline's", rich_help_panel=PICTURE)]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MACHINE)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.", rich_help_panel=MACHINE)]
Offload = Annotated[str, typer.Option(help="none, model, group or sequential: less GPU memory, slower.", rich_help_panel=MACHINE)]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from.", rich_help_panel=MACHINE)]


def configured(selector_file: Path | None, preset: str | None, **given: Any) -> Any:
    """The cache that these options ask for; BadParameter if there is no such one."""
    import runpy

    from dit_accel import TokenCacheConfig

    if selector_file is not None:
        runpy.run_path(str(selector_file))
    with usage():
        given = {name: value for name, value in given.items() if value is not None}
        return TokenCacheConfig.preset(preset, **given) if preset else TokenCacheConfig(**given)
