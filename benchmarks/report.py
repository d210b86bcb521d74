"""``summary.json``, ``report.md``, the picture and the tables of docs/evidence/performance.md, from all results."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.common import ROOT, Settings, parser, say, settings_of, write_json
from benchmarks.goals import GOALS, SUMMARY, is_met, read_results, summarise
from benchmarks.picture import draw

DOCS = ROOT / "docs" / "evidence" / "performance.md"
REPORT, PICTURE = "report.md", "report.svg"
CAPTION = "Training samples per second beside the bare backbone's, and how far each goal is reached"
MARKED = re.compile(r"(<!-- bench: ([a-z ]+) -->\n).*?(<!-- bench: end -->)", flags=re.DOTALL)
NOTHING = "*Not measured yet: `make bench`.*"

Cell = Mapping[str, Any]
Column = tuple[str, Callable[[Cell], str]]


def main(settings: Settings) -> None:
    """Write everything; a smoke run writes into its own folder and touches no document."""
    results = read_results(settings.out)
    summary = summarise(results)
    folder = settings.out if settings.smoke else settings.out.parent
    write_json(settings.out / f"{SUMMARY}.json", summary)
    (folder / PICTURE).write_text(draw(summary, results), encoding="utf-8")
    (folder / REPORT).write_text(report(summary, results), encoding="utf-8")
    page = fill(DOCS.read_text(encoding="utf-8"), tables(summary, results))
    (settings.out / DOCS.name if settings.smoke else DOCS).write_text(page, encoding="utf-8")
    say("\n" + tables(summary, results)["goals"])
    say(f"wrote {SUMMARY}.json, {REPORT}, {PICTURE} and the tables of {DOCS.name}")


def report(summary: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return ``report.md``: the goals, the picture, then each question with its method and its table."""
    made = tables(summary, results)
    smoke = any(result["smoke"] for result in results.values())
    lines = ["# Benchmarks", ""]
    if smoke:
        lines += ["**A smoke run on a tiny random model: it shows that the scripts work, and measures nothing.**", ""]
    lines += [
        made["machine"],
        "",
        f"![{CAPTION}]({PICTURE})",
        "",
        "## Goals",
        "",
        made["goals"],
        "",
    ]
    for name, result in results.items():
        lines += [f"## {result['question']}", "", result["method"], ""]
        lines += [f"{made[table]}\n" for table in TABLES if TABLES[table][0] == name and made[table] != NOTHING]
        lines += [f"`benchmarks/{name}.py`, {result['seconds']:.0f} s, {result['written']}.", ""]
    peer = next((result.get("peer") for result in results.values() if result.get("peer")), None)
    lines += ["## The peer: PEFT's `P_TUNING` (LSTM) with transformers' `Trainer`", "", peer, ""] if peer else []
    return "\n".join(lines)


