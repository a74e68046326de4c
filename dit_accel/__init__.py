"""Make diffusion transformers faster by computing fewer tokens."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_accel.apply import applied, apply, attn_processors, remove
    from dit_accel.config import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig, load_config
    from dit_accel.how import register_how
    from dit_accel.recipe import Recipe, recipes
    from dit_accel.report import Report, report
    from dit_accel.when import Place, Progress, register_when
    from dit_accel.which import SelectionContext, register_selector, selectors

__all__ = [
    "OutputCacheConfig",
    "Place",
    "Progress",
    "Recipe",
    "Report",
    "SelectionContext",
    "TokenCacheConfig",
    "TokenMergeConfig",
    "applied",
    "apply",
    "attn_processors",
    "load_config",
    "recipes",
    "register_how",
    "register_selector",
    "register_when",
    "remove",
    "report",
    "selectors",
]
_MODULES = ("apply", "config", "how", "recipe", "report", "when", "which")


class _Package(ModuleType):
    """Public names are loaded when first asked for: torch takes seconds, and the commands show their help without it."""

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        homes = [importlib.import_module(f"{self.__name__}.{module}") for module in _MODULES]
        for public in __all__:
            vars(self)[public] = next(vars(home)[public] for home in homes if public in vars(home))
        return vars(self)[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("apply", "report") or not isinstance(value, ModuleType):  # functions in files of the same name
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
