"""Metrics for Prometheus, and an access log with one JSON line per request.

Neither holds keys, texts or answers; names that are not in service are counted under one label.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from ptuning.files import file_error
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.rows import PromptRow
from ptuning.provenance import VERSION
from ptuning.serve.engine.job import CallRow, Job, Outcome, Row, Usage

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

    from ptuning.serve.registry import Registry

UNKNOWN, OTHER = "(unknown)", "(other)"
MAX_NAMES = 5000  # prompt names in the metrics over the life of a service; later ones are counted as OTHER
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")
CLIENT_GONE = 499  # the status that nginx logs for a client that disconnected
LOGGED_NAMES = 10  # per request
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

# Metric -> description, and the field of the engine's status that it shows.
ENGINE_GAUGES = {
    "num_rows_waiting": ("Rows in the queue", "rows_waiting"),
    "num_rows_running": ("Rows that are being decoded", "rows_writing"),
    "kept_bytes": ("Memory of the prefix cache", "kept_bytes"),
    "kept_texts": ("Prefixes in the cache", "kept_texts"),
}
ENGINE_COUNTERS = {
    "rows": ("Rows that were answered", "rows_done"),
    "passes": ("Forward passes of the model", "passes"),
    "prompt_tokens": ("Input tokens, slots included", "prompt_tokens"),
    "generation_tokens": ("Generated tokens", "tokens_written"),
    "cached_tokens": ("Input tokens taken from the prefix cache", "cached_tokens"),
    "rows_cancelled": ("Rows whose client disconnected before they were answered", "rows_cancelled"),
    "rows_failed": ("Rows that failed", "rows_failed"),
}


class RequestStats:
    """Measurements of one request: its route sets the models and rows, the engine's thread the outcomes."""

    def __init__(self, request_id: str, method: str) -> None:
        self.id = request_id
        self.method = method if method in METHODS else OTHER
        self.status = 0
        self.error: str | None = None  # its code
        self.usage: dict[str, list[Usage]] = {}  # of answered rows, by model name
        self.rows = 0
        self.queue_seconds: float | None = None
        self.first_token_seconds: float | None = None
        self._began = time.perf_counter()
        self._jobs: list[Job] = []
        self._names: dict[int, str] = {}

    @property
    def seconds(self) -> float:
        """Age of the request."""
        return time.perf_counter() - self._began

    @property
    def is_running(self) -> bool:
        """Whether one of its rows has left the queue."""
        return any(job.is_begun for job in self._jobs)

    def add_model(self, name: str, prompt: Prompt | None = None) -> None:
        """Note a model that the request names, which need not exist."""
        self.usage.setdefault(name, [])
        if prompt is not None:
            self._names[id(prompt)] = name

    def add_job(self, job: Job) -> None:
        """Note rows that are in the queue."""
        self._jobs.append(job)
        self.rows += sum(not isinstance(row, CallRow) for row in job.rows)

    def note_first_token(self) -> None:
        """Note the time of the first piece of an answer."""
        if self.first_token_seconds is None:
            self.first_token_seconds = self.seconds

    def add_outcome(self, row: Row, outcome: Outcome) -> None:
        """Note an answered row."""
        if isinstance(row, CallRow):
            return
        self.note_first_token()
        if self.queue_seconds is None:
            self.queue_seconds = outcome.waited
        name = self._names.get(id(row.prompt)) if isinstance(row, PromptRow) else None
        if self.usage:
            self.usage[name or next(iter(self.usage))].append(outcome.usage)


def stats_of(request: HTTPConnection) -> RequestStats:
    """Return the measurements of a request."""
    stats = request.scope["state"]["stats"]
    assert isinstance(stats, RequestStats)
    return stats


