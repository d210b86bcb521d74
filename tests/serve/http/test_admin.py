"""The operator's routes: prompts listed, loaded, replaced, unloaded and reloaded over HTTP."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from ptuning.errors import PromptError
from ptuning.names import MANIFEST_FILE
from ptuning.prompt.prompt import Prompt
from ptuning.serve.http.app import create_app
from ptuning.serve.http.keys import Keys
from ptuning.serve.http.service import Settings
from ptuning.serve.registry import Registry
from tests.serve.conftest import FakeEngine
from tests.serve.test_registry import BAD_NAMES, prompt_of, save, version_of, versions

ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/v1/prompts", None),
    ("POST", "/v1/prompts", {"name": "c", "path": "c"}),
    ("POST", "/v1/prompts/reload", None),
    ("PUT", "/v1/prompts/a", {"path": "c"}),
    ("DELETE", "/v1/prompts/a", None),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "c", "lora_path": "c"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "a"}),
    ("GET", "/metrics", None),
]


def check(prompt: Prompt) -> None:
    if version_of(prompt) == 9:
        raise PromptError("it belongs to another backbone")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Prompts ``a`` and ``team/b`` in service, and a folder ``c`` that is not yet."""
    save(tmp_path / "prompts" / "a", 1)
    save(tmp_path / "prompts" / "team" / "b", 2)
    made = Registry(tmp_path / "prompts", base_name="some-model", check=check)
    made.reload()
    save(tmp_path / "prompts" / "c", 3)
    return made


def client_of(registry: Registry, key: str | None = None, **settings: Any) -> TestClient:
    engine: Any = FakeEngine(None)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return TestClient(create_app(engine, registry, Settings(**settings)), headers=headers)


@pytest.fixture
def client(registry: Registry) -> TestClient:
    """An operator's client."""
    return client_of(registry, "boss", admin_keys=Keys("boss"))


def error_of(answer: Any) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


def test_the_life_of_a_prompt(client: TestClient, registry: Registry) -> None:
    """Loaded, listed, replaced, unloaded; requests see each at once."""
    made = client.post("/v1/prompts", json={"name": "team/c", "path": "c"})
    assert made.status_code == 201
    assert (made.json()["id"], made.json()["path"], made.json()["slots"]) == ("team/c", "c", 2)
    listed = client.get("/v1/prompts").json()
    assert [prompt["id"] for prompt in listed["data"]] == ["a", "team/b", "team/c"]
    assert listed["data"][0] == {
        "id": "a", "object": "prompt", "path": "a", "sha256": registry.get("a").sha256,
        "loaded_at": int(registry.get("a").loaded_at), "template": "[P*2] {text} [Y]", "fields": ["text"],
        "labels": None, "task": None, "slots": 2, "method": "manual", "scores": {},
    }  # fmt: skip
    assert client.put("/v1/prompts/team/c", json={"path": "a"}).json()["path"] == "a"
    assert versions(registry) == {"a": 1, "team/b": 2, "team/c": 1}
    assert client.delete("/v1/prompts/team/c").json() == {"id": "team/c", "object": "prompt", "deleted": True}
    assert versions(registry) == {"a": 1, "team/b": 2}


def test_a_score_that_is_no_number_is_left_out(client: TestClient, tmp_path: Path) -> None:
    prompt = replace(prompt_of(5), scores={"loss": float("nan"), "perplexity": float("inf"), "accuracy": 0.5})
    prompt.save(tmp_path / "prompts" / "odd")
    assert client.post("/v1/prompts", json={"name": "odd", "path": "odd"}).json()["scores"] == {"accuracy": 0.5}


def test_reload_returns_the_changes(client: TestClient, registry: Registry, tmp_path: Path) -> None:
    save(tmp_path / "prompts" / "a", 4)
    save(tmp_path / "prompts" / "unfit", 9)
    (tmp_path / "prompts" / "team" / "b").rename(tmp_path / "b")
    changes = client.post("/v1/prompts/reload").json()
    failed = [{"id": "unfit", "message": "it belongs to another backbone"}]
    assert changes == {"added": ["c"], "changed": ["a"], "removed": ["team/b"], "failed": failed}
    assert client.get("/v1/prompts").json()["failed"] == failed
    assert versions(registry) == {"a": 4, "c": 3}
    (tmp_path / "prompts").rename(tmp_path / "away")
    answer = client.post("/v1/prompts/reload")
    assert error_of(answer) == (500, "folder_not_readable", None)
    assert versions(registry) == {"a": 4, "c": 3}


