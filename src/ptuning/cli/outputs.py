"""Where answers go: lines on the terminal, JSON, or a CSV or JSONL file that appears whole or not at all."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
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
# The key of the first line of kept lines.
LINES_OF = "lines of"
# So many other labels stand beside the answer on a terminal; --json has all.
SHOWN_OTHERS = 3


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
    if not os.path.lexists(path):
        return
    if data is not None and os.path.exists(data) and path.exists() and os.path.samefile(path, data):
        raise FileError(f"{path} is the data itself; name another file for the answers")
    if not overwrite:
        raise FileError(f"{path} exists; name another file, or replace it with --overwrite")


def is_table(path: Path) -> bool:
    """Whether a file of answers is a table."""
    return path.suffix.lower() == TABLE


def columns_of(rows: Sequence[Mapping[str, object]], added: Sequence[str]) -> list[str]:
    """Return the columns of a table of answers: all names in the rows, in order, then those that are ``added``."""
    found = dict.fromkeys(name for row in rows for name in row)
    taken = next((name for name in added if name in found), None)
    if taken is not None:
        raise ConfigError(f"the data has a column '{taken}' already; rename it there, or write .jsonl")
    return [*found, *added]


def answer_columns(path: Path, raw: RawRows) -> Sequence[str]:
    """Return the columns of a file of answers to the rows of a file; none if it is no table."""
    rows = [dict.fromkeys(raw.columns), *(row for _, row in raw)]
    return columns_of(rows, (PREDICTION, PROBABILITY)) if is_table(path) else ()


@contextmanager
def writing_to(
    path: Path, columns: Sequence[str], *, delimiter: str = ","
) -> Iterator[Callable[[Mapping[str, object]], None]]:
    """Yield what writes one row into a file, which takes its place when the block ends. ``columns`` are a table's."""
    make_folder(path.parent)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as handle:
        if not is_table(path):
            yield lambda row: print(json.dumps(row, ensure_ascii=False), file=handle)
            return
        table = csv.writer(handle, delimiter=delimiter, lineterminator="\n")
        table.writerow(columns)
        yield lambda row: table.writerow([_cell(row.get(name)) for name in columns])


def _cell(value: object) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


Take = Callable[[Mapping[str, object], "Record", "Prediction"], None]


@contextmanager
def answers_to(path: Path, raw: RawRows) -> Iterator[Take]:
    """Yield what writes an answer into a file, with the row of the data that it answers and that row's record. A table
    has the columns of the data, and its separator if it is a CSV.
    """
    columns = answer_columns(path, raw)
    delimiter = raw.delimiter if raw.format == "csv" and raw.delimiter else ","
    with writing_to(path, columns, delimiter=delimiter) as write:

        def take(row: Mapping[str, object], record: Record, found: Prediction) -> None:
            if is_table(path):
                write({**row, PREDICTION: found.text, PROBABILITY: round(found.probability, 6)})
            else:
                write({"record": plain(record), **found.to_json()})

        yield take


