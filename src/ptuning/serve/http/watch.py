"""What can be seen of the service from outside: metrics for Prometheus, and an access log of one JSON line a request.

Neither holds keys, texts or answers; names that are not in service are all one name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from ptuning.files import file_error
from ptuning.prompt.prompt import Prompt
from ptuning.provenance import VERSION
from ptuning.serve.engine.job import CallRow, Job, Outcome, PromptRow, Row, Usage

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

UNKNOWN, OTHER = "(unknown)", "(other)"
MOST_NAMES = 5000  # of prompts in the metrics, over the life of a service; later ones are counted together
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")
CLIENT_GONE = 499  # the client went before it was answered, as nginx writes it
LOGGED_NAMES = 10  # in a line, of a request that asks many prompts
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
    "prompt_tokens": ("Tokens of the rows, slots included", "prompt_tokens"),
    "generation_tokens": ("Tokens written", "tokens_written"),
    "cached_tokens": ("Of these tokens: those that were not read again", "cached_tokens"),
    "rows_cancelled": ("Rows whose client went before they were answered", "rows_cancelled"),
    "rows_failed": ("Rows that failed", "rows_failed"),
}


class Names(Protocol):
    """The names that are in service, as the watch sees them."""

    @property
    def base_name(self) -> str: ...  # noqa: D102
    @property
    def served(self) -> Mapping[str, object]: ...  # noqa: D102
    @property
    def failures(self) -> Mapping[str, str]: ...  # noqa: D102


class Seen:
    """What is seen of one request: its routes tell what it asks, the engine's thread what becomes of it."""

    def __init__(self, request_id: str, method: str) -> None:
        self.id = request_id
        self.method = method if method in METHODS else OTHER
        self.status = 0
        self.error: str | None = None
        self.usage: dict[str, list[Usage]] = {}  # of what is answered, by the name that was asked
        self.rows = 0
        self.queue_seconds: float | None = None
        self.first_seconds: float | None = None
        self._began = time.perf_counter()
        self._jobs: list[Job] = []
        self._names: dict[int, str] = {}

    @property
    def seconds(self) -> float:
        """Seconds since it came."""
        return time.perf_counter() - self._began

    @property
    def is_begun(self) -> bool:
        """Whether one of its rows is out of the queue."""
        return any(job.is_begun for job in self._jobs)

    def asked(self, name: str, prompt: Prompt | None = None) -> None:
        """It asks a model of this name, which there may not be."""
        self.usage.setdefault(name, [])
        if prompt is not None:
            self._names[id(prompt)] = name

    def submitted(self, job: Job) -> None:
        """Its rows are in the queue."""
        self._jobs.append(job)
        self.rows += sum(not isinstance(row, CallRow) for row in job.rows)

    def first(self) -> None:
        """A first piece of an answer is there."""
        if self.first_seconds is None:
            self.first_seconds = self.seconds

    def answered(self, row: Row, outcome: Outcome) -> None:
        """A row is answered."""
        if isinstance(row, CallRow):
            return
        self.first()
        if self.queue_seconds is None:
            self.queue_seconds = outcome.waited
        asked = [*self.usage]
        name = self._names.get(id(row.prompt)) if isinstance(row, PromptRow) else None
        if asked:
            self.usage[name or asked[0]].append(outcome.usage)

    def refused(self, code: str) -> None:
        """It ends with an error of this code."""
        self.error = code


def seen_of(request: HTTPConnection) -> Seen:
    """Return what is seen of a request."""
    found = request.scope["state"]["seen"]
    assert isinstance(found, Seen)
    return found


