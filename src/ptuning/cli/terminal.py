"""Printing: results on the standard output, progress and messages on the error stream. Loads nothing heavy."""

from __future__ import annotations

import functools
import json
import logging
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ptuning.backbone import sources
from ptuning.backbone.families import COLUMNS, TESTED, Family
from ptuning.provenance import about_data

if TYPE_CHECKING:
    from ptuning.backbone.tokenizer import TextTokenizer
    from ptuning.data.questions import Questions
    from ptuning.files import Json
    from ptuning.progress import Progress
    from ptuning.prompt.inspect import Inspection, Neighbour
    from ptuning.prompt.predict import Prediction
    from ptuning.prompt.prompt import Prompt
    from ptuning.prompt.score import Result
    from ptuning.records import Records
    from ptuning.statistics import Score

# What the stages of a progress report are called on the screen.
STAGES = {
    "suite": "comparing", "cache": "preparing", "train": "training", "dev": "scoring", "predict": "answering",
    "estimate": "trying out",
}  # fmt: skip
# A person sees this many neighbours of a slot; JSON holds all.
SHOWN_NEIGHBOURS = 3
# And these columns of the table of backbones; docs/backbones.md has all.
SHOWN_COLUMNS = ("family", "kind", "slots", "answers", "shared prefix")


def say(text: str) -> None:
    """Print a message that is no result. Its lines are not wrapped, so that paths, commands and carets stay whole."""
    _errors().print(text, markup=False, highlight=False, soft_wrap=True)


def complain(text: str) -> None:
    """Print an error."""
    say(f"error: {text}")


def stopped(what: str, kept: Path | None, command: str) -> None:
    """Print that a signal ended the work, what is left of it, and with which command to go on."""
    say(f"{what}; {kept} is kept, go on with:\n  {command}" if kept else f"{what}; nothing was written")


