"""The methods that can be asked for by name, and the words for a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dit_accel.config import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig

Config = TokenCacheConfig | TokenMergeConfig | OutputCacheConfig
METHODS: dict[str, type[Config]] = {
    "token-cache": TokenCacheConfig,
    "output-cache": OutputCacheConfig,
    "token-merge": TokenMergeConfig,
}
# What their options are called in the record of a picture and in the specification of an evaluation.
SECTIONS: dict[str, type[Config]] = {"cache": TokenCacheConfig, "merge": TokenMergeConfig, "output": OutputCacheConfig}


def parts(config: Config | Sequence[Config] | None) -> dict[str, Config]:
    """The configurations by the names of their methods; none for None."""
    given = [config] if isinstance(config, Config) else config or ()
    return {name: part for name, kind in METHODS.items() for part in given if isinstance(part, kind)}


def method_of(config: Config | Sequence[Config] | None) -> str:
    """As the command line calls it: none, token-cache, output-cache, token-merge or token-cache+token-merge."""
    return "+".join(parts(config)) or "none"


def describe(config: Config | Sequence[Config] | None) -> str:
    """A short description, for a picture's caption."""
    words = []
    for part in parts(config).values():
        if isinstance(part, TokenCacheConfig):
            words.append(f"N={part.interval} R={part.cache_ratio:g} {part.selector}")
        elif isinstance(part, OutputCacheConfig):
            words.append(_describe_output(part))
        else:
            extras = {"keys": part.keep_queries, "proportional": part.proportional_attention, "MLP": part.merge_mlp}
            every = "x".join(map(str, part.rematching))
            words.append(" ".join([f"merge {part.ratio:g} every {every}", *(word for word, asked in extras.items() if asked)]))
    return ", ".join(words) or "uncached"


def _describe_output(part: OutputCacheConfig) -> str:
    full = part.run_steps if part.interval == 1 else None
    if part.full_steps is not None:
        full = len({0, *part.full_steps})
    everywhere = full is not None and full == part.run_steps
    if everywhere:
        when = f"{full} steps"
    elif part.full_steps is not None:
        when = f"{full} full steps" + (f" of {part.run_steps}" if part.run_steps else "")
    elif part.tolerance is not None:
        when = f"tolerance {part.tolerance:g}"
    else:
        when = f"N={part.interval}" if part.when is None else f"when {part.when}"
    order = part.order if isinstance(part.order, tuple) else (part.order,)
    words = [when]
    if part.merging:
        words.append("early steps merged")
    if not everywhere or part.guidance_steps is not None:
        words.append(f"{part.how} {'/'.join(map(str, order))}")
    if part.compute_ratio:
        words.append(f"computing {part.compute_ratio:g} {part.selector}, attention {part.attention}")
    return ", ".join(words)


def settings_of(config: Config | Sequence[Config] | None) -> dict[str, Any]:
    """All options, for the record of a picture."""
    options = {type(part): part.to_dict() for part in parts(config).values()}
    return {"method": method_of(config), **{section: options.get(kind) for section, kind in SECTIONS.items()}}


def first_partial_step(config: Config | Sequence[Config]) -> int:
    """The first step of a run on which a method leaves something out, or a later one; of rules that are functions, a guess."""
    found = []
    for part in parts(config).values():
        step = part.warmup_steps
        if isinstance(part, OutputCacheConfig) and part.full_steps is not None:
            step = next(n for n in range(1, len(part.full_steps) + 2) if n not in part.full_steps)
        found.append(step)
    return max(found)
