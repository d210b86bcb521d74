"""From cells to tables: scores of tasks, means over tasks and types, and paired differences; also over the results of
several folders (`merged`).
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ptuning.errors import FileError
from ptuning.experiment.cells import CellResult, text_values
from ptuning.files import Json
from ptuning.method.registry import METHODS
from ptuning.metrics import RESULT_SCORES, most_of, score_values
from ptuning.names import LEARNED, MANUAL, PREDICTIONS_FILE
from ptuning.records import TARGET_FIELD
from ptuning.report.results_file import (
    Agreement,
    AnsweredRow,
    Cell,
    CellRecord,
    MethodInfo,
    Results,
    Scores,
    ScoreWithSpread,
    read_answers,
    read_results,
)
from ptuning.statistics import Score, Values, difference, mean_difference, mean_score, summary, value_of

Done = Mapping[str, Mapping[str, Sequence[CellResult]]]  # task -> method -> its finished cells, one for each seed
# A score that is computed anew from the answers must be the cell's own; else it is left out, since it needs more.
TOLERANCE = 1e-6


@dataclass
class Collector:
    """Computes the tables of finished cells, from results without cells; methods are in the order of the tables."""

    empty: Results
    methods: Sequence[str]
    types: Mapping[str, str | None]
    _means: dict[tuple[str, str], tuple[int, Scores]] = field(default_factory=dict)

    def collect(self, cells: Sequence[CellResult]) -> Results:
        """Return the results with tables over the cells that are done."""
        finished = [result for result in cells if result.status == "done"]
        done: dict[str, dict[str, list[CellResult]]] = {}
        for result in finished:
            done.setdefault(result.cell.task, {}).setdefault(result.cell.method, []).append(result)
        present = {result.cell.method for result in cells}
        names = [name for name in self.methods if name in present]
        kinds = sorted({kind for task in done if (kind := self.types.get(task)) is not None})
        by_value: dict[str, dict[str, Scores]] = {}
        for value in dict.fromkeys(value for result in finished for value in result.by):
            for name in names:
                rows = [replace(result, values=result.by[value]) for result in finished if result.cell.method == name]
                if rows:  # its means are kept with those of tasks, whose names have no line breaks
                    by_value.setdefault(value, {})[name] = self._summary(f"\n{value}", name, rows)
        results = replace(
            self.empty,
            cells=[result.record for result in cells],
            tasks={
                task: {name: self._summary(task, name, methods[name]) for name in names if name in methods}
                for task, methods in done.items()
            },
            macro=over_tasks(done, names),
            by_type={
                kind: over_tasks({task: done[task] for task in done if self.types.get(task) == kind}, names)
                for kind in kinds
            },
            by_value=by_value,
        )
        return replace(results, differences=differences(done, compared(names, results.ranked)))

    def _summary(self, task: str, method: str, results: Sequence[CellResult]) -> Scores:
        """Return the scores of a method on a task; the bootstrap is drawn again only when a seed joins."""
        kept = self._means.get((task, method))
        if kept is None or kept[0] != len(results):
            kept = self._means[task, method] = len(results), over_records(results)
        return kept[1]


def over_records(results: Sequence[CellResult]) -> dict[str, ScoreWithSpread]:
    """Return score -> mean over seeds, with an interval over records (each with its mean over the seeds)."""
    scores = {}
    for name in _common(results):
        seeds = [result.values[name] for result in results]
        scores[name] = _with_spread(summary(seeds, most=most_of(name)), [value_of(values) for values in seeds])
    return scores


def over_tasks(done: Done, names: Iterable[str]) -> dict[str, Scores]:
    """Return method -> score -> mean over tasks (macro average), with an interval over tasks.

    Source: Petroni et al. (2019), section 4 (macro average over relations).
    """
    table: dict[str, Scores] = {}
    for method in names:
        cells = [methods[method] for methods in done.values() if method in methods]
        scores = {}
        for name in _common([result for results in cells for result in results]):
            means = [{result.cell.seed: value_of(result.values[name]) for result in results} for results in cells]
            seeds = [seed for seed in means[0] if all(seed in row for row in means)]  # those that all tasks have
            by_seed = [float(np.mean([row[seed] for row in means])) for seed in seeds]
            tasks = [float(np.mean(list(row.values()))) for row in means]
            scores[name] = _with_spread(mean_score(tasks, bounds=(0.0, most_of(name))), by_seed)
        if scores:
            table[method] = scores
    return table


def compared(names: Sequence[str], ranked: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of methods to compare: every method with the learned and with the manual prompt, a method with
    its variants, and the best of the ``ranked`` methods with the next.
    """
    bases = {name: name.partition(" ")[0] for name in names}
    slots = [name for name, base in bases.items() if "@" not in name and base in METHODS and METHODS[base].learns_slots]
    learned = next(iter(slots), LEARNED)
    pairs = [(learned, name) for name in names if name != learned and learned in names]
    pairs += [(name, MANUAL) for name in names if name not in (learned, MANUAL) and MANUAL in names]
    first = {base: name for name, base in reversed(bases.items())}  # of a method and its variants
    pairs += [(first[base], name) for name, base in bases.items() if first[base] != name]
    best = tuple(ranked[:2])
    if len(best) == 2 and best not in pairs and best[::-1] not in pairs:
        pairs.append(best)
    return list(dict.fromkeys(pairs))


