"""The picture of the benchmarks as SVG text, the same bytes for the same numbers: throughput beside the bare backbone,
and how far each goal is reached.

Colours are those of the reports, which stay apart in grey print; every series has a marker of its own.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from benchmarks.goals import GOALS
from ptuning.report.pictures import COLOURS, GREY, HOLLOW, INK, MARKERS, RULE

WIDTH = 7.2
SERIES = ("peft", "ptuning")


def draw(summary: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the picture."""
    import matplotlib
    from matplotlib.figure import Figure

    cells = [cell for cell in results.get("training", {}).get("cells", []) if cell["contestant"] in SERIES]
    names = list(dict.fromkeys(cell["cell"] for cell in cells))
    reached = {
        name: (found["goal"] / found[key] if GOALS[name].most else found[key] / found["goal"])
        for name, found in summary["questions"].items()
        for key in ("measured",)
        if found[key]
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rc("svg", fonttype="none", hashsalt="bench")
        matplotlib.rc("font", family=["DejaVu Sans"], size=9.0)
        matplotlib.rc("axes", edgecolor=GREY, labelcolor=INK, titlesize=10.0, titlelocation="left")
        matplotlib.rc("axes.spines", top=False, right=False)
        heights = [max(2, len(names)), max(2, len(reached))]
        figure = Figure(figsize=(WIDTH, 0.32 * sum(heights) + 2.2), layout="constrained")
        upper, lower = figure.subplots(2, 1, height_ratios=heights)
        for series, who in enumerate(SERIES):
            colour, marker, hollow = COLOURS[series], MARKERS[series], HOLLOW[series]
            for cell in (cell for cell in cells if cell["contestant"] == who):
                at, found = names.index(cell["cell"]), cell["of_bare"]
                upper.plot((found["low"], found["high"]), (at, at), color=colour, linewidth=1.6, zorder=2)
                upper.plot(found["median"], at, marker, color=colour, markerfacecolor="white" if hollow else colour)
            upper.plot([], [], marker, color=colour, markerfacecolor="white" if hollow else colour, label=who)
        upper.axvline(1.0, color=INK, linewidth=1.0, linestyle="--", zorder=1)
        upper.set_xlim(left=0.0)
        upper.set_title("Training samples per second, of the bare backbone's (dashed)")
        for at, value in enumerate(reached.values()):
            lower.plot((1.0, value), (at, at), color=GREY, linewidth=1.0, zorder=1)
            lower.plot(value, at, MARKERS[1], color=COLOURS[1], zorder=2)
        lower.axvline(1.0, color=INK, linewidth=1.0, linestyle="--", zorder=1)
        lower.set_xscale("log")
        lower.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        lower.set_title("Measured, of the goal (dashed; right of it the goal is reached)")
        for axes, labels in ((upper, names), (lower, list(reached))):
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(max(1, len(labels)) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.grid(visible=True, axis="x", color=RULE, linewidth=0.8)
            axes.set_axisbelow(True)
        upper.legend(loc="lower left", frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    return "\n".join(line.rstrip() for line in svg[svg.index("<svg") :].splitlines()) + "\n"
