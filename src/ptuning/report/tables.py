"""The blocks of a report's page (text, tables, pictures), and its tables. No score is computed here: every number in
them is in the JSON files.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ptuning.errors import cut
from ptuning.files import Json, sha256
from ptuning.metrics import TASK_SCORE, called, in_order, most_of
from ptuning.names import PREDICTIONS_FILE, RANDOM_WEIGHTS
from ptuning.report.results_file import AnsweredRow, Results, ScoreTable, ScoreWithSpread, read_answers
from ptuning.statistics import FEWEST_PAIRS, Score

SHOWN_HASH_DIGITS = 12
SHOWN_ANSWERS = 10
SHOWN_CHARACTERS = 120
NO_INTERVAL = "no interval"  # of a single value, or of equal ones


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    kind: ClassVar[str] = "items"
    items: Sequence[str]


@dataclass(frozen=True)
class Entry:
    """A table's entry: text, smaller lines below it, whether it is the best of its row or column, and its score."""

    text: str
    small: Sequence[str] = ()
    best: bool = False
    score: Score | None = None


@dataclass(frozen=True)
class Table:
    """A table. The first entry of each row is its heading; ``numbers`` aligns the other columns to the right."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    numbers: bool = True


@dataclass(frozen=True)
class Picture:
    """An SVG drawing, with a caption and a description for readers who cannot see it."""

    kind: ClassVar[str] = "picture"
    name: str
    svg: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Fold:
    """Blocks that are hidden until the reader opens them."""

    kind: ClassVar[str] = "fold"
    title: str
    blocks: Sequence[Text | Items | Table | Picture]


Block = Text | Items | Table | Picture | Fold


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    heading: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """The target of links within the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.heading.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A whole report: title, a warning if results are missing, the main result in a paragraph, and the sections."""

    title: str
    warning: Fold | None
    answer: str
    sections: Sequence[Section]


def decimal(value: float, *, signed: bool = False) -> str:
    """Write a fraction times a hundred with one decimal.

    >>> decimal(0.284, signed=True), decimal(-0.0001)
    ('+28.4', '0.0')
    """
    shown = f"{100 * value:.1f}"
    shown = "0.0" if shown == "-0.0" else shown.replace("-", "\N{MINUS SIGN}")
    return f"+{shown}" if signed and value > 0 and shown != "0.0" else shown


def percent(value: float, of: str = "") -> str:
    r"""Write the value ``of`` a score: a percentage, or as it is where the score goes up to 100.

    >>> percent(0.5234), percent(52.34, "bleu")
    ('52.3\xa0%', '52.3')
    """
    return decimal(value / most_of(of)) + ("" if most_of(of) > 1 else "\N{NO-BREAK SPACE}%")


def counted(number: int, noun: str) -> str:
    """Write a number with its noun, as in ``2 tasks``."""
    return f"{number:,} {noun if number == 1 else noun + 's'}"


def entry(score: Score | None, of: str, *, best: bool = False, signed: bool = False) -> Entry:
    """Return the value ``of`` a score, or a difference in points (``signed``), with its interval, n, and its spread
    over seeds if there are several.
    """
    if score is None:
        return Entry("–")
    most = most_of(of)
    low, high = (decimal(end / most, signed=signed) for end in (score.low, score.high))
    small = [f"[{low}, {high}]" if score.has_interval else NO_INTERVAL, f"n = {score.n:,}"]
    if isinstance(score, ScoreWithSpread) and score.std is not None and score.seeds > 1:
        small.append(f"sd {decimal(score.std / most)}, {score.seeds} seeds")
        small += [f"lowest {decimal(score.lowest / most)}"] if score.lowest is not None else []
    return Entry(decimal(score.value / most, signed=True) if signed else percent(score.value, of), small, best, score)


def phrase(score: Score, of: str, unit: str, *, signed: bool = False) -> str:
    r"""Write the value ``of`` a score, or a difference in points (``signed``), within a sentence.

    >>> phrase(Score(0.5, 0.4, 0.6, n=10), "mrr", "facts")
    '50.0\xa0% (95 % interval 40.0 to 60.0, n = 10 facts)'
    """
    most = most_of(of)
    shown = f"{decimal(score.value / most, signed=True)} points" if signed else percent(score.value, of)
    low, high = (decimal(end / most, signed=signed) for end in (score.low, score.high))
    interval = f"95 % interval {low} to {high}" if score.has_interval else NO_INTERVAL
    return f"{shown} ({interval}, {f'n = {score.n:,} {unit}'.rstrip()})"


def reading(score: Score) -> str:
    """Return whether the interval of a difference is above, below, or around zero."""
    if not score.has_interval:
        return NO_INTERVAL
    if score.low > 0:
        return "above zero"
    return "below zero" if score.high < 0 else "includes zero"


def main(results: Results) -> list[Block]:
    """Return the main table: a row per method with every score, the number of tried settings and mean seconds."""
    table = results.overall
    names = in_order(name for scores in table.values() for name in scores)
    if not names:
        return []
    best = {name: max(row[name].value for row in table.values() if name in row) for name in names}
    rows = []
    for method in results.ordered(table):
        about = results.methods[method].describe if method in results.methods else ""
        cells = results.done(method)
        tried = sorted({cell.tried for cell in cells})
        scores = [(name, table[method].get(name)) for name in names]
        rows.append(
            [
                Entry(method, [about] if about else []),
                *(
                    entry(score, name, best=score is not None and score.value == best[name] and len(table) > 1)
                    for name, score in scores
                ),
                Entry(" to ".join(f"{number:,}" for number in dict.fromkeys([*tried[:1], *tried[-1:]])) or "–"),
                Entry(f"{sum(cell.seconds for cell in cells) / len(cells):,.1f}", [counted(len(cells), "run")])
                if cells
                else Entry("–"),
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
    blocks: list[Block] = [Table(caption, ["method", *map(called, names), "tried", "mean seconds"], rows)]
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
    scores = [table.get(method, {}).get(name) for method in methods]
    best = max((score.value for score in scores if score is not None), default=None)
    return [entry(score, name, best=score is not None and score.value == best) for score in scores]


def by_type(results: Results) -> list[Block]:
    """Return the scores for each type of relation, if there are several tasks, and of several types."""
    score, types = results.primary, results.shown_types
    if len(results.tasks) < 2 or not types:
        return []
    methods = results.ordered(name for table in types.values() for name in table)
    rows = [
        [Entry(method), *(entry(table.get(method, {}).get(score), score) for table in types.values())]
        for method in methods
    ]
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
        info = results.task_info.get(task, {})
        own = info.get("metrics") or []
        for name in own or [score]:
            kind = called(name) if own else info.get("type")
            rows.append([Entry(results.named(task), [_shown(kind)] if kind else []), *_compared(table, methods, name)])
    is_mean = score == TASK_SCORE
    caption = (
        f"{'The metrics of' if is_mean else f'{called(score)} on'} every task, with 95 % intervals; ★ marks the best "
        f"of a row; n counts {results.unit}{', or groups of them that are scored together' if is_mean else ''}."
    )
    return [Table(caption, ["task", *methods], rows)]


def agreement(results: Results) -> list[Block]:
    """Return how well the development score of the chosen settings predicts the reported score."""
    choices = results.agreement
    if choices is None or not choices.cells:
        return []
    if len(choices.cells) < FEWEST_PAIRS:
        correlation = f"unknown: that takes {FEWEST_PAIRS} runs at least"
    elif choices.correlation is None:
        correlation = "undefined"
    else:
        correlation = f"{choices.correlation:.2f} (near zero, choosing is little better than chance)"
    gap = (
        "" if choices.mean_gap is None else f"; the mean difference is {decimal(choices.mean_gap, signed=True)} points"
    )
    text = (
        "Epochs, learning rates and examples in context are chosen by the development score. Its rank correlation with "
        f"the reported score, after each task's means are subtracted, is {correlation}{gap}; "
        f"n = {len(choices.cells):,} runs."
    )
    rows = [
        [
            Entry(results.named(choice.task)),
            Entry(choice.method),
            Entry(percent(choice.dev)),
            Entry(percent(choice.test)),
            Entry(decimal(choice.dev - choice.test, signed=True)),
        ]
        for choice in choices.cells
    ]
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
        both = (entry(scores.get(name, {}).get(score), score) for name in (base, method))
        rows.append([Entry(base), *both, entry(gap, score, signed=True)])
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
    names = in_order(name for scores in results.differences.values() for name in scores)
    if not names:
        return []
    rows = []
    for pair, scores in results.differences.items():
        columns = (entry(scores.get(name), name, signed=True) for name in names)
        rows.append([Entry(pair), *columns, Entry(reading(scores[names[0]]) if names[0] in scores else "–")])
    large = ", ".join(called(name) for name in names if most_of(name) > 1)
    large = f" (of {large} in points)" if large else ""
    caption = (
        f"Differences in percentage points{large}, with 95 % intervals of the paired difference (both methods answered "
        f"the same {results.unit}). The last column compares the interval of {called(names[0])} with zero."
    )
    return [Table(caption, ["difference", *map(called, names), "interval"], rows)]


def changes(results: Results) -> list[Block]:
    """Return some answers that the learned prompt gained and some that it lost, for every task."""
    written, learned = results.pair
    folds: list[Block] = []
    for task in results.tasks:
        before, after = (_answers(results, task, method) for method in (written, learned))
        both = [(before[key], after[key]) for key in sorted(before.keys() & after.keys(), key=_digest)]
        gained, lost = (
            [(old, new) for old, new in both if new.answer.hit is is_right and old.answer.hit is not is_right]
            for is_right in (True, False)
        )
        if both:
            name = results.named(task)
            title = f"{name}: {len(gained):,} gained and {len(lost):,} lost of {len(both):,} {results.unit}"
            blocks: list[Text | Items | Table | Picture] = []
            for rows, change in ((gained, "gained"), (lost, "lost")):
                shown = f"{min(len(rows), SHOWN_ANSWERS)} of {len(rows):,}" if rows else "none"
                caption = f"{name}: {shown} {change} by {learned} against {written}."
                columns = ["record", "target", written, learned]
                table = Table(caption, columns, [_change(*pair) for pair in rows[:SHOWN_ANSWERS]], numbers=False)
                blocks.append(table if rows else Text(caption))
            folds.append(Fold(title, blocks))
    rule = (
        f"Gained answers are right with {learned} and wrong with {written}; lost ones the other way round. Each method "
        f"is taken with its lowest seed. The {SHOWN_ANSWERS} shown are the first when records are sorted by SHA-256."
    )
    return [Text(rule), *folds] if folds else []


def _digest(key: str) -> str:
    return sha256(key.encode())


def _answers(results: Results, task: str, method: str) -> dict[str, AnsweredRow]:
    """Return record -> answer of the first finished cell; the n-th of equal records has its number in its key."""
    counts: Counter[str] = Counter()
    rows: dict[str, AnsweredRow] = {}
    for cell in results.done(method, task)[:1]:
        path = results.folder_of(cell) / PREDICTIONS_FILE
        for row in read_answers(path) if path.is_file() else []:
            key = json.dumps(row.record, sort_keys=True, ensure_ascii=False)
            counts[key] += 1
            rows[f"{key} {counts[key]}"] = row
    return rows


def _change(before: AnsweredRow, after: AnsweredRow) -> list[Entry]:
    fields = {name: text for name, text in after.record.items() if name != "y"}
    record = fields.get("x") or "; ".join(f"{name}: {text}" for name, text in fields.items())
    entries = [Entry(cut(text, SHOWN_CHARACTERS)) for text in (record, after.target or "")]
    for answer in (before.answer, after.answer):
        rank = [] if answer.rank is None else [f"target has rank {answer.rank:,}"]
        small = ["target is none of the answers"] if answer.rank == 0 else rank
        entries.append(Entry(cut(answer.text, SHOWN_CHARACTERS), small))
    return entries


def settings(results: Results) -> list[Block]:
    """Return the experiment and its backbone and, folded, all settings, tasks and versions."""

    def table(caption: str, heading: str, values: Mapping[str, Json]) -> Table:
        rows = [[Entry(name), Entry(_shown(value))] for name, value in values.items() if value is not None]
        return Table(caption, [heading, "value"], rows, numbers=False)

    backbone = {f"backbone {key}": value for key, value in results.backbone.items()}
    run = {"suite": results.suite, "command": results.command, **backbone}
    blocks: list[Block] = [table("Suite, command and backbone.", "", run)]
    if results.settings:
        caption = "Settings, given or by default, that act on one of the methods."
        acting = table(caption, "setting", results.settings)
        blocks.append(Fold(counted(len(acting.rows), "setting"), [acting]))
    if results.task_info:
        title = f"Templates and data of {counted(len(results.task_info), 'task')}"
        columns = ["task", "type", "manual template", "learned template", "rows", "dropped", "split", "data"]
        tasks = [_task(results.named(name), info) for name, info in results.task_info.items()]
        blocks.append(Fold(title, [Table(f"{title}.", columns, tasks, numbers=False)]))
    if results.versions:
        blocks.append(Fold("Versions", [table("Versions of packages.", "package", results.versions)]))
    return blocks


def _task(name: str, info: Mapping[str, Json]) -> list[Entry]:
    parts, dropped = (value if isinstance(value := info.get(key), Mapping) else {} for key in ("data", "dropped"))
    data = [
        f"{part}: {_shown(about.get('kept'))} of {_shown(about.get('rows'))} rows of {_shown(about.get('name'))}, "
        f"sha256 {_shown(about.get('sha256'))[:SHOWN_HASH_DIGITS]}"
        for part, about in parts.items()
        if isinstance(about, Mapping)
    ]
    return [
        Entry(name),
        *(Entry(_shown(info.get(key))) for key in ("type", "manual", "template", "rows")),
        Entry("; ".join(f"{reason}: {_shown(count)}" for reason, count in dropped.items()) or "none"),
        Entry(_shown(info.get("split"))),
        Entry("" if data else "–", data),
    ]


def _shown(value: Json | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
