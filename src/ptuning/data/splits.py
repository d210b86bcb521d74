"""Seeded draws and splits. A draw depends on the seed and the rows alone, never on the order of a set or a clock."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ptuning.data.layouts import FACTS
from ptuning.data.questions import Question, Questions, as_questions
from ptuning.data.reading import SPLITS
from ptuning.data.relations import FLAW, SENTENCE_FIELDS, Relation, subject_of
from ptuning.errors import RecordError
from ptuning.records import ALIASES, TARGET_FIELD, Record, Records, canonical_json

# Fields that may hold a copy of the answer. The same input with another answer must not be in two parts.
ANSWERS = (TARGET_FIELD, *ALIASES[TARGET_FIELD])

Parts = dict[str, list[Record]]
Keeps = Callable[[Sequence[Record]], Sequence[bool]]  # for each of N facts, whether to keep it
HELD_OUT = 0.2  # of a relation's subjects, for the development and for the test part


def split_records(records: Records, *, fraction: float, seed: int) -> tuple[Records, Records]:
    """Hold out a share of records as :func:`split_questions` does."""
    kept, held = split_questions(as_questions(records), fraction=fraction, seed=seed)
    return kept.records, held.records


def split_questions(questions: Questions, *, fraction: float, seed: int) -> tuple[Questions, Questions]:
    """Hold out a ``fraction`` in (0, 1) of the rows. The rows of a group, and rows with the same input, stay together.

    Returns the rest, and the part that is held out, each in the original order. Fewer than two different inputs are a
    RecordError.
    """
    units = _units(questions, lambda row: _input(row, hidden=ANSWERS))
    if len(units) < 2:
        raise RecordError(
            f"{questions.name}: too few different records to set some aside; give more, or others to choose by (a "
            "development file, --dev, or a dev part in the folder)"
        )
    drawn = _shuffled(units, f"split {seed}")[: min(len(units) - 1, _share(len(units), fraction))]
    held = {id(row) for key in drawn for row in units[key]}
    percent = f"{fraction:.0%}"
    return (
        _part(questions, lambda row: id(row) not in held, f"without the {percent} set aside, seed {seed}"),
        _part(questions, lambda row: id(row) in held, f"{percent} set aside, seed {seed}"),
    )


def draw_records(records: Records, count: int | None, *, seed: int) -> Records:
    """Draw ``count`` records, in their order; all of them if ``count`` is None or not below their number."""
    if count is None or count >= len(records):
        return records
    chosen = sorted(random.Random(f"draw {seed}").sample(range(len(records)), count))
    return Records([records[index] for index in chosen], name=f"{records.name} ({count} drawn, seed {seed})")


def draw_questions(questions: Questions, limit: int | None, *, seed: int) -> Questions:
    """Draw whole groups until there are at least ``limit`` rows, in their order; all rows without a limit."""
    if limit is None or limit >= len(questions):
        return questions
    units = _units(questions, _asked)
    drawn: set[int] = set()
    for key in _shuffled(units, f"limit {seed}"):
        if len(drawn) < limit:
            drawn |= {id(row) for row in units[key]}
    rows = [row for row in questions if id(row) in drawn]
    return Questions(rows, name=f"{questions.name} ({len(rows)} drawn)")


def draw_few(pool: Questions, count: int, labels: Sequence[str] = (), *, seed: int) -> tuple[Questions, Questions]:
    """Draw a few-shot training part and a development part of ``count`` examples each; too few are a RecordError.

    A group is one example with all of its rows, as FewGLUE counts. Without groups the ``labels``, if there are any,
    take turns, so that each has the same number of examples as long as there are enough.
    """
    units = list(_units(pool, _asked).values())
    if len(units) < 2 * count:
        raise RecordError(
            f"{pool.name}: {count} examples to learn from and {count} to choose by are asked for, and there are "
            f"{len(units)}; ask for {len(units) // 2} or fewer"
        )
    random.Random(f"few-shot {seed}").shuffle(units)
    if labels and all(unit[0].group is None for unit in units):
        units = list(_in_turns(units, labels))
    train, dev = (
        Questions([row for unit in part for row in unit], name=f"{pool.name} ({count} drawn for {what}, seed {seed})")
        for part, what in ((units[:count], "training"), (units[count : 2 * count], "development"))
    )
    return train, dev


def with_few_choices(questions: Questions, count: int, *, seed: int) -> Questions:
    """Leave at most ``count`` choices to each row: a right one, and a draw of the others."""
    few = []
    for number, question in enumerate(questions):
        if len(question.choices) > count:
            draw = random.Random(f"choices {seed} {number}")
            right = draw.choice(question.answers)
            others = [place for place in range(len(question.choices)) if place != right]
            kept = sorted([right, *draw.sample(others, count - 1)])
            answers = tuple(at for at, place in enumerate(kept) if place in question.answers)
            question = replace(question, choices=tuple(question.choices[place] for place in kept), answers=answers)
        few.append(question)
    return Questions(few, name=questions.name, digest=questions.sha256)


@dataclass(frozen=True)
class Split:
    """A relation's facts, filtered and divided; subjects of the test part are in no other part.

    ``rows`` is the number of facts that were read, ``dropped`` maps a reason to the number that was dropped for it, and
    ``how`` says in words how the parts were made.
    """

    train: Records
    dev: Records
    test: Records
    rows: int
    dropped: Mapping[str, int]
    how: str


def split_relation(
    relation: Relation,
    *,
    keeps: Keeps | None = None,
    reason: str = "object is not one token",
    seed: int = 0,
    limit: int | None = None,
) -> Split:
    """Filter a relation's facts and divide them.

    Facts in one file are divided 60/20/20 by subject, drawn before any fact is dropped: the part of a fact depends on
    the subjects and the seed alone, and is the same for every tokenizer and every order of the file. Given parts stay
    as they are, but a fact is dropped if its subject is in a later part too. A missing part is drawn from the training
    part's subjects.

    ``keeps`` decides for N facts which to keep, and ``reason`` is why it drops the others. ``limit`` is the largest
    number of facts in all, of drawn subjects and in the proportions of the parts. Without a training part, or with an
    empty part, it raises a RecordError that says why.
    """
    if limit is not None and limit < len(SPLITS):
        raise RecordError(f"{relation.name}: a limit of {limit} facts; the three parts need at least one each")
    rows = sum(map(len, relation.parts.values()))
    placed, how = _placed(relation, seed=seed)
    dropped: Counter[str] = Counter()
    parts = _usable(placed, keeps, reason, dropped)
    _keep_apart(parts, dropped)
    if limit is not None and sum(map(len, parts.values())) > limit:
        parts = _limited(parts, limit, seed=seed, dropped=dropped)
        how += f", at most {limit} facts"
    for part in SPLITS:
        if not parts[part]:
            why = ", ".join(f"{count} {text}" for text, count in dropped.items()) or "none"
            raise RecordError(
                f"{relation.name}: the part {part} is empty. {rows} facts were read from {relation.source} and divided "
                f"({how}); dropped: {why}. Leave this relation out, or give it more facts"
            )
    train, dev, test = (Records(parts[part], name=f"{relation.source} ({part}, {how})") for part in SPLITS)
    return Split(train, dev, test, rows, dict(dropped), how)


def _shuffled(names: Iterable[str], draw: str) -> list[str]:
    ordered = sorted(set(names))
    random.Random(draw).shuffle(ordered)
    return ordered


def _share(count: int, fraction: float) -> int:
    return max(1, round(count * fraction))


def _units(questions: Questions, key: Callable[[Question], str]) -> dict[str, list[Question]]:
    units: dict[str, list[Question]] = {}
    for row in questions:
        units.setdefault(key(row) if row.group is None else f"group {row.group}", []).append(row)
    return units


def _input(row: Question, *, hidden: Sequence[str]) -> str:
    return canonical_json({name: text for name, text in row.record.items() if name not in hidden})


def _asked(row: Question) -> str:
    """Return the input of a task's row, with its choices. Only ``y`` holds the answer there."""
    return f"{_input(row, hidden=(TARGET_FIELD,))}{list(row.choices)}"


