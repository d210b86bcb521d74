"""Metrics and the access log: what operators count on is there, and neither keys nor texts are."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from ptuning.serve.engine.job import Usage
from ptuning.serve.http import watch as watching
from ptuning.serve.http.watch import OTHER, UNKNOWN, Watch, Watched, access_log, metrics_route, seen_of
from ptuning.serve.registry import Registry
from tests.serve.test_registry import save


@dataclass
class Status:
    """As much of an engine's as is shown."""

    rows_waiting: int = 3
    rows_writing: int = 2
    rows_done: int = 10
    passes: int = 5
    tokens_read: int = 100
    tokens_written: int = 20
    cached_tokens: int = 40
    kept_bytes: int = 4096
    kept_texts: int = 1
    cancelled: int = 1
    failed: int = 2


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    save(tmp_path / "prompts" / "a")
    save(tmp_path / "prompts" / "b")
    made = Registry(tmp_path / "prompts", base_name="base", check=id)
    made.reload()
    return made


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    return tmp_path / "access.log"


@pytest.fixture
def watch(registry: Registry, log_file: Path) -> Iterator[Watch]:
    log = access_log(log_file)
    yield Watch(registry, base_name="base", status=Status, log=log)
    for handler in log.handlers:
        handler.close()


def app_of(watch: Watch) -> FastAPI:
    """An app whose routes report as those of the service do."""
    app = FastAPI()
    app.include_router(metrics_route(watch))

    @app.post("/v1/predict")
    async def predict(request: Request) -> Any:
        asked = await request.json()
        seen = seen_of(request)
        seen.admitted(asked["models"], asked["rows"])
        if asked.get("refuse"):
            seen.refused("rate_limit_exceeded")
            return JSONResponse({}, 429)
        if asked.get("unknown"):
            seen.refused("model_not_found")
            return JSONResponse({}, 404)
        if asked.get("fail"):
            raise RuntimeError("secret text")
        seen.begun(0.5)
        for name in asked["models"]:
            for _ in range(asked["rows"]):
                seen.answered(name, Usage(prompt_tokens=10, completion_tokens=2, cached_tokens=4))
        return {}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> None:
        raise HTTPException(404)

    return app


def client_of(watch: Watch) -> TestClient:
    return TestClient(Watched(app_of(watch), watch), raise_server_exceptions=False)


def numbers(watch: Watch, accept: str = "") -> dict[str, float]:
    """All samples of the exposition: name and labels -> value."""
    text = watch.exposition(accept)[0].decode()
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="ascii").split("\n") if line]


def test_requests_are_counted_by_what_operators_ask_for(watch: Watch) -> None:
    client = client_of(watch)
    assert client.post("/v1/predict", json={"models": ["a", "b"], "rows": 3}).status_code == 200
    assert client.post("/v1/predict", json={"models": ["a"], "rows": 1, "refuse": True}).status_code == 429
    assert client.post("/v1/predict", json={"models": ["a"], "rows": 1, "fail": True}).status_code == 500
    found = numbers(watch)
    assert found["ptuning_requests_total{route=/v1/predict,status=200}"] == 1
    assert found["ptuning_requests_total{route=/v1/predict,status=429}"] == 1
    assert found["ptuning_requests_total{route=/v1/predict,status=500}"] == 1
    assert found["ptuning_refusals_total{reason=rate_limit_exceeded}"] == 1
    assert found["ptuning_refusals_total{reason=500}"] == 1
    assert found["ptuning_model_requests_total{model=a}"] == 3
    assert found["ptuning_model_rows_total{model=b}"] == 3
    assert found["ptuning_model_prompt_tokens_total{model=a}"] == 30
    assert found["ptuning_model_generation_tokens_total{model=a}"] == 6
    assert found["ptuning_request_queue_time_seconds_sum"] == 0.5
    assert found["ptuning_time_to_first_token_seconds_count"] == 1
    assert found["ptuning_e2e_request_latency_seconds_count"] == 3


