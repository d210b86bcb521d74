"""Read data files and the shipped facts into records (field name -> text)."""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ptuning.errors import FileError, RecordError, closest
from ptuning.files import parse_json, read_bytes, sha256
from ptuning.records import TARGET_FIELD, Records, check_columns, clean

if TYPE_CHECKING:
    from importlib.abc import Traversable  # where Python 3.10 has it

    from pyarrow import Array


T = TypeVar("T")
Row = tuple[str, Mapping[str, object]]  # file and line, and the row as the file has it
SPLITS = ("train", "dev", "test")
# A cell of a table may hold a whole document.
MAX_CELL_CHARACTERS = 2**31 - 1
# Ending of a data file -> its format.
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
SUFFIXES = tuple(FORMATS)
TEXT_SUFFIX = ".txt"
# Separators of CSV cells, and the number of rows by which they are detected.
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
SNIFFED_ROWS = 20
PARQUET_MARK = b"PAR1"
# A Parquet file of a megabyte can hold a value once and say that it is repeated a hundred million times. Limit, and
# estimates of what a row and a value take as Python objects.
MAX_PARQUET_BYTES = 4 * 2**30
ROW_BYTES, VALUE_BYTES = 400, 64

logger = logging.getLogger(__name__)


# Field -> the names that it may have in a file.
Asked = Mapping[str, Sequence[str]]


