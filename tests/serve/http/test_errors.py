"""Requests that are refused: status, code and field of each; nothing of the server's own is in a message."""

import json
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest

from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.serve.engine.job import CancelledError, Job, Outcome, QueueFullError, StoppedError
from ptuning.serve.http.errors import without_paths
from tests.serve.conftest import Api, fails_with

USER = {"role": "user", "content": "Kenya"}
ASSISTANT = {"role": "assistant", "content": "Nairobi"}
IMAGE = {"role": "user", "content": [{"type": "image_url"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "write", "prompt": "a"},
    "/v1/chat/completions": {"model": "write", "messages": [USER]},
    "/v1/predict": {"model": "write", "records": ["a"]},
    "/v1/classify": {"model": "mood", "input": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}
LONG = "a " * 99  # more than the model's 64 tokens
# Route -> (changes of a good body, status, code, field).
REFUSED: dict[str, list[tuple[dict[str, Any], int, str, str]]] = {
    "/v1/completions": [
        ({"model": "nope"}, 404, "model_not_found", "model"),
        ({"model": 3}, 400, "invalid_value", "model"),
        ({"prompt": None}, 400, "invalid_value", "prompt"),
        ({"prompt": "\ud800"}, 400, "invalid_value", "prompt"),
        ({"model": "kept", "prompt": LONG}, 400, "context_length_exceeded", "prompt"),
        ({"model": "kept", "prompt": LONG, "stream": True}, 400, "context_length_exceeded", "prompt"),
        ({"model": "tiny", "prompt": LONG}, 400, "context_length_exceeded", "prompt"),
        ({"model": "tiny", "prompt": ""}, 400, "invalid_record", "prompt"),
        ({"model": "tiny", "prompt": [100_000]}, 400, "invalid_record", "prompt"),
        ({"model": "pair"}, 400, "invalid_value", "prompt"),
        ({"model": "choose"}, 400, "invalid_value", "prompt"),
        ({"model": "pair", "prompt": None, "fields": {"x": "Kenya"}}, 400, "invalid_record", "fields"),
        ({"fields": {"x": "b"}}, 400, "invalid_value", "prompt"),
        ({"model": "tiny", "fields": {"x": "a"}}, 400, "invalid_value", "fields"),
        ({"wat": True}, 400, "unknown_field", "wat"),
        ({"n": "2"}, 400, "invalid_value", "n"),
        ({"temperature": math.nan}, 400, "invalid_value", "temperature"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options"),
        # Unsupported parameters that would change the answer.
        ({"tools": [{}]}, 400, "unsupported", "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "unsupported", "response_format"),
        ({"presence_penalty": 0.5}, 400, "unsupported", "presence_penalty"),
        ({"logit_bias": {"5": 1}}, 400, "unsupported", "logit_bias"),
        ({"best_of": 2}, 400, "unsupported", "best_of"),
        ({"suffix": "b"}, 400, "unsupported", "suffix"),
        ({"top_k": 5}, 400, "invalid_value", "top_k"),
        ({"repetition_penalty": 0}, 400, "invalid_value", "repetition_penalty"),
        # Token ids and echo need a template that ends in its one field.
        ({"prompt": [5, 6]}, 400, "prompt_unfit", "prompt"),
        ({"echo": True}, 400, "prompt_unfit", "prompt"),
        ({"model": "renamed", "prompt": [5, 6]}, 400, "unsupported", "prompt"),
        ({"model": "mood", "echo": True}, 400, "unsupported", "echo"),
        ({"model": "tiny", "echo": True, "stream": True}, 400, "unsupported", "echo"),
    ],
    "/v1/chat/completions": [
        ({"model": "tiny"}, 400, "unsupported", "model"),
        ({"model": "pair"}, 400, "invalid_value", "messages[0].content"),
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "system", "content": "be kind"}, USER]}, 400, "unsupported", "messages[0]"),
        ({"messages": [USER, ASSISTANT, USER]}, 400, "unsupported", "messages[1]"),
        ({"messages": [USER, USER]}, 400, "unsupported", "messages"),
        ({"messages": [IMAGE]}, 400, "unsupported", "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "invalid_value", "messages[0].content"),
        ({"fields": {"x": "a"}}, 400, "invalid_value", "messages"),
        ({"messages": [], "fields": [{"x": "a"}, {"x": "b"}]}, 400, "invalid_value", "fields"),
        ({"top_logprobs": 2}, 400, "invalid_value", "top_logprobs"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"max_completion_tokens": 10**6}, 400, "context_length_exceeded", "max_completion_tokens"),
        ({"tools": [{"type": "function"}]}, 400, "unsupported", "tools"),
    ],
    "/v1/predict": [
        ({"model": "tiny"}, 400, "unsupported", "model"),
        ({"model": ["mood", "nope"]}, 404, "model_not_found", "model"),
        ({"model": []}, 400, "invalid_value", "model"),
        ({"records": []}, 400, "invalid_value", "records"),
        ({"records": [3]}, 400, "invalid_value", "records[0]"),
        ({"records": "a"}, 400, "invalid_value", "records"),
        ({"records": [{"z": "a"}, {"w": "b"}]}, 400, "invalid_record", "records[0]"),  # all fail alike
        ({"model": "choose"}, 400, "invalid_value", "records[0]"),
        ({"top_k": 0}, 400, "invalid_value", "top_k"),
        ({"normalise": "max"}, 400, "invalid_value", "normalise"),
        ({"generation": {"wat": 1}}, 400, "invalid_value", "generation"),
        ({"model": "mood", "candidates": ["b", "b"]}, 400, "invalid_record", "records[0]"),
        ({"model": "mood", "count_stop": True}, 400, "invalid_value", "records[0]"),
        ({"calibrate": "yes"}, 400, "invalid_value", "calibrate"),
        ({"wat": 1}, 400, "unknown_field", "wat"),
        # Only prompts with slots have a manual one.
        ({"model": "pair:manual"}, 400, "unsupported", "model"),
        ({"model": "nope:manual"}, 404, "model_not_found", "model"),
        ({"model": "tiny:manual"}, 404, "model_not_found", "model"),
        ({"model": "mood:manual:manual"}, 404, "model_not_found", "model"),
        ({"model": ":manual"}, 404, "model_not_found", "model"),
    ],
    "/v1/classify": [
        ({"model": "write"}, 400, "unsupported", "model"),
        ({"model": "tiny"}, 400, "unsupported", "model"),
    ],
    "/tokenize": [
        ({"model": "nope"}, 404, "model_not_found", "model"),
        ({"prompt": "\ud800"}, 400, "invalid_value", "prompt"),
    ],
    "/detokenize": [
        ({"tokens": [10**8]}, 400, "invalid_value", "tokens"),
        ({"tokens": [-1]}, 400, "invalid_value", "tokens[0]"),
    ],
}  # fmt: skip
# Lists and numbers that would cost much; none reaches the engine.
HOSTILE: dict[str, list[dict[str, Any]]] = {
    "/v1/predict": [
        {"records": ["a"] * 5_000},
        {"records": ["a"] * 65},
        {"model": ["mood"] * 2000},
        {"model": ["mood", "write"], "records": ["a"] * 33},
        {"candidates": [str(number) for number in range(2_000)]},
        {"generation": {"num_beams": 10**9}},
        {"generation": {"max_new_tokens": 10**9}},
        {"generation": {"stop_strings": ["x"] * 10_000}},
    ],
    "/v1/completions": [
        {"max_tokens": 10**9},
        {"max_tokens": 65},
        {"n": 17},
        {"n": 10**30},
        {"stop": ["x"] * 10_000},
        {"stop": [""]},
        {"logprobs": 21},
        {"temperature": 1e9},
        {"top_p": 0},
        {"seed": 2**70},
        {"prompt": ["a"] * 5_000},
        {"prompt": [1] * 200_000},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [-1]},
    ],
}


