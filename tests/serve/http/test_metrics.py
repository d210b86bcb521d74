"""Metrics and the access log: what operators count on is there, and neither keys nor texts are."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from ptuning.errors import FileError
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.serve.engine.engine import EngineStatus
from ptuning.serve.engine.job import Job, Listener, Outcome, QueueFullError, Usage
from ptuning.serve.http import metrics as metrics_module
from ptuning.serve.http.app import create_app
from ptuning.serve.http.metrics import OTHER, UNKNOWN, Metrics, RequestStats, access_log
from ptuning.serve.http.service import Settings
from ptuning.serve.registry import Registry
from tests.serve.test_registry import save

STATUS = EngineStatus(
    rows_waiting=3, rows_writing=2, rows_done=10, rows_failed=2, rows_cancelled=1, passes=5, tokens_read=100,
    tokens_written=20, cached_tokens=40, kept_texts=1, kept_bytes=4096,
)  # fmt: skip
USAGE = Usage(prompt_tokens=10, completion_tokens=2, cached_tokens=4)


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
def watch(registry: Registry, log_file: Path) -> Iterator[Metrics]:
    log = access_log(log_file)
    yield Metrics(registry, status=lambda: STATUS, log=log)
    for handler in log.handlers:
        handler.close()


def answers(job: Job) -> None:
    """An engine that answers at once, half a second late."""
    job.is_begun = True
    for number in range(len(job.rows)):
        job.listener.ended(number, Outcome(Prediction("x", (Candidate("x", -1.0),)), USAGE, waited=0.5))


def is_full(job: Job) -> None:
    raise QueueFullError("256 rows wait already", retry_after=2.0)


def breaks(job: Job) -> None:
    raise RuntimeError("secret text")


def client_of(watch: Metrics, submit: Callable[[Job], None] = answers) -> TestClient:
    """A client of a service that is watched."""
    backbone = SimpleNamespace(fingerprint="f", kind="causal")
    engine: Any = SimpleNamespace(
        queue_rows=64,
        is_alive=True,
        submit=submit,
        check_room=lambda: None,
        model=SimpleNamespace(backbone=backbone),
    )
    names: Any = watch._registry
    return TestClient(create_app(engine, names, Settings(open_metrics=True), metrics=watch))


def ask(client: TestClient, *names: str, rows: int = 1, **headers: str) -> Any:
    body = {"model": list(names), "records": [{"text": "s3cret"}] * rows}
    return client.post(
        "/v1/predict", json=body, headers={name.replace("_", "-"): text for name, text in headers.items()}
    )


def numbers(watch: Metrics, accept: str = "") -> dict[str, float]:
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


def test_requests_are_counted_by_what_operators_ask_for(watch: Metrics) -> None:
    assert ask(client_of(watch), "a", "b", rows=3).status_code == 200
    assert ask(client_of(watch, is_full), "a").status_code == 429
    assert ask(client_of(watch, breaks), "a").status_code == 500
    found = numbers(watch)
    assert found["ptuning_requests_total{route=/v1/predict,status=200}"] == 1
    assert found["ptuning_requests_total{route=/v1/predict,status=429}"] == 1
    assert found["ptuning_requests_total{route=/v1/predict,status=500}"] == 1
    assert found["ptuning_refusals_total{reason=rate_limit_exceeded}"] == 1
    assert found["ptuning_refusals_total{reason=internal_error}"] == 1
    assert found["ptuning_model_requests_total{model=a}"] == 3
    assert found["ptuning_model_rows_total{model=a}"] == found["ptuning_model_rows_total{model=b}"] == 3
    assert found["ptuning_model_prompt_tokens_total{model=b}"] == 30
    assert found["ptuning_model_generation_tokens_total{model=b}"] == 6
    assert found["ptuning_request_queue_time_seconds_sum"] == 0.5
    assert found["ptuning_time_to_first_token_seconds_count"] == 1
    assert found["ptuning_e2e_request_latency_seconds_count"] == 1


def test_what_is_no_good_request_is_counted_by_its_code(watch: Metrics) -> None:
    client = client_of(watch)
    client.post("/v1/predict", content="{", headers={"content-type": "application/json"})
    client.post("/v1/predict", json={"model": "a"})
    client.get("/nowhere")
    found = numbers(watch)
    reasons = {"invalid_json", "missing_field", "not_found"}
    assert {
        name.removeprefix("ptuning_refusals_total{reason=")[:-1] for name in found if "refusals_total" in name
    } == reasons


def test_the_engine_and_the_registry_are_shown_as_they_are(watch: Metrics, registry: Registry, tmp_path: Path) -> None:
    found = numbers(watch)
    assert {name: found[f"ptuning_{name}"] for name in (
        "num_rows_waiting", "num_rows_running", "kept_bytes", "kept_texts", "rows_total", "passes_total",
        "prompt_tokens_total", "generation_tokens_total", "cached_tokens_total", "rows_cancelled_total",
        "rows_failed_total", "prompts_loaded", "prompts_failed",
    )} == {
        "num_rows_waiting": 3, "num_rows_running": 2, "kept_bytes": 4096, "kept_texts": 1, "rows_total": 10,
        "passes_total": 5, "prompt_tokens_total": 140, "generation_tokens_total": 20, "cached_tokens_total": 40,
        "rows_cancelled_total": 1, "rows_failed_total": 2, "prompts_loaded": 2, "prompts_failed": 0,
    }  # fmt: skip
    assert any(name.startswith("ptuning_build_info{model=base") for name in found)
    registry.unload("a")
    (tmp_path / "prompts" / "bad").mkdir()
    (tmp_path / "prompts" / "bad" / "prompt.json").touch()
    registry.reload()
    found = numbers(watch)
    assert (found["ptuning_prompts_loaded"], found["ptuning_prompts_failed"]) == (2, 1)


def test_requests_that_wait_and_run_are_told_apart(watch: Metrics) -> None:
    first, second, third = (watch.begin("", "POST") for _ in range(3))
    jobs = [Job([SimpleNamespace()], Listener(1)) for _ in range(2)]  # type: ignore[list-item]
    first.add_job(jobs[0])
    second.add_job(jobs[1])
    jobs[0].is_begun = True
    found = numbers(watch)
    assert (found["ptuning_num_requests_running"], found["ptuning_num_requests_waiting"]) == (1, 1)
    for one in (first, second, third):
        watch.end(one, route="/v1/predict")
    found = numbers(watch)
    assert (found["ptuning_num_requests_running"], found["ptuning_num_requests_waiting"]) == (0, 0)
    assert found["ptuning_requests_total{route=/v1/predict,status=499}"] == 3


def test_names_that_nobody_serves_are_one_name(watch: Metrics, log_file: Path) -> None:
    """Abuse case 19: what a client makes up becomes neither a label nor a line."""
    client = client_of(watch)
    for number in range(20):
        assert ask(client, f"made-up-{number}").status_code == 404
        client.get(f"/v1/models/made-up-{number}")
        client.get(f"/made-up-{number}", headers={"x-request-id": f"made-up {number}"})
        client.request(f"MADEUP{number}", "/v1/predict")
    found = numbers(watch)
    assert found[f"ptuning_model_requests_total{{model={UNKNOWN}}}"] == 40
    assert found["ptuning_requests_total{route=/v1/models/{name:path},status=404}"] == 20
    assert found[f"ptuning_requests_total{{route={UNKNOWN},status=404}}"] == 20
    assert not [name for name in found if "made" in name.lower()]
    assert "made" not in log_file.read_text(encoding="ascii").lower()
    assert lines(log_file)[0]["models"] == [UNKNOWN]


def test_many_names_in_turn_do_not_grow_the_metrics(
    watch: Metrics, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service whose prompts come and go for a year stays as it is."""
    monkeypatch.setattr(metrics_module, "MAX_NAMES", 2)
    for name in ("x", "y", "z", "u"):
        registry.load(name, "a")
        seen = watch.begin("", "POST")
        seen.add_model(name)
        seen.status = 400
        watch.end(seen, route="/v1/predict")
    found = [name for name in numbers(watch) if name.startswith("ptuning_model_requests_total")]
    assert found == [f"ptuning_model_requests_total{{model={name}}}" for name in ("x", "y", OTHER)]


