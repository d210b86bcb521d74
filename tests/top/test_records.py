"""Records made of the rows that callers have: numbers as they are, what is missing left out, bad texts refused."""

import copy
import pickle
from datetime import date, datetime, time, timedelta
from decimal import Decimal

import numpy as np
import pytest
import torch

from ptuning.errors import LabelWordError, RecordError, shown
from ptuning.records import (
    References,
    as_records,
    canonical_json,
    check_columns,
    clean,
    gathered,
    plain,
    references_of,
    target_of,
)
from ptuning.template.labels import LabelWords


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    row = {
        "a": np.int64(3), "b": np.float64(0.5), "c": np.bool_(True), "d": np.str_("e"), "f": torch.tensor(7),
        "g": np.float32(0.25), "h": np.array(2),
    }  # fmt: skip
    assert clean(row, where="") == {"a": "3", "b": "0.5", "c": "true", "d": "e", "f": "7", "g": "0.25", "h": "2"}


def test_dates_times_and_decimals_are_the_text_that_python_writes() -> None:
    """They were left out of the record, as if the field were missing; those of a task were text. numpy's nanoseconds
    were a number.
    """
    row = {
        "a": date(2026, 11, 27), "b": datetime(2026, 11, 27, 10, 30), "c": time(10, 30), "d": timedelta(minutes=90),
        "e": Decimal("3.50"), "f": np.datetime64("2026-11-27"), "g": np.datetime64("2026-11-27T10:30", "ns"),
        "h": np.datetime64("NaT"), "i": Decimal("nan"), "j": Decimal("-sNaN"),
    }  # fmt: skip
    assert clean(row, where="") == {
        "a": "2026-11-27", "b": "2026-11-27 10:30:00", "c": "10:30:00", "d": "1:30:00", "e": "3.50",
        "f": "2026-11-27", "g": "2026-11-27T10:30:00.000000000",
    }  # fmt: skip


def test_what_is_missing_in_a_table_is_missing_in_the_record() -> None:
    """pandas marks missing text as NaN."""
    row = {"x": "Kenya", "a": None, "b": float("nan"), "c": np.nan, "d": np.float32("nan"), "e": np.array([1, 2])}
    assert clean(row, where="") == {"x": "Kenya"}
    assert clean({"label": float("nan"), "obj_label": "Nairobi"}, where="") == {
        "obj_label": "Nairobi",
        "y": "Nairobi",
    }


@pytest.mark.parametrize("value", ["text", 1, True, "\ud800"])
def test_half_a_character_in_a_field_or_its_name_is_an_error(value: object) -> None:
    name = "x" if value == "\ud800" else "\ud800"
    with pytest.raises(RecordError, match=r"record 1: the field .* holds half a character"):
        as_records([{name: value}])


def test_a_number_too_long_to_write_is_an_error() -> None:
    with pytest.raises(RecordError, match="record 1: the number in the field 'x' is too long"):
        as_records([{"x": 10**5000}])


def test_columns_of_one_name_are_an_error_at_any_width() -> None:
    check_columns([f"c{number}" for number in range(100_000)], where="a.csv")
    with pytest.raises(RecordError, match=r"a\.csv: the column names x are there twice"):
        check_columns(["x", *map(str, range(100_000)), "x"], where="a.csv")


def test_a_value_that_cannot_be_written_is_shown_by_its_type() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    assert (shown(10**5000), shown(deep), shown("a")) == ("int", "list", "'a'")
    assert len(shown("a" * 100)) == 60
    with pytest.raises(RecordError, match="field names must be text, not int"):
        as_records([{10**5000: "a"}])  # type: ignore[dict-item]  # as a caller may
    with pytest.raises(LabelWordError, match="label 'a' has int"):
        LabelWords.of({"a": 10**5000})  # type: ignore[dict-item]


def test_a_list_of_texts_in_the_targets_place_is_its_references() -> None:
    """The first is the text that is learned; all of them travel with the record, also through a copy or a process."""
    (row,) = as_records([{"x": ["a"], "y": [" Nairobi", "Nairobi, Kenya ", "", 3]}])
    assert row == {"y": "Nairobi"}  # a list in another field is left out, as ever
    for one in (row, copy.deepcopy(row), pickle.loads(pickle.dumps(row)), {**row}):
        assert references_of(one) == ("Nairobi", "Nairobi, Kenya", "3")
    assert target_of(row) == plain(row)["y"] == ["Nairobi", "Nairobi, Kenya", "3"]
    assert canonical_json(row) == '{"y": ["Nairobi", "Nairobi, Kenya", "3"]}'


def test_one_reference_is_a_target_as_any_other_and_none_is_none() -> None:
    (one, none) = as_records([{"y": ["a", "a"]}, {"x": "b", "y": []}])
    assert (type(one["y"]), references_of(one), target_of(one)) == (str, ("a",), "a")
    assert (none, references_of(none), target_of(none)) == ({"x": "b"}, (), None)


def test_a_list_of_references_holds_texts_only() -> None:
    with pytest.raises(RecordError, match="record 1: the field 'y' is a list, whose entries must be texts"):
        as_records([{"y": ["a", {"b": 1}]}])
    assert isinstance(References([" a", "b "]).strip(), References)


def test_records_that_differ_in_their_target_alone_are_one() -> None:
    rows = as_records([{"x": "a", "y": "1"}, {"x": "b", "y": "2"}, {"x": "a", "y": ["3", "1"]}, {"x": "c"}])
    found = gathered(rows)
    assert [(one["x"], references_of(one)) for one in found] == [("a", ("1", "3")), ("b", ("2",)), ("c", ())]
    assert [found.place(number) for number in (1, 2, 3)] == [rows.place(number) for number in (1, 2, 4)]
    assert (found.name, found.sha256) == (rows.name, rows.sha256)
