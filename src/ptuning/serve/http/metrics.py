"""Metrics for Prometheus, and an access log with one JSON line per request.

Neither holds keys, texts or answers; names that are not in service are counted under one label.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
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

    from ptuning.serve.engine.engine import Engine
    from ptuning.serve.registry import Registry

UNKNOWN, OTHER = "(unknown)", "(other)"
MAX_NAMES = 5000  # prompt names in the metrics over the life of a service; later ones are counted as OTHER
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")
CLIENT_GONE = 499  # the status that nginx logs for a client that disconnected
LOGGED_NAMES = 10  # per request
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

# Metric -> description, field of the engine's status, and kind.
ENGINE_METRICS: dict[str, tuple[str, str, type[GaugeMetricFamily | CounterMetricFamily]]] = {
    "num_rows_waiting": ("Rows in the queue", "rows_waiting", GaugeMetricFamily),
    "num_rows_running": ("Rows that are being decoded", "rows_writing", GaugeMetricFamily),
    "kept_bytes": ("Memory of the prefix cache", "kept_bytes", GaugeMetricFamily),
    "kept_texts": ("Prefixes in the cache", "kept_texts", GaugeMetricFamily),
    "rows": ("Rows that were answered", "rows_done", CounterMetricFamily),
    "passes": ("Forward passes of the model", "passes", CounterMetricFamily),
    "prompt_tokens": ("Input tokens, slots included", "prompt_tokens", CounterMetricFamily),
    "generation_tokens": ("Generated tokens", "tokens_written", CounterMetricFamily),
    "cached_tokens": ("Input tokens taken from the prefix cache", "cached_tokens", CounterMetricFamily),
    "rows_cancelled": ("Rows whose client disconnected", "rows_cancelled", CounterMetricFamily),
    "rows_failed": ("Rows that failed", "rows_failed", CounterMetricFamily),
}


@dataclass(eq=False)
class RequestStats:
    """Measurements of one request: its route sets the models and rows, the engine's thread the outcomes."""

    id: str
    method: str
    status: int = 0
    error: str | None = None  # its code
    usage: dict[str, list[Usage]] = field(default_factory=dict)  # of answered rows, by model name
    jobs: list[Job] = field(default_factory=list)
    rows: int = 0
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    began: float = field(default_factory=time.perf_counter)
    _names: dict[int, str] = field(default_factory=dict)

    def add_model(self, name: str, prompt: Prompt | None = None) -> None:
        """Note a model that the request names, which need not exist."""
        self.usage.setdefault(name, [])
        if prompt is not None:
            self._names[id(prompt)] = name

    def add_job(self, job: Job) -> None:
        """Note rows that are in the queue."""
        self.jobs.append(job)
        self.rows += sum(not isinstance(row, CallRow) for row in job.rows)

    def note_first_token(self) -> None:
        """Note the time of the first piece of an answer."""
        if self.first_token_seconds is None:
            self.first_token_seconds = time.perf_counter() - self.began

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
        engine: Its status is shown.
        log: Access log; see :func:`access_log`. None for no log.
    """

    def __init__(self, registry: Registry, engine: Engine, log: logging.Logger | None = None) -> None:
        self._registry, self._engine, self._log = registry, engine, log
        self._live: set[RequestStats] = set()
        self._names: set[str] = set()
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
        running = [any(job.is_begun for job in stats.jobs) for stats in [*self._live] if stats.rows]
        for name, text, value in (
            ("num_requests_running", "Requests that are being answered", sum(running)),
            ("num_requests_waiting", "Requests in the queue", len(running) - sum(running)),
            ("prompts_loaded", "Prompts in service", len(self._registry.served)),
            ("prompts_failed", "Prompts that could not be loaded", len(self._registry.failures)),
        ):
            yield GaugeMetricFamily(f"ptuning_{name}", text, value=value)
        status = self._engine.status
        for name, (text, attribute, kind) in ENGINE_METRICS.items():
            yield kind(f"ptuning_{name}", text, value=getattr(status, attribute))

    def begin(self, request_id: str, method: str) -> RequestStats:
        """Begin to measure a request."""
        stats = RequestStats(request_id, method if method in METHODS else OTHER)
        self._live.add(stats)
        return stats

    def end(self, stats: RequestStats, *, route: str) -> None:
        """Count a request that has ended, and log it. ``route`` is the path of its route, not its address, which may
        hold anything.
        """
        self._live.discard(stats)
        seconds, status = time.perf_counter() - stats.began, stats.status or CLIENT_GONE
        self._requests.labels(route, str(status)).inc()
        if status >= 400 or stats.error is not None:
            self._refusals.labels(stats.error or str(status)).inc()
        usage: dict[str, list[Usage]] = {}
        for name, rows in stats.usage.items():
            is_known = name == self._registry.base_name or name in self._registry.served
            usage.setdefault(name if is_known else UNKNOWN, []).extend(rows)
        for name, rows in usage.items() if stats.rows or status >= 400 else ():
            label = name if name in self._names or len(self._names) < MAX_NAMES else OTHER
            self._names.add(label)
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
        handler = logging.StreamHandler() if file is None else _LossyHandler(file, encoding="utf-8")
    except OSError as error:
        raise file_error("write", Path(file or "-"), error) from error
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.Logger("ptuning.access", logging.INFO)
    logger.addHandler(handler)
    return logger


class _LossyHandler(logging.handlers.WatchedFileHandler):
    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or lose it."""
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Lose a line."""
