"""Printing: results on the standard output, progress and messages on the error stream. Loads nothing heavy."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ptuning.backbone import sources

if TYPE_CHECKING:
    from ptuning.files import Json
    from ptuning.progress import Progress
    from ptuning.statistics import Score

# What the stages of a progress report are called on the screen.
STAGES = {
    "suite": "comparing", "cache": "preparing", "train": "training", "dev": "scoring", "predict": "answering",
    "estimate": "trying out",
}  # fmt: skip
# Control characters that JSON allows in a text.
CONTROL = re.compile("[\x7f-\x9f]")


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
    with _errors().status(escape(visible(text))):
        yield


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Show that a backbone is loaded; if it is converted first, which takes longer, say so."""
    text = f"loading {name}"
    packed = sources.gguf_weights(name)
    if packed is not None and not sources.is_cached(packed):
        text = f"converting {name} for the first time, 20 seconds or more"
        say(text)
    with waiting(text):
        yield


class Clock:
    """How long the work has taken, and how long it will: by the share of a training that is done, or by what a
    comparison says.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began = now()
        self._suite: Progress | None = None
        self._first: Progress | None = None  # of the training, in this process
        self._first_at = 0.0
        self._last: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        """Take note of a progress."""
        if progress.stage == "suite":
            self._suite = progress
        elif progress.stage == "train":
            anew = self._last is not None and progress.done < self._last.done  # after a training that was lost
            if self._first is None or anew or progress.total != self._first.total:
                self._first, self._first_at = progress, self._now()
            self._last = progress

    @property
    def text(self) -> str:
        """The time so far and the time left, as far as it is known."""
        return ", ".join(filter(None, (f"{duration(self._now() - self._began)} so far", self.left)))

    @property
    def left(self) -> str:
        """The time left; empty if nothing is known."""
        first, last, suite = self._first, self._last, self._suite
        if suite is not None:
            known = f"about {duration(suite.seconds_left)} left" if suite.seconds_left else ""
            cells = f"{suite.untimed} cell{'s' if suite.untimed > 1 else ''} not timed yet" if suite.untimed else ""
            return ", ".join(filter(None, (known, cells)))
        if first is None or last is None or last.done in (first.done, last.total):
            return ""
        seconds = (self._now() - self._first_at) * (last.total - last.done) / (last.done - first.done)
        return f"at most {duration(seconds)} left"  # a training may stop early


@contextmanager
def bar() -> Iterator[Callable[[Progress], None]]:
    """Show progress on the error stream: a bar per running stage on a terminal, a line per epoch anywhere."""
    from rich.progress import BarColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    def say_epoch(progress: Progress, more: str = "") -> None:
        if progress.stage == "epoch" and progress.done:
            say(f"{progress.name} epoch {progress.done}/{progress.total}: {progress.note}{more}".lstrip())

    console, clock = _errors(), Clock()
    if not console.is_terminal:

        def log(progress: Progress) -> None:
            clock(progress)
            say_epoch(progress, f"; {clock.text}")

        yield log
        return
    fields = [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("count", "note")]

    class Left(TimeRemainingColumn):
        """The time left; that of cells, which are few and unlike each other, as the comparison says it."""

        def render(self, task: Task) -> Text:
            return Text(clock.left) if task.description == STAGES["suite"] else super().render(task)

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), fields[0], Left())
    with Bar(*columns, fields[1], console=console, transient=True) as live:
        # Shown while no stage runs: before the first, between two, and while files are written.
        idle = live.add_task("working", total=None, count="", note="")
        tasks = {stage: live.add_task(name, visible=False, count="", note="") for stage, name in STAGES.items()}

        def report(progress: Progress) -> None:
            if progress.stage == "epoch":
                say_epoch(progress)
                return
            clock(progress)
            live.update(
                tasks[progress.stage],
                completed=progress.done,
                total=progress.total,
                visible=progress.done < progress.total,
                count=f"{progress.done}/{progress.total}",
                note=visible(progress.note),
            )
            live.update(idle, visible=not any(task.visible for task in live.tasks if task.id != idle))

        yield report


def is_live() -> bool:
    """Whether progress bars are shown, so that nobody needs the time in lines."""
    return _errors().is_terminal


def program() -> str:
    """Return how this program can be called from here: by its name if the shell would find it, else by its path."""
    own = Path(sys.executable).with_name("ptuning")
    if shutil.which("ptuning") == str(own):
        return "ptuning"
    if not own.is_file():
        return f"{shlex.quote(sys.executable)} -m ptuning"
    with contextlib.suppress(OSError, ValueError):  # the working folder may be gone, or another
        own = own.relative_to(Path.cwd())
    return shlex.quote(str(own))


def interval(score: Score) -> str:
    """Return a score with its interval, or with n if values that are all equal give none."""
    if not score.has_interval:
        return f"{score.value:.3f}  n = {score.n}"
    return f"{score.value:.3f}  [{score.low:.3f}, {score.high:.3f}]"


class _Console(Console):
    """Shows characters that a terminal would obey, such as escapes, instead of sending them: texts may be data's."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text as rich prints it. Whatever prints through a console comes by here, cells of tables too."""
        return super().render_str(visible(text, lines=True), **options)


