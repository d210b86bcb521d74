"""The limits of a run: sentences about what its results do not show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ptuning.names import RANDOM_WEIGHTS
from ptuning.report.blocks import counted
from ptuning.report.cell_files import read_curve
from ptuning.report.results_file import WRITTEN, Results

# With fewer rows than this, an interval is about ten points wide on either side.
SMALL_ROWS, SMALL_TASKS = 100, 10


def limits(results: Results) -> Iterator[str]:
    """Yield what a reader must not conclude from a run, and why."""
    yield from _cells(results)
    yield from _sizes(results)
    yield from _comparison(results)
    yield from _knowledge(results)
    name = results.backbone.get("name")
    called = f" ({name})" if name else ""
    if "; " not in str(results.backbone.get("fingerprint")):  # which a report over folders has of each
        yield f"There is one backbone{called}: the order of the methods may differ with other sizes and families."


def _cells(results: Results) -> Iterator[str]:
    done = [cell for cell in results.cells if cell.status == "done"]
    left = len(results.cells) - len(done)
    if left:
        yield (
            f"{counted(left, 'run')} of {len(results.cells):,} failed or did not run yet: the mean of a "
            "method that lacks some is over other tasks and seeds than that of a complete one."
        )
    lost = sum(read_curve(results.folder_of(cell)) is None for cell in done)
    if lost:
        yield f"The files of {counted(lost, 'finished run')} are missing, so curves and answers leave them out."
    seeds = max((len({cell.seed for cell in done if cell.method == name}) for name in results.overall), default=0)
    if seeds == 1:
        yield "Every method ran with one seed, so it is unknown how much two trainings of one method differ."
    elif 1 < seeds < 5:
        yield (
            f"There are at most {seeds} seeds per method, so the standard deviations are rough. The intervals describe "
            "other test parts, not other trainings."
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
            f"Fewer than {SMALL_ROWS} test {results.unit} in {counted(len(small), 'task')} ({named}): "
            "differences of a few points there are noise."
        )
    if 1 < len(results.tasks) < SMALL_TASKS:
        yield f"A mean over {len(results.tasks)} tasks says little about other tasks."
    reasons = [info.get("dropped") for info in results.task_info.values()]
    numbers = [number for counts in reasons if isinstance(counts, Mapping) for number in counts.values()]
    dropped = sum(number for number in numbers if isinstance(number, int | float))
    if dropped:
        yield (
            f"{counted(int(dropped), 'row')} were dropped before anything was scored, for the reasons under Settings: "
            "the scores are about the remaining rows."
        )


def _comparison(results: Results) -> Iterator[str]:
    written, learned = results.pair
    if results.overall and (written not in results.overall or learned not in results.overall):
        yield "A written or a learned prompt is missing, so the run does not show what learning the prompt changes."
    elif results.overall and f"{learned} - {written}" not in results.differences:
        yield f"The difference {learned} \N{MINUS SIGN} {written} has no paired test; compare the intervals with care."
    tried = {max((cell.tried or 1 for cell in results.done(name)), default=1) for name in results.overall}
    if len(tried) > 1:
        yield "Methods tried different numbers of settings (column tried); more tries find a better one by chance."
    if results.agreement is not None:
        yield from _choices(results)
    elif results.backbone.get("kind") == "causal" and WRITTEN[0] in results.overall:
        yield from _form(results)


def _choices(results: Results) -> Iterator[str]:
    if any(info.get("benchmark", True) for info in results.task_info.values()):  # older files do not say it
        yield (
            "Scores are on the validation part, whose labels are known. Only the benchmark's server can score its test "
            "part."
        )
    on_dev = [name for name, info in results.task_info.items() if info.get("reported") == "dev"]
    if on_dev:
        yield (
            f"{', '.join(on_dev)}: there is no validation part, so scores are on the few rows of the development part; "
            "do not compare them with scores from elsewhere."
        )
    few = []
    for name, info in results.task_info.items():
        data = info.get("data")
        dev = data.get("dev") if isinstance(data, Mapping) else None
        rows = dev.get("rows") if isinstance(dev, Mapping) else None
        if isinstance(rows, int | float) and rows < SMALL_ROWS:
            few.append(name)
    if few:
        yield (
            f"Fewer than {SMALL_ROWS} rows to choose settings by in {', '.join(few[:8])}: those choices are partly "
            "chance (see how well development and reported scores agree)."
        )
    yield "Each task has one pattern and one set of label words; with others the order of the methods may differ."


def _form(results: Results) -> Iterator[str]:
    """Limits of a written prompt on a causal model, which may write more than the answer."""
    free, restricted = WRITTEN
    why = (
        f"After the {free} prompt a causal backbone may continue with any word, such as an article. Training also "
        "teaches the form of the answers. "
    )
    if restricted in results.overall:
        yield f"{why}{restricted}, which ranks the task's answers only, is the fairer comparison."
    else:
        yield f"{why}Without {restricted}, part of the gain of a learned prompt may be this form."


def _knowledge(results: Results) -> Iterator[str]:
    if results.suite == "superglue":
        yield "The backbone's pretraining text may contain the rows, or the texts they were made from."
    elif results.suite != "compare":
        yield (
            "The backbone's pretraining text may contain the test facts. Recalling them is the task here, so the "
            "scores say nothing about facts that are new to the backbone."
        )
    else:
        yield "The backbone's pretraining text may contain the test records."
    trained = [name for name, method in results.methods.items() if method.trained and name in results.overall]
    without = [name for name in trained if "@" not in name and f"{name}{RANDOM_WEIGHTS}" not in results.overall]
    if without:
        yield (
            f"There is no control with random weights for {', '.join(without)}: it is unknown how much was learned "
            f"from the training {results.unit} alone and how much the backbone knew."
        )
