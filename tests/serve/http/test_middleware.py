"""What every request passes first: limits, keys, headers, and how it ends."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest

from ptuning.errors import ConfigError
from ptuning.serve.engine.job import Job, QueueFullError
from ptuning.serve.http.errors import without_paths
from ptuning.serve.http.keys import Keys
from ptuning.serve.http.middleware import Middleware
from ptuning.serve.http.service import Settings
from tests.serve.http.conftest import Asked

JSON = {"content-type": "application/json"}
BODY = json.dumps({"model": "mood", "records": ["a"]})
Stubbed = Callable[..., Asked]


def unasked(job: Job) -> None:
    raise AssertionError("the engine was asked")


def failing(error: Exception) -> Callable[[Job], None]:
    """Return an engine that fails all rows."""

    def take(job: Job) -> None:
        for at in range(len(job.rows)):
            job.listener.ended(at, error)

    return take


def chunks(size: int, of: int = 1000) -> Iterator[bytes]:
    for _ in range(size // of):
        yield b" " * of


def test_a_body_that_is_too_large_is_refused_with_its_length_and_without(stubbed: Stubbed) -> None:
    asked = stubbed(unasked, Settings(body_bytes=10_000))
    for content in (b" " * 10_001, chunks(11_000), chunks(1_000_000)):
        found = asked.client.post("/v1/predict", content=content, headers=JSON)
        assert (found.status_code, found.json()["error"]["code"]) == (413, "too_large")


def test_a_body_without_length_is_read_on_to_a_bound_and_then_the_connection_ends(stubbed: Stubbed) -> None:
    asked = stubbed(unasked, Settings(body_bytes=1000))
    sent: list[Any] = []
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b" " * 500, "more_body": True}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/predict",
        "headers": [(b"content-type", b"application/json")],
    }
    asyncio.run(Middleware(unasked, asked.service)(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 413
    assert (b"connection", b"close") in sent[0]["headers"]
    assert read <= 10


def test_deep_json_is_refused_before_it_is_parsed(stubbed: Stubbed) -> None:
    asked = stubbed(unasked)
    deep = '{"model": "mood", "records": [' + '{"x":' * 5000 + "1" + "}" * 5000 + "]}"
    for body in (deep, "[" * 100_000, '{"a":' * 33 + "1" + "}" * 33):
        found = asked.client.post("/v1/predict", content=body, headers=JSON)
        assert (found.status_code, found.json()["error"]["code"]) == (400, "invalid_json")
        assert "deep" in found.json()["error"]["message"]


def test_brackets_in_texts_and_side_by_side_are_not_deep(asked: Asked) -> None:
    for text in ("[" * 99, '\\"[{' * 40):
        assert asked.post("/v1/predict", model="mood", records=[text]).status_code == 200
    ids = [[5, 6]] * 40
    assert asked.post("/v1/completions", model="tiny", prompt=ids, max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"model": "mood", "records": ["a"] * 1_000_00},
        {"model": ["mood"] * 2000, "records": ["a"]},
        {"model": "mood", "records": ["a"], "candidates": [str(at) for at in range(100_000)]},
        {"model": "mood", "records": ["a"] * 65},
        {"model": ["mood", "write"], "records": ["a"] * 33},
        {"model": "write", "records": ["a"], "generation": {"num_beams": 10**9}},
        {"model": "write", "records": ["a"], "generation": {"max_new_tokens": 10**9}},
        {"model": "write", "records": ["a"], "generation": {"stop_strings": ["x"] * 10_000}},
    ],
)
def test_long_lists_and_large_numbers_are_refused(stubbed: Stubbed, body: dict[str, object]) -> None:
    found = stubbed(unasked).client.post("/v1/predict", json=body)
    assert found.status_code == 400, found.text
    assert found.json()["error"]["param"]


@pytest.mark.parametrize(
    "more",
    [
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
        {"prompt": ["a"] * 100_000},
        {"prompt": [1] * 200_000},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [-1]},
    ],
)
def test_large_and_empty_settings_are_refused(stubbed: Stubbed, more: dict[str, object]) -> None:
    for model in ("write", "tiny"):
        found = stubbed(unasked).client.post("/v1/completions", json={"model": model, "prompt": "a", **more})
        assert found.status_code == 400, found.text
        assert found.json()["error"]["param"].partition("[")[0] in more


def test_only_json_is_taken(stubbed: Stubbed) -> None:
    asked = stubbed(unasked)
    for headers in ({"content-type": "text/plain"}, {"content-type": "multipart/form-data"}, {}):
        found = asked.client.post("/v1/predict", content=BODY, headers=headers)
        assert (found.status_code, found.json()["error"]["code"]) == (415, "unsupported_type")
    packed = {**JSON, "content-encoding": "gzip"}
    assert asked.client.post("/v1/predict", content=BODY, headers=packed).status_code == 415


def test_json_may_name_its_charset(asked: Asked) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert asked.client.post("/v1/predict", content=BODY, headers=headers).status_code == 200


@pytest.fixture
def locked(stubbed: Stubbed) -> Asked:
    """A service with keys, whose engine fails rows by a full queue: whoever comes in gets 429."""
    settings = Settings(keys=Keys.of("user-key", "other-key"), admin_keys=Keys.of("admin-key"))
    return stubbed(failing(QueueFullError("full", retry_after=3.2)), settings)


@pytest.mark.parametrize(
    ("header", "status", "code"),
    [
        (None, 401, "missing_api_key"),
        ("", 401, "missing_api_key"),
        ("Bearer", 401, "missing_api_key"),
        ("Bearer ", 401, "missing_api_key"),
        ("Basic user-key", 401, "missing_api_key"),
        ("Bearer wrong", 401, "invalid_api_key"),
        ("Bearer user-key2", 401, "invalid_api_key"),
        ("Bearer user-ke", 401, "invalid_api_key"),
        ("Bearer user-key other-key", 401, "invalid_api_key"),
        ("Bearer user-key", 429, "rate_limit_exceeded"),
        ("bearer  other-key", 429, "rate_limit_exceeded"),
        ("Bearer admin-key", 429, "rate_limit_exceeded"),
    ],
)
def test_a_key_lets_in(locked: Asked, header: str | None, status: int, code: str) -> None:
    headers = JSON if header is None else {**JSON, "authorization": header}
    found = locked.client.post("/v1/predict", content=BODY, headers=headers)
    assert (found.status_code, found.json()["error"]["code"]) == (status, code)
    assert found.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)


def test_without_a_key_only_the_open_routes_answer_and_a_key_in_the_address_is_none(locked: Asked) -> None:
    for path in ("/health", "/ready", "/version"):
        assert locked.client.get(path).status_code == 200
    for path in ("/v1/models", "/openapi.json", "/tokenizer_info", "/nope", "/v1/models?api_key=user-key", "/health/"):
        assert locked.client.get(path).status_code == 401, path
    # Whoever may not come in cannot make the server read, either.
    found = locked.client.post("/v1/predict", content=b" " * 10_000_000, headers=JSON)
    assert found.status_code == 401


@pytest.mark.parametrize(
    "path", ["/v1/prompts", "/v1/prompts/mood", "/v1/prompts/reload", "/v1/load_lora_adapter", "/metrics"]
)
def test_the_operators_routes_want_an_operators_key(locked: Asked, path: str) -> None:
    status = {None: 401, "wrong": 401, "user-key": 403}
    for key, wanted in status.items():
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        assert locked.client.get(path, headers=headers).status_code == wanted
    assert locked.client.get(path, headers={"authorization": "Bearer admin-key"}).status_code not in (401, 403)


def test_keys_are_never_told(locked: Asked, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for key in ("user-key", "wrong-key", "admin-key"):
        found = locked.client.post("/v1/predict", content=BODY, headers={**JSON, "authorization": f"Bearer {key}"})
        assert key not in found.text
    assert "-key" not in caplog.text.replace("missing_api_key", "")
    assert "-key" not in repr(locked.service.settings)


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# the team\n\n  sk-one \nsk-two\r\n")
    keys = Keys.read(path)
    assert [keys.hold(one) for one in ("sk-one", "sk-two", "# the team", "", "sk-on")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    for text in ("", "# nothing\n", "two words\n", "schlüssel\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="key"):
            Keys.read(path)


@pytest.mark.parametrize("seconds", [0.001, 0.2, 3.2, 60, 1e9])
def test_a_full_queue_says_when_to_come_again(stubbed: Stubbed, seconds: float) -> None:
    """Abuse case 7: for one row and for many alike."""

    def full(job: Job) -> None:
        raise QueueFullError("the queue is full", retry_after=seconds)

    asked = stubbed(full)
    bodies: list[tuple[str, dict[str, object]]] = [
        ("/v1/predict", {"model": "mood", "records": ["a"]}),
        ("/v1/predict", {"model": "mood", "records": ["a"] * 9}),
        ("/v1/completions", {"model": "write", "prompt": "a"}),
        ("/v1/completions", {"model": "write", "prompt": "a", "stream": True}),
        ("/v1/chat/completions", {"model": "write", "messages": [{"role": "user", "content": "a"}]}),
    ]
    for path, body in bodies:
        found = asked.client.post(path, json=body)
        error = found.json()["error"]
        assert (found.status_code, error["code"], error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
        assert 1 <= int(found.headers["retry-after"]) <= 60


def test_a_full_queue_refuses_before_the_body_is_looked_at(stubbed: Stubbed) -> None:
    """Only whoever may ask, and only on the routes that ask the model."""
    asked = stubbed(lambda _: pytest.fail("handed over"), Settings(keys=Keys.of("user-key")))
    asked.service.engine.is_full = True  # type: ignore[attr-defined]
    key = {"Authorization": "Bearer user-key", "Content-Type": "application/json"}
    for path in ("/v1/predict", "/v1/completions", "/v1/chat/completions", "/v1/classify", "/classify"):
        for body in (b'{"model": "nope"}', b"no JSON"):
            found = asked.client.post(path, content=body, headers=key)
            assert (found.status_code, found.headers["retry-after"]) == (429, "2")
        assert asked.client.post(path, content=b"{}", headers={**key, "Authorization": "no"}).status_code == 401
        assert asked.client.get(path, headers=key).status_code == 405
    assert ("/v1/predict", [], 429) in asked.watch.requests
    assert ("/classify", [], 401) in asked.watch.requests
    for path in ("/v1/models", "/health", "/ready"):  # abuse case 22: it is full, and well
        assert asked.client.get(path, headers=key).status_code == 200


def test_a_fault_tells_its_id_and_nothing_else(stubbed: Stubbed, caplog: pytest.LogCaptureFixture) -> None:
    asked = stubbed(failing(RuntimeError("bad thing in /secret/place/model.bin\nINFO forged line")))
    for path, body in (
        ("/v1/predict", {"model": "mood", "records": ["a"]}),
        ("/v1/completions", {"model": "write", "prompt": "a"}),
        ("/v1/completions", {"model": "write", "prompt": "a", "stream": True}),
        ("/tokenize", {"prompt": "a"}),
    ):
        caplog.clear()
        found = asked.client.post(path, json=body, headers={"x-request-id": "my.id-1"})
        error = found.json()["error"]
        assert (found.status_code, error["code"], error["type"]) == (500, "internal_error", "server_error")
        assert "my.id-1" in error["message"]
        assert not any(word in found.text for word in ("secret", "bad thing", "Traceback", "RuntimeError"))
        assert "my.id-1" in caplog.text
        assert "bad thing" in caplog.text
        assert "\nINFO" not in caplog.text, "a text cannot begin a line of the log"


def test_a_submit_that_breaks_is_a_fault_too(stubbed: Stubbed) -> None:
    found = stubbed(unasked).post("/v1/completions", model="write", prompt="a")
    assert found.status_code == 500
    assert "asked" not in found.text


def test_messages_have_no_paths() -> None:
    text = (
        "the prompt of '/srv/my models/x' at /srv/data/model.gguf and C:\\Users\\me\\x.bin is/are a/b https://a.b/c/d"
    )
    assert without_paths(text) == "the prompt of 'my models/x' at model.gguf and x.bin is/are a/b https://a.b/c/d"


def test_every_answer_has_an_id_and_the_headers_of_a_careful_page(asked: Asked) -> None:
    found = asked.client.get("/health")
    assert found.headers["x-request-id"].startswith("req-")
    assert "default-src 'self'" in found.headers["content-security-policy"]
    assert found.headers["x-content-type-options"] == "nosniff"
    assert found.headers["x-frame-options"] == "DENY"
    assert found.headers["cache-control"] == "no-store"
    assert asked.client.get("/nope").headers["content-security-policy"]
    kept = asked.client.get("/health", headers={"x-request-id": "abc-123"})
    assert kept.headers["x-request-id"] == "abc-123"
    for wrong in ("a b", "x" * 65, "a;b", "<script>"):
        assert asked.client.get("/health", headers={"x-request-id": wrong}).headers["x-request-id"].startswith("req-")


def test_no_other_page_may_ask(asked: Asked) -> None:
    """CORS is off, and a name that a stranger points to this machine is not its own."""
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    found = asked.client.options("/v1/predict", headers=headers)
    assert found.status_code == 405
    assert not [name for name in found.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("evil.example", 403), ("", 403),
     ("localhost.evil.example", 403), ("127.0.0.1.evil.example:80", 403)],
)  # fmt: skip
def test_a_server_of_this_machine_answers_to_its_own_names(stubbed: Stubbed, host: str, status: int) -> None:
    asked = stubbed(unasked, Settings(hosts=frozenset({"localhost", "127.0.0.1", "::1"})))
    assert asked.client.get("/health", headers={"host": host}).status_code == status
