"""Messages of work that was stopped by a signal; tests/cli/test_app.py stops trainings."""

import signal
import sys
from pathlib import Path

import pytest
import typer

from ptuning.cli import signals
from ptuning.progress import Interrupted


@pytest.mark.parametrize(
    ("number", "left", "again", "end"),
    [
        (signal.SIGTERM, None, "", "after 1 of 4 cells; nothing was written\n"),
        (signal.SIGINT, "results.json", "", "compare --manual '[X] is [Y]' --out out\n"),
        (signal.SIGINT, "checkpoint", "--resume", "compare --manual '[X] is [Y]' --out out --resume\n"),
        (signal.SIGINT, "run.json", "--out", "compare --manual '[X] is [Y]' --out out\n"),  # it is there already
    ],
)
def test_the_first_signal_asks_to_stop(
    number: int,
    left: str | None,
    again: str,
    end: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["ptuning", "compare", "--manual", "[X] is [Y]", "--out", "out"])
    if left is not None:
        Path("out").mkdir()
        Path("out", left).write_text("")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with signals.stoppable(Path("out"), again=again) as (_, should_stop):
            assert not should_stop()
            signal.raise_signal(number)
            assert should_stop()
            raise Interrupted("stopped after 1 of 4 cells")

    with pytest.raises(typer.Exit) as ended:
        work()
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert ended.value.exit_code == signals.SIGNAL_EXIT + number
    message = capsys.readouterr().err
    assert message.startswith("stopping after this step; once more to stop at once\nstopped after 1 of 4 cells; ")
    assert (left is None) == (f"out/{left} is kept, continue with:\n" not in message)
    assert message.endswith(end)