class Metrics:
    """Counts requests, and writes the access log.

    Args:
        registry: The prompts and the base model, whose names are used as labels.
        status: Returns the engine's numbers; see :data:`ENGINE_GAUGES`.
        log: Access log; see :func:`access_log`. None for no log.
    """

    def __init__(self, registry: Registry, *, status: Callable[[], object], log: logging.Logger | None = None) -> None:
        self._registry = registry
        self._status = status
        self._log = log
        self._live: set[RequestStats] = set()
        self._labels: set[str] = set()
        self._metrics = CollectorRegistry()
        self._metrics.register(self)
        ProcessCollector(registry=self._metrics)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"ptuning_{name}", text, labels, registry=self._metrics)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"ptuning_{name}_seconds", text, buckets=BUCKETS, registry=self._metrics)

        self._requests = counter("requests", "Requests that ended", "route", "status")
        self._refusals = counter("refusals", "Requests that ended with an error", "reason")
        self._by_model = counter("model_requests", "Requests by model", "model")
        self._rows_by_model = counter("model_rows", "Answered rows by model", "model")
        self._read_by_model = counter("model_prompt_tokens", "Input tokens by model", "model")
        self._written_by_model = counter("model_generation_tokens", "Generated tokens by model", "model")
        self._queue_time = histogram("request_queue_time", "Time until a request's first row left the queue")
        self._first_token_time = histogram("time_to_first_token", "Time until the first token or answer")
        self._latency = histogram("e2e_request_latency", "Time until a request's answer was complete")

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Return all metrics in the format that an ``Accept`` header asks for, and their content type."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self._metrics), content_type

    def collect(self) -> Iterable[Metric]:
        """Yield metrics that are looked up (called by the Prometheus client)."""
        info = GaugeMetricFamily("ptuning_build_info", "Version and base model", labels=("version", "model"))
        info.add_metric((VERSION, self._registry.base_name), 1)
        yield info
        status, running = self._status(), [stats.is_running for stats in [*self._live] if stats.rows]
        gauges: dict[str, tuple[str, float]] = {
            "num_requests_running": ("Requests that are being answered", sum(running)),
            "num_requests_waiting": ("Requests in the queue", len(running) - sum(running)),
            "prompts_loaded": ("Prompts in service", len(self._registry.served)),
            "prompts_failed": ("Prompts that could not be loaded", len(self._registry.failures)),
        } | {name: (text, getattr(status, field, 0)) for name, (text, field) in ENGINE_GAUGES.items()}
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"ptuning_{name}", text, value=value)
        for name, (text, field) in ENGINE_COUNTERS.items():
            yield CounterMetricFamily(f"ptuning_{name}", text, value=getattr(status, field, 0))

    def begin(self, request_id: str, method: str) -> RequestStats:
        """Begin to measure a request."""
        stats = RequestStats(request_id, method)
        self._live.add(stats)
        return stats

    def end(self, stats: RequestStats, *, route: str) -> None:
        """Count a request that has ended, and log it. ``route`` is the path of its route, not its address, which may
        hold anything.
        """
        self._live.discard(stats)
        seconds, status = stats.seconds, stats.status or CLIENT_GONE
        self._requests.labels(route, str(status)).inc()
        if status >= 400 or stats.error is not None:
            self._refusals.labels(stats.error or str(status)).inc()
        usage: dict[str, list[Usage]] = {}
        for name, rows in stats.usage.items():
            is_known = name == self._registry.base_name or name in self._registry.served
            usage.setdefault(name if is_known else UNKNOWN, []).extend(rows)
        for name, rows in usage.items() if stats.rows or status >= 400 else ():
            label = name if name in self._labels or len(self._labels) < MAX_NAMES else OTHER
            self._labels.add(label)
            self._by_model.labels(label).inc()
            self._rows_by_model.labels(label).inc(len(rows))
            self._read_by_model.labels(label).inc(sum(row.prompt_tokens for row in rows))
            self._written_by_model.labels(label).inc(sum(row.completion_tokens for row in rows))
        for histogram, value in (
            (self._latency, seconds if stats.rows else None),
            (self._queue_time, stats.queue_seconds),
            (self._first_token_time, stats.first_token_seconds),
        ):
            if value is not None:
                histogram.observe(value)
        if self._log is None:
            return

        def milliseconds(value: float | None) -> float | None:
            return None if value is None else round(1000 * value, 1)

        answered = [row for rows in usage.values() for row in rows]
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "request_id": stats.id,
            "method": stats.method,
            "route": route,
            "status": status,
            "error": stats.error,
            "models": list(usage)[:LOGGED_NAMES],
            "rows": stats.rows,
            "prompt_tokens": sum(row.prompt_tokens for row in answered),
            "completion_tokens": sum(row.completion_tokens for row in answered),
            "cached_tokens": sum(row.cached_tokens for row in answered),
            "queue_ms": milliseconds(stats.queue_seconds),
            "first_token_ms": milliseconds(stats.first_token_seconds),
            "total_ms": milliseconds(seconds),
        }
        self._log.info("%s", json.dumps(line))  # in ASCII


def access_log(file: Path | None) -> logging.Logger:
    """Return the logger of the access log, to a file that may be rotated, or to the error stream. Lines that cannot be
    written later, as on a full disk, are lost, and no request fails.

    Raises:
        FileError: If the file cannot be opened.
    """
    try:
        handler = _StreamHandler() if file is None else _FileHandler(file, encoding="utf-8")
    except OSError as error:
        raise file_error("write", Path(file or "-"), error) from error
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.Logger("ptuning.access", logging.INFO)
    logger.addHandler(handler)
    return logger


class _Lossy(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or lose it."""
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Lose a line."""


class _StreamHandler(_Lossy, logging.StreamHandler):  # type: ignore[type-arg]
    """Lines to the error stream."""


class _FileHandler(_Lossy, logging.handlers.WatchedFileHandler):
    """Lines to a file, which is opened again after a rotation."""
