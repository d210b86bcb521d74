"""Rows of a file as questions: labels by name, choices and right answers of every kind, groups and numbers."""

import datetime
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from ptuning.data.questions import ChoiceSource, Question, Questions, Reader, RowPath, as_questions
from ptuning.errors import RecordError
from ptuning.files import validate
from ptuning.records import Records

at = RowPath.parse
LABELLED = Reader({"x": at("text")}, labels=("true", "false"), values={"y": {"1": "true", "0": "false"}})


def read(reader: Reader, *rows: Mapping[str, Any], labelled: bool = True) -> list[Question]:
    named = [(f"f.jsonl, line {number}", row) for number, row in enumerate(rows, start=1)]
    return list(reader.read(named, labelled=labelled))


def test_labels_go_by_name_whatever_the_file_has() -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "label": 1}, {"text": "a", "label": "0"}, {"text": "a", "label": True}]
    assert [one.record["y"] for one in read(LABELLED, *rows)] == ["true", "false", "true"]


def test_white_space_around_a_label_or_target_is_not_part_of_it() -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "label": "1 "}, {"text": "a", "label": "true\n"}]
    assert [one.record["y"] for one in read(LABELLED, *rows)] == ["true", "true"]
    assert read(Reader({}), {"label": " two\nlines\n"})[0].record["y"] == "two\nlines"


def test_a_label_outside_of_the_task_names_line_and_labels() -> None:
    with pytest.raises(RecordError, match=r"f.jsonl, line 2: the label is '2', and the task's \[values\] have 1, 0"):
        read(LABELLED, {"text": "a", "label": 1}, {"text": "a", "label": 2})
    plain = Reader({}, labels=("yes", "no"))
    with pytest.raises(RecordError, match=r"'yess' is outside of the task.*Did you mean 'yes'"):
        read(plain, {"label": "yess"})


def test_unlabelled_rows_need_no_label_and_show_none() -> None:
    assert read(LABELLED, {"text": "a"}, {"text": "b", "label": 1}, labelled=False) == [
        Question({"x": "a"}),
        Question({"x": "b"}),
    ]
    with pytest.raises(RecordError, match="no 'label'"):
        read(LABELLED, {"text": "a"})


def choices(**keys: Any) -> Reader:
    """A reader of choices, by default those at a and b; the keys are those of a task file."""
    return Reader({}, choices=validate(ChoiceSource, keys or {"from": ["a", "b"]}))


@pytest.mark.parametrize(("right", "answers"), [(1, (1,)), ("1", (1,)), ("Left", (0,)), (True, (0,)), (False, (1,))])
def test_the_right_choice_is_a_number_a_text_or_true_for_the_first(right: object, answers: tuple[int, ...]) -> None:
    (found,) = read(choices(), {"a": "Left", "b": "Right", "label": right})
    assert (found.choices, found.answers) == (("Left", "Right"), answers)
    assert found.record["y"] == found.choices[answers[0]]


@pytest.mark.parametrize(
    ("listed", "right", "text"),
    [
        (["2", "1", "0"], 0, "2"),  # a number is a place, whatever the choices are
        ([1, 2, 3, 4], 1, "2"),
        ([1, 2, 3, 4], "1", "1"),  # and a text one's text first
        (["a", "b"], "1", "b"),
        (["", "a", "b"], 1, "a"),  # empty and double ones count
        (["yes", "yes", "no"], 1, "yes"),
        (["yes", "yes", "no"], 2, "no"),
        (["yes", "yes", "no"], False, "no"),
    ],
)
def test_numbers_of_choices_are_those_of_the_row(listed: list[object], right: object, text: str) -> None:
    (question,) = read(choices(**{"from": ["options[]"]}), {"options": listed, "label": right})
    assert question.right == (text,)
    assert question.record["y"] == text


def test_an_empty_choice_is_not_right() -> None:
    reader = choices(**{"from": ["options[]"]})
    for right in (0, True):
        with pytest.raises(RecordError, match="is not one of the 3 choices"):
            read(reader, {"options": ["", "a", "b"], "label": right})


def test_values_that_are_labels_of_others() -> None:
    """A file that counts from 1 for labels that count from 0: the file's values go first."""
    shifted = Reader({}, labels=("0", "1"), values={"y": {"1": "0", "2": "1"}})
    assert [one.record["y"] for one in read(shifted, {"label": 1}, {"label": 2}, {"label": 0})] == ["0", "1", "0"]
    swapped = Reader({}, labels=("0", "1"), values={"y": {"1": "0", "0": "1"}})
    assert [one.record["y"] for one in read(swapped, {"label": 1}, {"label": 0})] == ["0", "1"]


