"""The side of a connection that the server cannot trust: a client that is slow with its headers, or does not read."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
READ_SECONDS = 30.0
# Bytes of the first line and the headers of a request.
HEADER_BYTES = 32 << 10


class GuardedProtocol(H11Protocol):
    """Closes the connection of a client whose headers are not there in :data:`HEADER_SECONDS`, or who has not read
    within :data:`READ_SECONDS` what is to be sent; its request hears that the client has gone.
    """

    _headers: asyncio.TimerHandle | None = None
    _reads: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for headers."""
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        """Take data; while it is no whole header, the client's time runs."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_headers()
        else:
            self._headers = _cancel(self._headers)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client."""
        self._headers, self._reads = _cancel(self._headers), _cancel(self._reads)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Give the client time to read."""
        super().pause_writing()
        self._reads = self._reads or self.loop.call_later(READ_SECONDS, self._abort)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        self._reads = _cancel(self._reads)
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection on which nothing comes, even if the last answer was never read."""
        super().timeout_keep_alive_handler()
        self._reads = self._reads or self.loop.call_later(READ_SECONDS, self._abort)

    def _await_headers(self) -> None:
        self._headers = self._headers or self.loop.call_later(HEADER_SECONDS, self._abort)

    def _abort(self) -> None:
        self.transport.abort()


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Stop a timer, and return what stands for none."""
    if timer is not None:
        timer.cancel()
    return None
