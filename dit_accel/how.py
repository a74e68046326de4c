"""How what is not computed gets its value: a weighted sum of what was computed before.

Every method is a function (times of the past, newest first; the time now; order) -> weights, one for each of the past. A method of
one's own:

    @dit_accel.register_how("mine")
    def mine(times, now, order):
        "The mean of the last two."
        return [0.5, 0.5] if len(times) > 1 else [1.0]
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from dit_accel.names import look_up, registering

Weights = Callable[[Sequence[float], float, int], list[float]]

HOW: dict[str, Weights] = {}
MOST = 3  # the highest order
END = 1e-3  # the least time from either end that logit tells from it


def register_how(name: str | Weights | None = None) -> Callable[..., Any]:
    """Decorator that makes a function (times, now, order) -> weights known by name, by default its own; it can be taken again.

    Raises:
        ValueError: for the name of one of dit_accel's own.
    """
    return registering("method", name, HOW)


def get(name: str | Weights) -> Weights:
    """The method of that name, or the function itself; ValueError with the known names if there is none."""
    return name if callable(name) else look_up("method", name, HOW)


def coefficients(how: str | Weights, times: Sequence[float], now: float, order: int, damping: float = 1.0) -> list[float]:
    """Weights of the past, newest first, for a value now: damping times the method's, the rest on the newest.

    Args:
        times: of the past, newest first and all different; as many as there are, at most order + 1 are used.
        damping: 1 is the method itself, 0 repeats the newest.
    """
    times = times[: order + 1]
    weights = get(how)(times, now, len(times) - 1)
    return [damping * w + (1 - damping) * (i == 0) for i, w in enumerate(weights)]


@register_how("reuse")
def reuse(times: Sequence[float], now: float, order: int) -> list[float]:
    """The newest value, again."""
    return [1.0]


@register_how("polynomial")
def polynomial(times: Sequence[float], now: float, order: int) -> list[float]:
    """The polynomial through the last order + 1 values (Lagrange); order 1 is the line through two."""
    return [math.prod((now - other) / (time - other) for j, other in enumerate(times) if j != i) for i, time in enumerate(times)]


def unit(times: Iterable[float]) -> float:
    """What times count as 1: 1000 where a transformer is told thousands, else 1."""
    return 1000.0 if max(times, default=0.0) > 1 else 1.0


@register_how("logit")
def logit(times: Sequence[float], now: float, order: int) -> list[float]:
    """As polynomial, in the logarithm of signal over noise of flow matching instead of the time."""
    most = unit((now, *times))

    def level(time: float) -> float:
        share = min(max(time / most, END), 1 - END)
        return math.log((1 - share) / share)

    weights: list[float] = polynomial([level(time) for time in times], level(now), order)
    return weights


@register_how("taylor")
def taylor(times: Sequence[float], now: float, order: int) -> list[float]:
    """The Taylor expansion at the newest value, with derivatives by backward differences (TaylorSeer, arXiv 2503.06923)."""
    return _combined(times, [(now - times[0]) ** k / math.factorial(k) for k in range(order + 1)])


@register_how("hermite")
def hermite(times: Sequence[float], now: float, order: int) -> list[float]:
    """As Taylor, with scaled Hermite polynomials in place of powers (HiCache, arXiv 2508.16984, with its scale 1/2)."""
    unit = times[0] - times[1] if order else 1.0
    polynomials = [1.0, (now - times[0]) / unit]  # 2 * scale * x
    for k in range(1, order):  # H_k+1(x) = 2 x H_k(x) - 2 k H_k-1(x)
        polynomials.append(polynomials[1] * polynomials[k] - 2 * k * polynomials[k - 1])
    return _combined(times, [(unit / 2) ** k * polynomials[k] / math.factorial(k) for k in range(order + 1)])


def _combined(times: Sequence[float], factors: Sequence[float]) -> list[float]:
    """Weights of the values for a sum of factors times their derivatives at the newest time."""
    derivatives = np.eye(len(times))  # of each value, in terms of all
    total = factors[0] * derivatives[0]
    for factor in factors[1:]:
        distances = np.array(times[: len(derivatives) - 1]) - np.array(times[1 : len(derivatives)])
        derivatives = (derivatives[:-1] - derivatives[1:]) / distances[:, None]
        total = total + factor * derivatives[0]
    weights: list[float] = total.tolist()
    return weights
