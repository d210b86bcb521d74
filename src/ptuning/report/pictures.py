"""Pictures of results as SVG text. Equal numbers give equal bytes.

The two main colours differ in grey print too, and every series has its own marker, so that no picture depends on its
colours.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ptuning.metrics import Confusion
from ptuning.statistics import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches. Narrow enough to read its text on a phone, where the picture shrinks to four fifths.
WIDTH = 4.6
# Source: Okabe and Ito (2008), "Color Universal Design": orange (light in grey) and blue (dark in grey), then others.
COLOURS = ("#d98a00", "#0072b2", "#009e73", "#7a3b69", "#333333")
MARKERS = ("o", "D", "s", "^", "v")
# Whether the markers of a series are hollow: those with a light colour.
HOLLOW = (True, False, True, False, False)
GREY = "#6b6b6b"
LABEL_CHARACTERS = 22
MAX_SIDE_BY_SIDE = 7  # labels of two confusion matrices in one line
# XML 1.0, production 2, has all other characters.
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
INK, RULE, RUN = "#222222", "#e2e2e2", "#a9a9a9"


def dots(rows: Sequence[tuple[str, Score, Score]], *, names: tuple[str, str], unit: str, name: str) -> str:
    """Draw two scores per row as dots joined by a line, with their intervals as whiskers. Ids begin with ``name``.

    ``rows`` has labels with a first and a second score from top to bottom, ``names`` names these, ``unit`` the axis.
    """
    with _canvas(name, height=0.42 * len(rows) + 1.2) as (figure, svg):
        axes = figure.subplots()
        for index, (_, first, second) in enumerate(rows):
            ends = (100 * first.value, 100 * second.value)
            axes.plot(ends, (index - 0.15, index + 0.15), color=GREY, linewidth=1.0, zorder=1)
            for series, (score, at) in enumerate(((first, index - 0.15), (second, index + 0.15))):
                axes.plot((100 * score.low, 100 * score.high), (at, at), color=COLOURS[series], linewidth=1.6, zorder=2)
                _mark(axes, [score.value], at, series=series)
        for series, method in enumerate(names):
            _mark(axes, [], 0.0, series=series, label=method)
        figure.legend(loc="outside upper left", ncols=2, frameon=False, handletextpad=0.3)
        axes.set_yticks(range(len(rows)), [_cut(label, LABEL_CHARACTERS) for label, _, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=True, axis="x")
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        for between in range(1, len(rows)):
            axes.axhline(between - 0.5, color=RULE, linewidth=0.8, zorder=0)
        axes.set_xlabel(f"{unit}, % (whiskers: 95 % interval)")
    return svg[0]


def curves(panels: Mapping[str, Sequence[Sequence[tuple[int, float]]]], *, name: str) -> str:
    """Draw learning curves, (epoch, score) pairs: a panel per method, with a thin line per training and their mean."""
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    with _canvas(name, height=1.75 * lines + 0.5) as (figure, svg):
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (method, trainings) in zip(grid.flat, panels.items(), strict=False):
            for points in trainings:
                axes.plot(*_percent(points), color=RUN, linewidth=0.9, zorder=1)
            mean = mean_curve(trainings)
            axes.plot(*_percent(mean), color=COLOURS[1], marker="D", markersize=4, linewidth=1.8, zorder=2)
            name_lines = re.sub(" |(?=@)", "\n", method, count=1)  # names of controls and of variants are long
            title = f"{name_lines}, n = {len(trainings)}"
            axes.set_title(title, fontsize=9)
            axes.grid(visible=True, axis="y")
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        for axes in list(grid.flat)[len(panels) - columns : len(panels)]:
            axes.tick_params(labelbottom=True)  # the lowest of each column, also above one that is left out
        figure.supxlabel("epoch", fontsize=10)
        figure.supylabel("development score, %", fontsize=10)
    return svg[0]


def matrices(panels: Mapping[str, Confusion], *, name: str) -> str:
    """Draw confusion matrices, a panel per method: counts, on squares that are darker the larger their share of a row
    is. Labels have numbers, and names at the left.
    """
    from matplotlib.colors import LinearSegmentedColormap

    size = max(len(matrix.labels) for matrix in panels.values())
    columns = min(2, len(panels)) if size <= MAX_SIDE_BY_SIDE else 1
    lines = -(-len(panels) // columns)
    shades = LinearSegmentedColormap.from_list("shares", ["#ffffff", COLOURS[1]])
    with _canvas(name, height=(0.24 * size + 0.75) * lines) as (figure, svg):
        grid = figure.subplots(lines, columns, squeeze=False)
        for place, (axes, (method, matrix)) in enumerate(zip(grid.flat, panels.items(), strict=False)):
            shares = [[count / max(1, sum(row)) for count in row] for row in matrix.counts]
            axes.pcolormesh(shares, cmap=shades, vmin=0, vmax=1, edgecolors="white", linewidth=1.0)
            for at, column in itertools.product(range(len(matrix.labels)), repeat=2):
                colour = "white" if shares[at][column] > 0.5 else INK
                text = f"{matrix.counts[at][column]:,}" if matrix.counts[at][column] else ""
                axes.text(column + 0.5, at + 0.5, text, color=colour, ha="center", va="center", fontsize=7.5)
            numbers = [str(number) for number in range(1, len(matrix.labels) + 1)]
            cut = [_cut(label, LABEL_CHARACTERS // 2) for label in matrix.labels]
            names = [f"{label} {number}" for label, number in zip(cut, numbers, strict=True)]
            middle = [at + 0.5 for at in range(len(matrix.labels))]
            axes.set_xticks(middle, numbers, fontsize=8)
            axes.set_yticks(middle, names if place % columns == 0 else numbers, fontsize=8)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.invert_yaxis()
            axes.set_title(method.replace("@", "\n@", 1), fontsize=9)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel("answer", fontsize=9)
        figure.supylabel("target", fontsize=9)
    return svg[0]


def mean_curve(trainings: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Return the mean per epoch, from the first that all have. After early stopping a training keeps its last score."""
    first = max(min(epoch for epoch, _ in points) for points in trainings)
    changes: dict[int, float] = defaultdict(float)  # epoch -> how much the sum over the trainings changes
    for points in trainings:
        before = 0.0
        for epoch, value in sorted(points):
            changes[epoch] += value - before
            before = value
    epochs = sorted(changes)
    sums = itertools.accumulate(changes[at] for at in epochs)
    return [(at, total / len(trainings)) for at, total in zip(epochs, sums, strict=True) if at >= first]


