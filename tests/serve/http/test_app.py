"""The application: what is open, errors in one shape, and one name for what is not known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.serve.http.conftest import BASE, Asked


def test_what_is_open_says_whether_the_service_lives_and_takes_requests(asked: Asked) -> None:
    assert [asked.client.get(path).status_code for path in ("/health", "/ready", "/version")] == [200, 200, 200]
    asked.service.phase = "draining"
    assert asked.client.get("/health").status_code == asked.client.head("/health").status_code == 200
    assert asked.client.head("/ready").status_code == 503
    refused = asked.client.get("/ready")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_serving")
    refused = asked.post("/v1/predict", model="mood", records=["a"])
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")


def test_a_dead_engine_is_not_healthy(stubbed: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stubbed(lambda job: None)
    monkeypatch.setattr(asked.service.engine, "is_alive", False)
    assert asked.client.get("/health").status_code == asked.client.get("/ready").status_code == 503


def test_models_are_the_base_and_the_prompts_and_tell_no_path(asked: Asked) -> None:
    listed = asked.client.get("/v1/models")
    assert [one["id"] for one in listed.json()["data"]] == [BASE, *sorted(asked.prompts)]
    assert "secret" not in listed.text
    mood = asked.client.get("/v1/models/mood").json()
    assert (mood["parent"], mood["root"], mood["labels"]) == (BASE, "mood", ["positive", "negative"])
    assert asked.client.get(f"/v1/models/{BASE}").json()["parent"] is None


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "param"),
    [
        ("GET", "/v1/models/nope", None, 404, "model_not_found", "model"),
        ("GET", "/nope", None, 404, "not_found", None),
        ("GET", "/v1/completions", None, 405, "method_not_allowed", None),
        ("POST", "/v1/completions", "{", 400, "invalid_json", None),
        ("POST", "/v1/completions", '{"prompt": "a"}', 400, "missing_field", "model"),
        ("POST", "/v1/completions", '{"model": 3, "prompt": "a"}', 400, "invalid_value", "model"),
        ("POST", "/v1/completions", '{"model": "nope", "prompt": "a"}', 404, "model_not_found", "model"),
        ("POST", "/v1/completions", '{"model": "write", "prompt": "a", "wat": 1}', 400, "unknown_field", "wat"),
        ("POST", "/v1/predict", '{"model": "mood", "records": ["a"], "wat": 1}', 400, "unknown_field", "wat"),
        ("POST", "/v1/completions", '{"model": "write", "prompt": "a", "n": "2"}', 400, "invalid_value", "n"),
        ("POST", "/v1/completions", '{"model": "write", "prompt": "\\ud800"}', 400, "invalid_value", "prompt"),
        ("POST", "/v1/completions", '{"model": "write", "prompt": "a", "temperature": NaN}', 400, "invalid_value",
         "temperature"),
        ("POST", "/v1/completions", '{"model": "mood", "prompt": "a", "n": ' + "9" * 5000 + "}", 400, "invalid_request",
         None),
        ("POST", "/v1/completions", '{"model": "kept", "prompt": "' + "a " * 99 + '"}', 400, "context_length_exceeded",
         "prompt"),
        ("POST", "/v1/completions", '{"model": "tiny", "prompt": "' + "a " * 99 + '"}', 400, "context_length_exceeded",
         "prompt"),
    ],
)  # fmt: skip
def test_errors_have_one_shape_and_name_the_field(
    asked: Asked, method: str, path: str, body: str | None, status: int, code: str, param: str | None
) -> None:
    found = asked.client.request(method, path, content=body, headers={"content-type": "application/json"})
    assert found.status_code == status
    error = found.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_every_request_is_told_to_the_watch(asked: Asked) -> None:
    asked.client.get("/nowhere")
    asked.post("/v1/predict", model="nope", records=["a"])
    asked.post("/v1/predict", model="mood", records=["a"])
    assert asked.watch.requests == [
        ("(unknown)", [], 404),
        ("/v1/predict", ["nope"], 404),
        ("/v1/predict", ["mood"], 200),
    ]
