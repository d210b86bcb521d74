"""Processes of their own that start at once: each is a fork of a process that has imported all that tests import, and
has done nothing else.
"""

import atexit
import contextlib
import importlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver, util
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest.mock import patch

# What they need beside that.
ALSO = (
    "ptuning.cli.app", "ptuning.experiment.suites", "ptuning.training.fleet",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([*ALSO])

COMMAND_LINE = "import runpy\nrunpy.run_module('ptuning', run_name='__main__', alter_sys=True)\n"


def prepare() -> None:
    """Make the process that others are forked of: a fork of this one, which has to be called before any test runs. The
    standard library would start a new one instead, which takes seconds to import what is here already.
    """
    if "transformers" not in sys.modules:
        return  # few tests run, and they may need none
    for name in ALSO:
        importlib.import_module(name)
    start = util.spawnv_passfds

    def fork(path: bytes, words: Sequence[str], handles: Sequence[int]) -> int:
        if "forkserver" not in words[-1]:  # what tidies up is no fork
            return start(path, words, handles)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the other threads only wait for pytest-xdist
            process = os.fork()
        if process:
            return process
        try:
            atexit._clear()
            last = 3  # closerange(0, 0) closes every handle where close_range is used
            for handle in sorted({*handles} - {0, 1, 2}):
                os.closerange(last, handle)
                last = handle + 1
            os.closerange(last, os.sysconf("SC_OPEN_MAX"))
            warnings.resetwarnings()  # those of the tests make errors of some
            logging.getLogger().handlers.clear()  # one of pytest's writes to a handle that is closed now
            exec(words[-1], {})
        finally:
            os._exit(1)

    with patch.object(util, "spawnv_passfds", fork):
        forkserver.ensure_running()


class Forked:
    """A process that runs a program; what it says goes to files.

    Args:
        program: Python text.
        arguments: What it finds in ``sys.argv`` behind its name.
        folder: Of what it says.
        environment: What it has in ``os.environ`` beside what the tests have.
    """

    def __init__(
        self, program: str, *arguments: object, folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        at = len(list(folder.glob("out-*")))
        self._out, self._err = folder / f"out-{at}", folder / f"err-{at}"
        words = ["program", *map(str, arguments)]
        given = (program, words, str(self._out), str(self._err), dict(environment or {}))
        self._process: ForkServerProcess = _FORKS.Process(target=_run, args=given, daemon=True)
        self._process.start()

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.exitcode

    @property
    def out(self) -> str:
        """What it printed."""
        return self._out.read_text(encoding="utf-8") if self._out.exists() else ""

    @property
    def err(self) -> str:
        """What it wrote to standard error."""
        return self._err.read_text(encoding="utf-8") if self._err.exists() else ""

    def wait(self, seconds: float = 120) -> int:
        """Wait for its end, and return its exit code."""
        self._process.join(seconds)
        assert self.code is not None, self.err
        return self.code

    def wait_until(self, holds: Callable[[], object], *, seconds: float = 200) -> None:
        """Wait until something holds, while it runs."""
        end = time.monotonic() + seconds
        while not holds():
            assert self.code is None, self.err
            assert time.monotonic() < end
            time.sleep(0.005)

    def send(self, number: int) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Send it SIGKILL."""
        self.send(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL


@contextlib.contextmanager
def forked(
    program: str, *arguments: object, folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Forked]:
    """Start a process that does not outlive the block; arguments as of :class:`Forked`."""
    found = Forked(program, *arguments, folder=folder, environment=environment)
    try:
        yield found
    finally:
        if found.code is None:
            found.kill()


def launched(processes: int) -> list[dict[str, str]]:
    """Return what torchrun tells each of so many processes on one machine, for their environments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "none"}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**told, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _run(program: str, words: list[str], out: str, err: str, environment: dict[str, str]) -> None:
    for number, path in ((1, out), (2, err)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(handle, number)
        os.close(handle)
    os.environ.update(environment)
    sys.argv = words
    exec(program, {"__name__": "__main__"})