def sent(api: Api, path: str, changes: dict[str, Any]) -> Any:
    body = json.dumps({**BODIES[path], **changes})  # as ASCII: half characters are escaped
    return api.client.post(path, content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    ("path", "changes", "status", "code", "field"),
    [(path, *row) for path, rows in REFUSED.items() for row in rows],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_a_wrong_request_is_refused_with_its_field(
    api: Api, path: str, changes: dict[str, Any], status: int, code: str, field: str
) -> None:
    answer = sent(api, path, changes)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, field), error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize(("path", "changes"), [(path, row) for path, rows in HOSTILE.items() for row in rows],
                         ids=lambda value: str(value)[:40])  # fmt: skip
def test_a_request_that_would_cost_too_much_never_reaches_the_engine(
    fake_api: Callable[..., Api], path: str, changes: dict[str, Any]
) -> None:
    api = fake_api()
    for model in ({}, {"model": "tiny"}) if path == "/v1/completions" else ({},):
        answer = sent(api, path, {**changes, **model})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"].partition("[")[0].partition(".")[0] in changes
    assert not api.engine.jobs


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "field"),
    [
        ("GET", "/v1/models/nope", None, 404, "model_not_found", "model"),
        ("GET", "/nope", None, 404, "not_found", None),
        ("GET", "/v1/completions", None, 405, "method_not_allowed", None),
        ("POST", "/v1/completions", "{", 400, "invalid_json", None),
        ("POST", "/v1/completions", '{"prompt": "a"}', 400, "missing_field", "model"),
        ("POST", "/v1/completions", '{"model": "mood", "prompt": "a", "n": ' + "9" * 5000 + "}", 400, "invalid_request",
         None),
    ],
)  # fmt: skip
def test_errors_before_the_route_have_the_same_format(
    api: Api, method: str, path: str, body: str | None, status: int, code: str, field: str | None
) -> None:
    answer = api.client.request(method, path, content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, field)


