"""What the user asks for: frozen, validated, and round-tripped through plain dicts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dit_accel import selection

TEXT_TOKENS = ("select", "reuse", "full")


@dataclass(frozen=True)
class TokenCacheConfig:
    """Token-wise feature caching (ToCa: Zou et al., ICLR 2025, arXiv 2410.05317).

    Args:
        interval: N, a full step every N steps; 1 computes everything always.
        cache_ratio: share of the tokens taken from the cache on a partial step, 0 to 1. At 0 nothing is cached; at 1 no
            token is computed (FORA).
        selector: name of the score that chooses the tokens to compute; see `dit_accel.selectors()`.
        warmup_steps: full steps at the start, at least 1.
        age_weight: lambda, how much a token's score grows for every N steps since it was last computed.
        text_tokens: text tokens on a partial step (FLUX): "select" like image tokens, "reuse" all, or compute them in "full".
        seed: seed of the selection's own random numbers; it does not touch the picture's noise.

    Raises:
        ValueError: for a value out of range or an unknown name, with the values that would do.
    """

    interval: int = 4
    cache_ratio: float = 0.9
    selector: str = "random"
    warmup_steps: int = 1
    age_weight: float = 0.25
    text_tokens: str = "select"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("interval", "warmup_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of steps, at least 1, not {value!r}.")
        if not 0 <= self.cache_ratio <= 1:
            raise ValueError(f"cache_ratio is the share of tokens taken from the cache, between 0 and 1, not {self.cache_ratio!r}.")
        if not 0 <= self.age_weight < float("inf"):
            raise ValueError(f"age_weight must be a finite number of at least 0, not {self.age_weight!r}.")
        if self.text_tokens not in TEXT_TOKENS:
            raise ValueError(f"text_tokens must be one of {', '.join(TEXT_TOKENS)}, not {self.text_tokens!r}.")
        selection.get(self.selector)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TokenCacheConfig:
        """The inverse of `to_dict`; an unknown key raises ValueError."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"TokenCacheConfig has no option {', '.join(unknown)}; its options are {', '.join(known)}.")
        return cls(**values)
