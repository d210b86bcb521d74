"""Seeded draws and splits: nothing is lost unsaid, nothing is in two parts, and a seed draws the same rows again."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence

import pytest

from ptuning.data.questions import Question, Questions
from ptuning.data.reading import load_records, read_rows
from ptuning.data.relations import Relation
from ptuning.data.splits import (
    Split,
    draw_few,
    draw_questions,
    draw_records,
    split_questions,
    split_records,
    split_relation,
    with_few_choices,
)
from ptuning.errors import RecordError
from ptuning.records import Record, Records, canonical_json


def relation(*facts: tuple[str, str], **parts: Iterable[tuple[str, str]]) -> Relation:
    """A relation in memory: facts in one file, or in the parts given."""
    given = {part: Records([{"x": x, "y": y} for x, y in pairs]) for part, pairs in parts.items()}
    read = given or {"facts": Records([{"x": x, "y": y} for x, y in facts])}
    return Relation("P1", "[X] is [Y]", None, None, read, (), "here")


def pairs(records: Sequence[Record]) -> list[tuple[str, str]]:
    return [(record["x"], record["y"]) for record in records]


def subjects(records: Sequence[Record]) -> set[str]:
    return {record["x"].strip().casefold() for record in records}


def parts_of(split: Split) -> list[Records]:
    return [split.train, split.dev, split.test]


def check_whole(split: Split) -> None:
    """Every fact read is in one part or counted as dropped, and no subject is in two."""
    assert sum(map(len, parts_of(split))) + sum(split.dropped.values()) == split.rows
    assert sum(len(subjects(part)) for part in parts_of(split)) == len(
        subjects([*split.train, *split.dev, *split.test])
    )


def many(count: int = 50, facts_each: int = 2) -> list[tuple[str, str]]:
    return [(f"s{number}", f"o{number}-{each}") for number in range(count) for each in range(facts_each)]


def facts(count: int) -> Records:
    """Every input twice, with different answers."""
    return Records([{"x": f"x{n // 2}", "y": f"y{n}"} for n in range(2 * count)], name="facts")


def drawn(*parts: Sequence[Record] | Questions) -> str:
    """Return a short name of what was drawn, in its order."""
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
        "records": drawn(*split_records(records, fraction=0.2, seed=7)),
        "few records": drawn(draw_records(records, 16, seed=7)),
        "questions": drawn(*split_questions(rows, fraction=0.3, seed=7)),
        "limited": drawn(draw_questions(rows, 20, seed=7), draw_questions(plain, 20, seed=7)),
        "few-shot": drawn(*draw_few(rows, 4, seed=7), *draw_few(plain, 4, ("a", "b"), seed=7)),
        "choices": hashlib.sha256(str([(row.choices, row.answers) for row in few]).encode()).hexdigest()[:12],
        "relation": drawn(*parts_of(split_relation(relation(*many()), seed=7, limit=40))),
    } == {
        "records": "4eaa891d68bf",
        "few records": "62ea2a31aac6",
        "questions": "6cf9f42ec23d",
        "limited": "a9af565a1d24",
        "few-shot": "f1f28738d8ac",
        "choices": "1981f8ffc585",
        "relation": "48f3bfe40a4c",
    }


def test_a_split_is_seeded_disjoint_and_whole() -> None:
    records = facts(50)
    kept, held = split_records(records, fraction=0.2, seed=3)
    again = split_records(records, fraction=0.2, seed=3)
    assert (list(kept), list(held)) == (list(again[0]), list(again[1]))
    assert list(split_records(records, fraction=0.2, seed=4)[1]) != list(held)
    assert sorted(row["y"] for row in [*kept, *held]) == sorted(row["y"] for row in records)
    assert len(held) == 20
    assert [row["y"] for row in kept] == [row["y"] for row in records if row in kept]
    assert held.name == "facts (20% set aside, seed 3)"
    assert (kept.sha256, held.sha256) == (again[0].sha256, again[1].sha256)


def test_a_split_does_not_depend_on_the_order_of_the_records() -> None:
    records = facts(20)
    turned = Records(list(reversed(records)), name="facts")
    assert {row["y"] for row in split_records(records, fraction=0.3, seed=0)[1]} == {
        row["y"] for row in split_records(turned, fraction=0.3, seed=0)[1]
    }


@pytest.mark.parametrize("answer", ["y", "label", "obj_label", "reply"])
def test_records_with_the_same_input_stay_together(answer: str) -> None:
    """Also where the answer came under another name: a copy of it left in the record must not tell inputs apart."""
    lines = "".join(json.dumps({"x": f"x{n // 3}", answer: f"y{n}"}) + "\n" for n in range(60))
    fields = {"y": "reply"} if answer == "reply" else None
    records = Records(read_rows(lines.encode(), name="a.jsonl", fields=fields))
    for seed in range(5):
        kept, held = split_records(records, fraction=0.5, seed=seed)
        assert not {row["x"] for row in kept} & {row["x"] for row in held}


def test_a_split_keeps_something_on_both_sides() -> None:
    for fraction in (0.001, 0.999):
        kept, held = split_records(facts(2), fraction=fraction, seed=0)
        assert len(kept) == len(held) == 2
    with pytest.raises(RecordError, match=r"facts: too few different records to set some aside; .*--dev"):
        split_records(facts(1), fraction=0.5, seed=0)


def test_rows_of_one_group_are_set_aside_together() -> None:
    """Answers to one question, which differ in their input; a row without a group stays with its like only."""
    groups = ["a", "a", "a", "b", "b", "b", None, None, None, None, None, None]
    rows = Questions([Question({"x": str(at), "y": "z"}, group=group) for at, group in enumerate(groups)])
    for seed in range(20):
        _, held = split_questions(rows, fraction=0.4, seed=seed)
        parts = [[rows.index(row) // 3 for row in held].count(group) for group in (0, 1)]
        assert set(parts) <= {0, 3}


def test_a_draw_of_choices_keeps_a_right_one_and_the_order() -> None:
    """For learning from rows with many choices; small rows stay as they are, and a seed draws the same again."""
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


# Relations


def test_one_file_is_divided_by_subject() -> None:
    split = split_relation(relation(*many()), seed=3)
    check_whole(split)
    assert [len(part) for part in parts_of(split)] == [60, 20, 20]
    assert (split.rows, split.dropped, split.how) == (100, {}, "60/20/20 by subject, seed 3")
    assert split.test.name == "here (test, 60/20/20 by subject, seed 3)"
    assert pairs(split.test) != pairs(split_relation(relation(*many()), seed=4).test)
    # Three subjects are enough for three parts.
    assert [len(part) for part in parts_of(split_relation(relation(*many(3))))] == [2, 2, 2]


def test_a_subject_is_the_same_in_other_letters() -> None:
    facts = [(f" {name} ", obj) for name, obj in many(10, 1)]
    split = split_relation(relation(*many(10, 1), *[(x.upper(), y + "!") for x, y in facts], ("S1", "o1-0 ")))
    check_whole(split)
    assert split.dropped == {"twice the same fact": 1}


@pytest.mark.parametrize("limit", [None, 31])
def test_the_order_of_the_file_changes_nothing(limit: int | None) -> None:
    facts = [*many(), *many()[:7]]
    first = split_relation(relation(*facts), limit=limit)
    random.Random(1).shuffle(facts)
    assert split_relation(relation(*facts), limit=limit) == first


def test_the_objects_do_not_choose_the_parts() -> None:
    facts = many(60, 1)
    objects = [y for _, y in facts]
    random.Random(1).shuffle(objects)
    permuted = [(x, y) for (x, _), y in zip(facts, objects, strict=True)]
    one, other = (split_relation(relation(*each), keeps=lambda rows: [True] * len(rows)) for each in (facts, permuted))
    assert [subjects(part) for part in parts_of(one)] == [subjects(part) for part in parts_of(other)]
    assert one.test != other.test


def test_what_is_kept_does_not_move_the_rest() -> None:
    """Two backbones with other tokenizers are scored on the same facts, as far as both can be."""

    def even(rows: Sequence[Record]) -> list[bool]:
        return [row["y"].endswith("0") and "7" not in row["x"] for row in rows]

    whole = split_relation(relation(*many()))
    kept = split_relation(relation(*many()), keeps=even, reason="too long")
    check_whole(kept)
    assert kept.dropped == {"too long": 100 - 45}
    for part, of_whole in zip(parts_of(kept), parts_of(whole), strict=True):
        assert list(part) == [row for row in of_whole if even([row])[0]]


def test_dropped_facts_are_counted_by_reason() -> None:
    facts = relation(*many(), ("", "a"), ("a", ""), (" ", "b"), *many()[:3])
    facts.parts["facts"].append({"x": "only a subject"})
    asked: list[Record] = []

    def keeps(rows: Sequence[Record]) -> list[bool]:
        asked.extend(rows)
        return [row["x"] != "s7" for row in rows]

    split = split_relation(facts, keeps=keeps)
    check_whole(split)
    assert split.dropped == {"no subject or object": 4, "twice the same fact": 3, "object is not one token": 2}
    assert len(asked) == 100  # it is asked about whole facts only


@pytest.mark.parametrize("limit", [3, 4, 7, 50, 99, 100, 1000])
def test_a_limit_keeps_the_proportions(limit: int) -> None:
    split = split_relation(relation(*many()), limit=limit)
    check_whole(split)
    sizes = [len(part) for part in parts_of(split)]
    assert sum(sizes) == min(limit, 100)
    for size, share in zip(sizes, (0.6, 0.2, 0.2), strict=True):
        assert abs(size - share * sum(sizes)) <= 1
    assert split.dropped.get("over the limit", 0) == max(0, 100 - limit)
    assert ("at most" in split.how) == (limit < 100)
    whole = split_relation(relation(*many()))
    for part, of_whole in zip(parts_of(split), parts_of(whole), strict=True):
        assert subjects(part) <= subjects(of_whole)
    other = split_relation(relation(*many()), limit=limit, seed=1)
    assert limit >= 100 or pairs(other.train) != pairs(split.train)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 9), (97, 1, 1), (3, 1, 1)])
@pytest.mark.parametrize("limit", [3, 4, 5])
def test_a_limit_is_exact_for_parts_of_any_size(sizes: tuple[int, int, int], limit: int) -> None:
    parts = {name: [(f"{name} {i}", "a") for i in range(size)] for name, size in zip(("train", "dev", "test"), sizes)}
    split = split_relation(relation(**parts), limit=limit)
    check_whole(split)
    assert sum(map(len, parts_of(split))) == min(limit, sum(sizes))
    assert all(parts_of(split))


def test_a_limit_draws_from_given_parts_and_keeps_their_order() -> None:
    parts = {name: [(f"{name} {i}", "a") for i in range(20)] for name in ("train", "dev", "test")}
    split = split_relation(relation(**parts), limit=30)
    check_whole(split)
    for name, part in zip(parts, parts_of(split), strict=True):
        numbers = [parts[name].index(pair) for pair in pairs(part)]
        assert len(numbers) == 10
        assert numbers == sorted(numbers)
        assert numbers != list(range(10))


def test_given_parts_stay_as_they_are() -> None:
    parts = {name: [(f"{name} {i}", str(i % 3)) for i in (3, 1, 2)] for name in ("train", "dev", "test")}
    split = split_relation(relation(**parts))
    assert [pairs(part) for part in parts_of(split)] == [parts["train"], parts["dev"], parts["test"]]
    assert (split.how, split.dropped) == ("the parts given", {})


def test_nobody_trains_on_a_subject_of_the_test_part() -> None:
    split = split_relation(
        relation(
            train=[("a", "1"), ("B ", "1"), ("c", "1"), ("d", "1"), ("d", "1")],
            dev=[("b", "2"), ("c", "2"), ("e", "2")],
            test=[("c", "3"), ("f", "3"), ("c", "4")],
        )
    )
    check_whole(split)
    assert [pairs(part) for part in parts_of(split)] == [
        [("a", "1"), ("d", "1")],
        [("b", "2"), ("e", "2")],
        [("c", "3"), ("f", "3"), ("c", "4")],
    ]
    assert split.dropped == {
        "twice the same fact": 1,
        "dev fact with a subject of the test part": 1,
        "train fact with a subject of the test part": 1,
        "train fact with a subject of the dev part": 1,
    }


@pytest.mark.parametrize(("given", "missing"), [("dev", "test"), ("test", "dev")])
def test_a_missing_part_is_taken_from_the_training_part(given: str, missing: str) -> None:
    other = [*((f"s{number}", "z") for number in range(30)), ("t", "z")]
    split = split_relation(relation(train=many(), **{given: other}), seed=5)
    check_whole(split)
    assert pairs(getattr(split, given)) == other
    taken = getattr(split, missing)
    assert (len(taken), len(split.train)) == (8, 32)  # of the 20 subjects that are not the other part's
    names = " and ".join(["train", given])
    assert split.how == f"{names} given, {missing} taken from 20% of the subjects of train, seed 5"
    again = split_relation(relation(train=many()[::-1], **{given: other}), seed=5)
    assert sorted(pairs(getattr(again, missing))) == sorted(pairs(taken))


def test_an_empty_part_says_why() -> None:
    message = (
        r"P1: the part train is empty\. 102 facts were read from here and divided \(60/20/20 by subject, seed 0\); "
        r"dropped: 1 no subject or object, 1 twice the same fact, 100 object is not one token\. Leave this relation out"
    )
    with pytest.raises(RecordError, match=message):
        split_relation(relation(*many(), many()[0], ("", "")), keeps=lambda rows: [False] * len(rows))
    with pytest.raises(RecordError, match=r"the part train is empty\. 4 facts .* dropped: none"):
        split_relation(relation(*many(2)))
    with pytest.raises(RecordError, match="the part dev is empty"):
        split_relation(relation(train=many(), dev=[], test=[("a", "b")]))
    with pytest.raises(RecordError, match=r"P1: a limit of 2 facts; the three parts need at least one each"):
        split_relation(relation(*many()), limit=2)


def test_the_callers_records_are_left_alone() -> None:
    given = relation(*many(), ("", ""))
    before = [dict(record) for record in given.parts["facts"]]
    split_relation(given, limit=10)
    assert list(given.parts["facts"]) == before