def test_a_record_fails_alone(api: Api) -> None:
    records = ["Kenya", {"z": "a"}, {"x": "the capital " * 200}, {"x": "Peru"}, "half \ud800 a letter"]
    answer = sent(api, "/v1/predict", {"model": "kept", "records": records})
    predictions = answer.json()["predictions"]
    errors = {at: row["error"] for at, row in enumerate(predictions) if "error" in row}
    assert {at: (error["code"], error["param"]) for at, error in errors.items()} == {
        1: ("invalid_record", "records[1]"),
        2: ("context_length_exceeded", "records[2]"),
        4: ("invalid_record", "records[4]"),
    }
    assert "'x'" in errors[1]["message"]
    assert "--" not in errors[1]["message"], "advice about an option is for the command line"
    alone = api.post("/v1/predict", model="kept", records=["Kenya", "Peru"]).json()["predictions"]
    for prediction, expected in zip((predictions[0], predictions[3]), alone, strict=True):
        assert prediction["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)


def test_an_engine_that_ends_is_503(fake_api: Callable[..., Api]) -> None:
    for error, code in ((StoppedError("it ends"), "not_serving"), (CancelledError("cancelled"), "cancelled")):
        for path in ("/v1/predict", "/v1/completions"):
            answer = sent(fake_api(fails_with(error)), path, {})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, code)


@pytest.mark.parametrize("seconds", [0.001, 3.2, 1e9])
def test_a_full_queue_says_when_to_come_again(fake_api: Callable[..., Api], seconds: float) -> None:
    """Abuse case 7."""

    def refuse(job: Job) -> None:
        raise QueueFullError("the queue is full", retry_after=seconds)

    api = fake_api(refuse)
    for answer in (*(sent(api, path, {}) for path in BODIES), sent(api, "/v1/completions", {"stream": True})):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
        assert 1 <= int(answer.headers["retry-after"]) <= 60


def test_a_fault_shows_its_id_and_nothing_else(fake_api: Callable[..., Api], caplog: pytest.LogCaptureFixture) -> None:
    error = RuntimeError("bad thing in /secret/place/model.bin\nINFO forged line")

    def break_(job: Job) -> None:
        raise error

    api, broken = fake_api(fails_with(error)), fake_api(break_)
    api.client.headers["x-request-id"] = broken.client.headers["x-request-id"] = "my.id-1"
    for answer in (
        sent(api, "/v1/predict", {}),
        sent(api, "/v1/completions", {}),
        sent(api, "/v1/completions", {"stream": True}),
        sent(api, "/tokenize", {}),
        sent(broken, "/v1/completions", {}),
    ):
        shown = answer.json()["error"]
        assert (answer.status_code, shown["code"], shown["type"]) == (500, "internal_error", "server_error")
        assert "my.id-1" in shown["message"]
        assert not any(word in answer.text for word in ("secret", "bad thing", "Traceback", "RuntimeError"))
    assert caplog.text.count("my.id-1") == caplog.text.count("bad thing") == 5
    assert {record.levelno for record in caplog.records if record.name.startswith("ptuning")} == {logging.ERROR}
    assert "\nINFO" not in caplog.text, "a text cannot begin a line of the log"


def test_an_answer_that_is_no_number_is_a_fault_of_its_row_alone(fake_api: Callable[..., Api]) -> None:
    def answer(job: Job) -> None:
        for at, value in enumerate((-1.0, math.nan, -math.inf)):
            job.listener.ended(at, Outcome(Prediction("a", (Candidate("a", value),))))

    first, second, third = sent(fake_api(answer), "/v1/predict", {"records": ["a", "b", "c"]}).json()["predictions"]
    assert first["prediction"] == "a"
    assert second["error"]["code"] == "internal_error"
    assert third["candidates"][0]["log_prob"] == -9999.0


def test_messages_have_no_paths() -> None:
    text = (
        "the prompt of '/srv/my models/x' at /srv/data/model.gguf and C:\\Users\\me\\x.bin is/are a/b https://a.b/c/d"
    )
    assert without_paths(text) == "the prompt of 'my models/x' at model.gguf and x.bin is/are a/b https://a.b/c/d"
