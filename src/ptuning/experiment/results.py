"""From cells to tables: scores of tasks, means over tasks and types, paired differences, and ``results.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ptuning.experiment.cells import CellResult
from ptuning.experiment.suite import FORMAT_VERSION
from ptuning.files import Json, write_json
from ptuning.method.baselines import REFERENCE
from ptuning.metrics import RESULT_SCORES
from ptuning.names import LEARNED, LEARNED_BY_TUNE, RESULTS_FILE
from ptuning.statistics import Score, Values, difference, mean_difference, mean_score, summary, value_of


@dataclass(frozen=True)
class Summary(Score):
    """A mean with its 95 % interval over ``n`` rows (of a task) or tasks (of a suite).

    Args:
        std: Standard deviation over seeds; None for a single one.
        seeds: How many seeds the mean is over.
        lowest: The lowest of the seeds; None for a single one.
    """

    std: float | None = None
    seeds: int = 1
    lowest: float | None = None

    def to_json(self) -> dict[str, float | int]:
        """Return the summary as it stands in ``results.json``."""
        return dataclasses.asdict(self)


Scores = Mapping[str, Summary]
Table = Mapping[str, Scores]


@dataclass(frozen=True)
class Results:
    """What a suite found.

    Args:
        suite: ``compare``, ``lama`` or ``paraphrases``.
        cells: All cells, those waiting and failed included.
        tasks: Task -> method -> score -> summary over its test records.
        macro: Method -> score -> summary over tasks.
        by_type: Type of relation -> the same over its tasks.
        differences: ``A - B`` -> score -> paired difference over tasks (over records, where there is one task).
        about: Everything else in ``results.json``.
        folder: Where the files lie.
    """

    suite: str
    cells: Sequence[CellResult]
    tasks: Mapping[str, Table]
    macro: Table
    by_type: Mapping[str, Table]
    differences: Mapping[str, Mapping[str, Score]]
    about: Mapping[str, Json]
    folder: Path

    @property
    def failed(self) -> list[CellResult]:
        """The cells that failed."""
        return [result for result in self.cells if result.status == "failed"]

    def to_json(self) -> dict[str, Json]:
        """Return what stands in ``results.json``."""
        return {
            "format_version": FORMAT_VERSION,
            "suite": self.suite,
            **self.about,
            "cells": [result.to_json() for result in self.cells],
            "tasks": {name: _table_json(table) for name, table in self.tasks.items()},
            "macro": _table_json(self.macro),
            "by_type": {name: _table_json(table) for name, table in self.by_type.items()},
            "differences": {name: _scores_json(found) for name, found in self.differences.items()},
        }

    def write(self) -> None:
        """Write ``results.json``."""
        write_json(self.folder / RESULTS_FILE, self.to_json())


@dataclass
class Collector:
    """Gathers results of cells and makes tables of them; keeps what did not change.

    Args:
        suite: Name of the suite.
        methods: Names of the methods in the order of the tables.
        types: Task -> its type, None where there is none.
        about: Everything else in ``results.json``.
        folder: Where the files lie.
    """

    suite: str
    methods: Sequence[str]
    types: Mapping[str, str | None]
    about: Mapping[str, Json]
    folder: Path
    _means: dict[tuple[str, str], tuple[int, Scores]] = field(default_factory=dict)

    def collect(self, cells: Sequence[CellResult]) -> Results:
        """Return the tables over those cells that are done."""
        done: dict[str, dict[str, list[CellResult]]] = {}
        for result in cells:
            if result.status == "done":
                done.setdefault(result.cell.task, {}).setdefault(result.cell.method, []).append(result)
        done_or_not = {result.cell.method for result in cells}
        names = [name for name in self.methods if name in done_or_not]
        tasks = {
            task: {name: self._summary(task, name, methods[name]) for name in names if name in methods}
            for task, methods in done.items()
        }
        kinds = sorted({kind for task in tasks if (kind := self.types.get(task)) is not None})
        by_type = {
            kind: over_tasks({task: methods for task, methods in done.items() if self.types.get(task) == kind}, names)
            for kind in kinds
        }
        return Results(
            suite=self.suite,
            cells=tuple(cells),
            tasks=tasks,
            macro=over_tasks(done, names),
            by_type=by_type,
            differences=differences(done, names),
            about=self.about,
            folder=self.folder,
        )

    def _summary(self, task: str, method: str, results: Sequence[CellResult]) -> Scores:
        """Return the scores of a method on a task; the bootstraps of finished pairs are not drawn again."""
        kept = self._means.get((task, method))
        if kept is None or kept[0] != len(results):
            kept = self._means[task, method] = len(results), over_records(results)
        return kept[1]


def over_records(results: Sequence[CellResult]) -> dict[str, Summary]:
    """Return score -> mean over records and seeds; the interval is over records, each with its mean over the seeds."""
    found = {}
    for name in _common(results):
        seeds = [result.values[name] for result in results]
        found[name] = _summary(summary(seeds), [value_of(values) for values in seeds])
    return found


def over_tasks(done: Mapping[str, Mapping[str, Sequence[CellResult]]], names: Iterable[str]) -> dict[str, Scores]:
    """Return method -> score -> mean over tasks (macro average), with an interval over tasks.

    Source: Petroni et al. (2019), section 4 (macro average over relations).
    """
    table: dict[str, Scores] = {}
    for method in names:
        found = [methods[method] for methods in done.values() if method in methods]
        common = [name for name in RESULT_SCORES if found and all(name in _common(results) for results in found)]
        scores = {}
        for name in common:
            means = [{one.cell.seed: value_of(one.values[name]) for one in results} for results in found]
            seeds = [seed for seed in means[0] if all(seed in row for row in means)]  # those that all tasks have
            by_seed = [float(np.mean([row[seed] for row in means])) for seed in seeds]
            scores[name] = _summary(mean_score([float(np.mean(list(row.values()))) for row in means]), by_seed)
        if scores:
            table[method] = scores
    return table


def differences(
    done: Mapping[str, Mapping[str, Sequence[CellResult]]], names: Sequence[str]
) -> dict[str, dict[str, Score]]:
    """Return ``A - B`` -> score -> paired difference with an interval over tasks, or over records of the only task.

    Everything is compared with the learned prompt, and everything learned with the manual prompt.
    """
    learned = next((name for name in LEARNED_BY_TUNE.values() if name in names), LEARNED)
    pairs = [(learned, name) for name in names if name != learned and learned in names]
    pairs += [(name, REFERENCE) for name in names if name not in (learned, REFERENCE) and REFERENCE in names]
    found = {}
    for one, other in pairs:
        both = [(methods[one], methods[other]) for methods in done.values() if one in methods and other in methods]
        scores = {}
        for name in RESULT_SCORES:
            if not both or not all(name in _common(results) for pair in both for results in pair):
                continue
            values = [([row.values[name] for row in left], [row.values[name] for row in right]) for left, right in both]
            scores[name] = (
                difference(*values[0])
                if len(values) == 1
                else mean_difference([_mean(left) - _mean(right) for left, right in values])
            )
        if scores:
            found[f"{one} - {other}"] = scores
    return found


def _mean(seeds: Sequence[Values]) -> float:
    return float(np.mean([value_of(values) for values in seeds]))


def _common(results: Sequence[CellResult]) -> list[str]:
    return [name for name in RESULT_SCORES if all(name in result.values for result in results)]


def _summary(over: Score, by_seed: Sequence[float]) -> Summary:
    std = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None
    lowest = min(by_seed) if len(by_seed) > 1 else None
    return Summary(over.value, over.low, over.high, over.n, std, max(1, len(by_seed)), lowest)


def _scores_json(scores: Mapping[str, Score]) -> dict[str, Json]:
    return {name: dict(value.to_json()) for name, value in scores.items()}


def _table_json(table: Table) -> dict[str, Json]:
    return {method: _scores_json(scores) for method, scores in table.items()}
