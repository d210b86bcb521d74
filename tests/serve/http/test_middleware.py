"""The middleware: keys, hosts, headers, and limits of bodies."""

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest

from ptuning.errors import ConfigError
from ptuning.serve.engine.job import QueueFullError
from ptuning.serve.http.keys import Keys
from ptuning.serve.http.middleware import Middleware
from ptuning.serve.http.service import Settings
from tests.serve.conftest import Api, fails_with

JSON = {"content-type": "application/json"}
BODY = json.dumps({"model": "mood", "records": ["a"]})


def chunks(size: int) -> Iterator[bytes]:
    for _ in range(size // 1000):
        yield b" " * 1000


DEEP = '{"x":' * 5000 + "1" + "}" * 5000


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b" " * 10_001, JSON, 413, "too_large"),
        (lambda: chunks(11_000), JSON, 413, "too_large"),
        (lambda: chunks(1_000_000), JSON, 413, "too_large"),
        (f'{{"model": "mood", "records": [{DEEP[:9_000]}', JSON, 400, "invalid_json"),
        ("[" * 9_000, JSON, 400, "invalid_json"),
        ('{"a":' * 33 + "1" + "}" * 33, JSON, 400, "invalid_json"),
        (BODY, {"content-type": "text/plain"}, 415, "unsupported_type"),
        (BODY, {"content-type": "multipart/form-data"}, 415, "unsupported_type"),
        (BODY, {}, 415, "unsupported_type"),
        (BODY, {**JSON, "content-encoding": "gzip"}, 415, "unsupported_type"),
    ],
)
def test_a_body_that_breaks_a_limit_is_refused(
    fake_api: Callable[..., Api], content: Any, headers: dict[str, str], status: int, code: str
) -> None:
    api = fake_api(settings=Settings(body_bytes=10_000))
    answer = api.client.post("/v1/predict", content=content() if callable(content) else content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert not api.engine.jobs


def test_a_body_without_end_is_read_to_a_bound_and_then_the_connection_ends(fake_api: Callable[..., Api]) -> None:
    sent: list[Any] = []
    reads = iter(range(10))

    async def receive() -> dict[str, Any]:
        next(reads)
        return {"type": "http.request", "body": b" " * 500, "more_body": True}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def app(*_: object) -> None:
        raise AssertionError

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/predict",
        "headers": [],
    }
    service = fake_api(settings=Settings(body_bytes=1000)).service
    asyncio.run(Middleware(app, service)(scope, receive, send))
    assert sent[0]["status"] == 413
    assert (b"connection", b"close") in sent[0]["headers"]


def test_brackets_in_texts_and_in_a_row_are_not_deep(api: Api) -> None:
    for text in ("[" * 99, '\\"[{' * 40):
        assert api.post("/v1/predict", model="mood", records=[text]).status_code == 200
    assert api.post("/v1/completions", model="tiny", prompt=[[5, 6]] * 40, max_tokens=1).status_code == 200
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert api.client.post("/v1/predict", content=BODY, headers=headers).status_code == 200


@pytest.fixture
def locked(fake_api: Callable[..., Api]) -> Api:
    """A service with keys, whose engine is full: whoever comes in gets 429."""
    settings = Settings(keys=Keys("user-key", "other-key"), admin_keys=Keys("admin-key"))
    return fake_api(fails_with(QueueFullError("full", retry_after=3.2)), settings)


@pytest.mark.parametrize(
    ("header", "status", "code"),
    [
        (None, 401, "missing_api_key"),
        ("", 401, "missing_api_key"),
        ("Bearer ", 401, "missing_api_key"),
        ("Basic user-key", 401, "missing_api_key"),
        ("Bearer wrong", 401, "invalid_api_key"),
        ("Bearer user-key2", 401, "invalid_api_key"),
        ("Bearer user-key other-key", 401, "invalid_api_key"),
        ("Bearer user-key", 429, "rate_limit_exceeded"),
        ("bearer  other-key", 429, "rate_limit_exceeded"),
        ("Bearer admin-key", 429, "rate_limit_exceeded"),
    ],
)
def test_a_key_lets_in(locked: Api, header: str | None, status: int, code: str) -> None:
    headers = JSON if header is None else {**JSON, "authorization": header}
    answer = locked.client.post("/v1/predict", content=BODY, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)