@contextmanager
def _canvas(name: str, *, height: float) -> Iterator[tuple[Figure, list[str]]]:
    """Yield an empty figure in the style of all pictures, and a list to which its SVG is added when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure

    drawn: list[str] = []
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The reader's browser draws the text, so a font that is missing here does not matter.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        matplotlib.rcdefaults()  # a user's own settings do not change the picture
        matplotlib.rc("svg", fonttype="none", hashsalt=name)  # text stays text: found by a search, drawn in any font
        matplotlib.rc("text", parse_math=False)  # a dollar sign in a label is a dollar sign
        matplotlib.rc("font", family=["DejaVu Sans"], size=10.0)
        matplotlib.rc("axes", edgecolor=GREY, labelcolor=INK, titlesize=10.0, titlelocation="left")
        matplotlib.rc("axes.spines", top=False, right=False)
        matplotlib.rc("xtick", color=GREY, labelcolor=INK)
        matplotlib.rc("ytick", color=GREY, labelcolor=INK)
        matplotlib.rc("grid", color=RULE, linewidth=0.8)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, drawn
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawn.append(_own_ids(buffer.getvalue(), name))


def _own_ids(svg: str, name: str) -> str:
    """Remove the header before the drawing, and start its ids with its name: a page holds several drawings. Characters
    that XML does not have come from names.
    """
    body = NOT_XML.sub("\N{REPLACEMENT CHARACTER}", svg[svg.index("<svg") :])
    return re.sub(
        r"<[^>]+>", lambda tag: re.sub(r'(\bid="|url\(#|href="#)', lambda at: f"{at[1]}{name}-", tag[0]), body
    )


def _mark(axes: Axes, values: Sequence[float], at: float, *, series: int, label: str | None = None) -> None:
    colour, marker, hollow = (items[series % len(items)] for items in (COLOURS, MARKERS, HOLLOW))
    axes.plot(
        [100 * value for value in values],
        [at] * len(values),
        linestyle="none",
        marker=marker,
        color=colour,
        markerfacecolor="white" if hollow else colour,
        markeredgewidth=1.6,
        markersize=6.5 if hollow else 5.5,
        zorder=3,
        label=label,
    )


def _percent(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [epoch for epoch, _ in points], [100 * value for _, value in points]


def _cut(label: str, most: int) -> str:
    flat = " ".join(label.split())
    return flat if len(flat) <= most else f"{flat[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
