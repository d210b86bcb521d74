"""Stopping at a signal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from ptuning.cli import signals
from ptuning.progress import Interrupted


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ptuning", "compare", "--manual", "[X] is [Y]", "--out", "out"])


def stopped(
    body: Callable[[Callable[[], bool]], None], capsys: pytest.CaptureFixture[str], *, again: str = ""
) -> tuple[int, str]:
    """Run something that signals end, and return the exit code and what was said."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as ended, signals.stoppable(Path("out"), again=again) as (_, should_stop):
        body(should_stop)
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    return ended.value.exit_code, capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_asks_to_stop(number: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def body(should_stop: Callable[[], bool]) -> None:
        assert not should_stop()
        signal.raise_signal(number)
        assert should_stop()
        raise Interrupted("stopped after 1 of 4 cells")

    exit_code, said = stopped(body, capsys)
    assert exit_code == code
    assert said == (
        "stopping after this step; once more to stop at once\nstopped after 1 of 4 cells; nothing was written\n"
    )


@pytest.mark.parametrize(
    ("left", "again", "end"),
    [
        ("results.json", "", "compare --manual '[X] is [Y]' --out out\n"),
        ("checkpoint", "--resume", "compare --manual '[X] is [Y]' --out out --resume\n"),
        ("run.json", "--out", "compare --manual '[X] is [Y]' --out out\n"),  # what is there is not said twice
    ],
)
def test_what_is_left_and_how_to_go_on(left: str, again: str, end: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out", left).write_text("")

    def body(_: Callable[[], bool]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal stops at once")

    code, said = stopped(body, capsys, again=again)
    assert code == 130
    assert f"stopped at once; out/{left} is kept, go on with:\n" in said
    assert said.endswith(end)
