"""Running the service: its socket, and its end. The first signal drains it, the second one ends it at once."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Protocol

import uvicorn

from ptuning.errors import ConfigError
from ptuning.serve.engine.job import StoppedError
from ptuning.serve.http.app import create_app
from ptuning.serve.http.protocol import HEADER_BYTES, GuardedProtocol

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ptuning.serve.http.service import Settings

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNAL_EXIT = 128
# Seconds for answers that are ready to reach their clients, once all rows are answered.
LAST_SECONDS = 5
IDLE_SECONDS = 30  # of a connection between two requests
BACKLOG = 512
# Is given what ends the service as a signal does.
OnReady = Callable[[Callable[[], None]], None]


class Drains(Protocol):
    """What is drained and stopped: the engine."""

    @property
    def has_failed(self) -> bool: ...  # noqa: D102
    def drain(self, seconds: float) -> bool: ...  # noqa: D102
    def stop(self) -> None: ...  # noqa: D102


class Closes(Protocol):
    """What takes no more changes at the end: the registry."""

    def close(self) -> None: ...  # noqa: D102


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


def listening(host: str, port: int) -> socket.socket:
    """Take a port (0: any that is free), which nobody can reach before the service runs. A ConfigError if it is taken,
    or the address is none of this machine's.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, number)
    except OSError as error:
        raise ConfigError(f"'{host}' is no address to listen at (--host): {error.strerror}") from error
    try:
        if os.name == "posix":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise ConfigError(
            f"cannot listen at {host}, port {port}: {error.strerror}; choose another one with --port (0: "
            "any that is free)"
        ) from error
    return made


def address_of(listener: socket.socket) -> str:
    """Return the address of a service for people."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run(
    app: FastAPI,
    engine: Drains,
    registry: Closes,
    listener: socket.socket,
    *,
    drain: float,
    on_ready: OnReady,
    on_hangup: Callable[[], None] | None = None,
) -> None:
    """Serve until a signal comes. It drains: ``/ready`` and new requests get 503, and requests that run have ``drain``
    seconds to end. A second signal ends the process at once. ``on_ready`` is called once connections are taken, with
    what does the same as a signal and may be called from any thread. ``on_hangup`` is called in a thread at a SIGHUP;
    in a terminal that ends the process, as ever. If the engine fails, whatever waits is told so; then a StoppedError.
    """
    config = uvicorn.Config(
        app,
        http=GuardedProtocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=LAST_SECONDS,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    server = _Server(config, on_ready, on_hangup, has_failed=lambda: engine.has_failed)

    def drained() -> None:
        registry.close()
        if not engine.drain(drain):
            engine.stop()

    server.at_signal = lambda: _begin_end(app, server, drained)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        engine.stop()
    if engine.has_failed:
        raise StoppedError("the model has failed, for the reason above, and so the service has ended; start it anew")


@contextlib.contextmanager
def starting(listener: socket.socket, settings: Settings) -> Iterator[None]:
    """Answer whoever connects while the block runs and gets the service ready: ``/health`` says that it lives, and
    all that asks a prompt gets 503. Who connects behind the block waits for the service.
    """
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {address_of(listener)}: {error.strerror}; choose another --port"
        ) from error
    nothing = _Nothing()
    app = create_app(nothing, nothing, settings)  # type: ignore[arg-type]  # while it loads, nothing else is asked
    app.state.service.phase = "loading"
    begun: queue.Queue[Callable[[], None]] = queue.Queue()

    def serve() -> None:
        try:
            with listener.dup() as own:  # uvicorn closes its handle of the socket
                run(app, nothing, nothing, own, drain=0, on_ready=begun.put)
        finally:
            begun.put(lambda: None)  # if it could not begin, the service is got ready all the same

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    end = begun.get()
    try:
        yield
    finally:
        end()
        thread.join()


class _Nothing:
    """The engine and the registry of a service that is not ready."""

    base_name = ""
    is_alive = True
    has_failed = False
    status = None

    def __init__(self) -> None:
        self.served: dict[str, object] = {}
        self.failures: dict[str, str] = {}

    def drain(self, seconds: float) -> bool:  # noqa: ARG002
        """There is nothing to wait for."""
        return True

    def stop(self) -> None:
        """There is nothing to stop."""

    close = stop


def _begin_end(app: FastAPI, server: _Server, drained: Callable[[], None]) -> None:
    app.state.service.phase = "draining"

    async def end() -> None:
        await asyncio.to_thread(drained)
        server.should_exit = True

    server.ending = asyncio.ensure_future(end())


class _Server(uvicorn.Server):
    """uvicorn's server, with signals as :func:`run` says."""

    at_signal: Callable[[], None]
    ending: asyncio.Future[None] | None = None
    _loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        config: uvicorn.Config,
        on_ready: OnReady,
        on_hangup: Callable[[], None] | None,
        *,
        has_failed: Callable[[], bool],
    ) -> None:
        super().__init__(config)
        self._on_ready, self._on_hangup, self._has_failed = on_ready, on_hangup, has_failed
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take connections, and say so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        self._on_ready(self.end)

    async def on_tick(self, counter: int) -> bool:
        """Do what uvicorn does ten times a second, and end if the engine has failed."""
        return await super().on_tick(counter) or self._has_failed()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Hear signals, which only a process's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        hangup = getattr(signal, "SIGHUP", None)  # not on Windows
        if hangup is not None and self._on_hangup is not None and _may_hear(hangup):
            before[hangup] = signal.signal(hangup, self._hung_up)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hung_up(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        again = self._on_hangup
        if again is not None:
            with contextlib.suppress(AttributeError, RuntimeError):
                self._loop.call_soon_threadsafe(lambda: self._loop.run_in_executor(None, again))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Take a signal."""
        self._signals += 1
        if self._signals > 1:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(SIGNAL_EXIT + sig)  # nothing is left behind: no child, no half-written file
        self.end()

    def end(self) -> None:
        """Begin to end."""
        with contextlib.suppress(AttributeError, RuntimeError):  # before the start, or behind the end
            self._loop.call_soon_threadsafe(self.at_signal)


def _may_hear(hangup: signal.Signals) -> bool:
    """Whether a SIGHUP is meant as a request. A terminal sends it when it is closed, and nohup has it ignored."""
    streams = (stream for stream in (sys.stdin, sys.stderr) if stream is not None and not stream.closed)
    return signal.getsignal(hangup) == signal.SIG_DFL and not any(stream.isatty() for stream in streams)