def _part(questions: Questions, keeps: Callable[[Question], bool], how: str) -> Questions:
    rows = [row for row in questions if keeps(row)]
    records = Records([row.record for row in rows], name=f"{questions.name} ({how})")
    return Questions(rows, name=records.name, digest=records.sha256)


def _in_turns(units: Sequence[list[Question]], labels: Sequence[str]) -> Iterator[list[Question]]:
    """Yield units so that labels take turns, in the order that they have within a label."""
    waiting = {label: [unit for unit in units if unit[0].right == (label,)] for label in labels}
    while any(waiting.values()):
        for label in labels:
            if waiting[label]:
                yield waiting[label].pop(0)


def _subjects(records: Iterable[Record], *, seed: int) -> list[str]:
    return _shuffled({subject_of(record) for record in records} - {""}, f"relation {seed}")


def _placed(relation: Relation, *, seed: int) -> tuple[Parts, str]:
    if set(relation.parts) == {FACTS}:
        facts = relation.parts[FACTS]
        subjects = _subjects(facts, seed=seed)
        aside = _share(len(subjects), HELD_OUT)
        place = dict.fromkeys(subjects[:aside], "test") | dict.fromkeys(subjects[aside : 2 * aside], "dev")
        order = {subject: number for number, subject in enumerate(subjects)}
        parts: Parts = {part: [] for part in SPLITS}
        for record in sorted(facts, key=lambda row: (order.get(subject_of(row), -1), canonical_json(row))):
            parts[place.get(subject_of(record), "train")].append(record)
        return parts, f"60/20/20 by subject, seed {seed}"
    parts = {part: list(records) for part, records in relation.parts.items()}
    missing = [part for part in SPLITS if part not in parts]
    if "train" in missing:
        raise RecordError(
            f"{relation.name}: there is no training part among {', '.join(parts)} in {relation.source}; add train.jsonl"
        )
    if not missing:
        return parts, "the parts given"
    given = [part for part in SPLITS if part in parts]
    others = {subject_of(record) for part in given[1:] for record in parts[part]}
    subjects = _subjects((record for record in parts["train"] if subject_of(record) not in others), seed=seed)
    drawn = set(subjects[: _share(len(subjects), HELD_OUT)])
    parts[missing[0]] = [record for record in parts["train"] if subject_of(record) in drawn]
    parts["train"] = [record for record in parts["train"] if subject_of(record) not in drawn]
    how = f"{' and '.join(given)} given, {missing[0]} taken from {HELD_OUT:.0%} of the subjects of train, seed {seed}"
    return parts, how