class RawRows(list[Row]):
    """The rows of a data file as it has them, each with its file and line: ``name``, ``sha256``, ``format`` (one of
    :data:`FORMATS`, or ``text``), the ``delimiter`` of a table, and the names of its ``columns``. A RecordError if
    a row is no mapping.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        *,
        name: str,
        digest: str,
        format: str,  # noqa: A002  # what a user calls it
        delimiter: str | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        super().__init__(rows)
        for where, row in self:
            if not isinstance(row, Mapping):
                raise RecordError(f"{where}: a record must be an object with named fields, not {type(row).__name__}")
        self.name, self.sha256, self.format, self.delimiter, self.columns = name, digest, format, delimiter, columns


def load_records(source: str | Path, *, fields: Mapping[str, str] | None = None, target: str | None = None) -> Records:
    """Read records from a data file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet), or shipped facts as ``NAME:split``.

    Values are text: numbers and booleans as JSON writes them. ``null``, lists and objects are left out. A missing ``x``
    is taken from LAMA's ``sub_label``, a missing ``y`` from ``obj_label`` or ``label``. ``fields`` maps new names of
    fields to those in the file, such as ``{"y": "answer"}``. The cells of a .csv file are separated by commas,
    semicolons or tabs, which its first rows tell. A list of texts as the target, or in the field ``target`` that will
    be it later, are references.

    Raises:
        FileError: If the file does not exist, cannot be read, or has another ending.
        RecordError: If a line cannot be read (it names file and line), or if there are no records.

    Example:
        >>> load_records("capitals:train")[0].keys()
        dict_keys(['x', 'y'])
    """
    records = as_read(load_rows(source), fields=fields, target=target)
    if not records:
        raise RecordError(f"{source} holds no records; it needs one record per line")
    return records


def load_rows(source: str | Path, *, asked: Asked | None = None) -> RawRows:
    """Read a data file or shipped facts as :func:`raw_rows` does. A file with another ending is an error, unless it is
    known for which fields it is ``asked``. Errors as for :func:`load_records`.
    """
    path = Path(source)
    exists = os.path.exists(path)  # unlike Path.exists, False for a name that cannot be a path
    if not exists and ":" in str(source) and not path.suffix:
        return _shipped_rows(str(source))
    try:
        str(source).encode("utf-8")
    except UnicodeEncodeError as error:  # every record that names its data would fail
        raise FileError(f"the name of the data file {str(source)!r} is not UTF-8 text; rename it") from error
    if not exists:
        raise FileError(f"no such data file: {source}.{_hint(path)}")
    if asked is None and path.suffix.lower() not in SUFFIXES:
        raise FileError(f"cannot tell the format of {source}; a data file ends in one of {', '.join(SUFFIXES)}")
    return raw_rows(read_bytes(path), name=str(source), asked=asked)


def read_rows(data: bytes, *, name: str, fields: Mapping[str, str] | None = None) -> Records:
    """Parse the bytes of a data file as :func:`raw_rows` does, into records."""
    return as_read(raw_rows(data, name=name), fields=fields)


def as_read(rows: RawRows, *, fields: Mapping[str, str] | None = None, target: str | None = None) -> Records:
    """Return rows as records: values as text, and ``fields`` renamed; a RecordError names file and line. ``target`` is
    a field that will be the target later, and may hold a list of references.
    """
    fields = fields or {}
    target = fields.get(TARGET_FIELD, target or TARGET_FIELD)
    read = [_renamed(clean(row, where=where, target=target), fields, where=where) for where, row in rows]
    return Records(read, name=rows.name, digest=rows.sha256, places=[where for where, _ in rows], fields=fields)


def with_fields(records: Records, fields: Mapping[str, str]) -> Records:
    """Return records with fields under the names that a prompt remembers (new name -> name in the file). A record that
    lacks the name in the file stays as it is: it may have the new one already.
    """
    if not fields:
        return records
    rows = [_renamed(dict(row), {new: old for new, old in fields.items() if old in row}, where="") for row in records]
    names = {**fields, **records.fields}
    return Records(rows, name=records.name, digest=records.sha256, places=records.places, fields=names)


def raw_rows(data: bytes, *, name: str, asked: Asked | None = None) -> RawRows:
    """Parse the bytes of a data file; its format follows from the ending of ``name``. For any other it is JSONL; or,
    if it is known for which fields it is ``asked`` and which names each may have in the file, what the content looks
    like: JSONL, a JSON array, a table, Parquet, or lines of text for the one field (which .txt always is).

    Returns (file and line, row as the file has it) pairs; raises a RecordError with both if a row cannot be read.
    """
    suffix, digest = Path(name).suffix.lower(), sha256(data)
    kind = FORMATS.get(suffix) or ("text" if suffix == TEXT_SUFFIX else None)
    if kind == "parquet" or (kind is None and asked is not None and data.startswith(PARQUET_MARK)):
        table = ((f"{name}, row {number}", row) for number, row in enumerate(parquet_rows(data, name=name), start=1))
        return RawRows(table, name=name, digest=digest, format="parquet")
    text = _text(data, name)
    if asked is None:
        kind = "jsonl" if kind in (None, "text") else kind
    elif kind is None:
        kind = _format_of(text, asked)
    if kind in ("csv", "tsv"):
        delimiter = "\t" if kind == "tsv" else _delimiter(text)
        rows, columns = _delimited_rows(text, name, delimiter, quoted=kind == "csv")
        return RawRows(rows, name=name, digest=digest, format=kind, delimiter=delimiter, columns=columns)
    if kind == "text":
        rows, column = _text_rows(text, name, asked or {})
        return RawRows(rows, name=name, digest=digest, format="text", columns=[column])
    is_array = kind == "json" and text.lstrip().startswith("[")
    rows = _array_rows(text, name) if is_array else _json_line_rows(text, name)
    return RawRows(rows, name=name, digest=digest, format="json" if is_array else "jsonl")


def shipped_facts() -> dict[str, dict[str, object]]:
    """Return the shipped facts: name -> title, manual template, ``about`` noun and rows per split."""
    facts: dict[str, dict[str, object]] = json.loads((_facts_folder() / "index.json").read_text(encoding="utf-8"))
    return facts


def _facts_folder() -> Traversable:
    return resources.files("ptuning.data") / "facts"


def _shipped_rows(source: str) -> RawRows:
    name, _, split = source.partition(":")
    known = shipped_names()
    if name not in known:
        raise FileError(
            f"no data file and no shipped facts named '{source}'.{closest(name, known)} Shipped: {_names()}"
        )
    if split not in SPLITS:
        raise FileError(f"'{source}': the parts of shipped facts are {', '.join(SPLITS)}, not '{split}'")
    data = (_facts_folder() / name / f"{split}.jsonl").read_bytes()
    rows = raw_rows(data, name=f"{source}.jsonl")
    rows.name = source
    return rows


def shipped_names() -> list[str]:
    """Return the names of shipped facts; ``NAME:split`` is data."""
    return list(shipped_facts())


def _names() -> str:
    return ", ".join(f"{name}:train|dev|test" for name in sorted(shipped_names()))


def _hint(path: Path) -> str:
    if path.name in shipped_names():
        return f" The shipped facts of that name have three parts: {path.name}:train, {path.name}:dev, {path.name}:test"
    neighbours = [entry.name for entry in path.parent.iterdir()] if os.path.isdir(path.parent) else []
    return closest(path.name, neighbours) + f" Shipped facts: {_names()}"


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecordError(f"{name}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error


def _json_line_rows(text: str, name: str) -> list[Row]:
    rows = []
    # Only "\n" ends a line: JSON strings may hold other line separators, which str.splitlines would cut at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            rows.append((where, parse_json(line)))
        except ValueError as error:
            raise RecordError(f"{where}: not a JSON object ({error}); each line must hold one") from error
    return rows


def _array_rows(text: str, name: str) -> list[Row]:
    try:
        return [(f"{name}, record {number}", row) for number, row in enumerate(parse_json(text), start=1)]
    except ValueError as error:
        raise RecordError(f"{name}: not valid JSON ({error})") from error


def _format_of(text: str, asked: Asked) -> str:
    """Return the format of a text that has no name to tell it. A text may begin with a bracket as well, but hardly as a
    list of objects does; and a line of text may have a comma, but hardly names of columns.
    """
    start = text.lstrip()
    if start.startswith("{"):
        return "jsonl"
    if re.match(r"\[\s*[{\]]", start):
        return "json"
    for kind, delimiter in (("csv", _delimiter(text)), ("tsv", "\t")):
        (header, *rows), is_whole = _sample(text, delimiter, quoted=kind == "csv")
        is_asked = all({*names} & {*header} for names in asked.values())
        are_names = len({*header}) == len(header) > 1 and all(re.fullmatch(r"\w[\w.-]*", name) for name in header)
        is_even = is_whole and {len(row) for row in rows} == {len(header)}
        if rows and (is_asked or (are_names and is_even)):
            return "tsv" if delimiter == "\t" else kind
    return "text"


def _delimiter(text: str) -> str:
    """Return what separates the cells of a CSV: of :data:`DELIMITERS` the one that makes the most columns, first of all
    with as many cells in at least half of the first rows; without such, one column or the most names in the header.
    """

    def rank(delimiter: str) -> tuple[int, int]:
        (header, *rows), _ = _sample(text, delimiter)
        fitting = sum(len(row) == len(header) for row in rows)
        if len(header) == 1:
            return int(delimiter == ","), 1
        return 2 * (2 * fitting >= len(rows)), len(header)

    return max(DELIMITERS, key=rank)


def _sample(text: str, delimiter: str, *, quoted: bool = True) -> tuple[list[list[str]], bool]:
    """Return the cells of a table's header and first rows, and whether they could all be read with this delimiter."""
    rows: list[list[str]] = []
    try:
        for cells in itertools.islice(filter(None, _cells(text, delimiter, quoted=quoted)), SNIFFED_ROWS + 1):
            rows.append(cells)  # rows before an error count
    except csv.Error:
        return rows or [[]], False
    return rows or [[]], True


