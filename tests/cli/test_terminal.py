"""Printing on a terminal: progress, messages as they are, and commands that work where they are read."""

import contextlib
import io
import logging
import shutil
import sys
import time
from pathlib import Path

import pytest
from rich.markup import escape

from ptuning.cli import terminal
from ptuning.progress import Progress


class Screen(io.StringIO):
    """A terminal of 80 columns that remembers everything."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    made = Screen()
    console = terminal._Console(file=made, force_terminal=True, width=80, emoji=False, color_system=None)
    monkeypatch.setattr(terminal, "errors", lambda: console)
    return made


def test_a_terminal_shows_bars_and_a_line_per_epoch(screen: Screen) -> None:
    with terminal.bar() as report:
        time.sleep(0.15)  # two frames
        report(Progress("train", 16, 64, "epoch 1/2, loss 3.25"))
        time.sleep(0.15)
        report(Progress("epoch", 1, 2, "train loss 3.1, dev loss [3.0], dev score 0.5"))
        report(Progress("dev", 5, 5, "epoch 2"))
        report(Progress("suite", 6, 12, "P36 p-tuning", seconds_left=180.0))
        time.sleep(0.15)
    shown = screen.getvalue()
    for text in ("working", "training", "16/64", "epoch 1/2, loss 3.25", "comparing", "about 3 min left"):
        assert text in shown
    assert "epoch 1/2: train loss 3.1, dev loss [3.0], dev score 0.5\n" in shown.replace("\r", "")
    assert "scoring" not in shown  # a stage that is over at once has no bar


def test_a_log_has_a_line_per_epoch_with_the_time() -> None:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), terminal.bar() as report:
        report(Progress("train", 10, 40, ""))
        report(Progress("epoch", 1, 4, "loss 3"))
    assert err.getvalue() == "epoch 1/4: loss 3; 0 s so far\n"


def test_the_clock_says_how_long_a_comparison_takes() -> None:
    now = 100.0
    clock = terminal.Clock(lambda: now)
    now += 3590
    clock(Progress("train", 100, 400, ""))
    assert clock.text == "1 h 00 min so far"
    clock(Progress("suite", 1, 6, "P36 manual", seconds_left=0.0, untimed=5))
    assert clock.left == "5 cells not timed yet"
    clock(Progress("suite", 2, 6, "P36 p-tuning", seconds_left=240.0, untimed=1))
    assert clock.left == "about 4 min left, 1 cell not timed yet"
    clock(Progress("suite", 6, 6, "", seconds_left=0.0))
    assert clock.left == ""


EVIL = "a\x1b[2J\x1b]0;PWN\x07\x9b31m\r\u202eb\ud800"
SHOWN = "a\\x1b[2J\\x1b]0;PWN\\x07\\x9b31m\\r\\u202eb\\ud800"


def test_escapes_of_data_are_shown_and_not_obeyed(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    """In messages, tables, headings, notes of a progress bar and JSON alike."""
    printed = terminal._Console(file=screen, width=200, emoji=False, highlight=False)
    monkeypatch.setattr(terminal, "results", lambda: printed)
    text = "a [bold]template[/] :warning: " + " ".join(["[P*3] [X] [Y]"] * 12) + "\n  ^ column 1"
    terminal.complain(text)
    terminal.complain(f"{EVIL}\nsecond line")
    assert screen.getvalue() == f"error: {text}\nerror: {SHOWN}\nsecond line\n"
    terminal.line(EVIL)
    terminal.heading(EVIL)
    table = terminal.table(EVIL)
    table.add_row(escape(EVIL))
    printed.print(table)
    assert screen.getvalue().count(SHOWN) == 5
    with terminal.waiting(EVIL), terminal.bar() as report:
        report(Progress("train", 1, 2, EVIL))
        time.sleep(0.15)
    shown = screen.getvalue()
    assert not {"\x07", "\x9b", "\u202e", "\ud800"} & set(shown)
    assert "\x1b[2J" not in shown
    assert "\x1b]" not in shown


def test_json_escapes_what_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json({"a": "\x1b\x7f\x9b é"}, indent=None)
    assert capsys.readouterr().out == '{"a": "\\u001b\\u007f\\u009b é"}\n'


def test_warnings_come_as_messages() -> None:
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        record = logging.LogRecord("ptuning.x", logging.WARNING, "f", 1, "dropped '%s'", ("[X]",), None)
        terminal.LogHandler().emit(record)
    assert err.getvalue() == "warning: dropped '[X]'\n"


@pytest.mark.parametrize(("found", "called"), [("own", "ptuning"), ("other", "{own}"), (None, "{own}")])
def test_the_next_command_is_one_that_works_here(
    found: str | None, called: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "an environment"
    folder.mkdir()
    (folder / "ptuning").touch()
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    where = {"own": str(folder / "ptuning"), "other": "/usr/bin/ptuning", None: None}[found]
    monkeypatch.setattr(shutil, "which", lambda _: where)
    assert terminal.program() == called.format(own="'an environment/ptuning'")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert terminal.program() == called.format(own=f"'{folder}/ptuning'")
    Path.cwd().rmdir()  # a working folder that is gone
    assert terminal.program() == called.format(own=f"'{folder}/ptuning'")
    (folder / "ptuning").unlink()
    if found != "own":
        assert terminal.program() == f"'{folder}/python' -m ptuning"
