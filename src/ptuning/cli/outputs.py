"""Answers on the terminal, and in a .csv or .jsonl file that appears whole or not at all."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from ptuning.cli import terminal
from ptuning.errors import ConfigError, FileError
from ptuning.files import make_folder, parse_json, read_bytes, replacing, write_bytes
from ptuning.names import check_output
from ptuning.records import plain

if TYPE_CHECKING:
    from ptuning.data.reading import RawRows
    from ptuning.files import Json
    from ptuning.prompt.prediction import Prediction
    from ptuning.records import Record

TABLE, LINES = ".csv", (".jsonl", ".ndjson")
# Columns that a table of answers has besides those of the data.
PREDICTION, PROBABILITY, HIT = "prediction", "probability", "hit"
ABSTAINED = "abstained"
IDENTITY = "lines of"  # the key of the first line of kept answers
SHOWN_OTHERS = 3  # other labels next to an answer on a terminal


def check_file(path: Path | None, *, overwrite: bool, data: str | None = None) -> None:
    """Check that answers can be written into a file, before any work: it is new or may be replaced, its ending tells
    the format, and it is not the ``data`` itself.
    """
    if path is None:
        if overwrite:
            raise ConfigError("--overwrite is for the file of the answers; name it with --out")
        return
    if path.suffix.lower() not in (TABLE, *LINES):
        raise ConfigError(f"cannot tell the format of {path}; --out ends in one of {', '.join((TABLE, *LINES))}")
    check_output(path.parent)
    if path.is_dir():
        raise FileError(f"{path} is a folder; name a file in it, such as {path / 'answers.jsonl'}")
    if data is not None and os.path.exists(data) and path.exists() and os.path.samefile(path, data):
        raise FileError(f"{path} is the data itself; name another file for the answers")
    if os.path.lexists(path) and not overwrite:
        raise FileError(f"{path} exists; name another file, or replace it with --overwrite")


def is_table(path: Path) -> bool:
    """Whether a file of answers is a table."""
    return path.suffix.lower() == TABLE


def columns_of(path: Path, rows: Iterable[Mapping[str, object]], added: Sequence[str]) -> list[str]:
    """Return the columns of a table of answers: all names in the rows, in order, then those that are ``added``; none
    for lines.
    """
    if not is_table(path):
        return []
    names = dict.fromkeys(name for row in rows for name in row)
    taken = next((name for name in added if name in names), None)
    if taken is not None:
        raise ConfigError(f"the data has a column '{taken}' already; rename it there, or write .jsonl")
    return [*names, *added]


def answer_columns(path: Path, raw: RawRows) -> list[str]:
    """Return the columns of a table of answers to the rows of a file; none for lines."""
    return columns_of(path, [dict.fromkeys(raw.columns), *(row for _, row in raw)], (PREDICTION, PROBABILITY))


def answer_row(path: Path, row: Mapping[str, object], record: Record, answer: Prediction) -> dict[str, object]:
    """Return what a file has for an answer: a table the row of the data, lines the record as it was read."""
    if is_table(path):
        return {**row, PREDICTION: answer.text, PROBABILITY: round(answer.probability, 6)}
    ended = {} if answer.stopped is None else {"stopped": answer.stopped}
    return {"record": plain(record), **answer.to_json(), **ended}


def write_rows(path: Path, rows: Iterable[Mapping[str, object]], columns: Sequence[str], delimiter: str = ",") -> None:
    """Write a table with some columns, or a line of JSON for each row."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as handle:
        if not is_table(path):
            handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        table = csv.writer(handle, delimiter=delimiter, lineterminator="\n")
        table.writerow(columns)
        table.writerows([_cell(row.get(name)) for name in columns] for row in rows)


def _cell(value: object) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