def test_groups_of_several_parts_are_kept_apart() -> None:
    reader = Reader({}, group=(at("a"), at("b")))
    found = read(reader, {"a": "1/2", "b": "3"}, {"a": "1", "b": "2/3"}, {"a": "1", "b": "2"}, labelled=False)
    assert len({one.group for one in found}) == 3
    assert found[2].group == "1/2"


def test_what_is_no_json_in_columns_that_nobody_reads() -> None:
    (found,) = read(LABELLED, {"text": "a", "label": 1, "day": datetime.date(2020, 1, 2), "raw": b"x"})
    assert found.record == {"x": "a", "y": "true"}
    with pytest.raises(RecordError, match=r"f.jsonl, line 1: the row holds half a character"):
        read(LABELLED, {"text": "\ud83d", "label": 1})


def test_what_is_right_and_no_choice_is_an_error() -> None:
    for right in (2, "Middle"):
        with pytest.raises(RecordError, match="not one of the 2 choices Left, Right"):
            read(choices(), {"a": "Left", "b": "Right", "label": right})
    with pytest.raises(RecordError, match=r"1 choice\(s\)"):
        read(choices(), {"a": "Left", "b": "Left", "label": 0})


def test_spans_are_cut_from_the_text_with_their_last_character_and_stand_once() -> None:
    source = choices(spans="passage.spans[]", of="passage.text", right="qas[].answers[].text").choices
    reader = Reader({"q": at("qas[].q")}, lists=(at("qas[]"),), choices=source, group=(at("id"), at("qas[].id")))
    row: dict[str, Any] = {
        "id": 7,
        "passage": {
            "text": "Bob met Eve. Bob left.",
            "spans": [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 13, "end": 15}],
        },
        "qas": [{"q": "who", "id": 1, "answers": [{"text": "Bob"}, {"text": "Bob"}, {"text": "Eve"}]}],
    }
    (found,) = read(reader, row)
    assert (found.choices, found.answers, found.group) == (("Bob", "Eve"), (0, 1), "7/1")
    row["passage"]["spans"] = [{"start": 0, "end": 99}]
    with pytest.raises(RecordError, match="is not in a text of 22 characters"):
        read(reader, row)


def test_phrases_beside_the_first_choice_hold_none_of_its_words() -> None:
    row = {"text": "The old man saw the dog and Bob because he barked.", "span": "Old man", "label": False}
    (found,) = read(choices(**{"from": "span", "phrases": "text"}), row)
    assert found.choices == ("Old man", "the dog", "Bob")
    assert found.answers == (1, 2)


def test_numbers_are_kept_as_the_file_has_them_and_may_be_missing() -> None:
    one = Reader({}, idx={"": at("idx")}, labels=("a", "b"))
    assert [found.idx for found in read(one, {"idx": 3, "label": "a"}, {"label": "b"})] == [3, None]
    two = Reader({}, idx={"p": at("p"), "q": at("q")}, labels=("a", "b"))
    assert read(two, {"p": 1, "q": 2, "label": "a"})[0].idx == {"p": 1, "q": 2}


def test_questions_know_where_they_came_from_and_their_records() -> None:
    rows = [Question({"x": "a", "y": "b"}), Question({"x": "c"}, ("d", "e"), (1,))]
    found = Questions(rows, name="f.jsonl", digest="d" * 64)
    assert (found.records, found.records.name, found.records.sha256) == (
        [{"x": "a", "y": "b"}, {"x": "c"}],
        "f.jsonl",
        "d" * 64,
    )
    assert found.has_choices
    assert not Questions(rows[:1]).has_choices
    other = Questions([Question({"x": "c"}, ("d", "e"), (0,))])
    assert Questions(rows[1:]).sha256 != other.sha256  # the right answers are part of the data


def test_records_are_questions_without_choices() -> None:
    data = Records([{"x": "a"}], name="n", digest="0" * 64)
    found = as_questions(data)
    assert (found, found.name, found.sha256) == ([Question({"x": "a"})], "n", "0" * 64)
    assert as_questions(found) is found


def test_a_right_answer_of_thousands_of_digits_is_none_of_the_choices() -> None:
    with pytest.raises(RecordError, match=r"the right answer '9+' is not one of the 2 choices"):
        read(choices(), {"a": "x", "b": "y", "label": "9" * 5000})


def test_rows_of_a_table_are_read_as_those_of_a_file() -> None:
    reader = Reader({"n": at("n")}, labels=("a", "b"))
    assert read(reader, {"n": np.int64(3), "label": "a"})[0].record["n"] == "3"
    assert read(reader, {"n": np.bool_(True), "label": "a"})[0].record["n"] == "true"
    with pytest.raises(RecordError, match="'n' is null"):
        read(reader, {"n": float("nan"), "label": "a"})
    rows: list[Any] = [{"n": 10**5000, "label": "a"}, {("n",): 1, "label": "a"}]
    for row in rows:
        with pytest.raises(RecordError, match="the row cannot be read as JSON"):
            read(reader, row)