class Monitor:
    """Counts requests, and writes a line for each.

    Args:
        names: The prompts and the base model, which have a name in the metrics and the log.
        status: Returns the engine's numbers; see :data:`ENGINE_GAUGES`.
        log: Takes the lines of the access log; see :func:`access_log`. None for no log.
    """

    def __init__(self, names: Names, *, status: Callable[[], object], log: logging.Logger | None = None) -> None:
        self._in_service = names
        self._status = status
        self._log = log
        self._live: set[Seen] = set()
        self._labels: set[str] = set()
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
        info.add_metric((VERSION, self._in_service.base_name), 1)
        yield info
        working = [one for one in [*self._live] if one.rows]
        yield _gauge("num_requests_running", "Requests that are being answered", sum(one.is_begun for one in working))
        yield _gauge("num_requests_waiting", "Requests in the queue", sum(not one.is_begun for one in working))
        yield _gauge("prompts_loaded", "Prompts in service", len(self._in_service.served))
        yield _gauge("prompts_failed", "Prompts that could not be loaded", len(self._in_service.failures))
        status = self._status()
        for name, (text, of) in ENGINE_GAUGES.items():
            yield _gauge(name, text, getattr(status, of, 0))
        for name, (text, of) in ENGINE_COUNTERS.items():
            yield CounterMetricFamily(f"ptuning_{name}", text, value=getattr(status, of, 0))

    def begin(self, request_id: str, method: str) -> Seen:
        """Begin to watch a request."""
        found = Seen(request_id, method)
        self._live.add(found)
        return found

    def end(self, seen: Seen, *, route: str) -> None:
        """Count a request that has ended, and write its line. ``route`` is its route's own path: an address as it was
        sent may hold anything.
        """
        self._live.discard(seen)
        seconds, status = seen.seconds, seen.status or CLIENT_GONE
        self._requests.labels(route, str(status)).inc()
        if status >= 400 or seen.error is not None:
            self._refusals.labels(seen.error or str(status)).inc()
        usage: dict[str, list[Usage]] = {}
        for name, listed in seen.usage.items():
            usage.setdefault(self._known(name), []).extend(listed)
        if seen.rows or status >= 400:
            self._count(usage)
        if seen.rows:
            self._whole_time.observe(seconds)
        for timed, measured in ((self._queue_time, seen.queue_seconds), (self._first_time, seen.first_seconds)):
            if measured is not None:
                timed.observe(measured)
        if self._log is not None:
            self._log.info("%s", json.dumps(_line(seen, usage, route=route, status=status, seconds=seconds)))

    def _count(self, usage: Mapping[str, list[Usage]]) -> None:
        for name, listed in usage.items():
            label = name
            if name not in self._labels and len(self._labels) >= MOST_NAMES:
                label = OTHER
            self._labels.add(label)
            self._by_model.labels(label).inc()
            self._rows_by_model.labels(label).inc(len(listed))
            self._read_by_model.labels(label).inc(sum(one.prompt_tokens for one in listed))
            self._written_by_model.labels(label).inc(sum(one.completion_tokens for one in listed))

    def _known(self, name: str) -> str:
        return name if name == self._in_service.base_name or name in self._in_service.served else UNKNOWN


def access_log(file: Path | None) -> logging.Logger:
    """Return what writes the access log into a file, which may be rotated meanwhile, or to the error stream. A log that
    later cannot be written, as on a full disk, loses lines and hurts no request.

    Raises:
        FileError: If the file cannot be opened.
    """
    try:
        handler = _Lines() if file is None else _Files(file, encoding="utf-8")
    except OSError as error:
        raise file_error("write", Path(file or "-"), error) from error
    handler.setFormatter(logging.Formatter("%(message)s"))
    made = logging.Logger("ptuning.access", logging.INFO)
    made.addHandler(handler)
    return made


class _Lines(logging.StreamHandler):  # type: ignore[type-arg]
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Lose the line."""


class _Files(logging.handlers.WatchedFileHandler):
    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; lose it if the file cannot be opened again."""
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Lose the line."""


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"ptuning_{name}", text, value=value)


def _line(
    seen: Seen, usage: Mapping[str, list[Usage]], *, route: str, status: int, seconds: float
) -> dict[str, object]:
    """Return a line of the access log; JSON escapes whatever is no letter, digit or sign of ASCII."""
    every = [one for listed in usage.values() for one in listed]

    def ms(measured: float | None) -> float | None:
        return None if measured is None else round(1000 * measured, 1)

    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "request_id": seen.id,
        "method": seen.method,
        "route": route,
        "status": status,
        "error": seen.error,
        "models": list(usage)[:LOGGED_NAMES],
        "rows": seen.rows,
        "prompt_tokens": sum(one.prompt_tokens for one in every),
        "completion_tokens": sum(one.completion_tokens for one in every),
        "cached_tokens": sum(one.cached_tokens for one in every),
        "queue_ms": ms(seen.queue_seconds),
        "first_token_ms": ms(seen.first_seconds),
        "total_ms": ms(seconds),
    }