class KeptRows:
    """Rows of a file ``out`` while they are made, as lines of JSON in ``path``, whose first line says what they belong
    to. ``done`` is the number that an earlier run left.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path, self.done = out, out.with_name(f"{out.name}.part"), 0

    def write(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Add rows; they are in the file when this returns."""
        with self.path.open("a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)

    def finish(self, columns: Sequence[str], delimiter: str) -> None:
        """Write the file, and remove the rows that were kept for it."""
        with self.path.open(encoding="utf-8") as lines:
            next(lines)
            write_rows(self.out, map(json.loads, lines), columns, delimiter)
        self.path.unlink()


@contextmanager
def kept_rows(out: Path, identity: Mapping[str, Json], *, resume: bool, overwrite: bool) -> Iterator[KeptRows]:
    """Yield the rows of a file, after those of a run that was stopped; a line that is not whole is dropped.

    A FileError if there are some and neither ``resume`` nor ``overwrite`` is asked for; a TrainingError if they belong
    to another ``identity``.
    """
    kept = KeptRows(out)
    make_folder(out.parent)
    if kept.path.is_symlink() or (kept.path.exists() and not kept.path.is_file()):
        raise FileError(f"{kept.path} is no file, and answers are kept there; move it, or name another --out")
    if kept.path.exists() and not overwrite:
        if not resume:
            raise FileError(
                f"{kept.path} has answers of a run that was stopped; continue with --resume, or replace it with "
                "--overwrite"
            )
        kept.done = _rows_left(kept.path, identity)
    else:
        kept.path.write_text(json.dumps({IDENTITY: dict(identity)}, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        yield kept
    finally:
        if kept.done == 0 and kept.path.exists() and kept.path.read_bytes().count(b"\n") == 1:
            kept.path.unlink()  # nothing was made


def _rows_left(path: Path, identity: Mapping[str, Json]) -> int:
    from ptuning.training.checkpoint import check_identity

    head, *lines = read_bytes(path).split(b"\n")[:-1] or [b""]
    try:
        saved = parse_json(head.decode("utf-8"))[IDENTITY]
        for line in lines:
            parse_json(line.decode("utf-8"))
    except (ValueError, KeyError) as error:
        raise FileError(f"{path} is damaged; start again with --overwrite") from error
    check_identity(identity, saved, where=str(path))
    write_bytes(path, b"".join(line + b"\n" for line in (head, *lines)))
    return len(lines)


def write_scored(path: Path, rows: Sequence[Mapping[str, Json]]) -> None:
    """Write the answers to records with targets. A table has the fields of the records, the target among them."""
    make_folder(path.parent)
    if not is_table(path):
        write_rows(path, rows, ())
        return
    records = [cast("Mapping[str, Json]", row["record"]) for row in rows]
    tables = [
        {
            **record,
            PREDICTION: row[PREDICTION],
            PROBABILITY: round(math.exp(cast("float", row["log_prob"])), 6),
            HIT: row[HIT],
        }
        for record, row in zip(records, rows, strict=True)
    ]
    write_rows(path, tables, columns_of(path, records, (PREDICTION, PROBABILITY, HIT)))


def show_answer(record: Record, answer: Prediction, *, as_json: bool) -> None:
    """Print an answer: as one line of JSON; or its text, on a terminal with the probabilities of labels."""
    if as_json:
        terminal.print_json({"record": plain(record), **answer.to_json()}, indent=None)
        return
    text, has_labels = (
        ABSTAINED if answer.abstained else terminal.visible(answer.text),
        answer.probabilities is not None,
    )
    if len(answer.candidates) > 1:
        listed = (
            f"{terminal.visible(each.text)} ({f'{each.probability:.3f}' if has_labels else f'{each.log_prob:.2f}'})"
            for each in answer.candidates
        )
        typer.echo("\t".join((*([ABSTAINED] if answer.abstained else []), *listed)))
    elif answer.probabilities is not None and terminal.results().is_terminal:
        ranked = list(answer.probabilities.items())[0 if answer.abstained else 1 :]
        shown = [f"{terminal.visible(name)} {value:.3f}" for name, value in ranked[:SHOWN_OTHERS]]
        own = "" if answer.abstained else f"\t{answer.probability:.3f}"
        typer.echo(f"{text}{own}\t({', '.join([*shown, *(['...'] if len(ranked) > SHOWN_OTHERS else [])])})")
    else:
        typer.echo(text)
