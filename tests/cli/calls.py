"""Running command lines in this process, and the data that the tests of commands share."""

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ptuning.cli import app
from ptuning.progress import Progress
from ptuning.training.run import TrainingRun

FACTS = [
    ("Kenya", "Nairobi"), ("France", "Paris"), ("Peru", "Lima"), ("Chad", "yes"), ("Togo", "no"), ("Cuba", "great"),
    ("Oman", "film"), ("Fiji", "movie"), ("Mali", "answer"), ("Iran", "number"), ("Laos", "people"), ("Niue", "cities"),
]  # fmt: skip
WARM = "[P:The capital of] [X] [P:is] [Y]"
# Settings of a training that takes less than a second: three steps in each epoch.
QUICK = ("--epochs", "2", "--batch-size", "4")


@dataclass(frozen=True)
class Outcome:
    """Exit code and outputs of a command."""

    code: int
    out: str
    err: str


def call(*args: object, stdin: bytes | io.StringIO = b"") -> Outcome:
    """Run a command line in this process, as ``ptuning`` does; ``stdin`` may be a stand-in for a terminal."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["ptuning", *map(str, args)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)) if isinstance(stdin, bytes) else stdin)
        try:
            app.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def works(*args: object, stdin: bytes = b"") -> str:
    """Run a command line that must work, and return what it printed."""
    done = call(*args, stdin=stdin)
    assert done.code == 0, done.err
    return done.out


def fails(*args: object, says: Sequence[str], stdin: bytes = b"") -> str:
    """Run a command line that must end with exit code 2, one message that names some facts, and nothing written."""
    before = everything_in(Path.cwd())
    done = call(*args, stdin=stdin)
    assert (done.code, done.out) == (2, ""), done
    assert "Traceback" not in done.err
    # Notes, as on the template made by --manual, may come before the error, which is the last message.
    notice, _, message = done.err.rpartition("error: ")
    assert "error" not in notice
    assert message.strip()
    for part in says:
        assert part in message, f"'{part}' is not in: {message}"
    assert everything_in(Path.cwd()) == before
    return message


def everything_in(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder, hidden and temporary ones too, with its bytes; folders as empty ones."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def write_lines(path: str | Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write JSONL, and return its path."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Path(path)


def lines_of(text: str | Path) -> list[dict[str, Any]]:
    """Read JSONL, from a text or a file."""
    text = text.read_text(encoding="utf-8") if isinstance(text, Path) else text
    return [json.loads(line) for line in text.splitlines()]


def json_of(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def vectors_of(folder: str | Path) -> bytes:
    """Return the bytes of a run's prompt."""
    return (Path(folder) / "prompt" / "prompt.safetensors").read_bytes()


def commands_of(group: Any) -> Iterator[Any]:
    """Yield all commands of a program."""
    for command in group.commands.values():
        yield from commands_of(command) if hasattr(command, "commands") else [command]


def environment() -> dict[str, str]:
    """Return the variables of a process of its own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


def interrupting(
    number: int = signal.SIGINT, *, times: int = 1, at: Callable[[Progress], bool] = lambda now: now.stage == "train"
) -> Callable[..., object]:
    """Return a stand-in for ``TrainingRun.train`` that sends this process signals at some progress."""
    real, left = TrainingRun.train, times

    def train(*args: Any, report: Callable[[Progress], None], **named: Any) -> object:
        def watch(progress: Progress) -> None:
            nonlocal left
            report(progress)
            while left and at(progress):
                left -= 1
                signal.raise_signal(number)

        return real(*args, report=watch, **named)

    return train
