"""What a run cannot show: sentences that depend on what its results hold. Knows nothing of pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ptuning.names import RANDOM_WEIGHTS
from ptuning.report.blocks import counted
from ptuning.report.cell_files import read_curve
from ptuning.report.results_file import WRITTEN, Results

# With so few rows an interval is some ten points wide on either side. With so few tasks a mean says little of others.
SMALL_ROWS, SMALL_TASKS = 100, 10


def caveats(results: Results) -> Iterator[str]:
    """Say what a reader must not conclude from a run, and why.

    Args:
        results: As they were read.
    """
    yield from _cells(results)
    yield from _sizes(results)
    yield from _comparison(results)
    yield from _knowledge(results)
    name = results.backbone.get("name")
    called = f" ({name})" if name else ""
    yield f"There is one backbone{called}: other sizes and families may order the methods otherwise."


def _cells(results: Results) -> Iterator[str]:
    done = [cell for cell in results.cells if cell.status == "done"]
    left = len(results.cells) - len(done)
    if left:
        yield (
            f"{counted(left, 'run')} of {len(results.cells):,} failed or did not run yet: a method that lacks some is "
            "a mean over other tasks and seeds than one that lacks none."
        )
    lost = sum(read_curve(results.folder_of(cell)) is None for cell in done)
    if lost:
        yield f"The files of {counted(lost, 'finished run')} are not there, so curves and answers leave them out."
    seeds = max((len({cell.seed for cell in done if cell.method == name}) for name in results.overall), default=0)
    if seeds == 1:
        yield "Every method ran with one seed: how far two trainings of one method lie apart is not known."
    elif 1 < seeds < 5:
        yield (
            f"There are at most {seeds} seeds a method: a standard deviation over so few is rough. The intervals are "
            "about other test parts, not about other trainings."
        )


def _sizes(results: Results) -> Iterator[str]:
    counts = {
        task: max(score.n for scores in methods.values() for score in scores.values())
        for task, methods in results.tasks.items()
        if any(methods.values())
    }
    small = [results.named(task) for task, rows in counts.items() if rows < SMALL_ROWS]
    if small:
        named = f"{', '.join(small[:5])}{' and others' if len(small) > 5 else ''}"
        yield (
            f"Fewer than {SMALL_ROWS} test {results.unit} in {counted(len(small), 'task')} ({named}): differences of "
            "a few points there are noise."
        )
    if 1 < len(results.tasks) < SMALL_TASKS:
        yield f"A mean over {len(results.tasks)} tasks says little about tasks that are not among them."
    dropped = 0.0
    for info in results.task_info.values():
        reasons = info.get("dropped")
        numbers = reasons.values() if isinstance(reasons, Mapping) else ()
        dropped += sum(number for number in numbers if isinstance(number, int | float))
    if dropped:
        yield (
            f"{counted(int(dropped), 'row')} were dropped before anything was scored, for the reasons under Settings: "
            "the scores are about the others."
        )


def _comparison(results: Results) -> Iterator[str]:
    written, learned = results.pair
    if results.overall and (written not in results.overall or learned not in results.overall):
        yield "A written or a learned prompt is missing, so the run does not say what learning the prompt changes."
    elif results.overall and f"{learned} - {written}" not in results.differences:
        yield f"The difference {learned} \N{MINUS SIGN} {written} was not tested in pairs; compare intervals with care."
    tried = {max((cell.tried or 1 for cell in results.done(name)), default=1) for name in results.overall}
    if len(tried) > 1:
        yield "Methods chose from different numbers of settings (column tried); more tries find better ones by chance."
    if results.agreement is not None:
        yield from _choices(results)
    elif results.backbone.get("kind") == "causal" and WRITTEN[0] in results.overall:
        yield from _form(results)
    if results.paraphrases:
        yield "The wordings are those that someone wrote down, not a sample of all ways to say it."


def _choices(results: Results) -> Iterator[str]:
    """What a benchmark with labels, and few rows to choose by, leaves open."""
    yield (
        "Scores are on the validation part, whose labels are known; the benchmark's own test part is scored by its "
        "server alone."
    )
    on_dev = [name for name, info in results.task_info.items() if info.get("reported") == "dev"]
    if on_dev:
        yield (
            f"{', '.join(on_dev)}: there is no validation part, so the few rows of the development part are reported; "
            "compare with nothing outside of this run."
        )
    few = [name for name, rows in _rows_to_choose_by(results).items() if rows < SMALL_ROWS]
    if few:
        yield (
            f"Fewer than {SMALL_ROWS} rows to choose by in {', '.join(few[:8])}: what was chosen there is chosen by "
            "chance in part (see how far development and reported scores agree)."
        )
    yield "One pattern and one set of label words per task were used; others may order the methods otherwise."


def _rows_to_choose_by(results: Results) -> dict[str, float]:
    found = {}
    for name, info in results.task_info.items():
        data = info.get("data")
        dev = data.get("dev") if isinstance(data, Mapping) else None
        rows = dev.get("rows") if isinstance(dev, Mapping) else None
        if isinstance(rows, int | float):
            found[name] = rows
    return found


def _form(results: Results) -> Iterator[str]:
    """A causal model says more with a written prompt than the answer."""
    free, restricted = WRITTEN
    why = (
        f"A causal backbone may go on with any word after the {free} prompt, such as an article, while training "
        "teaches the form of the answers as well. "
    )
    if restricted in results.overall:
        yield f"{why}{restricted}, which ranks the task's answers only, is the fairer measure of what the prompt knows."
    else:
        yield f"{why}Without {restricted}, part of what a learned prompt gains may be this form."


def _knowledge(results: Results) -> Iterator[str]:
    if results.suite == "superglue":
        yield "Rows, or the texts that they were made of, may stand in what the backbone was pretrained on."
    elif results.suite != "compare":
        yield (
            "Test facts may stand in the text that the backbone was pretrained on. That is what recalling means here, "
            "and it also means that the scores say nothing about facts that are new to it."
        )
    else:
        yield "Test records may stand in the text that the backbone was pretrained on."
    trained = [name for name, method in results.methods.items() if method.trained and name in results.overall]
    without = [name for name in trained if "@" not in name and f"{name}{RANDOM_WEIGHTS}" not in results.overall]
    if without:
        yield (
            f"There is no control with random weights for {', '.join(without)}: how much was learned from the training "
            f"{results.unit} alone, instead of being known to the backbone, is open."
        )
