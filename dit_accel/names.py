"""Functions that are known by name, and what to say of a name that is not."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Entry = TypeVar("Entry")
Function = Callable[..., Any]


def meant(name: Any, known: Iterable[Any], likeness: float = 0.6) -> str:
    """A question about the known name that a misspelled one resembles, with a space before it; or nothing."""
    words = {str(word).lower(): word for word in known}
    close = difflib.get_close_matches(str(name).lower(), words, n=1, cutoff=likeness)
    return f" Did you mean {words[close[0]]}?" if close else ""


def look_up(kind: str, name: str, known: Mapping[str, Entry]) -> Entry:
    """The entry of that name; ValueError with the known names if there is none."""
    if name not in known:
        raise ValueError(f"There is no {kind} {name!r}.{meant(name, known)} Known {kind}s: {', '.join(known) or 'none'}.")
    return known[name]


def called(function: Any) -> str:
    """The name of a function, or a name."""
    return str(getattr(function, "__name__", function))


def ours(entry: Any) -> bool:
    return str(getattr(getattr(entry, "score", entry), "__module__", "")).startswith("dit_accel.")


def registering(
    kind: str, name: str | Function | None, known: dict[str, Any], make: Function = lambda function: function
) -> Function:
    """The decorator behind `@register("mine")`, `@register()` and `@register`, of which the latter two take the function's name.

    A name that is taken is taken over, so that a notebook's cell can be run again, but for those of dit_accel itself.
    """

    def register(function: Function) -> Function:
        own = name if isinstance(name, str) else called(function)
        if own in known and ours(known[own]) and not ours(function):
            raise ValueError(f"The {kind} {own!r} is one of dit_accel's own; choose another name.")
        known[own] = make(function)
        return function

    return register(name) if callable(name) else register
