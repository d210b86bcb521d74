"""Who is told of every request that is done: metrics and the access log."""

from __future__ import annotations


class Watch:
    """Is told of requests; this one does nothing with it."""

    def request_done(self, route: str, model: str, status: int, seconds: float) -> None:
        """A request is done.

        Args:
            route: The route's own path, as ``/v1/models/{name}``; ``(unknown)`` if there is none.
            model: The name of what was asked, if it is one that is in service; else ``(unknown)``.
            status: HTTP status; 499 if the client went away.
            seconds: From its first line to the last byte of the answer.
        """
