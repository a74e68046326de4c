"""What the figures of a report share: their looks, marks that know their method, labels that keep apart, and files."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

WIDTH = 4.4  # inches; with text of 10 points this can be read when the figure is 330 pixels wide
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, without black and yellow
MARKERS = ("o", "s", "^", "D", "v", "P", "p")
PLAIN = {"full": ("#000000", "*"), "no-op": ("#767676", "x"), "fewer steps": ("#767676", "o")}
NAMED = 16  # methods that a legend names one by one; of more it names the series
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "dit-accel",
    "text.parse_math": False,
}


Looks = dict[str, tuple[str, str]]  # color and marker of every method, by key


@dataclass(frozen=True)
class Drawing:
    """One figure, under the name of its files."""

    name: str
    svg: str
    png: bytes
    table: pd.DataFrame


def series(method: str) -> str:
    """A method without its numbers: what several settings of one method share."""
    words = [word for word in method.split() if not re.fullmatch(r"\w+=-?[\d.]+(x-?[\d.]+)*", word)]
    return " ".join(words)


def looks(part: pd.DataFrame) -> Looks:
    """Settings of one method look alike."""
    names = list(dict.fromkeys(series(method) for method in part.loc[part["kind"] == "method", "method"]))
    return {
        row.key: PLAIN.get(row.kind)
        or (COLORS[names.index(series(row.method)) % len(COLORS)], MARKERS[names.index(series(row.method)) % len(MARKERS)])
        for row in part.itertuples()
    }


@contextmanager
def style() -> Iterator[None]:
    with matplotlib.rc_context(STYLE):
        yield


def gid(key: str, part: str) -> str:
    """The id of an artist that stands for a method; `finish` turns it into attributes of the SVG."""
    return f"method:{key}:{part}"


def finish(name: str, figure: Figure, table: pd.DataFrame) -> Drawing:
    """Render a figure. Ids are made unique within the page, and artists of a method get data-method and data-part."""
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=200)
    figure.savefig(svg, format="svg", metadata={"Date": None})
    text = svg.getvalue()
    text = text[text.index("<svg") :]

    def tag(found: re.Match[str]) -> str:
        marked = re.sub(r'\bid="method:([\w-]+):(\w+)"', r'data-method="\1" data-part="\2"', found[0])
        return re.sub(r'((?<![\w-])id="|url\(#|href="#)', rf"\g<1>{name}-", marked)

    return Drawing(name, re.sub(r"<[^!?/][^>]*>", tag, text), png.getvalue(), table)


def canvas(known: pd.DataFrame, shades: Looks) -> tuple[Figure, Axes]:
    """A figure with the legend of these methods below its axes."""
    figure, keys = legend(list(known.itertuples()), shades)
    figure.set_size_inches(WIDTH, 3.4 + keys)
    return figure, figure.add_subplot()


def legend(rows: list[Any], shades: Looks, marks: bool = True) -> tuple[Figure, float]:
    """An empty figure with a legend at its foot, and the height of that: the methods with their numbers, or only the series."""
    figure = Figure(layout="constrained")
    entries: dict[str, tuple[str, Any]] = {}
    for row in rows:
        if len(rows) <= NAMED:
            entries[f"#{row.number}  {row.method}"] = (row.key, row)
        elif marks:
            entries.setdefault(series(row.method) if row.kind == "method" else row.kind, ("", row))
    labels = [wrapped(label, 46) for label in entries]
    handles = [mark(shades[row.key], row) if marks else Line2D([], [], ls="") for _, row in entries.values()]
    if not entries:
        return figure, 0.0
    made = figure.legend(handles, labels, loc="outside lower left", handletextpad=0.4, borderpad=0, handlelength=1.2 * marks)
    for (key, _), handle, text in zip(entries.values(), made.legend_handles, made.get_texts(), strict=True):
        if key:
            handle.set_gid(gid(key, "mark"))
            text.set_gid(gid(key, "key"))
    return figure, 0.18 * sum(label.count("\n") + 1 for label in labels) + 0.1


def mark(look: tuple[str, str], row: Any) -> Line2D:
    """The mark of a method; hollow where its seconds cannot be compared."""
    hollow = not row.comparable
    return Line2D([], [], ls="", color=look[0], marker=look[1], ms=9 if look[1] == "*" else 6, mfc="white" if hollow else look[0])


def points(
    figure: Figure, axes: Axes, known: pd.DataFrame, shades: Looks, x: pd.Series, y: pd.Series, across: Any, along: Any
) -> None:
    """Every method as a mark with bars and its number beside it.

    Args:
        across, along: (low, high) ends of the horizontal and of the vertical bars, or None.
    """
    bars = []
    for i, row in zip(known.index, known.itertuples(), strict=True):
        color = shades[row.key][0]
        for ends, steady, flat in ((across, y, True), (along, x, False)):
            if ends is not None and pd.notna(ends[0][i]):
                bar, still = [ends[0][i], ends[1][i]], [steady[i]] * 2
                bars.append(np.column_stack((bar, still) if flat else (still, bar)))
                axes.plot(*bars[-1].T, color=color, alpha=0.6, lw=1.3, gid=gid(row.key, "bar"))
                mark_cuts(axes, bar, still[0], flat, color=color, gid=gid(row.key, "cut"))
        dot = mark(shades[row.key], row)
        dot.set(xdata=[x[i]], ydata=[y[i]], gid=gid(row.key, "point"), zorder=3)
        axes.add_line(dot)
    moves = moves_apart(figure, axes, np.column_stack([x, y]), [str(number) for number in known["number"]], bars)
    for row, place, move in zip(known.itertuples(), zip(x, y, strict=True), moves, strict=True):
        line = {"arrowstyle": "-", "color": "#888888", "lw": 0.7, "shrinkA": 0, "shrinkB": 3} if np.hypot(*move) > 12 else None
        note = axes.annotate(str(row.number), place, move, textcoords="offset points", ha="center", va="center", arrowprops=line)
        note.set(fontsize=9, gid=gid(row.key, "label"), zorder=4, in_layout=False)
        if note.arrow_patch:
            note.arrow_patch.set_gid(gid(row.key, "leader"))


def mark_cuts(axes: Axes, bar: list[float], still: float, flat: bool, **look: Any) -> None:
    """Arrowheads at the limits of an axis where a bar goes on beyond them."""
    low, high = axes.get_xlim() if flat else axes.get_ylim()
    for cut, end, arrow in ((bar[0] < low, low, "<" if flat else "v"), (bar[1] > high, high, ">" if flat else "^")):
        if cut:
            axes.plot(*((end, still) if flat else (still, end)), arrow, ms=7, mew=0, clip_on=False, **look)


def moves_apart(
    figure: Figure, axes: Axes, places: NDArray[np.float64], texts: list[str], bars: list[NDArray[np.float64]]
) -> list[tuple[float, float]]:
    """`labels_apart` of points [n, 2] and bars [2, 2] that are given in the axes' own units."""
    figure.draw_without_rendering()
    points, *lines = (axes.transData.transform(some) * 72 / figure.dpi for some in (places, *bars))
    frame = np.asarray(axes.get_window_extent().extents) * 72 / figure.dpi
    return labels_apart(points, texts, frame, [line.ravel() for line in lines])


