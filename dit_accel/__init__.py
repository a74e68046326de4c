"""Make diffusion transformers faster by computing fewer tokens."""

from dit_accel.apply import apply, attn_processors, remove
from dit_accel.config import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig
from dit_accel.how import register_how
from dit_accel.report import Report, report
from dit_accel.when import Place, Progress, register_when
from dit_accel.which import SelectionContext, register_selector, selectors

__all__ = [
    "OutputCacheConfig",
    "Place",
    "Progress",
    "Report",
    "SelectionContext",
    "TokenCacheConfig",
    "TokenMergeConfig",
    "apply",
    "attn_processors",
    "register_how",
    "register_selector",
    "register_when",
    "remove",
    "report",
    "selectors",
]
