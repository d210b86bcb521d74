"""Stopping at a signal: the first Ctrl-C or termination asks the work to stop, the second one ends it at once."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import typer

from ptuning.cli import terminal
from ptuning.names import CHECKPOINT_FOLDER, RESULTS_FILE, RUN_FILE

if TYPE_CHECKING:
    from ptuning.progress import OnProgress

SIGNAL_EXIT = 128  # a shell's exit code for a signal is this plus its number: 130 for Ctrl-C


@contextlib.contextmanager
def stoppable(
    out: Path, *, again: str = "", kept: Path | None = None
) -> Iterator[tuple[OnProgress, Callable[[], bool]]]:
    """Yield a progress callback and a check whether to stop; a message names the option ``again`` that continues, and
    what is ``kept``, by default what a run keeps in its folder.
    """
    from ptuning.progress import Interrupted

    received: list[int] = []
    # A thread prints this, because the signal may come while the progress bar is drawn.
    notice = Thread(target=terminal.say, args=("stopping after this step; once more to stop at once",))

    def note(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        notice.start()

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with terminal.bar() as report:
            yield report, lambda: bool(received)
    except (Interrupted, KeyboardInterrupt) as error:
        if notice.ident is not None:
            notice.join()
        words = [word for word in sys.argv[1:] if word != "--overwrite"]  # which would start again
        words += [again] if again and again not in words else []
        places = [kept] if kept is not None else [out / name for name in (CHECKPOINT_FOLDER, RUN_FILE, RESULTS_FILE)]
        place = next((place for place in places if place.exists()), None)
        kept_text = f"{place} is kept, continue with:\n  {terminal.program()} {shlex.join(words)}"
        terminal.say(f"{str(error) or 'stopped at once'}; {kept_text if place else 'nothing was written'}")
        raise typer.Exit(SIGNAL_EXIT + received[0]) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
