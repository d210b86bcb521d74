"""A record, the row of data that everything starts from: a mapping from field name to text, and the checks for it."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, Protocol, TypeGuard

from ptuning.errors import PTuningError, RecordError, shown
from ptuning.files import Json, sha256

Record = Mapping[str, str]


class References(str):
    """A target with several ``references``, any of which is right: the text of the first, by which it is learned.

    >>> References(["Nairobi", "the city of Nairobi"])
    'Nairobi'
    """

    references: tuple[str, ...]

    def __new__(cls, references: Sequence[str]) -> References:
        """Return the first of the texts, with all of them."""
        made = super().__new__(cls, references[0])
        made.references = tuple(references)
        return made

    def __getnewargs__(self) -> tuple[tuple[str, ...]]:  # type: ignore[override]  # pickled with its references
        """Return what it is made of."""
        return (self.references,)

    def strip(self, chars: str | None = None, /) -> str:
        """Return it with each of its references stripped."""
        return References([text.strip(chars) for text in self.references])


class DataFrame(Protocol):
    """A data frame of pandas or polars, or a table of pyarrow. None of these libraries is imported here."""

    @property
    def columns(self) -> Any: ...  # noqa: D102


# What becomes records.
Rows = Iterable[Mapping[str, object]] | DataFrame
TARGET_FIELD = "y"
# What other data sets call the two sides of a fact, or the target: LAMA's T-REx files and most classification sets.
ALIASES = {"x": ("sub_label",), "y": ("obj_label", "label")}
IN_MEMORY = "in memory"  # the name of data that is in no file
# Values that become the text that Python writes: 2026-11-27, 10:30:00, 3.50. A datetime is a date.
WRITTEN = (date, time, timedelta, Decimal)
MISSING = ("NaT", "NaN", "sNaN")


class Records(list[Record]):
    """A list of records and where it came from: ``name`` is the path as given, ``NAME:split`` or ``in memory``,
    ``sha256`` the hash of the file's bytes, or of the records' canonical JSON where there is no file.

    ``places``: where each record comes from, such as ``mail.csv, line 41``; ``fields`` which fields had another name
    there (new name -> name in the file).
    """

    def __init__(
        self,
        rows: Iterable[Record],
        *,
        name: str = IN_MEMORY,
        digest: str | None = None,
        places: Sequence[str] = (),
        fields: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(rows)
        self.name = name
        self.sha256 = digest or sha256("".join(canonical_json(row) + "\n" for row in self).encode("utf-8"))
        self.places = tuple(places)
        self.fields = dict(fields or {})

    def place(self, number: int) -> str:
        """Return where a record comes from, by its number from 1: the file with its line if they are known."""
        is_known = len(self.places) == len(self)  # somebody may have added records to the list
        return self.places[number - 1] if is_known else f"{self.name}, record {number}"


def canonical_json(record: Record) -> str:
    """Return a record as one JSON line with sorted keys."""
    return json.dumps(plain(record), ensure_ascii=False, sort_keys=True)


def plain(record: Record) -> dict[str, Json]:
    """Return a record as JSON has it: with the list of its references as the target, if it has several."""
    return {name: _listed(text) for name, text in record.items()}


def target_of(record: Record) -> Json:
    """Return a record's target as JSON has it: a text, a list of references, or None."""
    return _listed(record[TARGET_FIELD]) if TARGET_FIELD in record else None


def references_of(record: Record) -> tuple[str, ...]:
    """Return the right texts of a record: its references, its one target, or none."""
    text = record.get(TARGET_FIELD)
    if text is None:
        return ()
    return text.references if isinstance(text, References) else (text,)


