"""The tables of a report. Every number in them is in the JSON files; no score is computed here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping

from ptuning.errors import cut
from ptuning.files import Json, sha256
from ptuning.metrics import TASK_SCORE, Answer, best_of, called, in_order, most_of
from ptuning.names import PREDICTIONS_FILE, RANDOM_WEIGHTS
from ptuning.report.blocks import (
    Block,
    Entry,
    Fold,
    Table,
    Text,
    counted,
    difference,
    entry,
    percent,
    phrase,
    points,
    reading,
)
from ptuning.report.cell_files import AnsweredRow, read_answers
from ptuning.report.results_file import CellRecord, Results, ScoreTable, ScoreWithSpread
from ptuning.statistics import FEWEST_PAIRS

SHOWN_HASH_DIGITS = 12
SHOWN_ANSWERS = 10
SHOWN_CHARACTERS = 120


def settings(results: Results) -> list[Block]:
    """Return the experiment and its backbone and, folded, all settings, tasks and versions."""
    backbone = {f"backbone {key}": value for key, value in results.backbone.items()}
    run = {"suite": results.suite, "command": results.command, **backbone}
    blocks: list[Block] = [Table("What was run.", ["", "value"], _listed(run), numbers=False)]
    if results.settings:
        rows = _listed(results.settings)
        table = Table("Every setting, given or by default.", ["setting", "value"], rows, numbers=False)
        blocks.append(Fold(counted(len(rows), "setting"), [table]))
    if results.task_info:
        title = f"Templates and data of {counted(len(results.task_info), 'task')}"
        columns = ["task", "type", "manual template", "learned template", "rows", "dropped", "split", "data"]
        tasks = [_task(results.named(name), info) for name, info in results.task_info.items()]
        blocks.append(Fold(title, [Table(f"{title}.", columns, tasks, numbers=False)]))
    if results.versions:
        versions = _listed(results.versions)
        table = Table("Versions that the numbers depend on.", ["package", "version"], versions, numbers=False)
        blocks.append(Fold("Versions", [table]))
    return blocks


def _listed(values: Mapping[str, Json]) -> list[list[Entry]]:
    return [[Entry(name), Entry(_shown(value))] for name, value in values.items() if value is not None]


def _task(name: str, info: Mapping[str, Json]) -> list[Entry]:
    parts, dropped = info.get("data"), info.get("dropped")
    lost = dropped if isinstance(dropped, Mapping) else {}
    data = [
        f"{part}: {_shown(about.get('kept'))} of {_shown(about.get('rows'))} rows of {_shown(about.get('name'))}, "
        f"sha256 {_shown(about.get('sha256'))[:SHOWN_HASH_DIGITS]}"
        for part, about in (parts.items() if isinstance(parts, Mapping) else ())
        if isinstance(about, Mapping)
    ]
    return [
        Entry(name),
        *(Entry(_shown(info.get(key))) for key in ("type", "manual", "template", "rows")),
        Entry("; ".join(f"{reason}: {_shown(count)}" for reason, count in lost.items()) or "none"),
        Entry(_shown(info.get("split"))),
        Entry("" if data else "–", data),
    ]


def main(results: Results) -> list[Block]:
    """Return the main table: a row per method with every score, then :data:`COLUMNS`."""
    scores = results.overall
    shown = in_order(name for one in scores.values() for name in one)
    if not shown:
        return []
    best = {name: best_of(name, (one[name].value for one in scores.values() if name in one)) for name in shown}
    rows = []
    for method in results.ordered(scores):
        about = results.methods[method].describe if method in results.methods else ""
        columns = [(scores[method].get(name), name) for name in shown]
        rows.append(
            [
                Entry(method, [about] if about else []),
                *(
                    entry(one, best=one is not None and one.value == best[name] and len(scores) > 1, of=name)
                    for one, name in columns
                ),
                *(column(results, method) for column in COLUMNS.values()),
            ]
        )
    of = results.named(*results.tasks) if len(results.tasks) == 1 else f"means of {counted(len(results.tasks), 'task')}"
    part = "reported" if results.agreement is not None else "test"
    caption = (
        f"Scores on the {part} part ({of}; n counts {results.overall_unit}), with 95 % intervals; ★ marks the best of "
        "a column; sd is the standard deviation over seeds; tried is the number of settings that were compared "
        "on the development part."
    )
    if (beams := results.settings.get("num_beams")) is not None:
        caption += f" Texts are written by a search of {_shown(beams)} beams."
    signed = [f"{called(name)}: {text}" for name, text in _signatures(results).items()]
    told = [Text(f"Compare these scores with others only where all of this is equal. {'; '.join(signed)}.")]
    return [Table(caption, ["method", *map(called, shown), *COLUMNS], rows), *(told if signed else [])]


def _signatures(results: Results) -> Mapping[str, Json]:
    """Return score -> the signature that its library gives, of the only task."""
    found = next(iter(results.task_info.values()), {}).get("signatures") if len(results.tasks) == 1 else None
    return found if isinstance(found, Mapping) else {}


def by_value(results: Results) -> list[Block]:
    """Return the scores by each value of a field of the test records, if that is asked for."""
    if not results.by_value:
        return []
    score, field = results.primary, _shown(results.settings.get("by"))
    methods = results.best_first(name for found in results.by_value.values() for name in found)
    rows = []
    for value, found in results.by_value.items():
        scores = [_of(found, method, score) for method in methods]
        best = best_of(score, (one.value for one in scores if one is not None))
        rows.append(
            [Entry(value), *(entry(one, best=one is not None and one.value == best, of=score) for one in scores)]
        )
    caption = (
        f"{called(score)} by {field}, a field of the test {results.unit}, with 95 % intervals; ★ marks the best of a "
        f"row; n counts {results.unit}."
    )
    return [Table(caption, [field, *methods], rows)]


def _tried(results: Results, method: str) -> Entry:
    tried = sorted({cell.tried for cell in results.done(method)})
    lowest_to_highest = dict.fromkeys([*tried[:1], *tried[-1:]])
    return Entry(" to ".join(f"{number:,}" for number in lowest_to_highest) or "–")


def _mean_seconds(results: Results, method: str) -> Entry:
    seconds = [cell.seconds for cell in results.done(method)]
    if not seconds:
        return Entry("–")
    return Entry(f"{sum(seconds) / len(seconds):,.1f}", [counted(len(seconds), "run")])


# The columns of the main table after the scores: heading -> entry of a method.
COLUMNS: Mapping[str, Callable[[Results, str], Entry]] = {"tried": _tried, "mean seconds": _mean_seconds}


def by_type(results: Results) -> list[Block]:
    """Return the scores for each type of relation, if there are several tasks, and of several types."""
    score, types = results.primary, results.shown_types
    if len(results.tasks) < 2 or not types:
        return []
    methods = results.ordered(name for found in types.values() for name in found)
    rows = [[Entry(method), *(entry(_of(found, method, score)) for found in types.values())] for method in methods]
    caption = f"{called(score)} by type of relation, means over the tasks of a type; n counts tasks."
    return [Table(caption, ["method", *types], rows)]


def per_task(results: Results) -> list[Block]:
    """Return every method's score on every task, if there are several; a task's own metrics have a row each."""
    if len(results.tasks) < 2:
        return []
    score = results.primary
    methods = results.best_first(name for found in results.tasks.values() for name in found)
    rows = []
    for task, found in results.tasks.items():
        own = results.task_info.get(task, {}).get("metrics")
        for name in map(str, own) if isinstance(own, list) and own else [score]:
            best = max((one[name].value for one in found.values() if name in one), default=None)
            scores = [_of(found, method, name) for method in methods]
            kind = called(name) if own else results.task_info.get(task, {}).get("type")
            heading = Entry(results.named(task), [_shown(kind)] if kind else [])
            rows.append([heading, *(entry(one, best=one is not None and one.value == best) for one in scores)])
    what = "The metrics of every task" if score == TASK_SCORE else f"{called(score)} on every task"
    unit = f"{results.unit}, or groups of them that are scored together" if score == TASK_SCORE else results.unit
    caption = f"{what}, with 95 % intervals; ★ marks the best of a row; n counts {unit}."
    return [Table(caption, ["task", *methods], rows)]


def agreement(results: Results) -> list[Block]:
    """Return how well the development score of the chosen settings predicts the reported score."""
    found = results.agreement
    if found is None or not found.cells:
        return []
    few = len(found.cells) < FEWEST_PAIRS
    said = (
        f"There are too few runs for a rank correlation with the reported score, {FEWEST_PAIRS} at least"
        if few
        else "Its rank correlation with the reported score cannot be computed here"
        if found.correlation is None
        else f"Its rank correlation with the reported score, after each task's means are subtracted, is "
        f"{found.correlation:.2f}"
    )
    gap = "" if found.mean_gap is None else f", and their mean difference is {points(found.mean_gap)} points"
    text = (
        "Epochs, learning rates and examples in context are chosen by the development score. "
        f"{said} (n = {len(found.cells):,} runs){gap}."
    )
    if not few and found.correlation is not None:
        text += " With a correlation near zero, choosing by so few rows is little better than chance."
    rows = []
    for one in found.cells:
        texts = [results.named(one.task), one.method, percent(one.dev), percent(one.test), points(one.dev - one.test)]
        rows.append(list(map(Entry, texts)))
    caption = "Shares of rows that the chosen setting answered correctly, for each run."
    columns = ["task", "method", "development", "reported", "difference in points"]
    return [Text(text), Fold(f"Every run, {len(rows):,}", [Table(caption, columns, rows)])]


def control(results: Results) -> list[Block]:
    """Return the scores of the same methods on a backbone with random weights."""
    score, scores = results.primary, results.overall
    rows = []
    for method in results.controls:
        base = method.removesuffix(RANDOM_WEIGHTS)
        gap = results.differences.get(f"{base} - {method}", {}).get(score)
        both = (entry(_of(scores, name, score), of=score) for name in (base, method))
        rows.append([Entry(base), *both, difference(gap, of=score)])
    if not rows:
        return []
    common = _of(scores, "majority", score)
    also = (
        f" Always giving the majority answer reaches {phrase(common, results.overall_unit, of=score)}."
        if common
        else ""
    )
    return [
        Text(
            "A backbone with random weights has read no text, so a method's score on it was learned from the training "
            f"{results.unit} alone: which answers are frequent, and which words hint at them.{also} Only what the "
            "pretrained backbone adds to this score can be knowledge that the prompt recalls."
        ),
        Table(
            f"{called(score)} with the pretrained backbone and with random weights; the n of scores counts "
            f"{results.overall_unit}.",
            ["method", "pretrained", f"random weights (training {results.unit} alone)", "difference in points"],
            rows,
        ),
    ]


def differences(results: Results) -> list[Block]:
    """Return the paired differences between methods."""
    shown = in_order(name for found in results.differences.values() for name in found)
    if not shown:
        return []
    rows = []
    for pair, found in results.differences.items():
        first = found.get(shown[0])
        columns = (difference(found.get(name), of=name) for name in shown)
        rows.append([Entry(pair), *columns, Entry(reading(first) if first is not None else "–")])
    large = [called(name) for name in shown if most_of(name) > 1]
    points = f" (of {', '.join(large)} in points)" if large else ""
    caption = (
        f"Differences in percentage points{points}, with 95 % intervals of the paired difference (both methods "
        f"answered the same {results.unit}). The last column compares the interval of {called(shown[0])} with zero."
    )
    return [Table(caption, ["difference", *map(called, shown), "interval"], rows)]


def changes(results: Results) -> list[Block]:
    """Return some answers that the learned prompt gained and some that it lost, for every task."""
    pair = written, learned = results.pair
    folds: list[Block] = []
    for task in results.tasks:
        before, after = (_by_record(results, next(iter(results.done(name, task)), None)) for name in pair)
        same = sorted(before.keys() & after.keys(), key=lambda key: sha256(key.encode()))
        gained = [(before[key], after[key]) for key in same if after[key].answer.hit and not before[key].answer.hit]
        lost = [(before[key], after[key]) for key in same if before[key].answer.hit and not after[key].answer.hit]
        if not same:
            continue
        title = f"{results.named(task)}: {len(gained):,} gained and {len(lost):,} lost of {len(same):,} {results.unit}"
        blocks = [
            _changed(pairs, f"{results.named(task)}: {{shown}} {what} by {learned} against {written}.", pair)
            for what, pairs in (("gained", gained), ("lost", lost))
        ]
        folds.append(Fold(title, blocks))
    if not folds:
        return []
    rule = (
        f"Gained answers are right with {learned} and wrong with {written}; lost ones the other way round. Each method "
        f"is taken with its lowest seed. The {SHOWN_ANSWERS} shown are the first when records are sorted by SHA-256."
    )
    return [Text(rule), *folds]


def _changed(pairs: list[tuple[AnsweredRow, AnsweredRow]], caption: str, names: tuple[str, str]) -> Table | Text:
    if not pairs:
        return Text(caption.replace("{shown}", "none"))
    shown = f"{min(len(pairs), SHOWN_ANSWERS)} of {len(pairs):,}"
    rows = []
    for before, after in pairs[:SHOWN_ANSWERS]:
        fields = {name: text for name, text in after.record.items() if name != "y"}
        record = fields.get("x") or "; ".join(f"{name}: {text}" for name, text in fields.items())
        answers = [Entry(cut(one.answer.text, SHOWN_CHARACTERS), _ranked(one.answer)) for one in (before, after)]
        rows.append([Entry(cut(record, SHOWN_CHARACTERS)), Entry(cut(after.target or "", SHOWN_CHARACTERS)), *answers])
    return Table(caption.replace("{shown}", shown), ["record", "target", *names], rows, numbers=False)


def _by_record(results: Results, cell: CellRecord | None) -> dict[str, AnsweredRow]:
    """Return record -> answer of a cell; the n-th of equal records has its number in its key."""
    seen: Counter[str] = Counter()
    found: dict[str, AnsweredRow] = {}
    path = results.folder_of(cell) / PREDICTIONS_FILE if cell is not None else None
    for row in read_answers(path) if path is not None and path.is_file() else []:
        key = json.dumps(row.record, sort_keys=True, ensure_ascii=False)
        seen[key] += 1
        found[f"{key} {seen[key]}"] = row
    return found


def _ranked(answer: Answer) -> list[str]:
    if answer.rank == 0:
        return ["target is none of the answers"]
    return [] if answer.rank is None else [f"target has rank {answer.rank:,}"]


def _of(found: ScoreTable, method: str, score: str) -> ScoreWithSpread | None:
    return found.get(method, {}).get(score)


def _shown(value: Json | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