class LogHandler(logging.Handler):
    """Prints log messages above a running progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        say(f"{record.levelname.lower()}: {self.format(record)}")


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show on a terminal that something of unknown length is going on."""
    with _errors().status(text):
        yield


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Show that a backbone is loaded, and say so where it is converted first, which takes longer."""
    text = f"loading {name}"
    if name in sources.KNOWN and not sources.is_cached(name):
        text = f"converting {name} for the first time, about 20 seconds"
        say(text)
    with waiting(text):
        yield


@contextmanager
def bar() -> Iterator[Callable[[Progress], None]]:
    """Show progress on the error stream: a bar per running stage on a terminal, a line per epoch anywhere."""
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = _errors()
    if not console.is_terminal:
        yield lambda progress: _say_epoch(progress) if progress.stage == "epoch" else None
        return
    fields = [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("count", "note")]
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), fields[0], TimeRemainingColumn())
    with Bar(*columns, fields[1], console=console, transient=True) as live:
        # Shown while no stage runs: before the first, between two, and while files are written.
        idle = live.add_task("working", total=None, count="", note="")
        tasks = {stage: live.add_task(name, visible=False, count="", note="") for stage, name in STAGES.items()}

        def report(progress: Progress) -> None:
            if progress.stage == "epoch":
                _say_epoch(progress)
                return
            live.update(
                tasks[progress.stage],
                completed=progress.done,
                total=progress.total,
                visible=progress.done < progress.total,
                count=f"{progress.done}/{progress.total}",
                note=progress.note,
            )
            live.update(idle, visible=not any(task.visible for task in live.tasks if task.id != idle))

        yield report


def _say_epoch(progress: Progress) -> None:
    say(f"epoch {progress.done}/{progress.total}: {progress.note}")


def program() -> str:
    """Return how this program can be called from here: by its name if the shell would find it, else by its path."""
    own = Path(sys.executable).with_name("ptuning")
    if shutil.which("ptuning") == str(own):
        return "ptuning"
    if not own.is_file():
        return f"{shlex.quote(sys.executable)} -m ptuning"
    inside = own.is_relative_to(Path.cwd())
    return shlex.quote(str(own.relative_to(Path.cwd()) if inside else own))


def interval(score: Score) -> str:
    """Return a score with its interval."""
    return f"{score.value:.3f}  [{score.low:.3f}, {score.high:.3f}]"


def evaluation(name: str, data: Records | Questions, found: Result, *, as_json: bool) -> None:
    """Print scores with their intervals."""
    if as_json:
        print_json(
            {
                "prompt": name,
                "data": about_data(data),
                "scores": {metric: score.to_json() for metric, score in found.scores.items()},
                "loss": found.loss,
                "targets_not_among_candidates": found.missing,
            }
        )
        return
    heading(f"{name} on {data.name}, n = {len(data)}")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("score")
    table.add_column("value  [95 % interval]")
    for metric, score in found.scores.items():
        table.add_row(metric.replace("_", " "), escape(interval(score)))
    results().print(table)
    line(f"loss {found.loss:.3f}")
    if found.missing:
        line(f"{found.missing} of {len(data)} targets are no candidates; they count as misses")


def predictions(data: Records, found: Sequence[Prediction], *, as_json: bool, masked: bool) -> None:
    """Print one answer per line, or one JSON object per line."""
    for record, prediction in zip(data, found, strict=True):
        if as_json:
            listed = [{"text": one.text, "log_prob": one.log_prob} for one in prediction.candidates]
            row: dict[str, Json] = {
                "record": dict(record),
                "prediction": prediction.text,
                "candidates": cast("Json", listed),
            }
            if masked and prediction.tokens is not None:
                row["tokens"] = prediction.tokens
            typer.echo(json.dumps(row, ensure_ascii=False))
        elif len(prediction.candidates) > 1:
            typer.echo("\t".join(f"{visible(one.text)} ({one.log_prob:.2f})" for one in prediction.candidates))
        elif masked and prediction.tokens is not None:
            typer.echo(f"{visible(prediction.text)}\t({prediction.tokens} token{'s' * (prediction.tokens != 1)})")
        else:
            typer.echo(visible(prediction.text))


def inspection(prompt: Prompt, found: Inspection, *, as_json: bool) -> None:
    """Print the nearest tokens of each slot."""
    if as_json:
        print_json({"template": str(prompt.template), **found.to_json()})
        return
    heading(str(prompt.template))
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("slot", "started at", "norm", "nearest by cosine", "nearest by distance"):
        table.add_column(name)
    for index, view in enumerate(found.slots):
        start = "random" if view.start is None else quoted(view.start)
        table.add_row(str(index), escape(start), f"{view.norm:.2f}", _listed(view.by_cosine), _listed(view.by_distance))
    console = results()
    console.print(table)
    console.print(
        f"For scale: two tokens lie {found.token_distance:.2f} apart (median), a token and its nearest "
        f"{found.neighbour_distance:.2f}; a token's norm is {found.token_norm:.2f}."
    )
    if not found.scores:
        console.print("Before reading meaning into these tokens: --data FILE scores them in the slots' place.")
        return
    learned, nearest = found.scores["as learned"], found.scores["nearest tokens"]
    console.print(f"score of the slots as learned            {escape(interval(learned))}, n = {learned.n}")
    console.print(f"score with the nearest token in each     {escape(interval(nearest))}")
    if nearest.high < learned.value:
        console.print("The nearest tokens do not do what the slots do: read no meaning into them.")


def template(positions: Sequence[tuple[str, int | None]], tokenizer: TextTokenizer, *, as_json: bool) -> None:
    """Print each position of a filled template."""
    rows = [
        (index, part, token, None if token is None else tokenizer.token(token))
        for index, (part, token) in enumerate(positions)
    ]
    if as_json:
        print_json(
            [{"position": index, "part": part, "token_id": token, "token": text} for index, part, token, text in rows]
        )
        return
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("position", "part", "id", "token"):
        table.add_column(name)
    for index, part, token, text in rows:
        shown = "random start" if text is None else quoted(text) + (" (start)" if part == "slot" else "")
        table.add_row(
            str(index),
            escape(part),
            "" if token is None else str(token),
            escape(shown),
            style={"slot": "green", "target": "bold"}.get(part, ""),
        )
    results().print(table)


def facts(known: Mapping[str, Mapping[str, object]]) -> None:
    """Print the shipped facts."""
    heading("shipped facts; NAME:train, NAME:dev and NAME:test work wherever a data file does")
    # As narrow as it can be: the manual templates are for copying and should not be wrapped at 80 columns.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("name", "records", "manual template (--manual)", "--about"):
        table.add_column(name)
    for name, entry in known.items():
        rows = cast("Mapping[str, int]", entry["rows"])
        counts = "/".join(str(rows[split]) for split in ("train", "dev", "test"))
        table.add_row(name, counts, escape(str(entry["manual"])), str(entry["about"]))
    results().print(table)


def backbones(rows: Sequence[Family], *, as_json: bool) -> None:
    """Print the table of backbones."""
    if as_json:
        listed: list[dict[str, Json]] = [{**row.to_json(), "tested": [*TESTED]} for row in rows]
        print_json(listed)
        return
    heading(f"families that the tests run ({', '.join(TESTED)}); any other works, or is refused with a reason")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in SHOWN_COLUMNS:
        table.add_column(name)
    for row in rows:
        table.add_row(*(escape(cell) for name, cell in zip(COLUMNS, row.cells, strict=True) if name in SHOWN_COLUMNS))
    results().print(table)


@functools.cache
def _errors() -> Console:
    """The one console of the error stream: what goes through it stands above a running progress bar."""
    return Console(stderr=True, emoji=False)


@functools.cache
def results() -> Console:
    """The one console of the standard output; a script that draws it may record what it prints."""
    return Console(highlight=False, emoji=False)


def heading(text: str) -> None:
    """Print a table's title. A title of the table's own would be wrapped at the table's width."""
    results().print(text, markup=False, style="italic", soft_wrap=True)


def line(text: str) -> None:
    """Print a line that is not wrapped, so that a path or a command can be copied."""
    results().print(text, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def visible(text: str) -> str:
    """Return a text on one line, with line breaks and other characters that do not print escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def quoted(text: str) -> str:
    """Return a token in quotes, on one line."""
    return f"'{visible(text)}'"


def parameters(record: Mapping[str, Json]) -> None:
    """Print how many weights a run trained, and how long it took."""
    trainable, frozen = cast("int", record["trainable_parameters"]), cast("int", record["frozen_parameters"])
    train_seconds, seconds = cast("float", record["train_seconds"]), cast("float", record["seconds"])
    whose = {
        "frozen": "the prompt encoder",
        "tuned": "prompt encoder and backbone",
        "lora": "prompt encoder and adapters",
    }
    line(f"trained: {trainable:,} parameters of {whose[str(record['tune'])]}; frozen: {frozen:,} of the backbone")
    line(f"time:    {train_seconds:.0f} s of training, {seconds:.0f} s in all")


def _listed(neighbours: Sequence[Neighbour]) -> str:
    """Return one neighbour per line: a table would break lines at the spaces that tokens begin with."""
    return escape("\n".join(f"{quoted(one.token)} {one.value:.2f}" for one in neighbours[:SHOWN_NEIGHBOURS]))


def mark(on: bool) -> str:
    """Return the style of a row, green for the one that was chosen."""
    return "bold green" if on else ""


def print_json(value: Json | Sequence[Mapping[str, Json]]) -> None:
    """Print a value as indented JSON."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))
