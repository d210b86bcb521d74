"""Read data files and the shipped facts into records (field name -> text)."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ptuning.data.parquet import parquet_rows
from ptuning.errors import FileError, RecordError, closest
from ptuning.files import parse_json, read_bytes, sha256
from ptuning.records import TARGET_FIELD, Records, check_columns, clean

if TYPE_CHECKING:
    from importlib.abc import Traversable  # where Python 3.10 has it


T = TypeVar("T")
Row = tuple[str, Mapping[str, object]]  # file and line, and the row as the file has it
SPLITS = ("train", "dev", "test")
# A cell of a table may hold a whole document.
MAX_CELL_CHARACTERS = 2**31 - 1
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def load_records(source: str | Path, *, fields: Mapping[str, str] | None = None) -> Records:
    """Read records from a data file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet), or shipped facts as ``NAME:split``.

    Values are text: numbers and booleans as JSON writes them. ``null``, lists and objects are left out. A missing ``x``
    is taken from LAMA's ``sub_label``, a missing ``y`` from ``obj_label`` or ``label``. ``fields`` maps new names of
    fields to those in the file, such as ``{"y": "answer"}``.

    Raises:
        FileError: If the file does not exist, cannot be read, or has another ending.
        RecordError: If a line cannot be read (it names file and line), or if there are no records.

    Example:
        >>> load_records("capitals:train")[0].keys()
        dict_keys(['x', 'y'])
    """
    path = Path(source)
    exists = os.path.exists(path)  # unlike Path.exists, False for a name that cannot be a path
    if not exists and ":" in str(source) and not path.suffix:
        return _shipped_records(str(source))
    try:
        str(source).encode("utf-8")
    except UnicodeEncodeError as error:  # every record that names its data would fail
        raise FileError(f"the name of the data file {str(source)!r} is not UTF-8 text; rename it") from error
    if not exists:
        raise FileError(f"no such data file: {source}.{_hint(path)}")
    if path.suffix.lower() not in SUFFIXES:
        raise FileError(f"cannot tell the format of {source}; a data file ends in one of {', '.join(SUFFIXES)}")
    data = read_bytes(path)
    records = read_rows(data, name=str(source), fields=fields)
    if not records:
        raise RecordError(f"{source} holds no records; it needs one record per line")
    return records


def read_rows(data: bytes, *, name: str, fields: Mapping[str, str] | None = None) -> Records:
    """Parse the bytes of a data file as :func:`raw_rows` does, into records."""
    rows = raw_rows(data, name=name)
    read = [_renamed(clean(row, where=where), fields, where=where) for where, row in rows]
    return Records(read, name=name, digest=sha256(data), places=[where for where, _ in rows], fields=fields)


def with_fields(records: Records, fields: Mapping[str, str]) -> Records:
    """Return records with fields under the names that a prompt remembers (new name -> name in the file). A record that
    lacks the name in the file stays as it is: it may have the new one already.
    """
    if not fields:
        return records
    rows = [_renamed(dict(row), {new: old for new, old in fields.items() if old in row}, where="") for row in records]
    found = {**fields, **records.fields}
    return Records(rows, name=records.name, digest=records.sha256, places=records.places, fields=found)


def raw_rows(data: bytes, *, name: str) -> list[Row]:
    """Parse the bytes of a data file; its format follows from the ending of ``name`` (JSONL for any other).

    Returns (file and line, row as the file has it) pairs; raises a RecordError with both if a row cannot be read.
    """
    suffix = Path(name).suffix.lower()
    if suffix == ".parquet":
        return [(f"{name}, row {number}", row) for number, row in enumerate(parquet_rows(data, name=name), start=1)]
    if suffix in (".csv", ".tsv"):
        return _delimited_rows(_text(data, name), name, tab=suffix == ".tsv")
    if suffix == ".json" and _text(data, name).lstrip().startswith("["):
        return _array_rows(_text(data, name), name)
    return _json_line_rows(_text(data, name), name)


def shipped_facts() -> dict[str, dict[str, object]]:
    """Return the shipped facts: name -> title, manual template, ``about`` noun and rows per split."""
    found: dict[str, dict[str, object]] = json.loads((_facts_folder() / "index.json").read_text(encoding="utf-8"))
    return found


def _facts_folder() -> Traversable:
    return resources.files("ptuning.data") / "facts"


def _shipped_records(source: str) -> Records:
    name, _, split = source.partition(":")
    known = shipped_facts()
    if name not in known:
        raise FileError(
            f"no data file and no shipped facts named '{source}'.{closest(name, known)} Shipped: {_names()}"
        )
    if split not in SPLITS:
        raise FileError(f"'{source}': the parts of shipped facts are {', '.join(SPLITS)}, not '{split}'")
    data = (_facts_folder() / name / f"{split}.jsonl").read_bytes()
    found = read_rows(data, name=f"{source}.jsonl")
    return Records(found, name=source, digest=found.sha256, places=found.places)


def _names() -> str:
    return ", ".join(f"{name}:train|dev|test" for name in sorted(shipped_facts()))


def _hint(path: Path) -> str:
    if path.name in shipped_facts():
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


def _delimited_rows(text: str, name: str, *, tab: bool) -> list[Row]:
    # Tab-separated benchmark files hold bare quotation marks as text, comma-separated ones quote with them.
    stream = io.StringIO(text, newline="")
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    reader = csv.reader(stream, "excel-tab", quoting=csv.QUOTE_NONE) if tab else csv.reader(stream, strict=True)
    rows: list[Row] = []
    try:
        header = next(reader, [])
        check_columns(header, where=f"{name}, line 1")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise RecordError(
                    f"{name}, line {reader.line_num}: {len(cells)} cells, and the header has {len(header)} columns"
                )
            rows.append((f"{name}, line {reader.line_num}", dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise RecordError(f"{name}, line {reader.line_num}: {error}") from error
    return rows


def renamed(record: Mapping[str, T], fields: Mapping[str, str] | None, *, where: str) -> dict[str, T]:
    """Return a record with ``fields`` (new name -> name in the file) under their new names only, so that no copy of an
    answer is left; a RecordError if one is missing.
    """
    found = {}
    for new, old in (fields or {}).items():
        if old not in record:
            raise RecordError(
                f"{where}: no field '{old}' to use as '{new}'; it has {', '.join(sorted(record)) or 'no fields'}"
            )
        found[new] = record[old]
    return {name: text for name, text in record.items() if name not in (fields or {}).values()} | found


def _renamed(record: Mapping[str, str], fields: Mapping[str, str] | None, *, where: str) -> dict[str, str]:
    found = renamed(record, fields, where=where)
    return {name: text.strip() if name == TARGET_FIELD else text for name, text in found.items()}
