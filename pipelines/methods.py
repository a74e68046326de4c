"""The methods that can be asked for by name, and the words for a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dit_accel import TokenCacheConfig, TokenMergeConfig

Config = TokenCacheConfig | TokenMergeConfig
METHODS = {"token-cache": TokenCacheConfig, "token-merge": TokenMergeConfig}


def parts(config: Config | Sequence[Config] | None) -> dict[str, Config]:
    """The configurations by the names of their methods; none for None."""
    given = [config] if isinstance(config, (TokenCacheConfig, TokenMergeConfig)) else config or ()
    return {name: part for name, kind in METHODS.items() for part in given if isinstance(part, kind)}


def method_of(config: Config | Sequence[Config] | None) -> str:
    """As the command line calls it: none, token-cache, token-merge or token-cache+token-merge."""
    return "+".join(parts(config)) or "none"


def describe(config: Config | Sequence[Config] | None) -> str:
    """In a few letters, for a picture's caption."""
    words = []
    for part in parts(config).values():
        if isinstance(part, TokenCacheConfig):
            words.append(f"N={part.interval} R={part.cache_ratio:g} {part.selector}")
        else:
            extras = {"keys": part.keep_queries, "proportional": part.proportional_attention, "MLP": part.merge_mlp}
            every = "x".join(map(str, part.rematching))
            words.append(" ".join([f"merge {part.ratio:g} every {every}", *(word for word, asked in extras.items() if asked)]))
    return ", ".join(words) or "in full"


def settings_of(config: Config | Sequence[Config] | None) -> dict[str, Any]:
    """All options, for the record of a picture."""
    options = {name: part.to_dict() for name, part in parts(config).items()}
    return {"method": method_of(config), "cache": options.get("token-cache"), "merge": options.get("token-merge")}