def tables(summary: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the name of every table -> its Markdown."""
    made = {"goals": goals(summary), "machine": machine(summary), "picture": NOTHING}
    if results:
        made["picture"] = f"![{CAPTION}](../../benchmarks/{PICTURE})"
    for name, (script, wanted, columns) in TABLES.items():
        cells = [cell for cell in results.get(script, {}).get("cells", []) if wanted(cell)]
        made[name] = table(cells, columns) if cells else NOTHING
    return made


def fill(page: str, made: Mapping[str, str]) -> str:
    """Return a page with its tables between their marks replaced; a mark without a table is a mistake of the page."""
    return MARKED.sub(lambda found: f"{found[1]}{made[found[2]]}\n{found[3]}", page)


def goals(summary: Mapping[str, Any]) -> str:
    """Return the table of goals beside what was measured."""
    lines = ["| question | goal | measured | low to high | note |", "|---|---|---|---|---|"]
    for name, goal in GOALS.items():
        found = summary["questions"][name]
        measured, reach = "-", "-"
        if found["measured"] is not None:
            number = figure(found["measured"])
            measured = f"**{number}**" if is_met(name, found["measured"]) else number
            reach = f"{figure(found['low'])} to {figure(found['high'])}"
        lines.append(f"| {goal.question} | {goal.text} | {measured} | {reach} | {plain(found['note'])} |")
    return "\n".join([*lines, "", "Bold: the goal is reached."])


def machine(summary: Mapping[str, Any]) -> str:
    """Say in a line what it was measured on."""
    if not summary["machine"]:
        return NOTHING
    found = summary["machine"]
    parts = [found["processor"], f"{found['cores']} cores", f"{found['memory_bytes'] / 2**30:.0f} GiB", found["system"]]
    parts += [f"{found['threads']} threads"] if "threads" in found else []
    parts += [found["gpu"] or "no GPU"]
    named = [f"{name} {version}" for name, version in summary["versions"].items() if version]
    return f"Measured on: {', '.join(parts)}; {', '.join(named)}."


def table(cells: Sequence[Cell], columns: Sequence[Column]) -> str:
    """Return a Markdown table with one row per cell."""
    lines = [f"| {' | '.join(name for name, _ in columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(plain(show(cell)) for _, show in columns)} |" for cell in cells]
    return "\n".join(lines)


def figure(value: float) -> str:
    """Write a number with three digits that count."""
    if value and abs(value) < 0.001:
        return f"{value:.0e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plain(text: str) -> str:
    """Keep text within its cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def text_of(key: str) -> Callable[[Cell], str]:
    """A column of text or of plain numbers."""
    return lambda cell: figure(cell[key]) if isinstance(cell[key], float) else str(cell[key])


def spread_of(key: str, *, scale: float = 1.0) -> Callable[[Cell], str]:
    """A column of medians with the lowest and the highest of the repeats."""

    def show(cell: Cell) -> str:
        found = cell[key]
        median, low, high = (figure(found[name] * scale) for name in ("median", "low", "high"))
        return median if low == high else f"{median} ({low} to {high})"

    return show


def percent_of(key: str) -> Callable[[Cell], str]:
    """A column of shares."""
    return lambda cell: f"{100 * cell[key]:.1f} %"


def has(key: str, *others: str) -> Callable[[Cell], bool]:
    """Whether a cell has what a table shows."""
    return lambda cell: all(name in cell for name in (key, *others))


def is_cell(name: str) -> Callable[[Cell], bool]:
    """Whether a cell is of a kind."""
    return lambda cell: cell["cell"] == name


WHO: Column = ("contestant", text_of("contestant"))
CELL: Column = ("question", text_of("cell"))
# Name -> script, which of its cells, columns.
TABLES: dict[str, tuple[str, Callable[[Cell], bool], tuple[Column, ...]]] = {
    "training": (
        "training",
        has("samples_per_second"),
        (
            ("records", text_of("cell")),
            WHO,
            ("tokens a row", text_of("tokens_per_row")),
            ("rows a pass", text_of("rows_per_pass")),
            ("samples/s", spread_of("samples_per_second")),
            ("of the bare backbone", spread_of("of_bare")),
        ),
    ),
    "late": (
        "late",
        has("seconds"),
        (
            CELL,
            WHO,
            ("tokens a row", text_of("tokens_per_row")),
            ("seconds", spread_of("seconds")),
            ("accuracy", lambda cell: spread_of("score")(cell) if "score" in cell else ""),
        ),
    ),
    "constant part": (
        "late",
        has("constant_tokens"),
        (
            ("tokens in front of the slots", text_of("constant_tokens")),
            ("rows", text_of("rows")),
            ("whole rows, s a step", spread_of("whole_seconds")),
            ("kept, s a step", spread_of("kept_seconds")),
            ("times faster", spread_of("times_faster")),
            ("the pass before, s", text_of("pass_seconds")),
        ),
    ),
    "deep": (
        "deep",
        lambda cell: "seconds" in cell or "samples_per_second" in cell,
        (
            CELL,
            WHO,
            ("samples/s", lambda cell: spread_of("samples_per_second")(cell) if "samples_per_second" in cell else ""),
            ("seconds", lambda cell: spread_of("seconds")(cell) if "seconds" in cell else ""),
        ),
    ),
    "prefix": (
        "prefix",
        has("seconds"),
        (
            ("path", text_of("contestant")),
            ("tokens shared", text_of("shared_tokens")),
            ("tokens a row", text_of("tokens_per_row")),
            ("seconds a batch", spread_of("seconds")),
        ),
    ),
    "scores": (
        "scores",
        has("score"),
        (("facts", text_of("cell")), WHO, ("seconds of the run", spread_of("seconds")), ("score", spread_of("score"))),
    ),
    "fleet": (
        "fleet",
        has("seconds_per_prompt"),
        (
            ("prompts", text_of("prompts")),
            ("how", text_of("contestant")),
            ("seconds", spread_of("seconds")),
            ("seconds a prompt", spread_of("seconds_per_prompt")),
        ),
    ),
    "workers": (
        "workers",
        has("whole_seconds"),
        (CELL, ("how", text_of("contestant")), ("seconds", spread_of("whole_seconds"))),
    ),
    "prediction": (
        "prediction",
        has("seconds_per_record"),
        (
            ("what", text_of("cell")),
            WHO,
            ("records", text_of("records")),
            ("ms a record", spread_of("seconds_per_record", scale=1000)),
        ),
    ),
    "agreement": (
        "prediction",
        has("gap"),
        (("against", text_of("contestant")), ("largest difference of log-probabilities", text_of("gap"))),
    ),
    "service": (
        "serving",
        has("offered"),
        (
            ("what", text_of("cell")),
            ("load", text_of("load")),
            ("offered a second", text_of("offered")),
            ("completed a second", spread_of("per_second")),
            ("median, ms", spread_of("p50", scale=1000)),
            ("99th percentile, ms", spread_of("p99", scale=1000)),
            ("refused", text_of("refused")),
            ("failed", text_of("failed")),
            ("sender, share of a core", percent_of("sender")),
        ),
    ),
    "service in process": (
        "serving",
        has("contestant", "seconds"),
        (
            ("what", text_of("cell")),
            WHO,
            ("prompts", text_of("prompts")),
            ("rows", text_of("rows")),
            ("seconds", spread_of("seconds")),
        ),
    ),
    "service loading": (
        "serving",
        is_cell("loading"),
        (("meanwhile", text_of("load")), ("ms to load a prompt", spread_of("seconds", scale=1000))),
    ),
    "scaling": (
        "scaling",
        has("r2"),
        (
            ("what grows", text_of("unit")),
            ("size", text_of("size")),
            ("seconds", spread_of("seconds")),
            ("line: fixed s", text_of("fixed_seconds")),
            ("line: ms each", lambda cell: figure(1000 * cell["seconds_each"])),
            ("r2", lambda cell: f"{cell['r2']:.3f}"),
            ("off", percent_of("off")),
        ),
    ),
    "arithmetic": (
        "arithmetic",
        has("times_faster"),
        (
            ("how", text_of("contestant")),
            ("samples/s", spread_of("samples_per_second")),
            ("times float32's speed", spread_of("times_faster")),
            ("logits off by", lambda cell: f"{cell['gap']:.0e}"),
        ),
    ),
    "memory": (
        "memory",
        has("peak_bytes"),
        (("job", text_of("cell")), WHO, ("peak, MB", spread_of("peak_bytes", scale=1e-6))),
    ),
    "startup": ("startup", has("seconds"), (("what", text_of("cell")), ("seconds", spread_of("seconds")))),
    "stages": (
        "stages",
        is_cell("stage"),
        (
            ("batch", text_of("batch_size")),
            ("stage", text_of("stage")),
            ("ms a step", lambda cell: figure(1000 * cell["seconds_per_step"])),
            ("share", percent_of("share")),
        ),
    ),
    "operations": (
        "stages",
        is_cell("operation"),
        (
            ("batch", text_of("batch_size")),
            ("operation", lambda cell: f"`{cell['operation']}`"),
            ("calls a step", text_of("calls_per_step")),
            ("share of processor time", percent_of("share")),
        ),
    ),
}


if __name__ == "__main__":
    main(settings_of(parser(__doc__).parse_args()))
