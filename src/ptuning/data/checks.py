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
from ptuning.template.language import Field
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


@dataclass
class Report:
    """The report of a check, a line each: counts, possible mistakes, and mistakes that make the data unusable.

    ``left_out`` names each row that is not used, and why.
    """

    facts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __add__(self, other: Report) -> Report:
        return Report(*(getattr(self, name) + getattr(other, name) for name in vars(self)))


@dataclass(frozen=True)
class Labelled:
    """Checked rows: ``parts`` without the rows that are left out, the label words, and the report."""

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
    """Check the rows of each part (``train``, ``dev``, ``test``, or others) and their labels.

    ``auto`` takes the targets of all parts but ``test`` as labels; rows whose label is rare and looks like a mistyped
    one are left out. If labels are ``known``, as those of a prompt are, it takes these. Rows without a target are left
    out, as long as most rows have one, and so are rows of ``train`` and ``dev`` in which all ``fields`` of the template
    are empty. ``merge`` says which labels count as others (old -> new, or texts such as ``biling=billing`` and
    ``case``).

    Raises:
        RecordError: If a part is empty, half of its targets or more are missing, one is none of the labels, the targets
            can be no labels, or something may be a mistake and the check is ``strict``.
        LabelWordError: If label words or merges are malformed.
    """
    report = Report()
    kept = {name: _with_target(name, questions, report) for name, questions in parts.items()}
    require_rows(kept)
    has_choices = any(questions.has_choices for questions in kept.values())
    words = known if labels is None or labels == AUTO else LabelWords.of(labels)
    if merge and not has_choices:
        kept = _merged(kept, merge, words.labels if words is not None else ())
    kept = {name: _with_text(name, questions, fields, report) for name, questions in kept.items()}
    learned = Counter(row.record[TARGET_FIELD] for name, rows in kept.items() if name != "test" for row in rows)
    if labels == AUTO:
        if has_choices:
            raise LabelWordError("labels are auto, and the rows bring their own choices; leave the labels out")
        words = known or LabelWords.of(found_labels(learned, name=next(iter(parts.values())).name))
        frequent = {label: max(learned.get(label, 0), TIMES) for label in words.labels}
        kept = {name: _without_mistyped(name, questions, frequent, report) for name, questions in kept.items()}
    if words is not None:
        for name, questions in kept.items():
            words.check_records(questions.records)
            if not has_choices:
                counts = Counter(row.record[TARGET_FIELD] for row in questions)
                listed = _listed(words.labels, counts, most=4 * SHOWN)
                report.facts.append(f"{name}: {len(words.labels)} labels in {len(questions)} records: {listed}")
    elif not has_choices:
        seen_labels(learned, kept, report)
    check_repeated(kept, fields, report, labelled=words is not None)
    if strict and report.warnings:
        raise RecordError("\n  ".join(("warnings about the data are errors with strict:", *report.warnings)))
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
    remedy = 'name the labels ("good;bad"), or the column that holds them (field y=NAME)'
    shown = ", ".join(cut(text, LONGEST) for text, _ in most)
    if _are_amounts(counts):
        raise RecordError(
            f"{name}: the targets are numbers ({shown}, ...; {len(counts)} different ones): a prompt chooses among "
            f"words and learns no amounts. Make them a few classes in the file (low, high), or {remedy}"
        )
    if len(counts) > MAX_LABELS or (len(counts) > RARE and rows < 2 * len(counts)):
        raise RecordError(
            f"{name}: {len(counts):,} different targets in {rows:,} records ({shown}, ...) are too many to be labels. "
            f"Leave labels out, and the answer is written; or {remedy}"
        )
    mistyped = look_alikes(counts)
    spellings: dict[str, list[str]] = {}
    for label in sorted(counts, key=lambda label: (-counts[label], label)):
        if label not in mistyped:
            spellings.setdefault(_folded(label), []).append(label)
    if same := [listed for listed in spellings.values() if len(listed) > 1]:
        shown = "; ".join(" and ".join(f"'{label}' ({counts[label]})" for label in listed) for listed in same[:SHOWN])
        raise RecordError(
            f"{name}: labels differ in capitals or spaces only: {shown}. Take them as one with alias_label {CASE}, or "
            'name the labels ("good;bad")'
        )
    if len(spellings) < 2:
        raise RecordError(f"{name}: the targets have one label only ({shown}); {remedy}")
    return sorted(label for label in counts if label not in mistyped)


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


