"""Metrics and the access log: what operators count on is there, and neither keys nor texts are."""

import errno
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ptuning.errors import FileError
from ptuning.prompt.prompt import Prompt
from ptuning.serve.engine.job import Job, Listener, QueueFullError
from ptuning.serve.http import metrics as metrics_module
from ptuning.serve.http.metrics import OTHER, UNKNOWN, Metrics, access_log
from ptuning.serve.http.service import Settings
from tests.serve.conftest import BASE, Api, FakeEngine, api_of, fails_with

FULL = fails_with(QueueFullError("256 rows wait already", retry_after=2.0))
BROKEN = fails_with(RuntimeError("secret text"))


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    return tmp_path / "access.log"


def api_with(log: logging.Logger) -> Api:
    """A service with prompts a and b, whose engine answers at once, with 10 tokens read and 2 generated."""
    engine = FakeEngine(SimpleNamespace(backbone=SimpleNamespace(fingerprint="f", kind="causal")))
    engine.on_job = engine.answer
    prompts = {name: Prompt.manual("{text} [Y]") for name in ("a", "b")}
    return api_of(engine, prompts, Settings(open_metrics=True), log=log)


@pytest.fixture
def api(log_file: Path) -> Iterator[Api]:
    log = access_log(log_file)
    yield api_with(log)
    log.handlers[0].close()


@pytest.fixture
def metrics(api: Api) -> Metrics:
    return api.service.metrics


def ask(api: Api, *names: str, rows: int = 1, path: str = "/v1/predict", headers: dict[str, str] | None = None) -> Any:
    body = {"model": list(names), "records": [{"text": "s3cret"}] * rows}
    return api.client.post(path, json=body, headers=headers)


def numbers(metrics: Metrics) -> dict[str, float]:
    """All samples of the exposition without their prefix: name and labels -> value."""
    values = {}
    for family in text_string_to_metric_families(metrics.exposition()[0].decode()):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            name = sample.name.removeprefix("ptuning_")
            values[f"{name}{{{labels}}}" if labels else name] = sample.value
    return values


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="ascii").split("\n") if line]


def test_requests_are_counted_by_route_status_reason_and_model(api: Api, metrics: Metrics) -> None:
    assert ask(api, "a", "b", rows=3).status_code == 200
    for on_job, status in ((FULL, 429), (BROKEN, 500)):
        api.engine.on_job = on_job
        assert ask(api, "a").status_code == status
    api.client.post("/v1/predict", content="{", headers={"content-type": "application/json"})
    api.client.get("/nowhere")
    values = numbers(metrics)
    assert {name: value for name, value in values.items() if name.startswith(("requests_total", "refusals_total"))} == {
        "requests_total{route=/v1/predict,status=200}": 1,
        "requests_total{route=/v1/predict,status=400}": 1,
        "requests_total{route=/v1/predict,status=429}": 1,
        "requests_total{route=/v1/predict,status=500}": 1,
        f"requests_total{{route={UNKNOWN},status=404}}": 1,
        "refusals_total{reason=rate_limit_exceeded}": 1,
        "refusals_total{reason=internal_error}": 1,
        "refusals_total{reason=invalid_json}": 1,
        "refusals_total{reason=not_found}": 1,
    }
    assert values["model_requests_total{model=a}"] == 3
    assert values["model_rows_total{model=a}"] == values["model_rows_total{model=b}"] == 3
    assert values["model_prompt_tokens_total{model=b}"] == 30
    assert values["model_generation_tokens_total{model=b}"] == 6
    assert values["request_queue_time_seconds_sum"] == 0.5
    assert values["time_to_first_token_seconds_count"] == values["e2e_request_latency_seconds_count"] - 2 == 1


def test_the_engine_and_the_registry_are_shown_as_they_are(api: Api, metrics: Metrics) -> None:
    api.service.registry.unload("a")
    expected = {
        "num_rows_waiting": 3, "num_rows_running": 2, "kept_bytes": 4096, "kept_texts": 1, "rows_total": 10,
        "passes_total": 5, "prompt_tokens_total": 140, "generation_tokens_total": 20, "cached_tokens_total": 40,
        "rows_cancelled_total": 1, "rows_failed_total": 2, "prompts_loaded": 1, "prompts_failed": 0,
    }  # fmt: skip
    values = numbers(metrics)
    assert {name: values[name] for name in expected} == expected
    assert any(name.startswith(f"build_info{{model={BASE}") for name in values)


def test_waiting_and_running_requests_and_clients_that_go_away(metrics: Metrics, log_file: Path) -> None:
    requests = [metrics.begin("", "POST") for _ in range(3)]
    jobs = [Job([SimpleNamespace()], Listener(1)) for _ in range(2)]  # type: ignore[list-item]
    for stats, job in zip(requests, jobs, strict=False):
        stats.add_job(job)
    jobs[0].is_begun = True
    values = numbers(metrics)
    assert (values["num_requests_running"], values["num_requests_waiting"]) == (1, 1)
    for stats in requests:
        metrics.end(stats, route="/v1/predict")
    values = numbers(metrics)
    assert (values["num_requests_running"], values["num_requests_waiting"]) == (0, 0)
    assert values["requests_total{route=/v1/predict,status=499}"] == 3
    assert [line["status"] for line in lines(log_file)] == [499] * 3


