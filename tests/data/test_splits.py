"""Seeded draws and splits: nothing is lost, nothing is in two parts, and a seed draws the same rows again."""

import hashlib
import json
from collections.abc import Sequence

import pytest

from ptuning.data.questions import Question, Questions, as_questions
from ptuning.data.reading import as_read, load_records, raw_rows
from ptuning.data.splits import draw_few, draw_questions, draw_records, split_questions, with_few_choices
from ptuning.errors import RecordError
from ptuning.records import Record, Records, canonical_json


def facts(count: int) -> Questions:
    """Every input twice, with different answers."""
    return as_questions(Records([{"x": f"x{n // 2}", "y": f"y{n}"} for n in range(2 * count)], name="facts"))


def digest(*parts: Sequence[Record] | Questions) -> str:
    """Return a short name of drawn rows, in their order."""
    rows = [[canonical_json(row.record if isinstance(row, Question) else row) for row in part] for part in parts]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def test_a_seed_draws_the_same_rows_in_every_version() -> None:
    """Published scores name a seed and mean these rows."""
    records = load_records("capitals:train")
    rows = Questions(
        Question(
            {"x": f"x{at % 17}", "y": "ab"[at % 2]},
            ("a", "b", "c", "d"),
            (at % 4,),
            group=f"g{at % 9}" if at % 3 else None,
        )
        for at in range(60)
    )
    plain = Questions(Question(row.record) for row in rows)
    few = with_few_choices(rows, 2, seed=7)
    assert {
        "records": digest(*split_questions(as_questions(records), fraction=0.2, seed=7)),
        "few records": digest(draw_records(records, 16, seed=7)),
        "questions": digest(*split_questions(rows, fraction=0.3, seed=7)),
        "limited": digest(draw_questions(rows, 20, seed=7), draw_questions(plain, 20, seed=7)),
        "few-shot": digest(*draw_few(rows, 4, seed=7), *draw_few(plain, 4, ("a", "b"), seed=7)),
        "choices": hashlib.sha256(str([(row.choices, row.answers) for row in few]).encode()).hexdigest()[:12],
    } == {
        "records": "4eaa891d68bf",
        "few records": "62ea2a31aac6",
        "questions": "6cf9f42ec23d",
        "limited": "a9af565a1d24",
        "few-shot": "f1f28738d8ac",
        "choices": "1981f8ffc585",
    }


def test_a_split_is_seeded_disjoint_and_whole() -> None:
    rows = facts(50)
    kept, held = split_questions(rows, fraction=0.2, seed=3)
    again = split_questions(rows, fraction=0.2, seed=3)
    assert (kept, held) == again
    assert (kept.sha256, held.sha256) == (again[0].sha256, again[1].sha256)
    assert split_questions(rows, fraction=0.2, seed=4)[1] != held
    assert sorted([*kept, *held], key=rows.index) == rows
    assert kept == [row for row in rows if row in kept]  # in order
    assert (len(held), held.name) == (20, "facts (20% set aside, seed 3)")
    turned = split_questions(Questions(rows[::-1]), fraction=0.2, seed=3)[1]
    assert turned == held[::-1]  # the order of the rows changes nothing


@pytest.mark.parametrize("answer", ["y", "label", "obj_label", "reply"])
def test_records_with_the_same_input_stay_together(answer: str) -> None:
    """Also where the answer has another name: a copy of it left in the record must not tell inputs apart."""
    lines = "".join(json.dumps({"x": f"x{n // 3}", answer: f"y{n}"}) + "\n" for n in range(60))
    fields = {"y": "reply"} if answer == "reply" else None
    records = as_questions(as_read(raw_rows(lines.encode(), name="a.jsonl"), fields=fields))
    for seed in range(5):
        kept, held = split_questions(records, fraction=0.5, seed=seed)
        assert not {row.record["x"] for row in kept} & {row.record["x"] for row in held}


def test_a_split_keeps_something_on_both_sides() -> None:
    for fraction in (0.001, 0.999):
        kept, held = split_questions(facts(2), fraction=fraction, seed=0)
        assert len(kept) == len(held) == 2
    with pytest.raises(RecordError, match=r"facts: too few .*(dev)"):
        split_questions(facts(1), fraction=0.5, seed=0)


def test_rows_of_one_group_are_set_aside_together() -> None:
    """Answers to one question, which differ in their input; a row without a group stays with its like only."""
    groups = ["a", "a", "a", "b", "b", "b", None, None, None, None, None, None]
    rows = Questions([Question({"x": str(at), "y": "z"}, group=group) for at, group in enumerate(groups)])
    for seed in range(20):
        _, held = split_questions(rows, fraction=0.4, seed=seed)
        assert {[row.group for row in held].count(group) for group in ("a", "b")} <= {0, 3}


def test_a_draw_of_choices_keeps_a_right_one_and_the_order() -> None:
    texts = tuple(f"text {number}" for number in range(20))
    rows = Questions([Question({}, texts, (3, 17)), Question({}, ("a", "b"), (1,))], name="f")
    for seed in range(20):
        few = with_few_choices(rows, 5, seed=seed)
        assert len(few[0].choices) == 5
        assert list(few[0].choices) == sorted(few[0].choices, key=texts.index)
        assert few[0].answers
        assert {few[0].choices[place] for place in few[0].answers} == {"text 3", "text 17"} & set(few[0].choices)
        assert few[1] is rows[1]
        assert few == with_few_choices(rows, 5, seed=seed)
    assert len({with_few_choices(rows, 5, seed=seed)[0].choices for seed in range(20)}) > 10
