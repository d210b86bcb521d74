"""Seeded draws and splits. A draw depends on the seed and the rows alone, never on the order of a set or a clock."""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ptuning.data.questions import Question, Questions
from ptuning.errors import RecordError
from ptuning.records import ALIASES, TARGET_FIELD, Records, canonical_json

# Fields that may hold a copy of the answer. The same input with another answer must not be in two parts.
ANSWERS = (TARGET_FIELD, *ALIASES[TARGET_FIELD])


def split_questions(questions: Questions, *, fraction: float, seed: int) -> tuple[Questions, Questions]:
    """Hold out a ``fraction`` in (0, 1) of the rows. The rows of a group, and rows with the same input, stay together.

    Returns the rest and the held-out part, each in the original order. Fewer than two different inputs are a
    RecordError.
    """
    units = _units(questions, hidden=ANSWERS, with_choices=False)
    if len(units) < 2:
        raise RecordError(
            f"{questions.name}: too few different records to set some aside; give more, or others to choose by (a "
            "development file (dev), or a dev part in the folder)"
        )
    drawn = shuffled(units, f"split {seed}")[: min(len(units) - 1, max(1, round(len(units) * fraction)))]
    held = {id(row) for key in drawn for row in units[key]}
    share = f"{fraction:.0%}"
    return (
        Questions(
            (row for row in questions if id(row) not in held),
            name=f"{questions.name} (without the {share} set aside, seed {seed})",
        ),
        Questions(
            (row for row in questions if id(row) in held), name=f"{questions.name} ({share} set aside, seed {seed})"
        ),
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
    units = _units(questions)
    drawn: set[int] = set()
    for key in shuffled(units, f"limit {seed}"):
        if len(drawn) < limit:
            drawn |= {id(row) for row in units[key]}
    rows = [row for row in questions if id(row) in drawn]
    return Questions(rows, name=f"{questions.name} ({len(rows)} drawn)")


def draw_few(pool: Questions, count: int, labels: Sequence[str] = (), *, seed: int) -> tuple[Questions, Questions]:
    """Draw a few-shot training part and a development part of ``count`` examples each; too few are a RecordError.

    A group is one example with all of its rows, as FewGLUE counts. Without groups the ``labels``, if there are any,
    take turns, so that each has the same number of examples as long as there are enough.
    """
    units = list(_units(pool).values())
    if len(units) < 2 * count:
        raise RecordError(
            f"{pool.name}: {count} examples to learn from and {count} to choose by are asked for, and there are "
            f"{len(units)}; ask for {len(units) // 2} or fewer"
        )
    random.Random(f"few-shot {seed}").shuffle(units)
    if labels and all(unit[0].group is None for unit in units):
        of_labels = [[unit for unit in units if unit[0].right == (label,)] for label in labels]
        turns = itertools.chain.from_iterable(itertools.zip_longest(*of_labels))
        units = [unit for unit in turns if unit is not None]
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


def shuffled(names: Iterable[str], draw: str) -> list[str]:
    """Return names in the order of a seeded draw."""
    ordered = sorted(set(names))
    random.Random(draw).shuffle(ordered)
    return ordered


def _units(
    questions: Questions, *, hidden: Sequence[str] = (TARGET_FIELD,), with_choices: bool = True
) -> dict[str, list[Question]]:
    """Return the rows that stay together: those of a group, or with the same input (and choices)."""
    units: dict[str, list[Question]] = {}
    for row in questions:
        record = canonical_json({name: text for name, text in row.record.items() if name not in hidden})
        own = f"{record}{list(row.choices) if with_choices else ''}"
        units.setdefault(own if row.group is None else f"group {row.group}", []).append(row)
    return units