def test_invented_names_become_neither_labels_nor_lines(api: Api, metrics: Metrics, log_file: Path) -> None:
    """Abuse case 19."""
    client = api.client
    for number in range(20):
        assert ask(api, f"made-up-{number}").status_code == 404
        client.get(f"/v1/models/made-up-{number}")
        client.get(f"/made-up-{number}", headers={"x-request-id": f"made-up {number}"})
        client.request(f"MADEUP{number}", "/v1/predict")
    values = numbers(metrics)
    assert values[f"model_requests_total{{model={UNKNOWN}}}"] == 40
    assert values["requests_total{route=/v1/models/{name:path},status=404}"] == 20
    assert not [name for name in values if "made" in name.lower()]
    assert "made" not in log_file.read_text(encoding="ascii").lower()
    assert lines(log_file)[0]["models"] == [UNKNOWN]


def test_prompts_that_come_and_go_do_not_grow_the_metrics(
    api: Api, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = api.service.registry
    monkeypatch.setattr(metrics_module, "MAX_NAMES", 2)
    for name in ("x", "y", "z", "u"):
        registry._publish(name, registry.get("a"))
        stats = metrics.begin("", "POST")
        stats.add_model(name)
        stats.status = 400
        metrics.end(stats, route="/v1/predict")
    names = [name for name in numbers(metrics) if name.startswith("model_requests_total")]
    assert names == [f"model_requests_total{{model={name}}}" for name in ("x", "y", OTHER)]


def test_a_request_is_a_line(api: Api, log_file: Path) -> None:
    ask(api, "a", rows=2, headers={"x-request-id": "mine-1"})
    (line,) = lines(log_file)
    assert line["total_ms"] >= line["first_token_ms"] >= 0
    assert line["time"].endswith("+00:00")
    assert {name: value for name, value in line.items() if name not in ("time", "total_ms", "first_token_ms")} == {
        "request_id": "mine-1", "method": "POST", "route": "/v1/predict", "status": 200, "error": None, "models": ["a"],
        "rows": 2, "prompt_tokens": 20, "completion_tokens": 4, "cached_tokens": 8, "queue_ms": 500.0,
    }  # fmt: skip


def test_a_line_holds_neither_keys_nor_texts(api: Api, metrics: Metrics, log_file: Path) -> None:
    """Abuse cases 16 and 18: of the address only the route is logged, of a request only numbers, all in one line."""
    secret = {"authorization": "Bearer s3cret", "x-request-id": "s3cret\n{}", "user-agent": "s3cret"}
    for on_job in (api.engine.answer, BROKEN, FULL):
        api.engine.on_job = on_job
        ask(api, "a", path="/v1/predict?key=s3cret", headers=secret)
    for path in ("/v1/models/s3cret?key=s3cret", "/s3cret"):
        api.client.get(path, headers=secret)
    text = log_file.read_text(encoding="ascii")
    assert [line["status"] for line in lines(log_file)] == [200, 500, 429, 404, 404]
    assert "s3cret" not in text
    assert "secret text" not in text
    stats = metrics.begin("", "POST")
    stats.error = "x\n\r\u2028\x1b[31m\udcff\u202e"
    metrics.end(stats, route="/v1/predict\n{}")
    assert [line["error"] for line in lines(log_file)[5:]] == [stats.error]


def test_a_log_that_cannot_be_written_fails_no_request(
    api: Api, log_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Abuse case 23: a full disk, or a folder that goes, loses lines; one that is missing at the start is an error."""
    client = api.client

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(logging.StreamHandler, "flush", full)
        assert client.get("/metrics").status_code == 200
    client.get("/metrics")
    assert lines(log_file)[-1]["route"] == "/metrics"
    folder = log_file.parent / "logs"
    folder.mkdir()
    log = access_log(folder / "log")
    other = api_with(log).client
    shutil.rmtree(folder)
    assert other.get("/metrics").status_code == 200
    folder.mkdir()
    assert other.get("/metrics").status_code == 200
    (folder / "log").rename(folder / "old.log")  # as a rotation does
    assert other.get("/metrics").status_code == 200
    assert [len(lines(folder / name)) for name in ("old.log", "log")] == [1, 1]
    log.handlers[0].close()
    assert capsys.readouterr().err == ""
    with pytest.raises(FileError, match="none"):
        access_log(folder / "none" / "log")


def test_without_a_file_lines_go_to_the_error_stream(capsys: pytest.CaptureFixture[str]) -> None:
    api_with(access_log(None)).client.get("/metrics")
    captured = capsys.readouterr()
    assert json.loads(captured.err)["route"] == "/metrics"
    assert captured.out == ""
