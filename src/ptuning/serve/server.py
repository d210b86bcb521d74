"""Running the service: its socket, signals and shutdown. The first signal drains it, the second ends it at once."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from ptuning.errors import ConfigError
from ptuning.serve.engine.job import StoppedError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ptuning.serve.engine.engine import Engine
    from ptuning.serve.registry import Registry

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNAL_EXIT = 128
# Seconds for finished answers to reach their clients, and of an idle connection between two requests.
LAST_SECONDS, IDLE_SECONDS = 5, 30
BACKLOG = 512
HEADER_BYTES = 32 << 10
# Is given a function that ends the service as a signal does.
OnReady = Callable[[Callable[[], None]], object]


def is_local(host: str) -> bool:
    """Whether an address is reached only from this machine."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Listen at a port (0: any that is free); clients that connect wait until the service runs.

    Raises:
        ConfigError: If the port is taken, or the address is none of this machine's.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, number)
    except OSError as error:
        raise ConfigError(f"'{host}' is no address to listen at (--host): {error.strerror}") from error
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen at {host}, port {port}: {error.strerror}; choose another --port (0: any that is free)"
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the URL of a service."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run(
    app: FastAPI,
    engine: Engine,
    registry: Registry,
    listener: socket.socket,
    *,
    drain: float,
    on_ready: OnReady,
    on_hangup: Callable[[], None] | None = None,
) -> None:
    """Serve until a signal comes, then drain: ``/ready`` and new requests get 503, and running requests have ``drain``
    seconds to end. A second signal ends the process at once.

    Args:
        app: The application of :func:`~ptuning.serve.http.app.create_app`.
        engine: Is drained and stopped at the end.
        registry: Accepts no changes while the service drains.
        listener: A listening socket.
        drain: Seconds for running requests.
        on_ready: Called once connections are accepted, with what ends the service from any thread.
        on_hangup: Called in a thread at a SIGHUP; in a terminal, SIGHUP ends the process.

    Raises:
        StoppedError: If the engine has failed.
    """
    config = uvicorn.Config(
        app,
        http="h11",
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

    def drained() -> None:
        registry.close()
        if not engine.drain(drain):
            engine.stop()

    server = _Server(config, engine, drained, on_ready, on_hangup)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        engine.stop()
    if engine.has_failed:
        raise StoppedError("the model has failed, for the reason above, and so the service has ended; start it anew")


class _Server(uvicorn.Server):
    """uvicorn's server with the signals of :func:`run`."""

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Engine,
        drained: Callable[[], None],
        on_ready: OnReady,
        on_hangup: Callable[[], None] | None,
    ) -> None:
        super().__init__(config)
        self._engine, self._drained, self._on_ready, self._on_hangup = engine, drained, on_ready, on_hangup
        self._signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Future[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        self._on_ready(self.end)

    async def on_tick(self, counter: int) -> bool:
        """Do what uvicorn does ten times a second, and end if the engine has failed."""
        return await super().on_tick(counter) or self._engine.has_failed

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals, which only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        hangup = getattr(signal, "SIGHUP", None)  # not on Windows
        if hangup is not None and self._on_hangup is not None and _may_handle(hangup):
            before[hangup] = signal.signal(hangup, self._handle_hangup)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle_hangup(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        loop, handler = self._loop, self._on_hangup
        if loop is not None and handler is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(lambda: loop.run_in_executor(None, handler))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Handle a signal."""
        self._signals += 1
        if self._signals > 1:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(SIGNAL_EXIT + sig)  # nothing is left: no child process, no half-written file
        self.end()

    def end(self) -> None:
        """Begin to drain."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # after the end
                self._loop.call_soon_threadsafe(self._begin_draining)

    def _begin_draining(self) -> None:
        async def drain() -> None:
            await asyncio.to_thread(self._drained)
            self.should_exit = True

        self.config.loaded_app.state.service.phase = "draining"
        self._draining = self._draining or asyncio.ensure_future(drain())


def _may_handle(hangup: signal.Signals) -> bool:
    """Whether a SIGHUP is meant as a request. A terminal sends it when it is closed, and nohup ignores it."""
    streams = (stream for stream in (sys.stdin, sys.stderr) if stream is not None and not stream.closed)
    return signal.getsignal(hangup) == signal.SIG_DFL and not any(stream.isatty() for stream in streams)