def seen_labels(counts: Mapping[str, int], parts: Mapping[str, Questions], report: Report) -> None:
    """Report the different targets, if they are few and come again and again: they may be labels."""
    rows = sum(counts.values())
    if _are_amounts(counts):
        report.facts.append(
            f"the targets are numbers ({len(counts)} different ones in {rows} records): they are written digit by "
            "digit, and a near miss is as wrong as any. For amounts, make a few classes of them (low, high)"
        )
        return
    if not 2 <= len(counts) <= SEEN_LABELS or rows < SEEN_ROWS * len(counts):
        return
    mistyped = look_alikes(counts)
    ordered = [label for label, _ in Counter(counts).most_common()]
    kept = [label for label in ordered if label not in mistyped]
    text = ";".join(kept)
    can_be_typed = len(kept) <= 2 * SHOWN and len(text) <= 4 * LONGEST and not set('=,"') & set(text)
    named = f', or "{text}"' if can_be_typed and text.count(";") == len(kept) - 1 else ""
    report.facts.append(
        f"{len(counts)} distinct targets in {rows} records: {_listed(ordered, counts, most=2 * SHOWN)}. If they are "
        f"labels to choose among, give labels as auto{named}; without, the answer is written as text"
    )
    for label, other in mistyped.items():
        same = [row for questions in parts.values() for row in questions if row.record[TARGET_FIELD] == label]
        report.warnings.append(f"'{label}' ({_places(same)}) looks like '{other}'")


def empty_fields(name: str, questions: Questions, fields: Sequence[str]) -> list[str]:
    """Return a line for each field that is empty in rows of a part, with their places."""
    lines = []
    for field_name in fields:
        rows = [row for row in questions if not row.record.get(field_name, "?").strip()]
        if rows:
            count = f"{len(rows)} row{'s' * (len(rows) > 1)}"
            lines.append(f"{name}: the field '{field_name}' is empty in {count}: {_places(rows)}")
    return lines


def check_repeated(parts: Mapping[str, Questions], fields: Sequence[str], report: Report, *, labelled: bool) -> None:
    """Report rows with the same text: in two parts, or in one part with one label or, as a warning, with two."""
    seen: dict[str, dict[str, Question]] = {}
    for name, questions in parts.items() if fields else ():
        own: dict[str, Question] = {}
        pairs = []
        for row in questions:
            texts = canonical_json({field_name: row.record.get(field_name, "") for field_name in fields})
            first = own.setdefault(f"{texts}{list(row.choices)}", row)
            if first is not row and labelled:
                pairs.append((row, first))
        if twice := [pair for pair in pairs if pair[0].right == pair[1].right]:
            report.facts.append(f"{name}: {_pairs(twice)} the same text and label as another")
        if torn := [pair for pair in pairs if pair[0].right != pair[1].right]:
            report.warnings.append(f"{name}: {_pairs(torn)} the same text as another, and another label")
        for other, earlier in seen.items():
            if both := [(row, earlier[key]) for key, row in own.items() if key in earlier]:
                report.warnings.append(
                    f"{name}: {_pairs(both)} the text of a row of {other}, so the scores may be too good"
                )
        seen[name] = own


def check_data(task: TaskFile, parts: Mapping[str, Questions]) -> Report:
    """Count rows, choices, labels and groups of a task's data. Missing labels, empty fields, and rows of two parts with
    the same text are warnings.
    """
    report = Report()
    for name, questions in parts.items():
        labels = Counter(row.record[TARGET_FIELD] for row in questions if TARGET_FIELD in row.record)
        line = f"{name}: {len(questions)} rows of {questions.name}"
        if task.answer_space.has_choices and questions:
            counts = sorted(len(row.choices) for row in questions)
            line += f"; {counts[0]} to {counts[-1]} choices, {counts[len(counts) // 2]} in the middle"
        elif task.label_words is not None and labels:
            line += "; " + ", ".join(f"{label} {labels[label]}" for label in task.label_words.labels)
            if missing := [label for label in task.label_words.labels if not labels[label]]:
                report.warnings.append(f"{name}: no row has the label {' or '.join(missing)}")
        groups = {row.group for row in questions if row.group is not None}
        report.facts.append(line + (f"; {len(groups)} groups" if groups else ""))
        report.warnings += empty_fields(name, questions, task.fields)
    check_repeated(parts, task.fields, report, labelled=task.label_words is not None)
    return report


