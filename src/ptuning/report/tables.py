"""The tables of a report. Every number in them is in the JSON files; no score is computed here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

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
    points,
    reading,
)
from ptuning.report.results_file import AnsweredRow, CellRecord, Results, ScoreTable, ScoreWithSpread, read_answers
from ptuning.statistics import FEWEST_PAIRS

SHOWN_HASH_DIGITS = 12
SHOWN_ANSWERS = 10
SHOWN_CHARACTERS = 120


def settings(results: Results) -> list[Block]:
    """Return the experiment and its backbone and, folded, all settings, tasks and versions."""
    backbone = {f"backbone {key}": value for key, value in results.backbone.items()}
    run = {"suite": results.suite, "command": results.command, **backbone}
    blocks: list[Block] = [Table("Suite, command and backbone.", ["", "value"], _listed(run), numbers=False)]
    if results.settings:
        rows = _listed(results.settings)
        caption = "Settings, given or by default, that act on one of the methods."
        blocks.append(Fold(counted(len(rows), "setting"), [Table(caption, ["setting", "value"], rows, numbers=False)]))
    if results.task_info:
        title = f"Templates and data of {counted(len(results.task_info), 'task')}"
        columns = ["task", "type", "manual template", "learned template", "rows", "dropped", "split", "data"]
        tasks = [_task(results.named(name), info) for name, info in results.task_info.items()]
        blocks.append(Fold(title, [Table(f"{title}.", columns, tasks, numbers=False)]))
    if results.versions:
        table = Table("Versions of packages.", ["package", "version"], _listed(results.versions), numbers=False)
        blocks.append(Fold("Versions", [table]))
    return blocks


def _listed(values: Mapping[str, Json]) -> list[list[Entry]]:
    return [[Entry(name), Entry(_shown(value))] for name, value in values.items() if value is not None]


def _task(name: str, info: Mapping[str, Json]) -> list[Entry]:
    splits, dropped = info.get("data"), info.get("dropped")
    reasons = dropped if isinstance(dropped, Mapping) else {}
    data = [
        f"{split}: {_shown(about.get('kept'))} of {_shown(about.get('rows'))} rows of {_shown(about.get('name'))}, "
        f"sha256 {_shown(about.get('sha256'))[:SHOWN_HASH_DIGITS]}"
        for split, about in (splits.items() if isinstance(splits, Mapping) else ())
        if isinstance(about, Mapping)
    ]
    return [
        Entry(name),
        *(Entry(_shown(info.get(key))) for key in ("type", "manual", "template", "rows")),
        Entry("; ".join(f"{reason}: {_shown(count)}" for reason, count in reasons.items()) or "none"),
        Entry(_shown(info.get("split"))),
        Entry("" if data else "–", data),
    ]


def main(results: Results) -> list[Block]:
    """Return the main table: a row per method with every score, the number of tried settings and mean seconds."""
    table = results.overall
    shown = in_order(name for scores in table.values() for name in scores)
    if not shown:
        return []
    best = {name: best_of(name, (row[name].value for row in table.values() if name in row)) for name in shown}
    rows = []
    for method in results.ordered(table):
        about = results.methods[method].describe if method in results.methods else ""
        cells = results.done(method)
        tried = sorted({cell.tried for cell in cells})
        seconds = sum(cell.seconds for cell in cells) / len(cells) if cells else 0.0
        rows.append(
            [
                Entry(method, [about] if about else []),
                *(
                    entry(score, best=score is not None and score.value == best[name] and len(table) > 1, of=name)
                    for name in shown
                    for score in [table[method].get(name)]
                ),
                Entry(" to ".join(f"{number:,}" for number in dict.fromkeys([*tried[:1], *tried[-1:]])) or "–"),
                Entry(f"{seconds:,.1f}", [counted(len(cells), "run")]) if cells else Entry("–"),
            ]
        )
    several = len(results.tasks) != 1
    of = f"means of {counted(len(results.tasks), 'task')}" if several else results.named(*results.tasks)
    part = "reported" if results.agreement is not None else "test"
    caption = (
        f"Scores on the {part} part ({of}; n counts {results.overall_unit}), with 95 % intervals; ★ marks the best of "
        "a column; sd is the standard deviation over seeds; tried is the number of settings that were compared "
        "on the development part."
    )
    if (beams := results.settings.get("num_beams")) is not None:
        caption += f" Texts are generated by a search of {_shown(beams)} beams."
    blocks: list[Block] = [Table(caption, ["method", *map(called, shown), "tried", "mean seconds"], rows)]
    signatures = {} if several else next(iter(results.task_info.values()), {}).get("signatures") or {}
    if signatures:
        signed = "; ".join(f"{called(name)}: {text}" for name, text in signatures.items())
        blocks.append(Text(f"Compare these scores with others only where all of this is equal. {signed}."))
    return blocks


def by_value(results: Results) -> list[Block]:
    """Return the scores by each value of a field of the test records, if ``by`` names one."""
    if not results.by_value:
        return []
    score, field = results.primary, _shown(results.settings.get("by"))
    methods = results.best_first(name for scores in results.by_value.values() for name in scores)
    rows = [[Entry(value), *_compared(scores, methods, score)] for value, scores in results.by_value.items()]
    caption = (
        f"{called(score)} by {field}, a field of the test {results.unit}, with 95 % intervals; ★ marks the best of a "
        f"row; n counts {results.unit}."
    )
    return [Table(caption, [field, *methods], rows)]


def _compared(table: ScoreTable, methods: Sequence[str], name: str) -> list[Entry]:
    """Return the entries of a row: one score of several methods, the best marked."""
    scores = [_of(table, method, name) for method in methods]
    best = best_of(name, (score.value for score in scores if score is not None))
    return [entry(score, best=score is not None and score.value == best, of=name) for score in scores]


def by_type(results: Results) -> list[Block]:
    """Return the scores for each type of relation, if there are several tasks, and of several types."""
    score, types = results.primary, results.shown_types
    if len(results.tasks) < 2 or not types:
        return []
    methods = results.ordered(name for table in types.values() for name in table)
    rows = [[Entry(method), *(entry(_of(table, method, score)) for table in types.values())] for method in methods]
    caption = f"{called(score)} by type of relation, means over the tasks of a type; n counts tasks."
    return [Table(caption, ["method", *types], rows)]


def per_task(results: Results) -> list[Block]:
    """Return every method's score on every task, if there are several; a task's own metrics have a row each."""
    if len(results.tasks) < 2:
        return []
    score = results.primary
    methods = results.best_first(name for table in results.tasks.values() for name in table)
    rows = []
    for task, table in results.tasks.items():
        own = results.task_info.get(task, {}).get("metrics")
        for name in map(str, own) if isinstance(own, list) and own else [score]:
            kind = called(name) if own else results.task_info.get(task, {}).get("type")
            heading = Entry(results.named(task), [_shown(kind)] if kind else [])
            rows.append([heading, *_compared(table, methods, name)])
    what = "The metrics of every task" if score == TASK_SCORE else f"{called(score)} on every task"
    unit = f"{results.unit}, or groups of them that are scored together" if score == TASK_SCORE else results.unit
    caption = f"{what}, with 95 % intervals; ★ marks the best of a row; n counts {unit}."
    return [Table(caption, ["task", *methods], rows)]


def agreement(results: Results) -> list[Block]:
    """Return how well the development score of the chosen settings predicts the reported score."""
    choices = results.agreement
    if choices is None or not choices.cells:
        return []
    runs = f"n = {len(choices.cells):,} runs"
    if len(choices.cells) < FEWEST_PAIRS:
        text = (
            f"There are too few runs for a rank correlation with the reported score, {FEWEST_PAIRS} at least ({runs})"
        )
    elif choices.correlation is None:
        text = f"Its rank correlation with the reported score cannot be computed here ({runs})"
    else:
        text = (
            "Its rank correlation with the reported score, after each task's means are subtracted, is "
            f"{choices.correlation:.2f} ({runs}; near zero, choosing is little better than chance)"
        )
    gap = "" if choices.mean_gap is None else f", and their mean difference is {points(choices.mean_gap)} points"
    rows = [
        [
            Entry(text)
            for text in (
                results.named(choice.task), choice.method, percent(choice.dev), percent(choice.test),
                points(choice.dev - choice.test),
            )
        ]
        for choice in choices.cells
    ]  # fmt: skip
    caption = "Shares of rows that the chosen setting answered correctly, for each run."
    columns = ["task", "method", "development", "reported", "difference in points"]
    return [
        Text(f"Epochs, learning rates and examples in context are chosen by the development score. {text}{gap}."),
        Fold(f"Every run, {len(rows):,}", [Table(caption, columns, rows)]),
    ]


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
    text = (
        f"A method's score on random weights was learned from the training {results.unit} alone. Only what the "
        "pretrained backbone adds to it can be knowledge that the prompt recalls."
    )
    caption = (
        f"{called(score)} with the pretrained backbone and with random weights; the n of scores counts "
        f"{results.overall_unit}."
    )
    return [Text(text), Table(caption, ["method", "pretrained", "random weights", "difference in points"], rows)]


def differences(results: Results) -> list[Block]:
    """Return the paired differences between methods."""
    shown = in_order(name for scores in results.differences.values() for name in scores)
    if not shown:
        return []
    rows = []
    for pair, scores in results.differences.items():
        first = scores.get(shown[0])
        columns = (difference(scores.get(name), of=name) for name in shown)
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
        if same:
            name = results.named(task)
            title = f"{name}: {len(gained):,} gained and {len(lost):,} lost of {len(same):,} {results.unit}"
            blocks = [
                _changed(rows, f"{name}: {{shown}} {what} by {learned} against {written}.", pair)
                for what, rows in (("gained", gained), ("lost", lost))
            ]
            folds.append(Fold(title, blocks))
    rule = (
        f"Gained answers are right with {learned} and wrong with {written}; lost ones the other way round. Each method "
        f"is taken with its lowest seed. The {SHOWN_ANSWERS} shown are the first when records are sorted by SHA-256."
    )
    return [Text(rule), *folds] if folds else []


def _changed(pairs: list[tuple[AnsweredRow, AnsweredRow]], caption: str, names: tuple[str, str]) -> Table | Text:
    if not pairs:
        return Text(caption.replace("{shown}", "none"))
    shown = f"{min(len(pairs), SHOWN_ANSWERS)} of {len(pairs):,}"
    rows = []
    for before, after in pairs[:SHOWN_ANSWERS]:
        fields = {name: text for name, text in after.record.items() if name != "y"}
        record = fields.get("x") or "; ".join(f"{name}: {text}" for name, text in fields.items())
        answers = [Entry(cut(row.answer.text, SHOWN_CHARACTERS), _ranked(row.answer)) for row in (before, after)]
        rows.append([Entry(cut(record, SHOWN_CHARACTERS)), Entry(cut(after.target or "", SHOWN_CHARACTERS)), *answers])
    return Table(caption.replace("{shown}", shown), ["record", "target", *names], rows, numbers=False)


def _by_record(results: Results, cell: CellRecord | None) -> dict[str, AnsweredRow]:
    """Return record -> answer of a cell; the n-th of equal records has its number in its key."""
    counts: Counter[str] = Counter()
    rows: dict[str, AnsweredRow] = {}
    path = results.folder_of(cell) / PREDICTIONS_FILE if cell is not None else None
    for row in read_answers(path) if path is not None and path.is_file() else []:
        key = json.dumps(row.record, sort_keys=True, ensure_ascii=False)
        counts[key] += 1
        rows[f"{key} {counts[key]}"] = row
    return rows


def _ranked(answer: Answer) -> list[str]:
    if answer.rank == 0:
        return ["target is none of the answers"]
    return [] if answer.rank is None else [f"target has rank {answer.rank:,}"]


def _of(table: ScoreTable, method: str, score: str) -> ScoreWithSpread | None:
    return table.get(method, {}).get(score)


def _shown(value: Json | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
