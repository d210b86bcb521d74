"""Parquet files that others wrote: odd dates, large files of few bytes, and whatever is in columns nobody asks for."""

import io
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from ptuning.data.questions import Reader, RowPath
from ptuning.data.reading import as_read, load_records, parquet_rows, raw_rows
from ptuning.errors import RecordError


def written(table: pa.Table) -> bytes:
    found = io.BytesIO()
    pyarrow.parquet.write_table(table, found)
    return found.getvalue()


ODD = {
    "date32": pa.array([10**8], pa.date32()),
    "timestamp": pa.array([2**62], pa.timestamp("us")),
    "time": pa.array([2**62], pa.time64("us")),
    "nested": pa.array([[2**62]], pa.list_(pa.timestamp("us"))),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_date_out_of_range_matters_only_where_it_is_used(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = written(pa.table({"x": ["Kenya"], "y": ["Nairobi"], "when": ODD[kind]}))
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING, logger="ptuning"):
        assert list(load_records(path)) == [{"x": "Kenya", "y": "Nairobi"}]
    assert "a.parquet: the column 'when': dates or times out of range" in caplog.text
    reader = Reader({"x": RowPath.parse("when")}, label=RowPath.parse("y"))
    with pytest.raises(RecordError, match=r"a\.parquet, row 1: 'when' is null"):
        list(reader.read(raw_rows(data, name="a.parquet")))


def test_times_finer_than_microseconds_are_kept_where_python_can() -> None:
    when = pa.array([1_000_000_000, None, 2**62], pa.timestamp("ns"))
    rows = as_read(raw_rows(written(pa.table({"n": [1, 2, 3], "when": when})), name="a.parquet"))
    assert list(rows)[:2] == [{"n": "1", "when": "1970-01-01 00:00:01"}, {"n": "2"}]


def test_texts_come_back_from_every_type_of_column() -> None:
    table = pa.table(
        {
            "a.b": pa.array(["x", None, "x"]), "list": [["p"], [], None],
            "large": pa.array(["l"] * 3, pa.large_string()),
            "words": pa.array(["w", "v", "w"]).dictionary_encode(), "bytes": pa.array([b"\xff"] * 3), "n": [1, 2, None],
        }
    )  # fmt: skip
    assert parquet_rows(written(table), name="a") == table.to_pylist()
    assert parquet_rows(written(table.slice(0, 0)), name="a") == []


def test_a_small_file_of_many_rows_is_refused_before_they_are_made() -> None:
    rows = 60_000_000
    text = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int8()), rows), ["the same"])
    data = written(pa.table({"x": text}))
    assert len(data) < 10**6
    with pytest.raises(RecordError, match=r"^bomb has 60,000,000 rows"):
        parquet_rows(data, name="bomb")


def test_a_long_text_that_rows_share_is_there_once() -> None:
    """A terabyte, if each row had its own."""
    text = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), 20_000), ["a" * 5_000_000])
    rows = parquet_rows(written(pa.table({"x": text})), name="a")
    assert len({id(row["x"]) for row in rows}) == 1


def test_columns_of_one_name_are_an_error() -> None:
    with pytest.raises(RecordError, match="a: the column names x are there twice"):
        parquet_rows(written(pa.table([["a"], ["b"]], names=["x", "x"])), name="a")
