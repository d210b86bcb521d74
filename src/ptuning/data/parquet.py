"""Parquet files as rows: within a bound of memory, and whatever is in columns that nobody asks for."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ptuning.errors import FileError, RecordError
from ptuning.records import check_columns

if TYPE_CHECKING:
    from pyarrow import Array
    from pyarrow.parquet import FileMetaData

logger = logging.getLogger(__name__)

# A file of a megabyte can hold a value once and say that it is repeated a hundred million times.
MOST_BYTES = 4 * 2**30
# What a row and a value take in memory as Python objects, roughly.
ROW_BYTES, VALUE_BYTES = 400, 64


def parquet_rows(data: bytes, *, name: str) -> list[Mapping[str, object]]:
    """Return the rows of a Parquet file. A date or time that Python has no value for is text, or None with a notice if
    it is out of range.

    Raises:
        FileError: If pyarrow is missing.
        RecordError: If the file is damaged, or would take more than :data:`MOST_BYTES` of memory.
    """
    try:
        from pyarrow import ArrowException, types
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise FileError(f"reading {name} needs pyarrow; install it with: pip install pyarrow") from error
    rows: list[Mapping[str, object]] = []
    try:
        plain = ParquetFile(io.BytesIO(data))
        _check_size(plain.metadata, name)
        columns = plain.schema_arrow.names
        check_columns(columns, where=name)
        # Texts that are repeated in the file are repeated in memory by reference only.
        texts = [
            column.name for column in plain.schema_arrow if types.is_string(column.type) or types.is_binary(column.type)
        ]
        file = ParquetFile(io.BytesIO(data), read_dictionary=texts)
        for number in range(file.num_row_groups):
            group = file.read_row_group(number)
            values = [
                [value for part in column.chunks for value in _values(part, f"{name}: the column '{title}'")]
                for title, column in zip(columns, group.columns, strict=True)
            ]
            rows += [dict(zip(columns, cells, strict=True)) for cells in zip(*values, strict=True)]
    except (ArrowException, OSError, ValueError, RecursionError) as error:
        # A damaged footer is an OSError, and broken text a ValueError.
        raise RecordError(f"{name} is not a readable Parquet file: {error}") from error
    return rows


def _check_size(about: FileMetaData, name: str) -> None:
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    size = ROW_BYTES * about.num_rows
    size += sum(VALUE_BYTES * column.num_values + column.total_uncompressed_size for column in columns)
    if size > MOST_BYTES:
        raise RecordError(
            f"{name} has {about.num_rows:,} rows, which take about {size / 2**30:.0f} GB of memory; the most that is "
            f"read is {MOST_BYTES / 2**30:.0f} GB, so use a part of it"
        )


def _values(array: Array, where: str) -> list[object]:
    """Return the values of a column as Python's own."""
    from pyarrow import DictionaryArray

    if isinstance(array, DictionaryArray):
        values = _values(array.dictionary, where)
        return [None if at is None else values[at] for at in array.indices.to_pylist()]
    try:
        found: list[object] = _as_python(array).to_pylist()
    except UnicodeDecodeError as error:
        raise RecordError(f"{where} holds text that is not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except (OverflowError, ValueError):  # Python's dates end with the year 9999, and its times at microseconds
        found = list(_one_by_one(array, where))
    return found


def _as_python(value: Any) -> Any:
    """Return nanoseconds as microseconds, which Python has; a ValueError if that loses some. Where pandas is installed,
    nanoseconds would become its own types.
    """
    from pyarrow import duration, time64, timestamp, types

    kind = value.type
    if not types.is_temporal(kind) or getattr(kind, "unit", None) != "ns":
        return value
    if types.is_timestamp(kind):
        return value.cast(timestamp("us", kind.tz))
    return value.cast(duration("us") if types.is_duration(kind) else time64("us"))


def _one_by_one(array: Array, where: str) -> Iterator[object]:
    lost = 0
    for scalar in array:
        value = _or_text(scalar)
        lost += value is None and scalar.is_valid
        yield value
    if lost:
        logger.warning("%s: values out of range, which count as missing: %d (%s)", where, lost, array.type)


def _or_text(scalar: Any) -> object:
    """Return a value as Python's own, else as Arrow writes it; None for one out of range."""
    from pyarrow import ArrowException, string, types

    try:
        return _as_python(scalar).as_py()
    except (OverflowError, ValueError):
        pass
    try:
        text: str = scalar.cast(string()).as_py()
    except (ArrowException, ValueError):
        return None
    if types.is_duration(scalar.type):
        return f"{text} {scalar.type.unit}"
    return None if text.startswith("<value out of range") else text