def test_a_request_is_a_line(watch: Metrics, log_file: Path) -> None:
    answer = ask(client_of(watch), "a", rows=2, x_request_id="mine-1")
    assert answer.headers["x-request-id"] == "mine-1"
    (line,) = lines(log_file)
    assert {name: value for name, value in line.items() if name not in ("time", "total_ms", "first_token_ms")} == {
        "request_id": "mine-1", "method": "POST", "route": "/v1/predict", "status": 200, "error": None, "models": ["a"],
        "rows": 2, "prompt_tokens": 20, "completion_tokens": 4, "cached_tokens": 8, "queue_ms": 500.0,
    }  # fmt: skip
    assert line["total_ms"] >= line["first_token_ms"] >= 0
    assert line["time"].endswith("+00:00")


def test_a_line_holds_neither_keys_nor_texts(watch: Metrics, log_file: Path) -> None:
    """Abuse case 16: of the address only the route is logged, of a request only numbers; a failure is no exception."""
    secret = {"authorization": "Bearer s3cret", "x-request-id": "s3cret\n{}", "user-agent": "s3cret"}
    for submit in (answers, breaks, is_full):
        client = client_of(watch, submit)
        client.post("/v1/predict?key=s3cret", json={"model": "a", "records": [{"text": "s3cret"}]}, headers=secret)
    client.get("/v1/models/s3cret?key=s3cret", headers=secret)
    client.get("/s3cret", headers=secret)
    text = log_file.read_text(encoding="ascii")
    assert [line["status"] for line in lines(log_file)] == [200, 500, 429, 404, 404]
    assert "s3cret" not in text
    assert "secret text" not in text


