"""The page of a report: its title, the main result in a paragraph, and its sections in their order.

To add a section, write a function that returns its blocks and list it in :data:`SECTIONS`.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping

from ptuning.metrics import Confusion, called
from ptuning.names import MAJORITY, PREDICTIONS_FILE, RANDOM_WEIGHTS
from ptuning.report import pictures, tables
from ptuning.report.results_file import WRITTEN, Results, read_answers, read_curve
from ptuning.report.tables import Block, Fold, Items, Page, Picture, Section, counted, phrase, reading

MAX_ROWS = 100  # of a picture: more are not told apart, and take minutes to draw
MAX_TASKS, MAX_METHODS = 8, 6  # confusion matrices of a page
# With fewer rows than this, an interval is about ten points wide on either side.
SMALL_ROWS = 100
TITLES = {
    "lama": "What a learned prompt recalls",
    "compare": "Methods compared",
    "superglue": "Methods compared on language understanding",
}


def build_page(results: Results) -> Page:
    """Return the page of a report; raise FileError if a file of a cell is damaged."""
    suite = results.suite
    if suite == "superglue" and not any(info.get("benchmark", True) for info in results.task_info.values()):
        suite = "compare"
    tasks = results.named(*results.tasks) if len(results.tasks) == 1 else counted(len(results.tasks), "task")
    about = results.backbone.get("name")
    return Page(
        title=f"{TITLES.get(suite, suite)}: {tasks}" + (f", {about}" if about else ""),
        warning=_unfinished(results),
        answer=" ".join(_answer(results)),
        sections=[Section(heading, blocks) for heading, make in SECTIONS.items() if (blocks := make(results))],
    )


def _unfinished(results: Results) -> Fold | None:
    left = [cell for cell in results.cells if cell.status != "done"]
    if not left:
        return None
    counts = {"failed": len(results.failed), "still to run": len(left) - len(results.failed)}
    missing = " and ".join(f"{n:,} {status}" for status, n in counts.items() if n)
    title = (
        f"Not complete: of {counted(len(results.cells), 'run')}, {missing}. Tables and pictures show the finished ones."
    )
    listed = [
        f"{results.named(cell.task)}, {cell.method}, seed {cell.seed}: "
        + (f"failed: {cell.error or 'no reason was recorded'}" if cell.status == "failed" else "still to run")
        for cell in left
    ]
    return Fold(title, [Items(listed)])


def _answer(results: Results) -> Iterator[str]:
    score, unit = results.primary, results.overall_unit
    shown = {method: phrase(results.overall[method][score], score, unit) for method in results.ranked}
    if not shown:
        yield "No method has finished yet, so there is nothing to compare."
        return
    best, *others = shown
    yield f"Of {counted(len(shown), 'method')}, {best} is best: {called(score)} {shown[best]}."
    if others:
        yield f"Next is {others[0]} with {shown[others[0]]}."
        gap = results.difference(best, others[0], score)
        if gap is not None:
            verdict = reading(gap) if gap.low <= 0 <= gap.high else f"is {reading(gap)}"
            shown_gap = phrase(gap, score, "", signed=True)
            ends = f"; its interval {verdict}" if gap.has_interval else ""
            yield f"The difference {best} \N{MINUS SIGN} {others[0]} is {shown_gap}{ends}."


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
    shown = rows if len(rows) <= MAX_ROWS else [*rows[: MAX_ROWS // 2], *rows[-MAX_ROWS // 2 :]]
    part = "" if shown == rows else f" The picture has the first and the last {MAX_ROWS // 2} of them."
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


def confusions(results: Results, task: str) -> dict[str, Confusion]:
    """Return method -> its confusion matrix over the test part of a task with labels, added up over seeds; without
    controls, and without the majority, which has one answer.
    """
    labels = results.task_info.get(task, {}).get("labels") or []
    matrices = {}
    for method in results.ordered({*results.tasks.get(task, {})} - {MAJORITY, *results.controls}) if labels else ():
        paths = (results.folder_of(cell) / PREDICTIONS_FILE for cell in results.done(method, task))
        rows = [row for path in paths if path.is_file() for row in read_answers(path) if row.target is not None]
        if rows:
            targets, answers = [row.target or "" for row in rows], [row.answer.text for row in rows]
            matrices[method] = Confusion.of(labels, targets, answers)
    return matrices


def confusion_pictures(results: Results) -> list[Block]:
    """Return a picture for each task with labels."""
    drawn = ((task, matrices) for task in results.tasks if (matrices := confusions(results, task)))
    blocks: list[Block] = []
    for number, (task, matrices) in enumerate(itertools.islice(drawn, MAX_TASKS), start=1):
        first = [name for name in matrices if name in {*results.pair, *results.ranked[:MAX_METHODS]}][:MAX_METHODS]
        panels = {name: matrices[name].shortened() for name in first}
        if not panels:
            continue
        seeds = max(len(results.done(method, task)) for method in panels)
        caption = (
            f"{results.named(task)}: a row for each target, a column for each answer, under its number. The darker a "
            f"square, the larger its share of the row.{f' Counts are sums over {seeds} seeds.' if seeds > 1 else ''}"
        )
        worst = "; ".join(f"{method}: {_most_confused(matrix)}" for method, matrix in panels.items())
        name = f"confusion-{number}"
        svg = pictures.matrices(panels, name=name)
        blocks.append(Picture(name, svg, caption, f"{caption} Most frequent: {worst}."))
    return blocks


def _most_confused(matrix: Confusion) -> str:
    counts = {
        (target, answer): matrix.counts[row][column]
        for row, target in enumerate(matrix.labels)
        for column, answer in enumerate(matrix.labels)
        if row != column
    }
    target, answer = max(counts, key=lambda pair: counts[pair])
    count = counts[target, answer]
    return f"{target} predicted as {answer} {counted(count, 'time')}" if count else "no confusion"


def _warnings(results: Results) -> list[Block]:
    listed = [
        f"{results.named(cell.task)}, {cell.method}, seed {cell.seed}: {cell.text}" for cell in results.warnings or ()
    ]
    return [Items(listed)] if listed else []


def limits(results: Results) -> Iterator[str]:
    """Yield what a reader must not conclude, and why."""
    names = list(results.overall)
    done = [cell for cell in results.cells if cell.status == "done"]
    if left := len(results.cells) - len(done):
        yield f"{counted(left, 'run')} of {len(results.cells):,} failed or did not run yet: means lack them."
    seeds = max((len({cell.seed for cell in done if cell.method == name}) for name in names), default=0)
    if seeds == 1:
        yield "Every method ran with one seed, so it is unknown how much two trainings of one method differ."
    small = [
        results.named(task)
        for task, methods in results.tasks.items()
        if 0 < max((score.n for scores in methods.values() for score in scores.values()), default=0) < SMALL_ROWS
    ]
    if small:
        yield (
            f"Fewer than {SMALL_ROWS} test {results.unit} in {counted(len(small), 'task')} ({_first(small)}): "
            "differences of a few points there are noise."
        )
    on_dev = [name for name, info in results.task_info.items() if info.get("reported") == "dev"]
    if on_dev:
        yield f"{_first(on_dev)}: without a validation part, scores are on the few rows of the development part."
    if len({max((cell.tried or 1 for cell in results.done(name)), default=1) for name in names}) > 1:
        yield "Methods tried different numbers of settings (column tried); more tries find a better one by chance."
    free, restricted = WRITTEN
    if results.agreement is None and results.backbone.get("kind") == "causal" and free in names:
        yield (
            "A learned prompt also learns the form of the answers, the manual one does not; "
            f"{restricted}, which ranks the task's answers only, is the fairer comparison."
        )
    trained = [name for name, method in results.methods.items() if method.trained and name in names]
    without = [name for name in trained if "@" not in name and f"{name}{RANDOM_WEIGHTS}" not in names]
    if without:
        yield (
            f"There is no control with random weights for {', '.join(without)}: how much the training {results.unit} "
            "alone teach is unknown."
        )
    yield f"Other backbones may rank methods otherwise, and their pretraining text may contain the test {results.unit}."


def _first(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{' and others' if len(names) > 5 else ''}"


# Heading -> the blocks of the section; one without blocks is left out.
SECTIONS: Mapping[str, Callable[[Results], list[Block]]] = {
    "Scores": tables.main,
    "By type of relation": tables.by_type,
    "Breakdown by field": tables.by_value,
    "Every task": tables.per_task,
    "Confusion matrix": confusion_pictures,
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
