"""The page of a report: its title, the main result in a paragraph, and its sections in their order.

To add a section, write a function that returns its blocks and list it in :data:`SECTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ptuning.metrics import called
from ptuning.report import confusion, pictures, tables
from ptuning.report.blocks import Block, Fold, Items, Page, Picture, Section, counted, phrase, reading
from ptuning.report.limits import limits
from ptuning.report.results_file import Results, read_curve
from ptuning.statistics import Score

MOST_ROWS = 100  # of a picture: more are not told apart, and take minutes to draw
TITLES = {
    "lama": "What a learned prompt recalls",
    "compare": "Methods compared",
    "superglue": "Methods compared on language understanding",
}


def build_page(results: Results) -> Page:
    """Return the page of a report; raise FileError if a file of a cell is damaged."""
    tasks = results.named(*results.tasks) if len(results.tasks) == 1 else counted(len(results.tasks), "task")
    about = results.backbone.get("name")
    return Page(
        title=f"{_title(results)}: {tasks}" + (f", {about}" if about else ""),
        warning=_warning(results),
        answer=" ".join(_answer(results)),
        sections=[Section(heading, blocks) for heading, make in SECTIONS.items() if (blocks := make(results))],
    )


def _title(results: Results) -> str:
    if results.suite == "superglue" and not any(info.get("benchmark", True) for info in results.task_info.values()):
        return TITLES["compare"]
    return TITLES.get(results.suite, results.suite)


def _warning(results: Results) -> Fold | None:
    left = [cell for cell in results.cells if cell.status != "done"]
    if not left:
        return None
    failed = sum(cell.status == "failed" for cell in left)
    missing = [f"{n:,} {what}" for n, what in ((failed, "failed"), (len(left) - failed, "still to run")) if n]
    title = (
        f"Not complete: of {counted(len(results.cells), 'run')}, {' and '.join(missing)}. Tables and pictures show "
        "the finished ones."
    )
    listed = [
        f"{results.named(cell.task)}, {cell.method}, seed {cell.seed}: "
        + (f"failed: {cell.error or 'no reason was recorded'}" if cell.status == "failed" else "still to run")
        for cell in left
    ]
    return Fold(title, [Items(listed)])


def _answer(results: Results) -> Iterator[str]:
    score, unit = results.primary, results.overall_unit
    ranked = results.ranked
    scores = {method: results.overall[method][score] for method in ranked}
    if not ranked:
        yield "No method has finished yet, so there is nothing to compare."
        return
    best, *others = ranked
    most = phrase(scores[best], unit, of=score)
    yield f"Of {counted(len(ranked), 'method')}, {best} is best: {called(score)} {most}."
    if others:
        yield f"Next is {others[0]} with {phrase(scores[others[0]], unit, of=score)}."
        gap = results.difference(best, others[0], score)
        if gap is not None:
            shown = phrase(gap, "", signed=True, of=score)
            yield f"The difference {best} \N{MINUS SIGN} {others[0]} is {shown}{_verdict(gap)}."


def _verdict(gap: Score) -> str:
    if not gap.has_interval:
        return ""
    if gap.low <= 0 <= gap.high:
        return "; its interval includes zero, so this run shows no difference"
    return f"; its interval is {reading(gap)}"


def _dots(results: Results) -> list[Block]:
    written, learned = results.pair
    score = results.primary
    rows = [
        (results.named(task), table[written][score], table[learned][score])
        for task, table in results.tasks.items()
        if score in table.get(written, {}) and score in table.get(learned, {})
    ]
    if len(rows) < 2:
        return []
    rows.sort(key=lambda row: row[1].value - row[2].value)
    better = sum(new.value > old.value for _, old, new in rows)
    shown = rows if len(rows) <= MOST_ROWS else [*rows[: MOST_ROWS // 2], *rows[-MOST_ROWS // 2 :]]
    part = "" if shown == rows else f" The picture has the first and the last {MOST_ROWS // 2} of them."
    caption = (
        f"{called(score)} of {written} and {learned} on every task, sorted by the difference; {learned} is "
        f"higher on {better:,} of {counted(len(rows), 'task')}.{part} Whiskers are 95 % intervals; the table of "
        f"every task has the numbers, with n."
    )
    svg = pictures.dots(shown, names=(written, learned), unit=called(score), name="dots")
    return [Picture("dots", svg, caption, f"Dot plot. {caption}")]


def _curves(results: Results) -> list[Block]:
    panels = {}
    for method in results.ordered(cell.method for cell in results.cells):
        curves = [curve for cell in results.done(method) if (curve := read_curve(results.folder_of(cell)))]
        if curves:
            panels[method] = curves
    if not panels:
        return []
    caption = (
        "Development score per epoch. Each thin line is a training (one task and seed), the line with "
        "markers is their mean, and n is their number. Epoch 0 is before training. After early stopping a training "
        "keeps its last score."
    )
    return [Picture("curves", pictures.curves(panels, name="curves"), caption, f"Learning curves. {caption}")]


def _warnings(results: Results) -> list[Block]:
    listed = [
        f"{results.named(cell.task)}, {cell.method}, seed {cell.seed}: {cell.text}" for cell in results.warnings or ()
    ]
    return [Items(listed)] if listed else []


# Heading -> the blocks of the section; one without blocks is left out.
SECTIONS: Mapping[str, Callable[[Results], list[Block]]] = {
    "Scores": tables.main,
    "By type of relation": tables.by_type,
    "Breakdown by field": tables.by_value,
    "Every task": tables.per_task,
    "Confusion matrix": confusion.section,
    "Manual and learned prompt": _dots,
    "Random-weights control": tables.control,
    "Differences": tables.differences,
    "Development and reported score": tables.agreement,
    "Warnings": _warnings,
    "Learning curves": _curves,
    "Answers gained and lost": tables.changes,
    "Settings": tables.settings,
    "Limitations": lambda results: [Items(list(limits(results)))],
}
