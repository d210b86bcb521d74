"""A record, the row of data that everything starts from: a mapping from field name to text, and the checks for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from ptuning.errors import PTuningError, RecordError
from ptuning.files import sha256

Record = Mapping[str, str]
TARGET_FIELD = "y"
# What other data sets call the two sides of a fact, or the target: LAMA's T-REx files and most classification sets.
ALIASES = {"x": ("sub_label",), "y": ("obj_label", "label")}


class Records(list[Record]):
    """A list of records and where it came from: ``name`` is the path as given, ``NAME:split`` or ``in memory``,
    ``sha256`` the hash of the file's bytes, or of the records' canonical JSON where there is no file.
    """

    def __init__(self, rows: Iterable[Record], *, name: str = "in memory", digest: str | None = None) -> None:
        super().__init__(rows)
        self.name = name
        self.sha256 = digest or sha256("".join(canonical_json(row) + "\n" for row in self).encode("utf-8"))


def canonical_json(record: Record) -> str:
    """Return a record as one JSON line with sorted keys."""
    return json.dumps(dict(record), ensure_ascii=False, sort_keys=True)


def as_records(data: Sequence[Record]) -> Records:
    """Return ``data`` as :class:`Records`, unchanged if it is one already."""
    if isinstance(data, Records):
        return data
    return Records([clean(row, where=f"record {index}") for index, row in enumerate(data, start=1)])


def check_text(text: str, *, where: str, what: str = "the row", error: type[PTuningError] = RecordError) -> None:
    """Raise an ``error`` if a text holds half a character: no tokenizer or file takes it. Broken JSON may have one, and
    a command line that is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as found:
        raise error(f"{where}: {what} holds half a character (a lone surrogate); write it in UTF-8") from found


def clean(row: Mapping[str, object], *, where: str) -> dict[str, str]:
    """Return scalar values as text, with :data:`ALIASES`; the target without the white space around it, which would be
    learned with it. A RecordError for no mapping, or a name that is no text.
    """
    if not isinstance(row, Mapping):
        raise RecordError(f"{where}: a record must be an object with named fields, not {type(row).__name__}")
    record: dict[str, str] = {}
    for name, value in row.items():
        if not isinstance(name, str):
            raise RecordError(f"{where}: field names must be text, not {name!r}")
        if isinstance(value, str):
            check_text(name + value, where=where, what=f"the field {name!r}")
            record[name] = value
        elif isinstance(value, bool | int | float):
            record[name] = json.dumps(value)
    for name, others in ALIASES.items():
        source = next((other for other in others if other in record), None)
        if name not in record and source is not None:
            record[name] = record[source]
    if TARGET_FIELD in record:
        record[TARGET_FIELD] = record[TARGET_FIELD].strip()
    return record


def require_targets(records: Records, *, field: str = TARGET_FIELD) -> None:
    """Raise a RecordError at the first record without a target; it gives the record's number and its fields."""
    for number, record in enumerate(records, start=1):
        if not record.get(field, "").strip():
            raise RecordError(
                f"{records.name}, record {number}: no target; the field '{field}' is missing or empty, the record has "
                f"{', '.join(sorted(record)) or 'no fields'}. Name another field with --field {field}=NAME"
            )