def test_the_engine_and_the_registry_are_shown_as_they_are(watch: Watch, registry: Registry, tmp_path: Path) -> None:
    found = numbers(watch)
    assert {name: found[f"ptuning_{name}"] for name in (
        "num_rows_waiting", "num_rows_running", "kept_bytes", "kept_texts", "rows_total", "passes_total",
        "prompt_tokens_total", "generation_tokens_total", "cached_tokens_total", "rows_cancelled_total",
        "rows_failed_total", "prompts_loaded", "prompts_failed",
    )} == {
        "num_rows_waiting": 3, "num_rows_running": 2, "kept_bytes": 4096, "kept_texts": 1, "rows_total": 10,
        "passes_total": 5, "prompt_tokens_total": 100, "generation_tokens_total": 20, "cached_tokens_total": 40,
        "rows_cancelled_total": 1, "rows_failed_total": 2, "prompts_loaded": 2, "prompts_failed": 0,
    }  # fmt: skip
    assert any(name.startswith("ptuning_build_info{model=base") for name in found)
    registry.unload("a")
    (tmp_path / "prompts" / "bad").mkdir()
    (tmp_path / "prompts" / "bad" / "prompt.json").touch()
    registry.reload()
    found = numbers(watch)
    assert (found["ptuning_prompts_loaded"], found["ptuning_prompts_failed"]) == (2, 1)


def test_requests_that_wait_and_run_are_told_apart(watch: Watch) -> None:
    first, second, third = (watch.begin("", "POST") for _ in range(3))
    first.admitted(["a"], 2)
    second.admitted(["a"], 1)
    first.begun()
    found = numbers(watch)
    assert (found["ptuning_num_requests_running"], found["ptuning_num_requests_waiting"]) == (1, 1)
    for one in (first, second, third):
        watch.end(one, route="/v1/predict")
    found = numbers(watch)
    assert (found["ptuning_num_requests_running"], found["ptuning_num_requests_waiting"]) == (0, 0)
    assert found["ptuning_requests_total{route=/v1/predict,status=499}"] == 3


def test_names_that_nobody_serves_are_one_name(watch: Watch, log_file: Path) -> None:
    """Abuse case 19: what a client makes up becomes neither a label nor a line."""
    client = client_of(watch)
    for number in range(50):
        asked = {"models": [f"made-up-{number}", f"other-{number}"], "rows": 1, "unknown": True}
        client.post("/v1/predict", json=asked)
        client.get(f"/v1/models/made-up-{number}")
        client.get(f"/made-up-{number}", headers={"x-request-id": f"made-up {number}"})
        client.request(f"MADEUP{number}", "/v1/predict")
    found = numbers(watch)
    assert found[f"ptuning_model_requests_total{{model={UNKNOWN}}}"] == 50
    assert found["ptuning_requests_total{route=/v1/models/{name:path},status=404}"] == 50
    assert found[f"ptuning_requests_total{{route={UNKNOWN},status=404}}"] == 50
    assert not [name for name in found if "made" in name.lower()]
    assert "made" not in log_file.read_text(encoding="ascii").lower()
    assert lines(log_file)[0]["models"] == [UNKNOWN]