def check_words(
    task: TaskFile, tokenizer: Tokenizer, kind: Kind, *, parts: Mapping[str, Questions] | None = None
) -> Report:
    """Fill every pattern of a task; report the tokens of its label words and the rows that get truncated.

    Without data (``parts``), a record whose fields hold their own names is filled in.
    """
    given = [questions for questions in (parts or {}).values() if questions]
    sample = given[0][0].record if given else {name: name for name in task.fields}
    patterns = enumerate(zip(task.manual, task.learned, strict=True), start=1)
    named = [(f"pattern {at}, {use}", each) for at, pair in patterns for use, each in zip(("manual", "learned"), pair)]
    report = Report()
    for name, template in named:
        try:
            bound = TokenizedTemplate(template, tokenizer=tokenizer, kind=kind)
            if task.label_words is not None:
                lines = task.label_words.check_known(task.label_words.examples(bound, sample))
                report.facts.append(f"label words and their tokens: {'; '.join(lines)}")
            filled: list[Example] = []
            for questions in given:
                chosen = questions[:FILLED_ROWS]
                texts = [max(task.answer_space.texts(row) or ("a",), key=len) for row in chosen]
                records = [row.record for row in chosen]
                filled += bound.examples(records, targets=texts, source=f"{questions.name}, row")
            report.warnings += check_known(bound, task.answer_space, given)
            if short := sum(example.shortened for example in filled):
                fields = [piece for piece in template.pieces if isinstance(piece, Field)]
                shrinking = dict.fromkeys(piece.name for piece in fields if not piece.keep)
                report.warnings.append(
                    f"{name}: {short} of {len(filled)} rows are shortened to {tokenizer.max_tokens} tokens, in the "
                    f"fields without '!': {', '.join(shrinking) or 'none'}"
                )
        except PTuningError as error:
            report.problems.append(f"{name}: {error}")
    # Words are mostly the same tokens in all patterns, and mistakes in them the same mistakes.
    return Report(*(list(dict.fromkeys(lines)) for lines in vars(report).values()))


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


def _merged(parts: Mapping[str, Questions], merge: Merge, labels: Sequence[str]) -> dict[str, Questions]:
    """Return the parts with merged labels replaced."""
    pairs, by_case = _merge_pairs(merge)
    counts = Counter(row.record[TARGET_FIELD] for questions in parts.values() for row in questions)
    new = {label: pairs.get(label, label) for label in counts}
    if by_case:
        spellings: dict[str, str] = {}
        for label in (*labels, *(new[label] for label in sorted(counts, key=lambda label: (-counts[label], label)))):
            spellings.setdefault(_folded(label), label)
        new = {label: spellings[_folded(other)] for label, other in new.items()}
    merged = {}
    for name, questions in parts.items():
        rows = [
            row if new[label] == label else replace(row, record={**row.record, TARGET_FIELD: new[label]})
            for row in questions
            for label in (row.record[TARGET_FIELD],)
        ]
        is_changed = any(row is not old for row, old in zip(rows, questions, strict=True))
        merged[name] = Questions(rows, name=questions.name, fields=questions.fields) if is_changed else questions
    return merged


def merges(merge: Merge | None) -> tuple[str, ...]:
    """Return merges of labels as texts: ``biling=billing``, and ``case``; a LabelWordError if they are malformed."""
    if not merge:
        return ()
    pairs, by_case = _merge_pairs(merge)
    return (*(f"{old}={new}" for old, new in pairs.items()), *([CASE] if by_case else []))


def _merge_pairs(merge: Merge) -> tuple[dict[str, str], bool]:
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


def _leave_out(questions: Questions, reasons: Mapping[int, str], report: Report) -> Questions:
    """Return the rows but those at some indices, with a hash of their own; report the reasons."""
    report.left_out += [f"{_place(questions[at])}: {reason}" for at, reason in reasons.items()]
    rows = (row for at, row in enumerate(questions) if at not in reasons)
    return Questions(rows, name=questions.name, fields=questions.fields) if reasons else questions


def _with_target(name: str, questions: Questions, report: Report) -> Questions:
    """Leave unlabelled rows out, unless most rows are: then another field holds the target."""
    without = [at for at, row in enumerate(questions) if not row.record.get(TARGET_FIELD, "").strip()]
    if not without or 2 * len(without) >= len(questions):
        return questions
    column = questions.fields.get(TARGET_FIELD, TARGET_FIELD)
    count = f"{len(without)} of {len(questions)} rows {'has' if len(without) == 1 else 'have'} no target"
    places = _places([questions[at] for at in without])
    report.warnings.append(f"{name}: {count}, the field '{column}': {places}; left out")
    return _leave_out(questions, dict.fromkeys(without, "no target"), report)