def gathered(records: Records) -> Records:
    """Return records of which those that differ in their target alone are one, with all of their references, in the
    place of the first.
    """
    texts: dict[str, list[str]] = {}
    first: dict[str, tuple[Record, str]] = {}
    for number, record in enumerate(records, start=1):
        key = canonical_json({name: text for name, text in record.items() if name != TARGET_FIELD})
        first.setdefault(key, (record, records.place(number)))
        texts.setdefault(key, []).extend(references_of(record))
    rows = []
    for key, (record, _) in first.items():
        references = list(dict.fromkeys(texts[key]))
        rows.append({**record, TARGET_FIELD: References(references)} if len(references) > 1 else record)
    places = [place for _, place in first.values()]
    return Records(rows, name=records.name, digest=records.sha256, places=places, fields=records.fields)


def _listed(text: str) -> Json:
    return list(text.references) if isinstance(text, References) else text


def as_records(data: Rows) -> Records:
    """Return ``data`` as :class:`Records`, unchanged if it is one already.

    ``data`` may be any iterable of mappings, a generator included, a ``datasets.Dataset`` (the numbers of a ClassLabel
    become its names), a pandas or polars data frame, or a pyarrow table. A RecordError if it is none of these, or a
    row is no mapping.
    """
    if isinstance(data, Records):
        return data
    return Records([clean(row, where=f"record {index}") for index, row in enumerate(rows_of(data), start=1)])


def rows_of(data: Rows) -> Iterable[Mapping[str, object]]:
    """Return the rows of data of any of the kinds of :func:`as_records`, values as they are."""
    if isinstance(data, str | bytes | Mapping):
        raise RecordError(
            f"the data is one {type(data).__name__}; give a list of records, or a table, such as data['train']"
        )
    table: Any = data
    if hasattr(data, "iterrows"):  # pandas
        check_columns(list(map(str, table.columns)), where="the data frame")
        rows = table.to_dict(orient="records")
    elif hasattr(data, "iter_rows"):  # polars
        rows = table.iter_rows(named=True)
    elif hasattr(data, "to_pylist"):  # pyarrow
        check_columns(table.column_names, where="the table")
        rows = table.to_pylist()
    elif isinstance(data, Iterable):
        rows = data
    else:
        raise RecordError(f"the data is a {type(data).__name__}; give a list of records, or a table")
    features = dict(getattr(data, "features", None) or {})
    # Only a ClassLabel of the library datasets can do this.
    classes = {name: kind.names for name, kind in features.items() if hasattr(kind, "int2str")}
    return (_named(row, classes) for row in rows) if classes else rows


def _named(row: Mapping[str, object], classes: Mapping[str, Sequence[str]]) -> dict[str, object]:
    """Return a row with the names of classes in place of their numbers; -1 means that there is none."""
    named = {name: classes[name][value] for name, value in row.items() if name in classes and _is_place(value)}
    return {**{name: value for name, value in row.items() if name not in classes}, **named}