REFUSED: list[tuple[str, str, Any, tuple[int, str, str | None]]] = [
    ("POST", "/v1/prompts", {"name": "a", "path": "c"}, (409, "conflict", None)),
    ("POST", "/v1/prompts", {"name": "../x", "path": "c"}, (400, "name_not_allowed", "name")),
    ("POST", "/v1/prompts", {"name": "x", "path": "/etc"}, (400, "name_not_allowed", "path")),
    ("POST", "/v1/prompts", {"name": "some-model", "path": "c"}, (400, "name_not_allowed", "name")),
    *[("POST", "/v1/prompts", {"name": "x", "path": path}, (400, "prompt_unfit", None))
      for path in ("unfit", "broken", "nothing", "team")],
    # A misspelt field must not load something else.
    ("POST", "/v1/prompts", {"name": "x", "path": "c", "force": True}, (400, "unknown_field", "force")),
    ("POST", "/v1/prompts", {"name": "x"}, (400, "missing_field", "path")),
    ("POST", "/v1/prompts", {"name": 1, "path": "c"}, (400, "invalid_value", "name")),
    ("POST", "/v1/prompts", [], (400, "invalid_value", None)),
    ("PUT", "/v1/prompts/a", {"path": "c", "name": "b"}, (400, "unknown_field", "name")),
    ("PUT", "/v1/prompts/x", {"path": "c"}, (404, "model_not_found", "model")),
    ("PUT", "/v1/prompts/a", {"path": "unfit"}, (400, "prompt_unfit", None)),
    ("DELETE", "/v1/prompts/x", None, (404, "model_not_found", "model")),
]  # fmt: skip


def test_a_change_that_is_refused_changes_nothing(client: TestClient, registry: Registry, tmp_path: Path) -> None:
    save(tmp_path / "prompts" / "unfit", 9)
    (save(tmp_path / "prompts" / "broken") / MANIFEST_FILE).write_text("{", encoding="utf-8")
    for method, path, body, expected in REFUSED:
        answer = client.request(method, path, json=body)
        assert error_of(answer) == expected, (body, answer.text)
        assert str(tmp_path) not in answer.text
    # Abuse case 4: no name or path leads out of the folder, in the body or in the address, escaped once or twice.
    for name in BAD_NAMES:
        assert client.post("/v1/prompts", json={"name": name, "path": "c"}).status_code == 400
        for address in (quote(name, safe=""), quote(quote(name, safe=""), safe="")) if len(name) < 5_000 else ():
            assert client.put(f"/v1/prompts/{address}", json={"path": "c"}).status_code in (404, 405)
    assert versions(registry) == {"a": 1, "team/b": 2}


def test_nothing_changes_while_the_service_ends(client: TestClient, registry: Registry) -> None:
    """Abuse case 12."""
    registry.close()
    for method, path, body in ROUTES:
        answer = client.request(method, path, json=body)
        if method == "GET":
            assert answer.status_code == 200
        else:
            assert error_of(answer) == (503, "not_serving", None)


def test_tools_load_prompts_as_lora_adapters(client: TestClient, registry: Registry, tmp_path: Path) -> None:
    """With vLLM's routes and answers; fields without a meaning here are ignored, and paths may be absolute."""
    load = {"lora_name": "c", "lora_path": str(tmp_path / "prompts" / "c"), "lora_int_id": 7}
    done = client.post("/v1/load_lora_adapter", json=load)
    assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'c' added successfully.")
    assert error_of(client.post("/v1/load_lora_adapter", json=load)) == (409, "conflict", None)
    for name in ("c", "d"):
        other = {**load, "lora_name": name, "lora_path": "a", "load_inplace": True}
        assert client.post("/v1/load_lora_adapter", json=other).status_code == 200
    assert versions(registry) == {"a": 1, "team/b": 2, "c": 1, "d": 1}
    done = client.post("/v1/unload_lora_adapter", json={"lora_name": "c"})
    assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'c' removed successfully.")
    again = client.post("/v1/unload_lora_adapter", json={"lora_name": "c"})
    assert error_of(again) == (404, "model_not_found", "model")


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_only_operators_come_in(method: str, path: str, body: Any, registry: Registry) -> None:
    """Abuse case 16: without admin keys there are no such routes; with them, no key and a wrong one is 401, a user's
    403.
    """
    users = client_of(registry, "user", keys=Keys("user"))
    assert error_of(users.request(method, path, json=body)) == (404, "not_found", None)
    for key, status in ((None, 401), ("wrong", 401), ("user", 403)):
        client = client_of(registry, key, keys=Keys("user"), admin_keys=Keys("boss"))
        assert client.request(method, path, json=body).status_code == status
        assert client.request(method, f"{path}?key=boss&api_key=boss", json=body).status_code == status
    assert versions(registry) == {"a": 1, "team/b": 2}
    client = client_of(registry, "boss", keys=Keys("user"), admin_keys=Keys("boss"))
    assert client.request(method, path, json=body).status_code in (200, 201)


def test_the_metrics_may_be_open(registry: Registry) -> None:
    """Without keys, and while the service ends."""
    client = client_of(registry, open_metrics=True)
    client.app.state.service.phase = "draining"  # type: ignore[attr-defined]
    answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "ptuning_prompts_loaded 2.0" in answer.text
    other = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert other.text.endswith("# EOF\n")