@pytest.mark.parametrize("given", ["", "a b", 'x"y', "x" * 65, "{}", "\x7f", "é", "a\\nb"])
def test_an_id_that_could_be_anything_is_replaced(given: str, watch: Metrics, log_file: Path) -> None:
    """Abuse case 18: log injection by a header."""
    client = client_of(watch)
    answer = client.get("/metrics", headers=[(b"x-request-id", given.encode())])
    found = answer.headers["x-request-id"]
    assert found.startswith("req-")
    assert lines(log_file)[0]["request_id"] == found


def test_whatever_is_logged_is_escaped(watch: Metrics, log_file: Path) -> None:
    """Whatever reaches a line: it stays one line, of ASCII."""
    seen = watch.begin("", "POST")
    seen.error = "x\n\r\u2028\x1b[31m\udcff\u202e"
    watch.end(seen, route="/v1/predict\n{}")
    assert len(lines(log_file)) == 1
    assert lines(log_file)[0]["error"] == "x\n\r\u2028\x1b[31m\udcff\u202e"


def test_a_log_that_cannot_be_written_hurts_no_request(
    watch: Metrics, log_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Abuse case 23: a full disk, or a folder that goes, loses lines; one that is not there at first is an error."""
    client = client_of(watch)

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
    other = client_of(Metrics(watch._registry, status=lambda: STATUS, log=log))
    shutil.rmtree(folder)
    assert other.get("/metrics").status_code == 200
    folder.mkdir()
    assert other.get("/metrics").status_code == 200
    assert len(lines(folder / "log")) == 1
    log.handlers[0].close()
    assert capsys.readouterr().err == ""
    with pytest.raises(FileError, match=r"cannot write .*No such file"):
        access_log(folder / "none" / "log")


def test_a_log_may_be_rotated(watch: Metrics, log_file: Path) -> None:
    client = client_of(watch)
    client.get("/metrics")
    log_file.rename(log_file.with_name("old.log"))
    client.get("/metrics")
    assert len(lines(log_file)) == 1


def test_without_a_file_lines_go_to_the_error_stream(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    client = client_of(Metrics(registry, status=lambda: STATUS, log=access_log(None)))
    client.get("/metrics")
    said = capsys.readouterr()
    assert json.loads(said.err)["route"] == "/metrics"
    assert said.out == ""


def test_a_client_that_goes_is_seen(watch: Metrics, log_file: Path) -> None:
    """The request ends without an answer, and is no longer counted as waiting."""
    seen = watch.begin("", "POST")
    seen.add_job(Job([SimpleNamespace()], Listener(1)))  # type: ignore[list-item]
    watch.end(seen, route="/v1/predict")
    assert lines(log_file)[0]["status"] == 499
    assert numbers(watch)["ptuning_num_requests_waiting"] == 0
    assert isinstance(seen, RequestStats)
