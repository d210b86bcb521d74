"""Caveats of a report: what its results do not show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ptuning.names import RANDOM_WEIGHTS
from ptuning.report.blocks import counted
from ptuning.report.results_file import WRITTEN, Results

# With fewer rows than this, an interval is about ten points wide on either side.
SMALL_ROWS, SMALL_TASKS = 100, 10


def limits(results: Results) -> Iterator[str]:
    """Yield what a reader must not conclude, and why."""
    done = [cell for cell in results.cells if cell.status == "done"]
    left = len(results.cells) - len(done)
    if left:
        yield (
            f"{counted(left, 'run')} of {len(results.cells):,} failed or did not run yet: means of methods that lack "
            "some are over other tasks and seeds."
        )
    seeds = max((len({cell.seed for cell in done if cell.method == name}) for name in results.overall), default=0)
    if seeds == 1:
        yield "Every method ran with one seed, so it is unknown how much two trainings of one method differ."
    elif 1 < seeds < 5:
        yield f"There are at most {seeds} seeds per method: standard deviations are rough."
    yield from _sizes(results)
    yield from _fairness(results)
    name = results.backbone.get("name")
    if "; " not in str(results.backbone.get("fingerprint")):  # a report over folders has several
        yield f"There is one backbone{f' ({name})' if name else ''}: others may rank methods otherwise."


def _sizes(results: Results) -> Iterator[str]:
    counts = {
        task: max(score.n for scores in methods.values() for score in scores.values())
        for task, methods in results.tasks.items()
        if any(methods.values())
    }
    small = [results.named(task) for task, rows in counts.items() if rows < SMALL_ROWS]
    if small:
        yield (
            f"Fewer than {SMALL_ROWS} test {results.unit} in {counted(len(small), 'task')} ({_first(small)}): "
            "differences of a few points there are noise."
        )
    if 1 < len(results.tasks) < SMALL_TASKS:
        yield f"A mean over {len(results.tasks)} tasks says little about other tasks."
    reasons = [info.get("dropped") for info in results.task_info.values()]
    dropped = sum(
        number
        for counts_of in reasons
        if isinstance(counts_of, Mapping)
        for number in counts_of.values()
        if isinstance(number, int | float)
    )
    if dropped:
        yield f"{counted(int(dropped), 'row')} were dropped before anything was scored, for the reasons under Settings."
    on_dev = [name for name, info in results.task_info.items() if info.get("reported") == "dev"]
    if on_dev:
        yield f"{_first(on_dev)}: without a validation part, scores are on the few rows of the development part."


def _fairness(results: Results) -> Iterator[str]:
    tried = {max((cell.tried or 1 for cell in results.done(name)), default=1) for name in results.overall}
    if len(tried) > 1:
        yield "Methods tried different numbers of settings (column tried); more tries find a better one by chance."
    free, restricted = WRITTEN
    if results.agreement is None and results.backbone.get("kind") == "causal" and free in results.overall:
        fairer = (
            f"{restricted}, which ranks the task's answers only, is the fairer comparison."
            if restricted in results.overall
            else f"without {restricted}, part of the gain of a learned prompt may be this form."
        )
        yield f"A learned prompt also learns the form of the answers, the manual one does not: {fairer}"
    yield f"The backbone's pretraining text may contain the test {results.unit}."
    trained = [name for name, method in results.methods.items() if method.trained and name in results.overall]
    without = [name for name in trained if "@" not in name and f"{name}{RANDOM_WEIGHTS}" not in results.overall]
    if without:
        yield (
            f"There is no control with random weights for {', '.join(without)}: how much the training {results.unit} "
            "alone teach is unknown."
        )


def _first(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{' and others' if len(names) > 5 else ''}"