def test_many_names_in_turn_do_not_grow_the_metrics(
    watch: Watch, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service whose prompts come and go for a year stays as it is."""
    monkeypatch.setattr(watching, "MOST_NAMES", 2)
    for name in ("x", "y", "z", "u"):
        registry.load(name, "a")
        seen = watch.begin("", "POST")
        seen.admitted([name], 1)
        watch.end(seen, route="/v1/predict")
    found = [name for name in numbers(watch) if name.startswith("ptuning_model_requests_total")]
    assert found == [f"ptuning_model_requests_total{{model={name}}}" for name in ("x", "y", OTHER)]


def test_the_route_gives_both_forms_of_the_metrics(watch: Watch) -> None:
    client = client_of(watch)
    plain = client.get("/metrics")
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "ptuning_prompts_loaded 2.0" in plain.text
    other = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert other.text.endswith("# EOF\n")


def test_a_guard_guards_the_metrics(watch: Watch) -> None:
    def guard() -> None:
        raise HTTPException(401)

    app = FastAPI()
    app.include_router(metrics_route(watch, guard=guard))
    assert TestClient(app).get("/metrics").status_code == 401


def test_a_request_is_a_line(watch: Watch, log_file: Path) -> None:
    client = client_of(watch)
    answer = client.post("/v1/predict", json={"models": ["a"], "rows": 2}, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    (line,) = lines(log_file)
    assert {name: value for name, value in line.items() if name not in ("time", "total_ms", "first_token_ms")} == {
        "request_id": "mine-1", "method": "POST", "route": "/v1/predict", "status": 200, "error": None, "models": ["a"],
        "rows": 2, "prompt_tokens": 20, "completion_tokens": 4, "cached_tokens": 8, "queue_ms": 500.0,
    }  # fmt: skip
    assert line["total_ms"] >= line["first_token_ms"] >= 0
    assert line["time"].endswith("+00:00")


def test_a_line_holds_neither_keys_nor_texts(watch: Watch, log_file: Path) -> None:
    """Abuse case 16: of the address only the route is logged, of a request only numbers; a failure is no exception."""
    client = client_of(watch)
    secret = {"authorization": "Bearer s3cret", "x-request-id": "s3cret\n{}", "user-agent": "s3cret"}
    asked = {"models": ["a"], "rows": 1, "text": "s3cret"}
    assert client.post("/v1/predict?key=s3cret", json=asked, headers=secret).status_code == 200
    client.post("/v1/predict?key=s3cret", json={**asked, "fail": True}, headers=secret)
    client.get("/v1/models/s3cret?key=s3cret", headers=secret)
    client.get("/s3cret", headers=secret)
    text = log_file.read_text(encoding="ascii")
    assert len(lines(log_file)) == 4
    assert "s3cret" not in text
    assert "secret text" not in text


@pytest.mark.parametrize("given", ["", "a b", 'x"y', "x" * 65, "{}", "\x7f", "é", "a\\nb"])
def test_an_id_that_could_be_anything_is_replaced(given: str, watch: Watch, log_file: Path) -> None:
    """Abuse case 18: log injection by a header."""
    client = client_of(watch)
    answer = client.get("/metrics", headers=[(b"x-request-id", given.encode())])
    found = answer.headers["x-request-id"]
    assert len(found) == 32
    assert lines(log_file)[0]["request_id"] == found


def test_whatever_is_logged_is_escaped(watch: Watch, log_file: Path) -> None:
    """Whatever reaches a line: it stays one line, of ASCII."""
    seen = watch.begin("", "POST")
    seen.refused("x\n\r\u2028\x1b[31m\udcff\u202e")
    watch.end(seen, route="/v1/predict\n{}")
    assert len(lines(log_file)) == 1
    assert lines(log_file)[0]["error"] == "x\n\r\u2028\x1b[31m\udcff\u202e"


def test_a_log_that_cannot_be_written_hurts_no_request(
    watch: Watch,
    log_file: Path,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Abuse case 23: a full disk loses lines, and a folder that is not there, too."""
    client = client_of(watch)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(logging.StreamHandler, "flush", full)
        assert client.get("/metrics").status_code == 200
    nowhere = Watch(registry, base_name="base", status=Status, log=access_log(log_file.parent / "no" / "log"))
    assert client_of(nowhere).get("/metrics").status_code == 200
    assert client.get("/metrics").status_code == 200
    assert lines(log_file)[-1]["route"] == "/metrics"
    assert capsys.readouterr().err == ""


def test_a_log_may_be_rotated(watch: Watch, log_file: Path) -> None:
    client = client_of(watch)
    client.get("/metrics")
    log_file.rename(log_file.with_name("old.log"))
    client.get("/metrics")
    assert len(lines(log_file)) == 1


def test_without_a_file_lines_go_to_the_error_stream(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    client = client_of(Watch(registry, base_name="base", status=Status, log=access_log(None)))
    client.get("/metrics")
    said = capsys.readouterr()
    assert json.loads(said.err)["route"] == "/metrics"
    assert said.out == ""


def test_a_client_that_goes_is_seen(watch: Watch, log_file: Path) -> None:
    """The request ends without an answer, and is no longer counted as waiting."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["seen"].admitted(["a"], 1)
        raise asyncio.CancelledError

    async def nothing(*_: object) -> Any:
        return None

    scope = {"type": "http", "method": "POST", "headers": []}
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(Watched(app, watch)(scope, nothing, nothing))
    assert lines(log_file)[0]["status"] == 499
    assert numbers(watch)["ptuning_num_requests_waiting"] == 0
