"""Published settings of a TokenCacheConfig."""

from typing import Any

# FORA: arXiv 2407.01425. ToCa: arXiv 2410.05317 and the settings of its released FLUX and PixArt-alpha code.
# TaylorSeer: arXiv 2503.06923; 10 full steps of 50 give its 4.99 times fewer FLOPs on FLUX.1-dev.
PRESETS: dict[str, dict[str, Any]] = {
    "toca-flux": dict(interval=4, cache_ratio=0.9, selector="attention", warmup_steps=3, ratio_schedule="toca"),
    "toca-pixart": dict(
        interval=3,
        interval_spread=0.2,
        cache_ratio=0.7,
        selector="cross-entropy",
        ratio_schedule="toca",
        spatial_bonus=0.4,
        spatial_tile=4,
    ),
    "fora": dict(interval=3, cache_ratio=1.0),
    "taylorseer": dict(interval=6, cache_ratio=1.0, warmup_steps=3, fill="forecast", forecast_order=2),
}
