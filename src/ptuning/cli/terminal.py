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

# Stage of a progress report -> its name on the screen.
STAGES = {
    "suite": "comparing", "cache": "preparing", "train": "training", "dev": "scoring", "predict": "answering",
    "estimate": "trying out",
}  # fmt: skip
# Control characters that JSON allows in a text.
CONTROL = re.compile("[\x7f-\x9f]")


class _Console(Console):
    """Shows characters that a terminal would obey, such as escapes, instead of sending them: texts may be data's."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text as rich prints it; cells of tables are rendered here, too."""
        return super().render_str(visible(text, lines=True), **options)


@functools.cache
def errors() -> Console:
    """The console of the error stream: its messages are printed above a running progress bar."""
    return _Console(stderr=True, emoji=False)


@functools.cache
def results() -> Console:
    """The console of the standard output; a script that draws it may record what it prints."""
    return _Console(highlight=False, emoji=False)


def say(text: str) -> None:
    """Print a message that is no result. Its lines are not wrapped, so that paths, commands and carets stay whole."""
    errors().print(text, markup=False, highlight=False, soft_wrap=True)


def complain(text: str) -> None:
    """Print an error."""
    say(f"error: {text}")


def line(text: str) -> None:
    """Print a line of a result that is not wrapped, so that a path or a command can be copied."""
    results().print(text, markup=False, soft_wrap=True)


def heading(text: str) -> None:
    """Print a table's title. A title of the table's own would be wrapped at the table's width."""
    results().print(text, markup=False, style="italic", soft_wrap=True)


def table(*columns: str, numbers: bool = False) -> Table:
    """Return an empty table; with ``numbers``, all columns but the first are aligned to the right."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for number, name in enumerate(columns):
        made.add_column(name, justify="right" if numbers and number else "left")
    return made


def print_json(value: Json | Sequence[Mapping[str, Json]], *, indent: int | None = 2) -> None:
    """Print a value as JSON, indented or on one line. Characters that a terminal would obey are escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    typer.echo(CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


class LogHandler(logging.Handler):
    """Prints log messages above a running progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        say(f"{record.levelname.lower()}: {self.format(record)}")


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show on a terminal that something of unknown length is going on."""
    with errors().status(escape(visible(text))):
        yield


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Show that a backbone is loaded; if it is converted first, which takes longer, say that."""
    text = f"loading {name}"
    packed = sources.gguf_weights(name)
    if packed is not None and not sources.is_cached(packed):
        text = f"converting {name} for the first time, 20 seconds or more"
        say(text)
    with waiting(text):
        yield


class Clock:
    """The time that the work has taken, and for a comparison the time left."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._began, self.left = now, now(), ""

    def __call__(self, progress: Progress) -> None:
        """Take note of a progress."""
        if progress.stage == "suite":
            known = f"about {duration(progress.seconds_left)} left" if progress.seconds_left else ""
            untimed = f"{progress.untimed} cell{'s' * (progress.untimed > 1)} not timed yet" if progress.untimed else ""
            self.left = ", ".join(filter(None, (known, untimed)))

    @property
    def text(self) -> str:
        """The time so far and the time left, as far as it is known."""
        return ", ".join(filter(None, (f"{duration(self._now() - self._began)} so far", self.left)))


@contextmanager
def bar() -> Iterator[Callable[[Progress], None]]:
    """Show progress on the error stream: a bar per running stage on a terminal, a line per epoch anywhere."""
    from rich.progress import BarColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    clock = Clock()

    class Left(TimeRemainingColumn):
        """The time left; that of cells, which are few and unlike each other, as the comparison gives it."""

        def render(self, task: Task) -> Text:
            return Text(clock.left) if task.description == STAGES["suite"] else super().render(task)

    count, note = (TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("count", "note"))
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), count, Left(), note)
    live = Bar(*columns, console=errors(), transient=True, disable=not is_live())
    # Shown while no stage runs: before the first, between two, and while files are written.
    idle = live.add_task("working", total=None, count="", note="")
    tasks = {stage: live.add_task(name, visible=False, count="", note="") for stage, name in STAGES.items()}

    def report(progress: Progress) -> None:
        clock(progress)
        if progress.stage != "epoch":
            live.update(
                tasks[progress.stage],
                completed=progress.done,
                total=progress.total,
                visible=progress.done < progress.total,
                count=f"{progress.done}/{progress.total}",
                note=visible(progress.note),
            )
            live.update(idle, visible=not any(task.visible for task in live.tasks if task.id != idle))
        elif progress.done:
            time_so_far = "" if is_live() else f"; {clock.text}"
            say(f"{progress.name} epoch {progress.done}/{progress.total}: {progress.note}{time_so_far}".lstrip())

    with live:
        yield report


def is_live() -> bool:
    """Whether progress bars are shown, so that lines need no time."""
    return errors().is_terminal


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
        complain("the line is not text in the terminal's encoding; type it again")
        return ask(prompt)


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


def mark(on: bool) -> str:
    """Return the style of a row, green for the one that was chosen."""
    return "bold green" if on else ""


def parameters(record: Mapping[str, Json]) -> None:
    """Print how many weights a run trained, and how long it took."""
    trained = {
        "none": "the prompt encoder",
        "head": "prompt encoder and classification head",
        "full": "prompt encoder and backbone",
        "lora": "prompt encoder and adapters",
    }[str(record["train_backbone"])]
    line(f"trained: {record['trainable_parameters']:,} parameters of {trained}; "
         f"frozen: {record['frozen_parameters']:,} of the backbone")  # fmt: skip
    train_seconds, seconds = cast("float", record["train_seconds"]), cast("float", record["seconds"])
    line(f"time:    {train_seconds:.0f} s of training, {seconds:.0f} s in all")
