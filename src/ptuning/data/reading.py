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
Columns = Mapping[str, Sequence[str]]  # field -> the names that its column may have in a file
SPLITS = ("train", "dev", "test")
# A cell of a table may hold a whole document.
MAX_CELL_CHARACTERS = 2**31 - 1
# Ending of a data file -> its format.
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
SUFFIXES = tuple(FORMATS)
# Separators of CSV cells, and the number of rows by which they are detected.
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
SNIFFED_ROWS = 20
PARQUET_MARK = b"PAR1"
# A Parquet file of a megabyte can hold a value once and say that it is repeated a hundred million times. Limit, and
# estimates of the memory of a row and a value as Python objects.
MAX_PARQUET_BYTES = 4 * 2**30
ROW_BYTES, VALUE_BYTES = 400, 64

logger = logging.getLogger(__name__)


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
    semicolons or tabs, as its first rows show. A list of texts as the target, or in the field ``target`` that will
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


def load_rows(source: str | Path, *, columns: Columns | None = None) -> RawRows:
    """Read a data file or shipped facts as :func:`raw_rows` does. A file with another ending is an error, unless the
    ``columns`` to read are known. Errors as for :func:`load_records`.
    """
    path, facts = Path(source), shipped_names()
    exists = os.path.exists(path)  # unlike Path.exists, False for a name that cannot be a path
    if not exists and ":" in str(source) and not path.suffix:
        name, _, split = str(source).partition(":")
        if name not in facts:
            raise FileError(
                f"no data file and no shipped facts named '{source}'.{closest(name, facts)} Shipped: {_listed(facts)}"
            )
        if split not in SPLITS:
            raise FileError(f"'{source}': the parts of shipped facts are {', '.join(SPLITS)}, not '{split}'")
        rows = raw_rows((_facts_folder() / name / f"{split}.jsonl").read_bytes(), name=f"{source}.jsonl")
        rows.name = str(source)
        return rows
    try:
        str(source).encode("utf-8")
    except UnicodeEncodeError as error:  # every record that names its data would fail
        raise FileError(f"the name of the data file {str(source)!r} is not UTF-8 text; rename it") from error
    if not exists and path.name in facts:
        raise FileError(f"no such data file: {source}. The shipped facts of that name are {_listed([path.name])}")
    if not exists:
        siblings = [entry.name for entry in path.parent.iterdir()] if os.path.isdir(path.parent) else []
        hint = closest(path.name, siblings)
        raise FileError(f"no such data file: {source}.{hint} Shipped facts: {_listed(facts)}")
    if columns is None and path.suffix.lower() not in SUFFIXES:
        raise FileError(f"cannot tell the format of {source}; a data file ends in one of {', '.join(SUFFIXES)}")
    return raw_rows(read_bytes(path), name=str(source), columns=columns)


def as_read(rows: RawRows, *, fields: Mapping[str, str] | None = None, target: str | None = None) -> Records:
    """Return rows as records: values as text, and ``fields`` renamed; a RecordError names file and line. ``target`` is
    a field that will be the target later, and may hold a list of references.
    """
    fields = fields or {}
    target = fields.get(TARGET_FIELD, target or TARGET_FIELD)
    records = [renamed(clean(row, where=where, target=target), fields, where=where) for where, row in rows]
    return Records(records, name=rows.name, digest=rows.sha256, places=[where for where, _ in rows], fields=fields)


def with_fields(records: Records, fields: Mapping[str, str]) -> Records:
    """Return records with fields under the names that a prompt remembers (new name -> name in the file). A record that
    lacks the name in the file stays as it is: it may have the new one already.
    """
    if not fields:
        return records
    rows = [renamed(row, {new: old for new, old in fields.items() if old in row}, where="") for row in records]
    names = {**fields, **records.fields}
    return Records(rows, name=records.name, digest=records.sha256, places=records.places, fields=names)


def renamed(record: Mapping[str, T], fields: Mapping[str, str] | None, *, where: str) -> dict[str, T]:
    """Return a record with ``fields`` (new name -> name in the file) under their new names only, so that no copy of an
    answer is left; a RecordError if one is missing.
    """
    moved: dict[str, Any] = {}
    for new, old in (fields or {}).items():
        if old not in record:
            known = ", ".join(sorted(record)) or "no fields"
            raise RecordError(f"{where}: no field '{old}' to use as '{new}'; it has {known}")
        value = record[old]
        moved[new] = value.strip() if new == TARGET_FIELD and isinstance(value, str) else value
    return {name: text for name, text in record.items() if name not in (fields or {}).values()} | moved