def _with_text(name: str, questions: Questions, fields: Sequence[str], report: Report) -> Questions:
    """Leave rows without any text out of training and development parts; warn about other empty fields."""
    lines = empty_fields(name, questions, fields)
    empty = [at for at, row in enumerate(questions) if not any(row.record.get(each, "?").strip() for each in fields)]
    if not fields or name not in ("train", "dev"):
        empty = []
    if empty and len(empty) == len(questions):
        raise RecordError(f"the {name} data ({questions.name}) has no row with text in {', '.join(fields)}")
    if empty:
        lines[-1] += f"; {len(empty)} of {len(questions)} rows have no text at all and are left out"
    report.warnings += lines
    return _leave_out(questions, dict.fromkeys(empty, "no text"), report)


def _without_mistyped(name: str, questions: Questions, frequent: Mapping[str, int], report: Report) -> Questions:
    """Leave rows out whose label looks like a mistyped one."""
    counts = Counter(row.record[TARGET_FIELD] for row in questions)
    strange = {label: 1 for label, count in counts.items() if label not in frequent and count <= RARE}
    reasons: dict[int, str] = {}
    for label, right in look_alikes({**strange, **frequent}).items():
        wrong = {at: row for at, row in enumerate(questions) if row.record[TARGET_FIELD] == label}
        if not wrong:
            continue
        pair = f"{label}={right}"
        pair = pair if re.fullmatch(r"[\w=.+-]+", pair) else f'"{pair}"'
        report.warnings.append(
            f"{name}: '{label}' looks like '{right}' ({_places([*wrong.values()])}); left out. Correct it in the file, "
            f"or count it as that label: alias_label {pair}"
        )
        reasons |= dict.fromkeys(wrong, f"'{label}' looks like '{right}'")
    return _leave_out(questions, reasons, report)


def _listed(labels: Sequence[str], counts: Mapping[str, int], *, most: int) -> str:
    listed = ", ".join(f"{cut(label, LONGEST)} {counts.get(label, 0)}" for label in labels[:most])
    return listed + ", ..." * (len(labels) > most)


def _place(row: Question) -> str:
    return row.where or "a row"


def _places(rows: Sequence[Question]) -> str:
    """Return the places of rows, the name of their file once: ``mail.csv, lines 12, 57``."""
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


def _folded(label: str) -> str:
    return " ".join(label.casefold().split())


def _are_amounts(counts: Mapping[str, int]) -> bool:
    """Whether all targets are numbers, and too many or too exact ones to be names of classes."""
    number = re.compile(r"[-+]?(\d+([.,]\d+)?|[.,]\d+)(e[-+]?\d+)?%?", re.IGNORECASE)
    if not counts or not all(len(text) <= LONGEST and number.fullmatch(text) for text in counts):
        return False
    return len(counts) > MAX_NUMBERS or any("." in text or "," in text for text in counts)


def _is_alike(label: str, other: str) -> bool:
    """Whether two labels may be one, mistyped. Numbers in them make a difference: "5 stars" is not "4 stars"."""
    left, right = _folded(label), _folded(other)
    if left == right:
        return True
    shortest, longest = sorted((len(left), len(right)))
    if longest > LONGEST or shortest < 4 or longest - shortest > 2:
        return False  # a text, or too short to tell
    if re.findall(r"\d", left) != re.findall(r"\d", right):
        return False
    # Mistyped words seldom differ in the first letter, and other words often do: increase, decrease.
    distance = _distance(left, right)
    return distance <= 1 or (distance == 2 and shortest >= 7 and left[0] == right[0])


def _distance(left: str, right: str) -> int:
    """Return the edit distance; swapped neighbours are one edit. Source: Damerau (1964)."""
    before: list[int] = []
    last = list(range(len(right) + 1))
    for at, letter in enumerate(left, start=1):
        row = [at]
        for to, other in enumerate(right, start=1):
            row.append(min(last[to] + 1, row[-1] + 1, last[to - 1] + (letter != other)))
            if at > 1 and to > 1 and letter == right[to - 2] and left[at - 2] == other:
                row[to] = min(row[to], before[to - 2] + 1)
        before, last = last, row
    return last[-1]
