"""Make diffusion transformers faster by computing fewer tokens."""

from dit_accel.apply import apply, attn_processors, remove
from dit_accel.config import TokenCacheConfig, TokenMergeConfig
from dit_accel.report import Report, report
from dit_accel.when import Place
from dit_accel.which import SelectionContext, register_selector, selectors

__all__ = [
    "Place",
    "Report",
    "SelectionContext",
    "TokenCacheConfig",
    "TokenMergeConfig",
    "apply",
    "attn_processors",
    "register_selector",
    "remove",
    "report",
    "selectors",
]