def _cells(text: str, delimiter: str, *, quoted: bool) -> Iterator[list[str]]:
    """Return the reader of a table's cells, which counts its lines."""
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    stream = io.StringIO(text, newline="")
    if quoted:
        return csv.reader(stream, delimiter=delimiter, strict=True)
    return csv.reader(stream, delimiter=delimiter, quoting=csv.QUOTE_NONE)


def _delimited_rows(text: str, name: str, delimiter: str, *, quoted: bool) -> tuple[list[Row], Sequence[str]]:
    """Return the rows of a table and its columns. Tab-separated benchmark files hold bare quotation marks as text, and
    so .tsv is read without quoting; .csv is quoted, whatever separates it.
    """
    reader: Any = _cells(text, delimiter, quoted=quoted)
    rows: list[Row] = []
    read = 0  # lines
    try:
        header: list[str] = next(filter(None, reader), [])
        check_columns(header, where=f"{name}, line 1")
        read = reader.line_num
        for cells in reader:
            read = reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                remedy = "; put a text that has one in it in quotation marks" if quoted else ""
                raise RecordError(
                    f"{name}, line {reader.line_num}: {len(cells)} cells, and the header has {len(header)} columns, "
                    f"separated by {DELIMITERS[delimiter]}{remedy}"
                )
            rows.append((f"{name}, line {reader.line_num}", dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        remedy = (
            f"; the row that begins in line {read + 1} has a quotation mark that is not closed, or one inside of a "
            "text that is not written twice"
        )
        about_quotes = "expected" in str(error)
        raise RecordError(f"{name}, line {reader.line_num}: {error}{remedy * about_quotes}") from error
    return rows, header


def _text_rows(text: str, name: str, asked: Asked) -> tuple[list[Row], str]:
    """Return one row per line for the one field that is asked for, and its name; empty lines at the end are none."""
    if len(asked) != 1:
        wanted = f"the fields {', '.join(asked)}" if asked else "no field"
        raise RecordError(
            f"{name} holds lines of text, which fill one field, and {wanted} would be read; give a CSV with names of "
            "columns in its first line, or JSONL"
        )
    (names,) = asked.values()
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    return [(f"{name}, line {number}", {names[0]: line}) for number, line in enumerate(lines, start=1)], names[0]


def renamed(record: Mapping[str, T], fields: Mapping[str, str] | None, *, where: str) -> dict[str, T]:
    """Return a record with ``fields`` (new name -> name in the file) under their new names only, so that no copy of an
    answer is left; a RecordError if one is missing.
    """
    moved = {}
    for new, old in (fields or {}).items():
        if old not in record:
            raise RecordError(
                f"{where}: no field '{old}' to use as '{new}'; it has {', '.join(sorted(record)) or 'no fields'}"
            )
        moved[new] = record[old]
    return {name: text for name, text in record.items() if name not in (fields or {}).values()} | moved


def _renamed(record: Mapping[str, str], fields: Mapping[str, str] | None, *, where: str) -> dict[str, str]:
    moved = renamed(record, fields, where=where)
    return {name: text.strip() if name == TARGET_FIELD else text for name, text in moved.items()}


def parquet_rows(data: bytes, *, name: str) -> list[Mapping[str, object]]:
    """Return the rows of a Parquet file. A date or time that Python has no value for is text, or None with a warning if
    it is out of range.

    Raises:
        FileError: If pyarrow is missing.
        RecordError: If the file is damaged, or would take more than :data:`MAX_PARQUET_BYTES` of memory.
    """
    try:
        from pyarrow import ArrowException, types
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise FileError(f"reading {name} needs pyarrow; install it with: pip install pyarrow") from error
    try:
        file = ParquetFile(io.BytesIO(data))
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
        size = ROW_BYTES * file.metadata.num_rows
        size += sum(VALUE_BYTES * chunk.num_values + chunk.total_uncompressed_size for chunk in chunks)
        if size > MAX_PARQUET_BYTES:
            raise RecordError(
                f"{name} has {file.metadata.num_rows:,} rows, which take about {size / 2**30:.0f} GB of memory; the "
                f"limit is {MAX_PARQUET_BYTES / 2**30:.0f} GB, so use a part of it"
            )
        schema = file.schema_arrow
        check_columns(schema.names, where=name)
        # Texts that are repeated in the file are repeated in memory by reference only.
        texts = [column.name for column in schema if types.is_string(column.type) or types.is_binary(column.type)]
        table = ParquetFile(io.BytesIO(data), read_dictionary=texts).read()
        columns = [
            [value for chunk in column.chunks for value in _column_values(chunk, f"{name}: the column '{title}'")]
            for title, column in zip(schema.names, table.columns, strict=True)
        ]
        return [dict(zip(schema.names, cells, strict=True)) for cells in zip(*columns, strict=True)]
    except (ArrowException, OSError, ValueError, RecursionError) as error:
        # A damaged footer is an OSError, and broken text a ValueError.
        raise RecordError(f"{name} is not a readable Parquet file: {error}") from error


def _column_values(array: Array, where: str) -> list[object]:
    """Return the values of a column as Python's own."""
    from pyarrow import DictionaryArray, types

    if isinstance(array, DictionaryArray):
        values = _column_values(array.dictionary, where)
        return [None if at is None else values[at] for at in array.indices.to_pylist()]
    is_fine = types.is_temporal(array.type) and getattr(array.type, "unit", None) == "ns"
    try:
        if not is_fine:
            listed: list[object] = array.to_pylist()
            return listed
    except UnicodeDecodeError as error:
        raise RecordError(f"{where} holds text that is not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except (OverflowError, ValueError):  # Python's dates end with the year 9999
        pass
    listed = [_moment(scalar) for scalar in array]
    lost = sum(value is None and scalar.is_valid for value, scalar in zip(listed, array, strict=True))
    if lost:
        logger.warning("%s: values out of range, which count as missing: %d (%s)", where, lost, array.type)
    return listed


def _moment(scalar: Any) -> object:
    """Return a date, time or duration as Python's own, else as Arrow writes it; None for one out of range. Nanoseconds
    become microseconds, which Python has, if none are lost.
    """
    from pyarrow import ArrowException, duration, string, time64, timestamp, types

    kind = scalar.type
    try:
        if getattr(kind, "unit", None) != "ns":
            return scalar.as_py()
        is_date = types.is_timestamp(kind)
        coarser = timestamp("us", kind.tz) if is_date else duration("us") if types.is_duration(kind) else time64("us")
        return scalar.cast(coarser).as_py()
    except (OverflowError, ValueError):
        pass
    try:
        text: str = scalar.cast(string()).as_py()
    except (ArrowException, ValueError):
        return None
    if types.is_duration(kind):
        return f"{text} {kind.unit}"
    return None if text.startswith("<value out of range") else text
