"""Checks of data before a model is loaded: labels (detected, merged, mistyped), missing targets, empty fields, repeated
rows; and of a task with its data and a tokenizer (`ptuning task check`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ptuning.data.answer_space import AnswerSpace
from ptuning.data.questions import Question, Questions
from ptuning.data.task_files import TaskFile
from ptuning.errors import LabelWordError, PTuningError, RecordError, cut
from ptuning.records import TARGET_FIELD, canonical_json, require_targets
from ptuning.template.ambiguity import check_fields, check_targets
from ptuning.template.encode import Example, TokenizedTemplate
from ptuning.template.labels import LabelWords
from ptuning.template.language import Field, Template
from ptuning.template.segments import Kind, Tokenizer

# `--labels auto`: the different targets are the labels, each its own word.
AUTO = "auto"
# `alias_label case`: labels that differ in capitals and spaces only are one.
CASE = "case"
Labels: TypeAlias = LabelWords | Mapping[str, Sequence[str]] | Sequence[str] | str
Merge: TypeAlias = Mapping[str, str] | Sequence[str] | str

# More different targets than this are no labels: each would be scored in every step.
MAX_LABELS = 200
# Numbers with more different values than this are taken for amounts.
MAX_NUMBERS = 10
# Targets are named as possible labels if there are not more different ones, and each is there so often on average.
SEEN_LABELS, SEEN_ROWS = 50, 3
# A label with this many rows or fewer may be a mistyped one, if a similar one is at least TIMES as frequent.
RARE, TIMES = 2, 4
LONGEST = 64  # characters of what may be mistyped, or a number
# Rows of each part that `task check` tokenizes to see whether they fit.
FILLED_ROWS = 500
SHOWN = 5  # places, labels and the like in one message


@dataclass(frozen=True)
class Report:
    """The report of a check, a line each: counts, possible mistakes, and mistakes that make the data unusable.

    ``left_out`` names each row that is not used, and why.
    """

    facts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __add__(self, other: Report) -> Report:
        return Report(*(getattr(self, name) + getattr(other, name) for name in vars(self)))


@dataclass(frozen=True)
class Labelled:
    """Rows that were looked at: ``parts`` without the rows that are left out, the label words, and what was found."""

    parts: dict[str, Questions]
    words: LabelWords | None = None
    report: Report = field(default_factory=Report)


def label_rows(
    parts: Mapping[str, Questions],
    labels: Labels | None = None,
    *,
    fields: Sequence[str],
    known: LabelWords | None = None,
    merge: Merge | None = None,
    strict: bool = False,
) -> Labelled:
    """Look at the rows of each part (``train``, ``dev``, ``test``, or others) and at their labels.

    ``auto`` takes the targets of all parts but ``test`` as labels; rows whose label is rare and looks like a mistyped
    one are left out. If labels are ``known``, as those of a prompt are, it takes these. Rows without a target are left
    out, as long as most rows have one, and so are rows of ``train`` and ``dev`` in which all ``fields`` of the template
    are empty. ``merge`` says which labels count as others (old -> new, or texts such as ``biling=billing`` and
    ``case``).

    Raises:
        RecordError: If a part is empty, half of its targets or more are missing, one is none of the labels, the targets
            can be no labels, or something may be a mistake and the check is ``strict``.
        LabelWordError: If label words or what is to be merged is malformed.
    """
    given, report = _without_target(parts)
    require_rows(given)
    has_choices = any(questions.has_choices for questions in given.values())
    words = known if labels is None or labels == AUTO else LabelWords.of(labels)
    kept = given if has_choices else _merged(given, merge, words.labels if words is not None else ())
    kept, left = _without_empty(kept, fields)
    report += left
    learned = Counter(row.record[TARGET_FIELD] for name, rows in kept.items() if name != "test" for row in rows)
    if labels == AUTO:
        if has_choices:
            raise LabelWordError("labels are auto, and the rows bring their own choices; leave the labels out")
        words = known or LabelWords.of(found_labels(learned, name=next(iter(parts.values())).name))
        kept, left = _without_mistyped(kept, words.labels, learned)
        report += left
    if words is not None:
        for questions in kept.values():
            words.check_records(questions.records)
    if words is not None and not has_choices:
        report += Report(tuple(_counts(name, rows, words.labels) for name, rows in kept.items()))
    elif not has_choices:
        report += seen_labels(learned, kept)
    report += repeated(kept, fields, labelled=words is not None)
    if strict and report.warnings:
        raise RecordError("\n  ".join(("what the data holds is an error with --strict:", *report.warnings)))
    return Labelled(kept, words, report)


def require_rows(parts: Mapping[str, Questions]) -> None:
    """Raise a RecordError if a part is empty or lacks a target."""
    for name, questions in parts.items():
        if not questions:
            raise RecordError(f"the {name} data ({questions.name}) holds no records")
        require_targets(questions.records)


def found_labels(counts: Mapping[str, int], *, name: str) -> list[str]:
    """Return the different targets as labels, in alphabetical order, without rare ones that look mistyped; a
    RecordError if they can be no labels.
    """
    rows, most = sum(counts.values()), Counter(counts).most_common(3)
    remedy = 'name the labels (--labels "good;bad"), or the column that holds them (--field y=NAME)'
    shown = ", ".join(cut(text, LONGEST) for text, _ in most)
    if _are_amounts(counts):
        raise RecordError(
            f"{name}: the targets are numbers ({shown}, ...; {len(counts)} different ones): a prompt chooses among "
            f"words and learns no amounts. Make them a few classes in the file (low, high), or {remedy}"
        )
    if len(counts) > MAX_LABELS or (len(counts) > RARE and rows < 2 * len(counts)):
        raise RecordError(
            f"{name}: {len(counts):,} different targets in {rows:,} records ({shown}, ...) are too many to be labels. "
            f"Leave --labels out, and the answer is written; or {remedy}"
        )
    mistyped = look_alikes(counts)
    _check_spellings(counts, mistyped, name=name)
    kept = sorted(label for label in counts if label not in mistyped)
    if len(kept) < 2:
        raise RecordError(f"{name}: the targets have one label only ({shown}); {remedy}")
    return kept


def look_alikes(counts: Mapping[str, int]) -> dict[str, str]:
    """Return rare labels that look like a mistyped frequent one, with that one."""
    frequent = [label for label, _ in Counter(counts).most_common() if counts[label] > RARE]
    likely_labels = {}
    for label, count in counts.items() if len(counts) <= MAX_LABELS else ():
        likely = (other for other in frequent if counts[other] >= TIMES * count and _is_alike(label, other))
        other = next(likely, None) if count <= RARE else None
        if other is not None:
            likely_labels[label] = other
    return likely_labels


def seen_labels(counts: Mapping[str, int], parts: Mapping[str, Questions]) -> Report:
    """Say which different targets there are, if they are few and come again and again: they may be labels."""
    rows = sum(counts.values())
    if _are_amounts(counts):
        fact = (
            f"the targets are numbers ({len(counts)} different ones in {rows} records): they are written digit by "
            "digit, and a near miss is as wrong as any. For amounts, make a few classes of them (low, high)"
        )
        return Report((fact,))
    if not 2 <= len(counts) <= SEEN_LABELS or rows < SEEN_ROWS * len(counts):
        return Report()
    mistyped = look_alikes(counts)
    ordered = [label for label, _ in Counter(counts).most_common()]
    listed = ", ".join(f"{cut(label, LONGEST)} {counts[label]}" for label in ordered[: 2 * SHOWN])
    kept = [label for label in ordered if label not in mistyped]
    text = ";".join(kept)
    can_be_typed = len(kept) <= 2 * SHOWN and len(text) <= 4 * LONGEST and not set('=,"') & set(text)
    named = f', or --labels "{text}"' if can_be_typed and text.count(";") == len(kept) - 1 else ""
    fact = (
        f"{len(counts)} distinct targets in {rows} records: {listed}{', ...' * (len(ordered) > 2 * SHOWN)}. If they "
        f"are labels to choose among, give --labels auto{named}; without, the answer is written as text"
    )
    warnings = [
        f"'{label}' ({_places(_rows_with(parts, label))}) looks like '{other}'" for label, other in mistyped.items()
    ]
    return Report((fact,), tuple(warnings))


def empty_fields(name: str, questions: Questions, fields: Sequence[str]) -> list[str]:
    """Return a line for each field that is empty in rows of a part, with their places."""
    lines = []
    for field_name in fields:
        rows = [row for row in questions if not row.record.get(field_name, "?").strip()]
        if rows:
            count = f"{len(rows)} row{'s' * (len(rows) > 1)}"
            lines.append(f"{name}: the field '{field_name}' is empty in {count}: {_places(rows)}")
    return lines


def repeated(parts: Mapping[str, Questions], fields: Sequence[str], *, labelled: bool) -> Report:
    """Say which rows have the same text: in two parts, or in one part with one label or, as a doubt, with two."""
    facts, warnings = [], []
    seen: dict[str, dict[str, Question]] = {}
    for name, questions in parts.items():
        own: dict[str, Question] = {}
        twice, torn = [], []
        for row in questions:
            key = canonical_json({field_name: row.record.get(field_name, "") for field_name in fields}) + str(
                list(row.choices)
            )
            first = own.setdefault(key, row)
            if first is not row and first.right == row.right:
                twice.append((row, first))
            elif first is not row:
                torn.append((row, first))
        if fields and labelled and twice:
            facts.append(f"{name}: {_pairs(twice)} the same text and label as another")
        if fields and labelled and torn:
            warnings.append(f"{name}: {_pairs(torn)} the same text as another, and another label")
        for other, earlier in seen.items() if fields else ():
            both = [(row, earlier[key]) for key, row in own.items() if key in earlier]
            if both:
                warnings.append(f"{name}: {_pairs(both)} the text of a row of {other}, so the scores may be too good")
        seen[name] = own
    return Report(tuple(facts), tuple(warnings))


def check_data(task: TaskFile, parts: Mapping[str, Questions]) -> Report:
    """Count rows, choices, labels and groups of a task's data. Missing labels, empty fields, and rows of two parts with
    the same text are warnings.
    """
    facts, warnings = [], []
    for name, questions in parts.items():
        labels = Counter(row.record[TARGET_FIELD] for row in questions if TARGET_FIELD in row.record)
        line = f"{name}: {len(questions)} rows of {questions.name}"
        if task.answer_space.has_choices and questions:
            counts = sorted(len(row.choices) for row in questions)
            line += f"; {counts[0]} to {counts[-1]} choices, {counts[len(counts) // 2]} in the middle"
        elif task.label_words is not None and labels:
            line += "; " + ", ".join(f"{label} {labels[label]}" for label in task.label_words.labels)
            missing = [label for label in task.label_words.labels if not labels[label]]
            if missing:
                warnings.append(f"{name}: no row has the label {' or '.join(missing)}")
        groups = {row.group for row in questions if row.group is not None}
        facts.append(line + (f"; {len(groups)} groups" if groups else ""))
        warnings += empty_fields(name, questions, task.fields)
    again = repeated(parts, task.fields, labelled=task.label_words is not None)
    return Report(tuple(facts), tuple(warnings)) + again


def check_words(
    task: TaskFile, tokenizer: Tokenizer, kind: Kind, *, parts: Mapping[str, Questions] | None = None
) -> Report:
    """Fill every pattern of a task; report the tokens of its label words and the rows that get truncated.

    Without data (``parts``), a record whose fields hold their own names is filled in.
    """
    given = [questions for questions in (parts or {}).values() if questions]
    sample = given[0][0] if given else Question({name: name for name in task.fields}, choices=("this", "that"))
    report = Report()
    for number, pair in enumerate(zip(task.manual, task.learned, strict=True), start=1):
        for what, template in zip(("manual", "learned"), pair, strict=True):
            report += _check_template(f"pattern {number}, {what}", task, template, tokenizer, kind, sample, given)
    # Words are mostly the same tokens in all patterns, and mistakes in them the same mistakes.
    return Report(*(tuple(dict.fromkeys(lines)) for lines in vars(report).values()))


def check_known(bound: TokenizedTemplate, answers: AnswerSpace, parts: Iterable[Questions]) -> list[str]:
    """Return warnings about text in the parts of a task that the tokenizer does not know. Each different target is
    tokenised once, with the fields' own names as their texts.

    Raises LabelWordError if it does not know a label's word, or not from that of another; RecordError if it knows
    hardly any target of a part.
    """
    bare = {name: name for name in bound.template.fields}  # a template may begin with a field, which must not be empty
    warnings = []
    if answers.words is not None:
        answers.words.check_known(answers.words.examples(bound, bare))
    for questions in parts:
        records = questions.records
        if answers.words is None and all(row.right for row in questions):
            texts = list(dict.fromkeys(text for row in questions for text in row.right))
            examples = bound.examples([bare] * len(texts), targets=texts)
            known = {text for text, example in zip(texts, examples, strict=True) if example.known}
            distinguishable = [not known.isdisjoint(row.right) for row in questions]
            warnings += check_targets(distinguishable, records, is_choice=answers.has_choices)
        warnings += check_fields(bound.tokenizer, records, bound.template.fields)
    return warnings


def _merged(parts: Mapping[str, Questions], merge: Merge | None, labels: Sequence[str]) -> dict[str, Questions]:
    """Return the parts with labels that are to be others replaced."""
    if not merge:
        return dict(parts)
    pairs, by_case = _asked(merge)
    counts = Counter(row.record[TARGET_FIELD] for questions in parts.values() for row in questions)
    renamed = {label: pairs.get(label, label) for label in counts}
    if by_case:
        spellings: dict[str, str] = {}
        ordered = sorted(counts, key=lambda label: (-counts[label], label))
        for label in (*labels, *(renamed[label] for label in ordered)):
            spellings.setdefault(_folded(label), label)
        renamed = {label: spellings[_folded(new)] for label, new in renamed.items()}
    merged = {}
    for name, questions in parts.items():
        old = [row.record[TARGET_FIELD] for row in questions]
        rows = [
            row if renamed[label] == label else replace(row, record={**row.record, TARGET_FIELD: renamed[label]})
            for row, label in zip(questions, old, strict=True)
        ]
        merged[name] = _same(questions, rows) if any(renamed[label] != label for label in old) else questions
    return merged


def merges(merge: Merge | None) -> tuple[str, ...]:
    """Return what is to be merged as texts: ``biling=billing``, and ``case``; a LabelWordError if it is malformed."""
    if not merge:
        return ()
    pairs, by_case = _asked(merge)
    return (*(f"{old}={new}" for old, new in pairs.items()), *([CASE] if by_case else []))


def _asked(merge: Merge) -> tuple[dict[str, str], bool]:
    if isinstance(merge, Mapping):
        return {str(old): str(new) for old, new in merge.items()}, False
    pairs, by_case = {}, False
    texts = [merge] if isinstance(merge, str) else merge
    if not (isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)):
        raise LabelWordError(f"labels to merge are a mapping or texts such as biling=billing and {CASE}, not {merge!r}")
    for text in texts:
        old, equals, new = (part.strip() for part in text.partition("="))
        if text.strip() == CASE:
            by_case = True
        elif old and equals and new:
            pairs[old] = new
        else:
            raise LabelWordError(f"'{text}' is no merge of labels (alias_label); write WRONG=RIGHT, or {CASE}")
    return pairs, by_case


def _without_target(parts: Mapping[str, Questions]) -> tuple[dict[str, Questions], Report]:
    """Drop unlabelled rows, unless most rows are: then another field holds the target."""
    kept, report = {}, Report()
    for name, questions in parts.items():
        left = [row for row in questions if not row.record.get(TARGET_FIELD, "").strip()]
        if not left or 2 * len(left) >= len(questions):
            kept[name] = questions
            continue
        used = set(map(id, left))
        kept[name] = _same(questions, [row for row in questions if id(row) not in used])
        old = questions.fields.get(TARGET_FIELD, TARGET_FIELD)
        count = f"{len(left)} of {len(questions)} rows {'has' if len(left) == 1 else 'have'} no target"
        warning = f"{name}: {count}, the field '{old}': {_places(left)}; left out"
        report += Report(warnings=(warning,), left_out=tuple(f"{_place(row)}: no target" for row in left))
    return kept, report


def _without_empty(parts: dict[str, Questions], fields: Sequence[str]) -> tuple[dict[str, Questions], Report]:
    """Drop rows without any text from the training and development parts; warn about other empty fields."""
    kept, found = {}, Report()
    for name, questions in parts.items():
        lines = empty_fields(name, questions, fields)
        rows = [row for row in questions if any(row.record.get(field_name, "?").strip() for field_name in fields)]
        learns = name in ("train", "dev") and bool(fields) and len(rows) < len(questions)
        if learns and not rows:
            raise RecordError(f"the {name} data ({questions.name}) has no row with text in {', '.join(fields)}")
        if learns:
            lines[-1] += f"; {len(questions) - len(rows)} of {len(questions)} rows have no text at all and are left out"
            used = set(map(id, rows))
            left = tuple(f"{_place(row)}: no text" for row in questions if id(row) not in used)
            found += Report(left_out=left)
        kept[name] = _same(questions, rows) if learns else questions
        found += Report(warnings=tuple(lines))
    return kept, found


def _without_mistyped(
    parts: dict[str, Questions], labels: Sequence[str], counts: Mapping[str, int]
) -> tuple[dict[str, Questions], Report]:
    """Drop rows whose label looks like a mistyped one."""
    kept, report = {}, Report()
    known = {label: max(counts.get(label, 0), TIMES) for label in labels}
    for name, questions in parts.items():
        own = Counter(row.record[TARGET_FIELD] for row in questions)
        strange = {label: 1 for label, count in own.items() if label not in known and count <= RARE}
        likely = look_alikes({**strange, **known})
        rows = [row for row in questions if row.record[TARGET_FIELD] not in likely]
        if len(rows) == len(questions):
            kept[name] = questions
            continue
        kept[name] = _same(questions, rows)
        warnings, left = [], []
        for label, right in likely.items():
            wrong = [row for row in questions if row.record[TARGET_FIELD] == label]
            warnings.append(
                f"{name}: '{label}' looks like '{right}' ({_places(wrong)}); left out. Correct it in the file, or "
                f"count it as that label: alias_label {_quoted(f'{label}={right}')}"
            )
            left += [f"{_place(row)}: '{label}' looks like '{right}'" for row in wrong]
        report += Report(warnings=tuple(warnings), left_out=tuple(left))
    return kept, report


def _check_spellings(counts: Mapping[str, int], mistyped: Mapping[str, str], *, name: str) -> None:
    """Raise a RecordError if frequent labels differ in capitals or spaces only."""
    spellings: dict[str, list[str]] = {}
    for label in sorted(counts, key=lambda label: (-counts[label], label)):
        if label not in mistyped:
            spellings.setdefault(_folded(label), []).append(label)
    same = [listed for listed in spellings.values() if len(listed) > 1]
    if same:
        shown = "; ".join(" and ".join(f"'{label}' ({counts[label]})" for label in listed) for listed in same[:SHOWN])
        raise RecordError(
            f"{name}: labels differ in capitals or spaces only: {shown}. Take them as one with alias_label {CASE}, or "
            'name the labels (--labels "good;bad")'
        )


def _counts(name: str, questions: Questions, labels: Sequence[str]) -> str:
    counts = Counter(row.record[TARGET_FIELD] for row in questions)
    listed = ", ".join(f"{cut(label, LONGEST)} {counts[label]}" for label in labels[: 4 * SHOWN])
    return f"{name}: {len(labels)} labels in {len(questions)} records: {listed}{', ...' * (len(labels) > 4 * SHOWN)}"


def _same(questions: Questions, rows: Iterable[Question]) -> Questions:
    """Return other rows of the same data, with a hash of their own."""
    return Questions(rows, name=questions.name, fields=questions.fields)


def _rows_with(parts: Mapping[str, Questions], label: str) -> list[Question]:
    return [row for questions in parts.values() for row in questions if row.record[TARGET_FIELD] == label]


def _place(row: Question) -> str:
    return row.where or "a row"


def _places(rows: Sequence[Question]) -> str:
    """Return the places of rows, the name of their file once: ``mail.csv, lines 12 and 57``."""
    shown = [_place(row) for row in rows[:SHOWN]]
    heads = {place.rpartition(" ")[0] for place in shown}
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    if len(shown) == 1 or len(heads) > 1 or not next(iter(heads)):
        return "; ".join(shown) + more
    return f"{next(iter(heads))}s {', '.join(place.rpartition(' ')[2] for place in shown)}{more}"


def _pairs(pairs: Sequence[tuple[Question, Question]]) -> str:
    """Return the beginning of a sentence on pairs of rows."""
    listed = "; ".join(f"{_place(row)} (as {_place(first)})" for row, first in pairs[:SHOWN])
    more = f"; {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
    return f"{listed}{more} {'has' if len(pairs) == 1 else 'have'}"


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w=.+-]+", text) else f'"{text}"'


def _folded(label: str) -> str:
    return " ".join(label.casefold().split())


def _are_amounts(counts: Mapping[str, int]) -> bool:
    """Whether all targets are numbers, and too many or too exact ones to be names of classes."""
    number = re.compile(r"[-+]?(\d+([.,]\d+)?|[.,]\d+)(e[-+]?\d+)?%?", re.IGNORECASE)
    if not counts or not all(len(text) <= LONGEST and number.fullmatch(text) for text in counts):
        return False
    return len(counts) > MAX_NUMBERS or any("." in text or "," in text for text in counts)


def _is_alike(one: str, other: str) -> bool:
    """Whether two labels may be one, mistyped. Numbers in them make a difference: "5 stars" is not "4 stars"."""
    left, right = _folded(one), _folded(other)
    if left == right:
        return True
    shortest = min(len(left), len(right))
    if max(len(left), len(right)) > LONGEST:
        return False  # a text, and no label
    if re.findall(r"\d", left) != re.findall(r"\d", right) or shortest < 4 or abs(len(left) - len(right)) > 2:
        return False
    # Mistyped words seldom differ in the first letter, and other words often do: increase, decrease.
    distance = _distance(left, right)
    return distance <= 1 or (distance == 2 and shortest >= 7 and left[0] == right[0])


def _distance(left: str, right: str) -> int:
    """Return the edit distance; swapped neighbours are one edit. Source: Damerau (1964)."""
    before: list[int] = []
    last = list(range(len(right) + 1))
    for at, one in enumerate(left, start=1):
        row = [at]
        for to, other in enumerate(right, start=1):
            row.append(min(last[to] + 1, row[-1] + 1, last[to - 1] + (one != other)))
            if at > 1 and to > 1 and one == right[to - 2] and left[at - 2] == other:
                row[to] = min(row[to], before[to - 2] + 1)
        before, last = last, row
    return last[-1]


def _check_template(
    name: str,
    task: TaskFile,
    template: Template,
    tokenizer: Tokenizer,
    kind: Kind,
    sample: Question,
    parts: Sequence[Questions],
) -> Report:
    facts, warnings = [], []
    try:
        bound = TokenizedTemplate(template, tokenizer=tokenizer, kind=kind)
        if task.label_words is not None:
            lines = task.label_words.check_known(task.label_words.examples(bound, sample.record))
            facts.append(f"label words and their tokens: {'; '.join(lines)}")
        filled: list[Example] = []
        for questions in parts:
            chosen = questions[:FILLED_ROWS]
            texts = [max(task.answer_space.texts(row) or ("a",), key=len) for row in chosen]
            records = [row.record for row in chosen]
            filled += bound.examples(records, targets=texts, source=f"{questions.name}, row")
        warnings += check_known(bound, task.answer_space, parts)
        short = sum(example.shortened for example in filled)
        if short:
            fields = [piece for piece in template.pieces if isinstance(piece, Field)]
            shrinking = dict.fromkeys(piece.name for piece in fields if not piece.keep)
            warnings.append(
                f"{name}: {short} of {len(filled)} rows are shortened to {tokenizer.max_tokens} tokens, in the fields "
                f"without '!': {', '.join(shrinking) or 'none'}"
            )
    except PTuningError as error:
        return Report(tuple(facts), tuple(warnings), (f"{name}: {error}",))
    return Report(tuple(facts), tuple(warnings))