def labels_apart(
    places: NDArray[np.float64], texts: list[str], frame: NDArray[np.float64], lines: list[NDArray[np.float64]]
) -> list[tuple[float, float]]:
    """How far to move each label from its point so that it covers no point and no other label, and rather no bar.

    Args:
        places: of the points [n, 2]; frame, lines: left, bottom, right and top of what labels stay in, and of bars; all in
            typographic points.
    """
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    moves = []
    turns = np.pi * np.array([0.25, 0.75, 1.75, 1.25, 0.5, 1.5, 0.0, 1.0, 0.125, 0.375, 0.625, 0.875, 1.125, 1.375, 1.625, 1.875])
    choices = [
        (reach * np.cos(turn), reach * np.sin(turn)) for reach in (10, 15, 21, 28, 36, 45, 56, 70, 88, 110) for turn in turns
    ]
    for (x, y), text in zip(places, texts, strict=True):
        wide = 3.2 * len(text) + 0.5

        def cost(move: tuple[float, float], x: float = x, y: float = y, wide: float = wide) -> float:
            box = (x + move[0] - wide, y + move[1] - 5, x + move[0] + wide, y + move[1] + 5)
            outside = box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3]
            hits, crossed = (
                sum(box[0] <= t[2] and t[0] <= box[2] and box[1] <= t[3] and t[1] <= box[3] for t in others)
                for others in (taken, lines)
            )
            return float(100 * hits + 100 * outside + 6 * crossed + np.hypot(*move))

        best = min(choices, key=cost)
        taken.append((x + best[0] - wide, y + best[1] - 5, x + best[0] + wide, y + best[1] + 5))
        moves.append(best)
    return moves


def wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width)) or text