def raw_rows(data: bytes, *, name: str, columns: Columns | None = None) -> RawRows:
    """Parse the bytes of a data file. The ending of ``name`` decides the format. For any other it is JSONL; or, if the
    ``columns`` to read are known, the format that the content looks like: JSONL, a JSON array, a table, Parquet, or
    lines of text for the one field (which .txt always is).

    Returns (file and line, row as the file has it) pairs; raises a RecordError with both if a row cannot be read.
    """
    suffix, digest = Path(name).suffix.lower(), sha256(data)
    kind = FORMATS.get(suffix) or ("text" if suffix == ".txt" else None)
    if kind == "parquet" or (kind is None and columns is not None and data.startswith(PARQUET_MARK)):
        table = ((f"{name}, row {number}", row) for number, row in enumerate(parquet_rows(data, name=name), start=1))
        return RawRows(table, name=name, digest=digest, format="parquet")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecordError(f"{name}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    if columns is None:
        kind = "jsonl" if kind in (None, "text") else kind
    elif kind is None:
        kind = _format_of(text, columns)
    if kind in ("csv", "tsv"):
        delimiter = "\t" if kind == "tsv" else _delimiter(text)
        rows, header = _delimited_rows(text, name, delimiter, quoted=kind == "csv")
        return RawRows(rows, name=name, digest=digest, format=kind, delimiter=delimiter, columns=header)
    if kind == "text":
        if columns is None or len(columns) != 1:
            wanted = f"the fields {', '.join(columns)}" if columns else "no field"
            raise RecordError(
                f"{name} holds lines of text, which fill one field, and {wanted} would be read; give a CSV with names "
                "of columns in its first line, or JSONL"
            )
        ((column, *_),) = columns.values()
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        while lines and not lines[-1].strip():
            lines.pop()
        rows = [(f"{name}, line {number}", {column: line}) for number, line in enumerate(lines, start=1)]
        return RawRows(rows, name=name, digest=digest, format="text", columns=[column])
    if kind == "json" and text.lstrip().startswith("["):
        try:
            rows = [(f"{name}, record {number}", row) for number, row in enumerate(parse_json(text), start=1)]
        except ValueError as error:
            raise RecordError(f"{name}: not valid JSON ({error})") from error
        return RawRows(rows, name=name, digest=digest, format="json")
    rows = []
    # Only "\n" ends a line: JSON strings may hold other line separators, at which str.splitlines would cut.
    for number, content in enumerate(text.split("\n"), start=1):
        where = f"{name}, line {number}"
        try:
            rows += [(where, parse_json(content))] if content.strip() else []
        except ValueError as error:
            raise RecordError(f"{where}: not a JSON object ({error}); each line must hold one") from error
    return RawRows(rows, name=name, digest=digest, format="jsonl")


def shipped_facts() -> dict[str, dict[str, object]]:
    """Return the shipped facts: name -> title, manual template, ``about`` noun and rows per split."""
    facts: dict[str, dict[str, object]] = json.loads((_facts_folder() / "index.json").read_text(encoding="utf-8"))
    return facts


def shipped_names() -> list[str]:
    """Return the names of shipped facts; ``NAME:split`` is data."""
    return list(shipped_facts())


def _facts_folder() -> Traversable:
    return resources.files("ptuning.data") / "facts"


def _listed(facts: Iterable[str]) -> str:
    return ", ".join(f"{name}:{'|'.join(SPLITS)}" for name in sorted(facts))


def _format_of(text: str, columns: Columns) -> str:
    """Return the format of a text without an ending that names it. A text may begin with a bracket as well, but hardly
    as a list of objects does; and a line of text may have a comma, but hardly names of columns.
    """
    start = text.lstrip()
    if start.startswith("{"):
        return "jsonl"
    if re.match(r"\[\s*[{\]]", start):
        return "json"
    for kind, delimiter in (("csv", _delimiter(text)), ("tsv", "\t")):
        (header, *rows), is_whole = _sample(text, delimiter, quoted=kind == "csv")
        has_columns = all({*names} & {*header} for names in columns.values())
        are_names = len({*header}) == len(header) > 1 and all(re.fullmatch(r"\w[\w.-]*", name) for name in header)
        is_even = is_whole and {len(row) for row in rows} == {len(header)}
        if rows and (has_columns or (are_names and is_even)):
            return "tsv" if delimiter == "\t" else kind
    return "text"


def _delimiter(text: str) -> str:
    """Return the separator of the cells of a CSV: of :data:`DELIMITERS` the one that makes the most columns, first of
    all with as many cells in at least half of the first rows; without such, one column or the most names in the header.
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
            where = f"{name}, line {read}"
            if cells and len(cells) != len(header):
                remedy = "; put a text that has one in it in quotation marks" if quoted else ""
                raise RecordError(
                    f"{where}: {len(cells)} cells, and the header has {len(header)} columns, separated by "
                    f"{DELIMITERS[delimiter]}{remedy}"
                )
            rows += [(where, dict(zip(header, cells, strict=True)))] if cells else []
    except csv.Error as error:
        remedy = (
            f"; the row that begins in line {read + 1} has a quotation mark that is not closed, or one inside of a "
            "text that is not written twice"
        )
        about_quotes = "expected" in str(error)
        raise RecordError(f"{name}, line {reader.line_num}: {error}{remedy * about_quotes}") from error
    return rows, header


def parquet_rows(data: bytes, *, name: str) -> list[Mapping[str, object]]:
    """Return the rows of a Parquet file. A date or time that Python has no value for is None, with a warning.

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
    from pyarrow import DictionaryArray

    if isinstance(array, DictionaryArray):
        values = _column_values(array.dictionary, where)
        return [None if at is None else values[at] for at in array.indices.to_pylist()]
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError as error:
        raise RecordError(f"{where} holds text that is not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except (OverflowError, ValueError):  # Python's dates end with the year 9999 and have no nanoseconds
        values = []
        for scalar in array:
            try:
                values.append(scalar.as_py())
            except (OverflowError, ValueError):
                values.append(None)
        logger.warning("%s: dates or times out of range (%s) count as missing", where, array.type)
        return values
