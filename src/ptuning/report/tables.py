"""The tables of a report: results in, blocks out. Computes no score; every number stands in the JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ptuning.files import Json
from ptuning.metrics import TASK_SCORE, called, in_order
from ptuning.names import RANDOM_WEIGHTS
from ptuning.report.blocks import (
    Block,
    Entry,
    Fold,
    Table,
    Text,
    counted,
    decimal,
    difference,
    entry,
    percent,
    phrase,
    points,
    reading,
)
from ptuning.report.results_file import Estimate, Findings

SHOWN_HASH_DIGITS = 12


def settings(findings: Findings) -> list[Block]:
    """Return what was run on what, and closed below it every setting, the tasks and the versions."""
    backbone = {f"backbone {key}": value for key, value in findings.backbone.items()}
    run = {"suite": findings.suite, "command": findings.command, **backbone}
    blocks: list[Block] = [Table("What was run.", ["", "value"], _listed(run), numbers=False)]
    if findings.settings:
        rows = _listed(findings.settings)
        table = Table("Every setting, given or by default.", ["setting", "value"], rows, numbers=False)
        blocks.append(Fold(counted(len(rows), "setting"), [table]))
    if findings.task_info:
        title = f"Templates and data of {counted(len(findings.task_info), 'task')}"
        columns = ["task", "type", "manual template", "learned template", "rows", "dropped", "split", "data"]
        tasks = [_task(findings.named(name), info) for name, info in findings.task_info.items()]
        blocks.append(Fold(title, [Table(f"{title}.", columns, tasks, numbers=False)]))
    if findings.versions:
        versions = _listed(findings.versions)
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


def main(findings: Findings) -> list[Block]:
    """Return the main table: a row per method, every score, and what it took."""
    scores = findings.overall
    shown = in_order(name for one in scores.values() for name in one)
    if not shown:
        return []
    best = {name: max(one[name].value for one in scores.values() if name in one) for name in shown}
    rows = []
    for method in findings.ordered(scores):
        about = findings.methods.get(method)
        columns = [(scores[method].get(name), best[name]) for name in shown]
        rows.append(
            [
                Entry(method, [about] if about else []),
                *(entry(one, best=one is not None and one.value == top and len(scores) > 1) for one, top in columns),
                *_effort(findings, method),
            ]
        )
    of = (
        findings.named(*findings.tasks)
        if len(findings.tasks) == 1
        else f"means of {counted(len(findings.tasks), 'task')}"
    )
    part = "reported" if findings.agreement is not None else "test"
    caption = (
        f"Scores on the {part} part ({of}; n counts {findings.overall_unit}), with 95 % intervals; ★ marks the best of "
        "a column; sd is the standard deviation over seeds; tried is the number of settings that the development part "
        "chose from."
    )
    return [Table(caption, ["method", *map(called, shown), "tried", "mean seconds"], rows)]


def _effort(findings: Findings, method: str) -> list[Entry]:
    """How many settings were tried, and the mean time of a run."""
    done = findings.done(method)
    tried = sorted({cell.tried for cell in done if cell.tried is not None})
    seconds = [cell.seconds for cell in done if cell.seconds is not None]
    lowest_to_highest = dict.fromkeys([*tried[:1], *tried[-1:]])
    return [
        Entry(" to ".join(f"{number:,}" for number in lowest_to_highest) or "–"),
        Entry(f"{sum(seconds) / len(seconds):,.1f}", [counted(len(seconds), "run")]) if seconds else Entry("–"),
    ]


def by_type(findings: Findings) -> list[Block]:
    """Return the scores of each type of relation, where there are several tasks."""
    if len(findings.tasks) < 2 or not findings.by_type:
        return []
    score, types = findings.primary, findings.by_type
    methods = findings.ordered(name for found in types.values() for name in found)
    rows = [[Entry(method), *(entry(_of(found, method, score)) for found in types.values())] for method in methods]
    caption = f"{called(score)} by type of relation, means over the tasks of a type; n counts tasks."
    return [Table(caption, ["method", *types], rows)]


def per_task(findings: Findings) -> list[Block]:
    """Return the score of every method on every task, where there are several; tasks with metrics of their own have a
    row for each of these.
    """
    if len(findings.tasks) < 2:
        return []
    score = findings.primary
    methods = findings.ordered(name for found in findings.tasks.values() for name in found)
    rows = []
    for task, found in findings.tasks.items():
        own = findings.task_info.get(task, {}).get("metrics")
        for name in map(str, own) if isinstance(own, list) and own else [score]:
            best = max((one[name].value for one in found.values() if name in one), default=None)
            scores = [_of(found, method, name) for method in methods]
            kind = called(name) if own else findings.task_info.get(task, {}).get("type")
            heading = Entry(findings.named(task), [_shown(kind)] if kind else [])
            rows.append([heading, *(entry(one, best=one is not None and one.value == best) for one in scores)])
    what = "The metrics of every task" if score == TASK_SCORE else f"{called(score)} on every task"
    unit = f"{findings.unit}, or groups of them that are scored together" if score == TASK_SCORE else findings.unit
    caption = f"{what}, with 95 % intervals; ★ marks the best of a row; n counts {unit}."
    return [Table(caption, ["task", *methods], rows)]


def agreement(findings: Findings) -> list[Block]:
    """Return how far the development score of what was chosen says what the reported score will be."""
    found = findings.agreement
    if found is None or not found.points:
        return []
    said = (
        "Nothing can be said of how the two go together"
        if found.correlation is None
        else f"Their rank correlation over runs, each task's means taken off, is {found.correlation:.2f}"
    )
    gap = "" if found.mean_gap is None else f", and their mean difference {points(found.mean_gap)} points"
    text = (
        "Epochs, learning rates and examples in context are chosen by the development score. "
        f"{said} (n = {len(found.points):,}){gap}. With a correlation near zero, choosing by so few rows is little "
        "better than drawing lots."
    )
    rows = [
        [
            Entry(findings.named(task)),
            Entry(method),
            Entry(percent(dev)),
            Entry(percent(test)),
            Entry(points(dev - test)),
        ]
        for task, method, dev, test in found.points
    ]
    caption = "Shares of rows answered rightly by what was chosen, run by run."
    columns = ["task", "method", "development", "reported", "difference in points"]
    return [Text(text), Fold(f"Every run, {len(rows):,}", [Table(caption, columns, rows)])]


def control(findings: Findings) -> list[Block]:
    """Return what the same method reaches where the backbone knows nothing."""
    score, scores = findings.primary, findings.overall
    rows = []
    for method in findings.controls:
        base = method.removesuffix(RANDOM_WEIGHTS)
        gap = findings.differences.get(f"{base} - {method}", {}).get(score)
        rows.append([Entry(base), entry(_of(scores, base, score)), entry(_of(scores, method, score)), difference(gap)])
    if not rows:
        return []
    common = _of(scores, "majority", score)
    also = f" Always giving the majority answer reaches {phrase(common, findings.overall_unit)}." if common else ""
    return [
        Text(
            "A backbone with random weights has read nothing, so whatever a method scores on it was learned from the "
            f"training facts alone: which answers are frequent, and which words hint at them.{also} Only what the "
            "pretrained backbone adds to that can be knowledge that the prompt recalled."
        ),
        Table(
            f"{called(score)} with the pretrained backbone and with random weights; the n of scores counts "
            f"{findings.overall_unit}.",
            ["method", "pretrained", "random weights (training facts alone)", "difference in points"],
            rows,
        ),
    ]


def differences(findings: Findings) -> list[Block]:
    """Return the paired differences between methods."""
    shown = in_order(name for found in findings.differences.values() for name in found)
    if not shown:
        return []
    rows = []
    for pair, found in findings.differences.items():
        first = found.get(shown[0])
        columns = (difference(found.get(name)) for name in shown)
        rows.append([Entry(pair), *columns, Entry(reading(first) if first is not None else "–")])
    caption = (
        "Differences in percentage points, with 95 % intervals of the paired difference (both methods answered the "
        f"same {findings.unit}). The last column says where the interval of {called(shown[0])} lies."
    )
    return [Table(caption, ["difference", *map(called, shown), "interval"], rows)]


def wordings(findings: Findings) -> list[Block]:
    """Return how far the wordings of a relation lie apart, and the score of every wording."""
    score = called(findings.primary)
    rows, folds = [], []
    for name, relation in findings.paraphrases.items():
        title = findings.named(name)
        for method, spread in relation.spread.items():
            numbers = [percent(spread.min), percent(spread.max), decimal(spread.range)]
            std = decimal(spread.std) if spread.std is not None else "–"
            rows.append([Entry(title), Entry(method), Entry(str(spread.patterns)), *map(Entry, [*numbers, std])])
        methods = findings.ordered(method for one in relation.wordings for method in one.scores)
        every = [[Entry(one.pattern), *(entry(one.scores.get(name)) for name in methods)] for one in relation.wordings]
        caption = f"{score} of the wordings of {title}, with 95 % intervals; n counts {findings.unit}."
        folds.append(Fold(f"The wordings of {title}", [Table(caption, ["wording", *methods], every)]))
    caption = (
        f"How far the wordings of a relation lie apart ({score}); the interval and n of every wording stand below."
    )
    columns = ["relation", "method", "wordings", "min", "max", "range in points", "sd in points"]
    return [Table(caption, columns, rows), *folds]


def _of(found: Mapping[str, Mapping[str, Estimate]], method: str, score: str) -> Estimate | None:
    return found.get(method, {}).get(score)


def _shown(value: Json | None) -> str:
    """Write a setting: text as it is, anything else as JSON."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