@functools.cache
def _errors() -> Console:
    """The one console of the error stream: what goes through it stands above a running progress bar."""
    return _Console(stderr=True, emoji=False)


@functools.cache
def results() -> Console:
    """The one console of the standard output; a script that draws it may record what it prints."""
    return _Console(highlight=False, emoji=False)


def is_interactive() -> bool:
    """Whether a person can type on the standard input."""
    return sys.stdin is not None and sys.stdin.isatty()


def ask(prompt: str) -> str:
    """Return a line that is typed; an EOFError if there are no more. A result elsewhere does not get the ``prompt``."""
    if not results().is_terminal:
        typer.echo(prompt, nl=False, err=True)
        prompt = ""
    try:
        return input(prompt)
    except UnicodeDecodeError:
        say("error: the line is not text in the terminal's encoding; type it again")
        return ask(prompt)


def table(*columns: str, narrow: bool = False) -> Table:
    """Return an empty table; a ``narrow`` one leaves room for long texts that should not be wrapped at 80 columns."""
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0) if narrow else (0, 1), show_edge=not narrow)
    for name in columns:
        found.add_column(name)
    return found


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


def visible(text: str, *, lines: bool = False) -> str:
    r"""Return a text with characters that do not print escaped, line breaks too unless it may have several ``lines``.

    >>> visible("a\x1b[2J\nb"), visible("a\x1b[2J\nb", lines=True)
    ('a\\x1b[2J\\nb', 'a\\x1b[2J\nb')
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or (lines and char == "\n") else repr(char)[1:-1] for char in text)


def quoted(text: str) -> str:
    """Return a token in quotes, on one line."""
    return f"'{visible(text)}'"


def parameters(record: Mapping[str, Json]) -> None:
    """Print how many weights a run trained, and how long it took."""
    trainable, frozen = cast("int", record["trainable_parameters"]), cast("int", record["frozen_parameters"])
    train_seconds, seconds = cast("float", record["train_seconds"]), cast("float", record["seconds"])
    whose = {
        "none": "the prompt encoder",
        "head": "prompt encoder and classification head",
        "full": "prompt encoder and backbone",
        "lora": "prompt encoder and adapters",
    }
    own = whose[str(record["train_backbone"])]
    line(f"trained: {trainable:,} parameters of {own}; frozen: {frozen:,} of the backbone")
    line(f"time:    {train_seconds:.0f} s of training, {seconds:.0f} s in all")


def mark(on: bool) -> str:
    """Return the style of a row, green for the one that was chosen."""
    return "bold green" if on else ""


def print_json(value: Json | Sequence[Mapping[str, Json]], *, indent: int | None = 2) -> None:
    """Print a value as JSON, indented or on one line. Characters that a terminal would obey are escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    typer.echo(CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text))