def differences(done: Done, pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, Score]]:
    """Return ``A - B`` -> score -> paired difference with an interval over tasks, or over records of the only task."""
    table = {}
    for first, second in pairs:
        both = [
            (methods[first], methods[second]) for methods in done.values() if first in methods and second in methods
        ]
        scores = {}
        for name in _common([result for pair in both for results in pair for result in results]):
            values = [([row.values[name] for row in left], [row.values[name] for row in right]) for left, right in both]
            scores[name] = (
                difference(*values[0], most=most_of(name))
                if len(values) == 1
                else mean_difference([_mean(left) - _mean(right) for left, right in values], most=most_of(name))
            )
        if scores:
            table[f"{first} - {second}"] = scores
    return table


def _mean(seeds: Sequence[Values]) -> float:
    return float(np.mean([value_of(values) for values in seeds]))


def _common(results: Sequence[CellResult]) -> list[str]:
    """Return the scores that all results have: in the order of the table, and those of texts in their own."""
    listed = dict.fromkeys([*RESULT_SCORES, *(name for result in results[:1] for name in result.values)])
    return [name for name in listed if results and all(name in result.values for result in results)]


def _with_spread(over: Score, by_seed: Sequence[float]) -> ScoreWithSpread:
    several = len(by_seed) > 1
    std, lowest = (float(np.std(by_seed, ddof=1)), min(by_seed)) if several else (None, None)
    return ScoreWithSpread(over.value, over.low, over.high, over.n, std, max(1, len(by_seed)), lowest)


@dataclass(frozen=True)
class _Part:
    """One folder: its results, and the answers of its finished cells to the common tasks."""

    results: Results
    answers: Mapping[Cell, Sequence[AnsweredRow]]

    def given(self, method: str) -> list[object]:
        """Return the answers of a method, for comparison with those of another folder."""
        return [
            (cell.task, cell.seed, [(row.answer.text, row.answer.hit, row.answer.rank) for row in rows])
            for cell, rows in self.answers.items()
            if cell.method == method
        ]


def merged(folders: Sequence[str | Path]) -> Results:
    """Return the results of several comparisons of one kind as one, with paired differences of all methods.

    Its tasks are those that all folders have. A method whose answers differ between folders becomes one for each, named
    after its folder: ``p-tuning (r1)``.

    Raises:
        FileError: If a file is missing or damaged, the comparisons are of different kinds, they have no task in common,
            or other test rows of one.
    """
    read = [read_results(folder) for folder in folders]
    shown = ", ".join(map(str, folders))
    suites = {results.suite for results in read}
    if len(suites) > 1:
        raise FileError(f"{shown} are comparisons of different kinds ({', '.join(sorted(suites))}); give those of one")
    tasks = [task for task in read[0].tasks if all(task in results.tasks for results in read)]
    if not tasks:
        raise FileError(f"{shown} have no finished task in common, so no table can hold them")
    last = Counter(Path(folder).absolute().name for folder in folders)
    labels = [name if last[name := Path(folder).absolute().name] == 1 else str(folder) for folder in folders]
    if len(set(labels)) < len(labels):
        raise FileError(f"the same folder is given twice: {', '.join(labels)}")
    parts = {label: _Part(results, _answers(results, tasks)) for label, results in zip(labels, read, strict=True)}
    for task in tasks:
        _check_same_rows(parts, task)
    base = Path(os.path.commonpath([Path(folder).absolute() for folder in folders]))
    cells: dict[Cell, CellResult] = {}
    methods: dict[str, MethodInfo] = {}
    for method in dict.fromkeys(name for results in read for name in results.ordered(results.overall)):
        # Folders with the same answers share a name.
        given = {label: answers for label, part in parts.items() if (answers := part.given(method))}
        owners = {label: next(other for other in given if given[other] == given[label]) for label in given}
        for label, owner in owners.items():
            info = parts[label].results.methods.get(method, MethodInfo())
            name = method
            if len(set(owners.values())) > 1:
                name, info = f"{method} ({owner})", replace(info, describe=f"{info.describe}; {label}")
            methods.setdefault(name, info)
            for record in parts[label].results.cells:
                cell = Cell(record.task, name, record.seed)
                if record.method == method and record.task in tasks and cell not in cells:
                    cells[cell] = _cell(cell, record, parts[label], base)
    empty = replace(_described(parts, tasks), methods=methods, folder=base)
    types = {task: kind if isinstance(kind := empty.task_info[task].get("type"), str) else None for task in tasks}
    return Collector(empty, list(methods), types).collect(list(cells.values()))


