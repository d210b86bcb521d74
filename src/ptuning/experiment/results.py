"""From cells to tables: scores of tasks, means over tasks and types, and paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ptuning.experiment.cells import CellResult
from ptuning.method.registry import METHODS
from ptuning.metrics import RESULT_SCORES, most_of
from ptuning.names import LEARNED, MANUAL
from ptuning.report.results_file import Results, Scores, ScoreWithSpread
from ptuning.statistics import Score, Values, difference, mean_difference, mean_score, summary, value_of


@dataclass
class Collector:
    """Computes the tables of finished cells, from results without cells; methods are in the order of the tables."""

    empty: Results
    methods: Sequence[str]
    types: Mapping[str, str | None]
    _means: dict[tuple[str, str], tuple[int, Scores]] = field(default_factory=dict)

    def collect(self, cells: Sequence[CellResult]) -> Results:
        """Return the results with tables over the cells that are done."""
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
        found = replace(
            self.empty,
            cells=[one.record for one in cells],
            tasks=tasks,
            macro=over_tasks(done, names),
            by_type=by_type,
        )
        return replace(
            found, by_value=self._by_value(cells, names), differences=differences(done, compared(names, found.ranked))
        )

    def _by_value(self, cells: Sequence[CellResult], names: Sequence[str]) -> dict[str, dict[str, Scores]]:
        """Return value of a field -> method -> scores on the test records with that value."""
        done = [one for one in cells if one.status == "done"]
        table: dict[str, dict[str, Scores]] = {}
        for value in dict.fromkeys(value for one in done for value in one.by):
            for name in names:
                own = [replace(one, values=one.by[value]) for one in done if one.cell.method == name]
                if own:  # kept beside those of tasks, whose names have no line breaks
                    table.setdefault(value, {})[name] = self._summary(f"\n{value}", name, own)
        return table

    def _summary(self, task: str, method: str, results: Sequence[CellResult]) -> Scores:
        """Return the scores of a method on a task; the bootstrap is drawn again only when a seed joins."""
        kept = self._means.get((task, method))
        if kept is None or kept[0] != len(results):
            kept = self._means[task, method] = len(results), over_records(results)
        return kept[1]


def over_records(results: Sequence[CellResult]) -> dict[str, ScoreWithSpread]:
    """Return score -> mean over seeds, with an interval over records (each with its mean over the seeds)."""
    found = {}
    for name in _common(results):
        seeds = [result.values[name] for result in results]
        found[name] = _summary(summary(seeds, most=most_of(name)), [value_of(values) for values in seeds])
    return found


def over_tasks(done: Mapping[str, Mapping[str, Sequence[CellResult]]], names: Iterable[str]) -> dict[str, Scores]:
    """Return method -> score -> mean over tasks (macro average), with an interval over tasks.

    Source: Petroni et al. (2019), section 4 (macro average over relations).
    """
    table: dict[str, Scores] = {}
    for method in names:
        found = [methods[method] for methods in done.values() if method in methods]
        common = _common([one for results in found for one in results])
        scores = {}
        for name in common:
            means = [{one.cell.seed: value_of(one.values[name]) for one in results} for results in found]
            seeds = [seed for seed in means[0] if all(seed in row for row in means)]  # those that all tasks have
            by_seed = [float(np.mean([row[seed] for row in means])) for seed in seeds]
            tasks = [float(np.mean(list(row.values()))) for row in means]
            scores[name] = _summary(mean_score(tasks, bounds=(0.0, most_of(name))), by_seed)
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
    best = (ranked[0], ranked[1]) if len(ranked) > 1 else None
    if best is not None and best not in pairs and best[::-1] not in pairs:
        pairs.append(best)
    return list(dict.fromkeys(pairs))


def differences(
    done: Mapping[str, Mapping[str, Sequence[CellResult]]], pairs: Iterable[tuple[str, str]]
) -> dict[str, dict[str, Score]]:
    """Return ``A - B`` -> score -> paired difference with an interval over tasks, or over records of the only task."""
    found = {}
    for one, other in pairs:
        both = [(methods[one], methods[other]) for methods in done.values() if one in methods and other in methods]
        scores = {}
        for name in _common([one for pair in both for results in pair for one in results]):
            values = [([row.values[name] for row in left], [row.values[name] for row in right]) for left, right in both]
            scores[name] = (
                difference(*values[0], most=most_of(name))
                if len(values) == 1
                else mean_difference([_mean(left) - _mean(right) for left, right in values], most=most_of(name))
            )
        if scores:
            found[f"{one} - {other}"] = scores
    return found


def _mean(seeds: Sequence[Values]) -> float:
    return float(np.mean([value_of(values) for values in seeds]))


def _common(results: Sequence[CellResult]) -> list[str]:
    """Return the scores that all results have: in the order of the table, and those of texts in their own."""
    listed = dict.fromkeys([*RESULT_SCORES, *(name for result in results[:1] for name in result.values)])
    return [name for name in listed if results and all(name in result.values for result in results)]


def _summary(over: Score, by_seed: Sequence[float]) -> ScoreWithSpread:
    std = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None
    lowest = min(by_seed) if len(by_seed) > 1 else None
    return ScoreWithSpread(over.value, over.low, over.high, over.n, std, max(1, len(by_seed)), lowest)
