"""Results of several folders as one: the tasks that all of them have, with the methods of all, paired row by row."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ptuning.errors import FileError
from ptuning.experiment.cells import CellResult, text_values
from ptuning.experiment.results import Collector
from ptuning.files import Json
from ptuning.metrics import score_values
from ptuning.names import PREDICTIONS_FILE
from ptuning.records import TARGET_FIELD, Record
from ptuning.report.results_file import (
    Agreement,
    AnsweredRow,
    Cell,
    CellRecord,
    MethodInfo,
    Results,
    read_answers,
    read_results,
)
from ptuning.statistics import value_of

# What the rows of a task are, which folders with the same test rows share.
OF_ROWS = (
    "label", "relation", "type", "data", "rows", "dropped", "metrics", "text_metrics", "signatures", "benchmark",
    "labels",
)  # fmt: skip
# The keys of a task's own metrics, for answers and for texts.
METRICS = ("metrics", "text_metrics")
# A score that is computed anew from the answers must be the cell's own; else it is left out, since it needs more.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class _Asked:
    """A test row as scoring reads it."""

    record: Record
    right: Sequence[str]
    group: str | None


@dataclass(frozen=True)
class _Part:
    """One folder: its results, and the answers of its finished cells to the common tasks."""

    results: Results
    answers: Mapping[Cell, Sequence[AnsweredRow]]

    def given(self, method: str) -> list[object]:
        """Return what a method answered, for comparison with that of another folder."""
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
    parts = {label: _Part(one, _answers(one, tasks)) for label, one in zip(_labels(folders), read, strict=True)}
    for task in tasks:
        _check_same_rows(parts, task)
    base = Path(os.path.commonpath([Path(folder).absolute() for folder in folders]))
    cells: dict[Cell, CellResult] = {}
    methods: dict[str, MethodInfo] = {}
    for method in dict.fromkeys(name for one in read for name in one.ordered(one.overall)):
        for label, name in _names(parts, method).items():
            results = parts[label].results
            info = results.methods.get(method, MethodInfo())
            methods.setdefault(
                name, replace(info, describe=f"{info.describe}; {label}" if name != method else info.describe)
            )
            for record in results.cells:
                if record.method == method and record.task in tasks:
                    cell = Cell(record.task, name, record.seed)
                    cells.setdefault(cell, _cell(cell, record, parts[label], base))
    empty = replace(_described(parts, tasks), methods=methods, folder=base)
    types = {task: kind if isinstance(kind := empty.task_info[task].get("type"), str) else None for task in tasks}
    return Collector(empty, list(methods), types).collect(list(cells.values()))


def _labels(folders: Sequence[str | Path]) -> list[str]:
    """Return what folders are called: their last name, or the whole path where two have the same."""
    names = [Path(folder).absolute().name for folder in folders]
    counts = Counter(names)
    labels = [name if counts[name] == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    if len(set(labels)) < len(labels):
        raise FileError(f"the same folder is given twice: {', '.join(labels)}")
    return labels


def _answers(results: Results, tasks: Sequence[str]) -> dict[Cell, list[AnsweredRow]]:
    return {
        Cell(one.task, one.method, one.seed): read_answers(results.folder_of(one) / PREDICTIONS_FILE)
        for one in sorted(results.cells, key=lambda one: (one.task, one.method, one.seed))
        if one.status == "done" and one.task in tasks
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
                "their methods cannot be paired; run both on the same data, with the same backbone's tokens, --limit "
                "and seed of the split"
            )


def _names(parts: Mapping[str, _Part], method: str) -> dict[str, str]:
    """Return what a method is called for each folder that has it; folders with the same answers share a name."""
    owners: dict[str, str] = {}
    given = {label: found for label, part in parts.items() if (found := part.given(method))}
    for label, found in given.items():
        owners[label] = next(other for other in given if given[other] == found)
    is_one = len(set(owners.values())) == 1
    return {label: method if is_one else f"{method} ({owner})" for label, owner in owners.items()}


def _cell(cell: Cell, record: CellRecord, part: _Part, base: Path) -> CellResult:
    folder = part.results.folder_of(record).absolute().relative_to(base).as_posix()
    rows = part.answers.get(Cell(record.task, record.method, record.seed))
    if rows is None:
        return CellResult(cell, record.status, seconds=record.seconds, error=record.error, folder=folder)
    info, answers = part.results.task_info.get(record.task, {}), [row.answer for row in rows]
    metrics, of_texts = (list(map(str, found)) if isinstance(found := info.get(key), list) else [] for key in METRICS)
    if of_texts:
        values = text_values(answers, [row.record for row in rows], of_texts)
    else:
        asked = [_Asked({**row.record, TARGET_FIELD: row.target or ""}, (row.target or "",), row.group) for row in rows]
        values = score_values(answers, asked, metrics)
    own = {
        name: found
        for name, found in values.items()
        if name in record.scores and abs(value_of(found) - record.scores[name]) < TOLERANCE
    }
    return CellResult(cell, record.status, own, record.seconds, record.tried, folder=folder)


def _described(parts: Mapping[str, _Part], tasks: Sequence[str]) -> Results:
    """Return results without scores: what all folders have in common, and what each has where they differ."""
    first = next(iter(parts.values())).results
    whole = {label: part.results for label, part in parts.items()}
    infos = {task: {label: one.task_info.get(task, {}) for label, one in whole.items()} for task in tasks}
    return Results(
        first.suite,
        command="; ".join(f"{label}: {one.command}" for label, one in whole.items()),
        backbone=_joined({label: one.backbone for label, one in whole.items()}),
        settings=_joined({label: one.settings for label, one in whole.items()}),
        versions=_joined({label: one.versions for label, one in whole.items()}),
        task_info={
            task: {
                **_joined(own),
                **{key: value for key, value in first.task_info.get(task, {}).items() if key in OF_ROWS},
            }
            for task, own in infos.items()
        },
        agreement=Agreement([], None, None) if first.agreement is not None else None,
    )


def _joined(values: Mapping[str, Mapping[str, Json]]) -> dict[str, Json]:
    """Return each key with its value, or with a text that has the value of each folder where they differ."""
    joined: dict[str, Json] = {}
    for key in dict.fromkeys(key for one in values.values() for key in one):
        own = {label: one.get(key) for label, one in values.items()}
        first = next(iter(own.values()))
        is_same = all(value == first for value in own.values())
        joined[key] = first if is_same else "; ".join(f"{label}: {_text(value)}" for label, value in own.items())
    return joined


def _text(value: Json) -> str:
    return value if isinstance(value, str) else "not given" if value is None else json.dumps(value, ensure_ascii=False)