class KeptLines:
    """Lines of JSON that are kept while they are made, in a file beside the one that they become: ``path``, whose first
    line says what they belong to. ``done`` is the number that were there.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path, self.done = out, _part_of(out), 0

    def write(self, rows: Sequence[Mapping[str, Json]]) -> None:
        """Add lines; they are in the file when this returns."""
        with self.path.open("a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def finish(self) -> None:
        """Put the lines, without the first, in their place."""
        with replacing(self.out) as temporary, temporary.open("wb") as target, self.path.open("rb") as lines:
            lines.readline()
            shutil.copyfileobj(lines, target)
        self.path.unlink()


@contextmanager
def kept_lines(out: Path, identity: Mapping[str, Json], *, resume: bool, overwrite: bool) -> Iterator[KeptLines]:
    """Yield lines to be written, after those that an earlier run has left; a line that is not whole is dropped.

    A FileError if there are some and neither ``resume`` nor ``overwrite`` is asked for; a TrainingError if they belong
    to another ``identity``.
    """
    kept = KeptLines(out)
    make_folder(out.parent)
    if kept.path.is_symlink() or (kept.path.exists() and not kept.path.is_file()):
        raise FileError(f"{kept.path} is no file of ours, and lines are kept there; move it, or name another --out")
    if kept.path.exists() and not overwrite:
        if not resume:
            raise FileError(
                f"{kept.path} has lines of a run that was stopped; go on with --resume, or start anew with --overwrite"
            )
        kept.done = _lines_left(kept.path, identity)
    else:
        kept.path.write_text(json.dumps({LINES_OF: dict(identity)}, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        yield kept
    finally:
        if kept.done == 0 and kept.path.exists() and kept.path.read_bytes().count(b"\n") == 1:
            kept.path.unlink()  # nothing was made


def is_finished(out: Path) -> bool:
    """Whether a file of lines is whole: it is there, and what is kept while it is made is not."""
    return out.exists() and not _part_of(out).exists()


def _part_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


def _lines_left(path: Path, identity: Mapping[str, Json]) -> int:
    """Return the number of whole lines behind the first, and drop one that is not whole."""
    from ptuning.training.checkpoint import check_identity

    head, *lines = read_bytes(path).split(b"\n")[:-1] or [b""]
    try:
        saved = parse_json(head.decode("utf-8"))[LINES_OF]
        for line in lines:
            parse_json(line.decode("utf-8"))
    except (ValueError, KeyError) as error:
        raise FileError(f"{path} is damaged; start anew with --overwrite") from error
    check_identity(identity, saved, where=str(path))
    write_bytes(path, b"".join(line + b"\n" for line in (head, *lines)))
    return len(lines)


def write_scored(path: Path, rows: Sequence[Mapping[str, Json]]) -> None:
    """Write the answers to records with targets. A table has the fields of the records, the target among them."""
    records = [cast("Mapping[str, Json]", row["record"]) for row in rows]
    columns = columns_of(records, (PREDICTION, PROBABILITY, HIT)) if is_table(path) else ()
    with writing_to(path, columns) as write:
        for record, row in zip(records, rows, strict=True):
            found = {PREDICTION: row[PREDICTION], PROBABILITY: round(math.exp(cast("float", row["log_prob"])), 6)}
            write({**record, **found, HIT: row[HIT]} if is_table(path) else row)


def show_answer(record: Record, found: Prediction, *, as_json: bool) -> None:
    """Print an answer: as one line of JSON; or its text, on a terminal with the probabilities of labels."""
    if as_json:
        terminal.print_json({"record": plain(record), **found.to_json()}, indent=None)
        return
    text = ABSTAINED if found.abstained else terminal.visible(found.text)
    if found.probabilities is not None and len(found.candidates) > 1:
        listed = "\t".join(f"{terminal.visible(one.text)} ({one.probability:.3f})" for one in found.candidates)
        typer.echo(f"{ABSTAINED}\t{listed}" if found.abstained else listed)
    elif found.probabilities is not None and terminal.results().is_terminal:
        typer.echo(f"{text}{_beside(found)}")
    elif len(found.candidates) > 1:
        typer.echo("\t".join(f"{terminal.visible(one.text)} ({one.log_prob:.2f})" for one in found.candidates))
    elif found.tokens is not None:
        typer.echo(f"{text}\t({found.tokens} token{'s' * (found.tokens != 1)})")
    else:
        typer.echo(text)


def _beside(found: Prediction) -> str:
    """Return what stands beside a label on a terminal: its probability, and those of the likeliest others."""
    ranked = list((found.probabilities or {}).items())
    own, others = ("", ranked) if found.abstained else (f"\t{found.probability:.3f}", ranked[1:])
    shown = ", ".join(f"{terminal.visible(name)} {value:.3f}" for name, value in others[:SHOWN_OTHERS])
    more = ", ..." if len(others) > SHOWN_OTHERS else ""
    return f"{own}\t({shown}{more})"
