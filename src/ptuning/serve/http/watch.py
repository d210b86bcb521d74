"""What can be seen of the service from outside: metrics for Prometheus, and an access log of one JSON line a request.

Neither holds keys, texts or answers; names that are not in service are all one name.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ptuning.provenance import VERSION
from ptuning.serve.engine.job import Usage
from ptuning.serve.registry import Registry

UNKNOWN, OTHER = "(unknown)", "(other)"
MOST_NAMES = 5000  # of prompts in the metrics, over the life of a service; later ones are counted together
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")
CLIENT_GONE = 499  # the client went before it was answered, as nginx writes it
REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

# Metric -> what it is, and the number of the engine's status that it shows.
ENGINE_GAUGES = {
    "num_rows_waiting": ("Rows in the queue", "rows_waiting"),
    "num_rows_running": ("Rows that are being answered in several passes", "rows_writing"),
    "kept_bytes": ("Memory of the keys and values that are kept", "kept_bytes"),
    "kept_texts": ("Texts whose keys and values are kept", "kept_texts"),
}
ENGINE_COUNTERS = {
    "rows": ("Rows that were answered", "rows_done"),
    "passes": ("Passes of the model", "passes"),
    "prompt_tokens": ("Tokens read, slots included", "tokens_read"),
    "generation_tokens": ("Tokens written", "tokens_written"),
    "cached_tokens": ("Tokens read whose keys and values were kept", "cached_tokens"),
    "rows_cancelled": ("Rows whose client went before they were answered", "cancelled"),
    "rows_failed": ("Rows that failed", "failed"),
}


@dataclass(eq=False)
class Seen:
    """What is seen of one request; its route says what it knows, and the rest is measured."""

    id: str
    method: str
    began: float
    rows: int = 0
    models: dict[str, list[Usage]] = field(default_factory=dict)
    status: int = 0
    error: str | None = None
    queue_seconds: float | None = None
    first_seconds: float | None = None
    is_begun: bool = False

    def admitted(self, models: Iterable[str], rows: int) -> None:
        """The request is in the queue with so many rows for each of these models."""
        self.models = {name: [] for name in models}
        self.rows = rows * len(self.models)

    def begun(self, queue_seconds: float | None = None) -> None:
        """The first of its rows is out of the queue."""
        if not self.is_begun:
            self.is_begun = True
            self.queue_seconds = time.perf_counter() - self.began if queue_seconds is None else queue_seconds

    def answered(self, model: str, usage: Usage | None = None) -> None:
        """A first piece of an answer is there, or with ``usage`` a whole row."""
        self.begun()
        if self.first_seconds is None:
            self.first_seconds = time.perf_counter() - self.began
        if usage is not None:
            self.models.setdefault(model, []).append(usage)

    def refused(self, code: str) -> None:
        """The request ends with an error of this code."""
        self.error = code


def seen_of(request: Request) -> Seen:
    """Return what is seen of a request; one that nobody watches is seen by nobody."""
    found = getattr(request.state, "seen", None)
    return found if isinstance(found, Seen) else Seen("", request.method, time.perf_counter())


class Watch:
    """Counts what :class:`Watched` sees of requests.

    Args:
        registry: Whose prompts have a name in the metrics and the log.
        base_name: Of the base model, which has one, too.
        status: Returns the engine's numbers; see :data:`ENGINE_GAUGES`.
        log: Takes the lines of the access log; see :func:`access_log`. None for no log.
    """

    def __init__(
        self, registry: Registry, *, base_name: str, status: Callable[[], object], log: logging.Logger | None = None
    ) -> None:
        self._registry = registry
        self._base_name = base_name
        self._status = status
        self._log = log
        self._live: set[Seen] = set()
        self._names: set[str] = set()
        self._metrics = CollectorRegistry()
        self._metrics.register(self)
        ProcessCollector(registry=self._metrics)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"ptuning_{name}", text, labels, registry=self._metrics)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"ptuning_{name}", text, buckets=SECONDS, registry=self._metrics)

        self._requests = counter("requests", "Requests that ended", "route", "status")
        self._refusals = counter("refusals", "Requests that ended with an error", "reason")
        self._by_model = counter("model_requests", "Requests by model", "model")
        self._rows_by_model = counter("model_rows", "Rows that were answered by model", "model")
        self._read_by_model = counter("model_prompt_tokens", "Tokens read by model", "model")
        self._written_by_model = counter("model_generation_tokens", "Tokens written by model", "model")
        self._queue_time = histogram("request_queue_time_seconds", "Time until a request's first row was begun")
        self._first_time = histogram("time_to_first_token_seconds", "Time until the first token, or the first answer")
        self._whole_time = histogram("e2e_request_latency_seconds", "Time until a request's answer was complete")

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Return all metrics, in the form that an ``Accept`` header asks for, and their content type."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self._metrics), content_type

    def collect(self) -> Iterable[Metric]:
        """Yield what is not counted but looked up (called by the Prometheus client)."""
        info = GaugeMetricFamily("ptuning_build_info", "Version and base model", labels=("version", "model"))
        info.add_metric((VERSION, self._base_name), 1)
        yield info
        working = [one for one in [*self._live] if one.rows]
        yield _gauge("num_requests_running", "Requests that are being answered", sum(one.is_begun for one in working))
        yield _gauge("num_requests_waiting", "Requests in the queue", sum(not one.is_begun for one in working))
        yield _gauge("prompts_loaded", "Prompts in service", len(self._registry.served))
        yield _gauge("prompts_failed", "Prompts that could not be loaded", len(self._registry.failures))
        status = self._status()
        for name, (text, of) in ENGINE_GAUGES.items():
            yield _gauge(name, text, getattr(status, of, 0))
        for name, (text, of) in ENGINE_COUNTERS.items():
            yield CounterMetricFamily(f"ptuning_{name}", text, value=getattr(status, of, 0))

    def begin(self, request_id: str, method: str) -> Seen:
        """Begin to watch a request; an id that is none is replaced."""
        given = request_id if REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex
        found = Seen(given, method if method in METHODS else OTHER, time.perf_counter())
        self._live.add(found)
        return found

    def end(self, seen: Seen, *, route: str) -> None:
        """Count a request that has ended, and write its line."""
        self._live.discard(seen)
        total = time.perf_counter() - seen.began
        status = seen.status or CLIENT_GONE
        self._requests.labels(route, str(status)).inc()
        if status >= 400:
            self._refusals.labels(seen.error or str(status)).inc()
        models: dict[str, list[Usage]] = {}
        for given, usages in seen.models.items():
            models.setdefault(self._known(given), []).extend(usages)
        for name, usages in models.items():
            label = self._label(name)
            self._by_model.labels(label).inc()
            self._rows_by_model.labels(label).inc(len(usages))
            self._read_by_model.labels(label).inc(sum(one.prompt_tokens for one in usages))
            self._written_by_model.labels(label).inc(sum(one.completion_tokens for one in usages))
        if seen.rows:
            self._whole_time.observe(total)
        for timed, seconds in ((self._queue_time, seen.queue_seconds), (self._first_time, seen.first_seconds)):
            if seconds is not None:
                timed.observe(seconds)
        if self._log is not None:
            self._log.info("%s", json.dumps(_line(seen, models, route=route, status=status, total=total)))

    def _known(self, name: str) -> str:
        return name if name == self._base_name or name in self._registry.served else UNKNOWN

    def _label(self, name: str) -> str:
        if name not in self._names and len(self._names) >= MOST_NAMES:
            return OTHER
        self._names.add(name)
        return name


def metrics_route(watch: Watch, *, guard: Callable[..., object] | None = None) -> APIRouter:
    """Return the route ``/metrics``; ``guard`` is a dependency that lets nobody in without an admin key."""
    made = APIRouter(dependencies=[] if guard is None else [Depends(guard)], tags=["admin"])

    @made.get("/metrics")
    def metrics(request: Request) -> Response:
        """What Prometheus reads."""
        body, content_type = watch.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    return made


class Watched:
    """ASGI middleware, the outermost one: each request is watched, has an id, and tells it in ``x-request-id``."""

    def __init__(self, app: ASGIApp, watch: Watch) -> None:
        self._app = app
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Watch a request; what is not HTTP passes by."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        seen = self._watch.begin(given.decode("latin-1"), scope["method"])
        scope.setdefault("state", {})["seen"] = seen

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", seen.id.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception:
            seen.status = seen.status or 500
            raise
        finally:
            # What the router has found: an address as it was sent may hold anything.
            self._watch.end(seen, route=getattr(scope.get("route"), "path", UNKNOWN))


def access_log(file: Path | None) -> logging.Logger:
    """Return what writes the access log into a file, which may be rotated meanwhile, or to the error stream.

    A log that cannot be written, as on a full disk, loses lines and hurts no request.
    """
    handler = _Lines() if file is None else _Files(file, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(message)s"))
    made = logging.Logger("ptuning.access", logging.INFO)
    made.addHandler(handler)
    return made


class _Lines(logging.StreamHandler):  # type: ignore[type-arg]
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Lose the line."""


class _Files(logging.handlers.WatchedFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Lose the line."""


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"ptuning_{name}", text, value=value)


def _line(seen: Seen, models: Mapping[str, list[Usage]], *, route: str, status: int, total: float) -> dict[str, object]:
    """Return a line of the access log; JSON escapes whatever is no letter, digit or sign of ASCII."""
    usages = [usage for listed in models.values() for usage in listed]

    def ms(seconds: float | None) -> float | None:
        return None if seconds is None else round(1000 * seconds, 1)

    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "request_id": seen.id,
        "method": seen.method,
        "route": route,
        "status": status,
        "error": seen.error,
        "models": list(models)[:10],
        "rows": seen.rows,
        "prompt_tokens": sum(one.prompt_tokens for one in usages),
        "completion_tokens": sum(one.completion_tokens for one in usages),
        "cached_tokens": sum(one.cached_tokens for one in usages),
        "queue_ms": ms(seen.queue_seconds),
        "first_token_ms": ms(seen.first_seconds),
        "total_ms": ms(total),
    }