def test_without_a_key_only_the_open_routes_answer(locked: Api) -> None:
    for path in ("/health", "/ready", "/version", "/", "/static/page.js"):
        assert locked.client.get(path).status_code == 200
    for path in ("/v1/models", "/openapi.json", "/tokenizer_info", "/nope", "/v1/models?api_key=user-key", "/health/"):
        assert locked.client.get(path).status_code == 401, path
    # The body of somebody without a key is not read.
    assert locked.client.post("/v1/predict", content=b" " * 10_000_000, headers=JSON).status_code == 401


def test_keys_are_in_no_answer_and_no_log(locked: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for key in ("user-key", "wrong-key", "admin-key"):
        answer = locked.client.post("/v1/predict", content=BODY, headers={**JSON, "authorization": f"Bearer {key}"})
        assert key not in answer.text
    assert "-key" not in caplog.text
    assert "-key" not in repr(locked.service.settings)


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# the team\n\n  sk-one \nsk-two\r\n")
    keys = Keys.read(path)
    assert all(keys.hold(key) for key in ("sk-one", "sk-two"))
    assert not any(keys.hold(key) for key in ("# the team", "", "sk-on"))
    for text in ("", "# nothing\n", "two words\n", "schlüssel\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="key"):
            Keys.read(path)


def test_a_full_queue_refuses_before_the_body_is_parsed(fake_api: Callable[..., Api]) -> None:
    """Only clients with a key, and only on the routes that use the model."""
    api = fake_api(settings=Settings(keys=Keys("user-key")))
    api.engine.is_full = True
    key = {"Authorization": "Bearer user-key", "Content-Type": "application/json"}
    for path in ("/v1/predict", "/v1/completions", "/v1/chat/completions", "/v1/classify", "/classify"):
        answer = api.client.post(path, content=b"no JSON", headers=key)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
        assert api.client.post(path, content=b"{}", headers={**key, "Authorization": "no"}).status_code == 401
        assert api.client.get(path, headers=key).status_code == 405
    for path in ("/v1/models", "/health", "/ready"):  # abuse case 22: it is full, and healthy
        assert api.client.get(path, headers=key).status_code == 200


def test_every_answer_has_an_id_and_security_headers(api: Api) -> None:
    for path in ("/health", "/nope"):
        headers = api.client.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
        assert headers["cache-control"] == "no-store"
    assert api.client.get("/health", headers={"x-request-id": "abc-123"}).headers["x-request-id"] == "abc-123"
    # Abuse case 18: the id of a client is in the log, so it may not be anything.
    for given in ("", "a b", "x" * 65, "a;b", "<script>", 'x"y', "{}", "\x7f", "é", "a\\nb"):
        answer = api.client.get("/health", headers=[(b"x-request-id", given.encode())])
        assert answer.headers["x-request-id"].startswith("req-")


def test_no_page_of_another_host_may_call(api: Api) -> None:
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    answer = api.client.options("/v1/predict", headers=headers)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("evil.example", 403), ("", 403), ("[", 403),
     ("localhost.evil.example", 403), ("127.0.0.1.evil.example:80", 403)],
)  # fmt: skip
def test_a_local_server_answers_to_its_own_names(fake_api: Callable[..., Api], host: str, status: int) -> None:
    api = fake_api(settings=Settings(hosts=frozenset({"localhost", "127.0.0.1", "::1"})))
    assert api.client.get("/health", headers={"host": host}).status_code == status