def _is_place(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and value >= 0


def check_text(text: str, *, where: str, what: str = "the row", error: type[PTuningError] = RecordError) -> None:
    """Raise an ``error`` if a text holds half a character: no tokenizer or file takes it. Broken JSON may have one, and
    a command line that is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as found:
        raise error(f"{where}: {what} holds half a character (a lone surrogate); write it in UTF-8") from found


def clean(row: Mapping[str, object], *, where: str, target: str = TARGET_FIELD) -> dict[str, str]:
    """Return scalar values (:func:`scalar`) as text, with :data:`ALIASES`; what is missing is left out. The target is
    without the white space around it, which would be learned with it; a list of texts in its place, or in the field
    that will be the ``target``, are its references. A RecordError for no mapping, a name that is no text, a
    reference that is none, or a number that is too long to write.
    """
    if not isinstance(row, Mapping):
        raise RecordError(f"{where}: a record must be an object with named fields, not {type(row).__name__}")
    record: dict[str, str] = {}
    targets = {target, TARGET_FIELD, *ALIASES[TARGET_FIELD]}
    for name, given in row.items():
        if not isinstance(name, str):
            raise RecordError(f"{where}: field names must be text, not {shown(name)}")
        if isinstance(given, list | tuple) and name in targets:
            record |= _referenced(given, name, where=where)
            continue
        value = scalar(given)
        if value is not None:
            record[name] = _as_text(value, name, where=where)
    for name, others in ALIASES.items():
        source = next((other for other in others if other in record), None)
        if name not in record and source is not None:
            record[name] = record[source]
    if TARGET_FIELD in record:
        record[TARGET_FIELD] = record[TARGET_FIELD].strip()
    return record


def _referenced(given: Sequence[object], name: str, *, where: str) -> dict[str, str]:
    """Return the field of a list of references; none if there are none."""
    texts = []
    for item in given:
        value = scalar(item)
        if value is None:
            raise RecordError(f"{where}: the field {name!r} is a list, whose entries must be texts, not {shown(item)}")
        texts.append(_as_text(value, name, where=where))
    different = list(dict.fromkeys(text for text in texts if text.strip()))
    return {name: different[0] if len(different) == 1 else References(different)} if different else {}


def scalar(value: object) -> str | bool | int | float | None:
    """Return a text, truth value or number as Python's own, and a date, time or decimal as text; None for what is
    missing (None, NaN, NaT) or none of these.

    >>> import numpy as np
    >>> scalar(np.int64(3)), scalar(np.str_("Kenya")), scalar(float("nan")), scalar([1])
    (3, 'Kenya', None, None)
    >>> scalar(date(2026, 11, 27)), scalar(np.datetime64("2026-11-27")), scalar(Decimal("3.50"))
    ('2026-11-27', '2026-11-27', '3.50')
    """
    # Of numpy or torch, which need not be loaded here.
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        is_time = getattr(getattr(value, "dtype", None), "kind", "") in ("M", "m")  # nanoseconds would become a number
        value = str(value) if is_time and value == value else value.item()
    if isinstance(value, WRITTEN):
        text = str(value)
        return None if text.lstrip("-") in MISSING else text
    if not isinstance(value, str | bool | int | float) or value != value:
        return None
    return value


def _as_text(value: str | bool | int | float, name: str, *, where: str) -> str:
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except ValueError as error:
        raise RecordError(f"{where}: the number in the field {name!r} is too long to write") from error
    check_text(name + text, where=where, what=f"the field {name!r}")
    return text


def check_columns(names: Sequence[str], *, where: str) -> None:
    """Raise a RecordError if two columns of a table have one name."""
    doubled = sorted(name for name, count in Counter(names).items() if count > 1)
    if doubled:
        raise RecordError(f"{where}: the column names {', '.join(doubled)[:200]} are there twice")


def require_targets(records: Records, *, field: str = TARGET_FIELD) -> None:
    """Raise a RecordError at the first record without a target; it gives the record's place and its fields."""
    for number, record in enumerate(records, start=1):
        if record.get(field, "").strip():
            continue
        others = sum(not row.get(field, "").strip() for row in records) - 1
        remedy = f"Name its column (field {field}=NAME)"
        if others + 1 < len(records):
            more = f" ({others} other record{'s' * (others > 1)} too)" if others else ""
            remedy += f", or fill it in{more} or remove the record"
        raise RecordError(
            f"{records.place(number)}: no target; the field '{field}' is missing or empty, the record has "
            f"{', '.join(sorted(record)) or 'no fields'}. {remedy}"
        )


def require_fields(records: Records, fields: Sequence[str]) -> None:
    """Raise a RecordError at the first record that lacks one of the fields; it names the record's place, what it
    has, and what to type if another of its fields is meant.
    """
    for number, record in enumerate(records, start=1):
        for name in fields:
            if name in record:
                continue
            others = [other for other in record if other != TARGET_FIELD]
            meant = difflib.get_close_matches(name, others, n=1) or (others if len(others) == 1 else ["NAME"])
            raise RecordError(
                f"{records.place(number)}: no text in the field '{name}'; its fields: {', '.join(record) or 'none'}. "
                f"If another one is meant, rename it (field {name}={meant[0]})"
            )
