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
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from ptuning.errors import ConfigError
from ptuning.serve.engine.job import StoppedError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ptuning.serve.http.service import Service

SIGNAL_EXIT = 128
# Seconds for finished answers to reach their clients, and for an idle connection between two requests.
LAST_SECONDS, IDLE_SECONDS = 5, 30
BACKLOG = 512
HEADER_BYTES = 32 << 10
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
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"'{host}' is no address to listen at: {error.strerror}") from error
    dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=dual)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}, port {port}: {error.strerror}; choose another port (0: any that is free)"
        ) from error


def address_of(listener: socket.socket) -> str:
    """Return the URL of a service."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run(
    app: FastAPI,
    listener: socket.socket,
    *,
    drain: float,
    on_ready: OnReady,
    on_hangup: Callable[[], None] | None = None,
) -> None:
    """Serve until a signal comes, then drain: ``/ready`` and new requests get 503, and running requests have ``drain``
    seconds to end. A second signal ends the process at once. Outside of the main thread, signals are not handled.

    Args:
        app: The application of :func:`~ptuning.serve.http.app.create_app`. Its engine is stopped at the end, and its
            registry accepts no changes while the service drains.
        listener: A listening socket.
        drain: Seconds for running requests.
        on_ready: Called once connections are accepted, with a function that ends the service as a signal does.
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

    server, engine = _Server(config), app.state.service.engine
    server.service, server.drain, server.on_ready, server.on_hangup = app.state.service, drain, on_ready, on_hangup
    try:
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        engine.stop()
    if engine.has_failed:
        raise StoppedError("the model has failed, for the reason above, and so the service has ended; start it anew")


class _Server(uvicorn.Server):
    """uvicorn's server with the signals of :func:`run`."""

    service: Service
    drain: float
    on_ready: OnReady
    on_hangup: Callable[[], None] | None
    loop: asyncio.AbstractEventLoop
    draining: asyncio.Future[None] | None = None
    signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections."""
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        if self.on_hangup is not None and threading.current_thread() is threading.main_thread() and _takes_hangup():
            self.loop.add_signal_handler(signal.SIGHUP, self.loop.run_in_executor, None, self.on_hangup)
        self.on_ready(self.end)

    async def on_tick(self, counter: int) -> bool:
        """Do what uvicorn does ten times a second, and end if the engine has failed."""
        return await super().on_tick(counter) or self.service.engine.has_failed

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Handle a signal."""
        self.signals += 1
        if self.signals > 1:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(SIGNAL_EXIT + sig)  # nothing is left: no child process, no half-written file
        self.end()

    def end(self) -> None:
        """Begin to drain, from any thread."""
        if hasattr(self, "loop"):
            with contextlib.suppress(RuntimeError):  # after the end
                self.loop.call_soon_threadsafe(self._begin_draining)

    def _begin_draining(self) -> None:
        def work() -> None:
            self.service.registry.close()
            if not self.service.engine.drain(self.drain):
                self.service.engine.stop()

        async def drain() -> None:
            await asyncio.to_thread(work)
            self.should_exit = True

        self.service.phase = "draining"
        self.draining = self.draining or asyncio.ensure_future(drain())


def _takes_hangup() -> bool:
    """Whether a SIGHUP is a request, which it is not on Windows, in a terminal, that sends it at its end, and under
    nohup, which ignores it.
    """
    streams = (stream for stream in (sys.stdin, sys.stderr) if stream is not None and not stream.closed)
    hangup = getattr(signal, "SIGHUP", None)
    is_free = hangup is not None and signal.getsignal(hangup) == signal.SIG_DFL
    return is_free and not any(stream.isatty() for stream in streams)