def _usable(parts: Parts, keeps: Keeps | None, reason: str, dropped: Counter[str]) -> Parts:
    """Return each part without facts that lack something, are there twice, or that ``keeps`` does not keep."""
    whole: list[tuple[str, Record]] = []
    for part in SPLITS:
        seen = set()
        for record in parts[part]:
            target = record.get(TARGET_FIELD, "").strip()
            fact = (subject_of(record), target, *(record.get(name) for name in SENTENCE_FIELDS))
            if not (subject_of(record) and target):
                dropped["no subject or object"] += 1
            elif FLAW in record:
                dropped[record[FLAW]] += 1
            elif fact in seen:
                dropped["twice the same fact"] += 1
            else:
                seen.add(fact)
                whole.append((part, record))
    kept = [True] * len(whole) if keeps is None else keeps([record for _, record in whole])
    usable: Parts = {part: [] for part in SPLITS}
    for (part, record), is_kept in zip(whole, kept, strict=True):
        if is_kept:
            usable[part].append(record)
        else:
            dropped[reason] += 1
    return usable


def _keep_apart(parts: Parts, dropped: Counter[str]) -> None:
    """Drop facts of an earlier part whose subject is in a later one; the test part is never touched."""
    for part, later in (("dev", "test"), ("train", "test"), ("train", "dev")):
        subjects = {subject_of(record) for record in parts[later]}
        kept = [record for record in parts[part] if subject_of(record) not in subjects]
        if len(kept) < len(parts[part]):
            dropped[f"{part} fact with a subject of the {later} part"] += len(parts[part]) - len(kept)
        parts[part] = kept


def _limited(parts: Parts, limit: int, *, seed: int, dropped: Counter[str]) -> Parts:
    """Return at most ``limit`` facts of drawn subjects; each part keeps its share, and at least one fact."""
    total = sum(map(len, parts.values()))
    dropped["over the limit"] += total - limit
    room = {part: min(len(parts[part]), max(1, limit * len(parts[part]) // total)) for part in SPLITS}
    while sum(room.values()) < limit:  # shares were rounded down
        room[max(SPLITS, key=lambda part: len(parts[part]) - room[part])] += 1
    while sum(room.values()) > limit:  # small parts were given a whole fact
        room[max(SPLITS, key=lambda part: room[part])] -= 1
    kept: Parts = {}
    for part, records in parts.items():
        order = {subject: number for number, subject in enumerate(_subjects(records, seed=seed))}
        first = sorted(range(len(records)), key=lambda index: order[subject_of(records[index])])[: room[part]]
        kept[part] = [records[index] for index in sorted(first)]
    return kept