def _answers(results: Results, tasks: Sequence[str]) -> dict[Cell, list[AnsweredRow]]:
    done = [cell for cell in results.cells if cell.status == "done" and cell.task in tasks]
    return {
        Cell(cell.task, cell.method, cell.seed): read_answers(results.folder_of(cell) / PREDICTIONS_FILE)
        for cell in sorted(done, key=lambda cell: (cell.task, cell.method, cell.seed))
    }


def _check_same_rows(parts: Mapping[str, _Part], task: str) -> None:
    rows = {
        label: [
            (row.record, row.target, row.group)
            for row in next(rows for cell, rows in part.answers.items() if cell.task == task)
        ]
        for label, part in parts.items()
    }
    first, *others = rows
    for label in others:
        if rows[label] != rows[first]:
            raise FileError(
                f"{task}: {first} and {label} have other test rows ({len(rows[first]):,} and {len(rows[label]):,}), so "
                "their methods cannot be paired; run both on the same data, with the same backbone's tokens, limit "
                "and seed of the split"
            )


def _cell(cell: Cell, record: CellRecord, part: _Part, base: Path) -> CellResult:
    """Return a finished cell with the scores that its answers give again, or one that failed."""
    folder = part.results.folder_of(record).absolute().relative_to(base).as_posix()
    rows = part.answers.get(Cell(record.task, record.method, record.seed))
    if rows is None:
        return CellResult(cell, record.status, seconds=record.seconds, error=record.error, folder=folder)
    info, answers = part.results.task_info.get(record.task, {}), [row.answer for row in rows]
    if info.get("text_metrics"):
        values = text_values(answers, [row.record for row in rows], info["text_metrics"])
    else:
        with_targets = [replace(row, record={**row.record, TARGET_FIELD: row.target or ""}) for row in rows]
        values = score_values(answers, with_targets, info.get("metrics") or ())
    own = {
        name: scored
        for name, scored in values.items()
        if name in record.scores and abs(value_of(scored) - record.scores[name]) < TOLERANCE
    }
    return CellResult(cell, record.status, own, record.seconds, record.tried, folder=folder)


def _described(parts: Mapping[str, _Part], tasks: Sequence[str]) -> Results:
    """Return results without scores: common values, and each folder's where they differ."""
    whole = {label: part.results for label, part in parts.items()}
    first = next(iter(whole.values()))
    backbone, settings, versions = (
        _joined({label: getattr(results, name) for label, results in whole.items()})
        for name in ("backbone", "settings", "versions")
    )
    return Results(
        first.suite,
        command="; ".join(f"{label}: {results.command}" for label, results in whole.items()),
        backbone=backbone,
        settings=settings,
        versions=versions,
        task_info={
            task: _joined({label: results.task_info.get(task, {}) for label, results in whole.items()})
            for task in tasks
        },
        agreement=Agreement([], None, None) if first.agreement is not None else None,
    )


def _joined(values: Mapping[str, Mapping[str, Json]]) -> dict[str, Json]:
    """Return each key with its value, or with a text that has the value of each folder where they differ."""
    joined: dict[str, Json] = {}
    for key in dict.fromkeys(key for mapping in values.values() for key in mapping):
        own = {label: mapping.get(key) for label, mapping in values.items()}
        first = next(iter(own.values()))
        is_same = all(value == first for value in own.values())
        joined[key] = first if is_same else "; ".join(f"{label}: {_text(value)}" for label, value in own.items())
    return joined


def _text(value: Json) -> str:
    return value if isinstance(value, str) else "not given" if value is None else json.dumps(value, ensure_ascii=False)
