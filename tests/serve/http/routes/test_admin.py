"""The operator's routes: prompts listed, loaded, replaced, unloaded and reloaded over HTTP."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
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


def client_of(registry: Registry, **settings: Any) -> TestClient:
    engine: Any = SimpleNamespace(queue_rows=4, is_alive=True, status=None)
    return TestClient(create_app(engine, registry, Settings(**settings)))


@pytest.fixture
def client(registry: Registry) -> TestClient:
    """An operator's client."""
    made = client_of(registry, admin_keys=Keys.of("boss"))
    made.headers["authorization"] = "Bearer boss"
    return made


def error_of(answer: Any) -> tuple[int, str, str | None]:
    """Status, code and param of an answer in OpenAI's form."""
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert isinstance(error["message"], str)
    return answer.status_code, error["code"], error["param"]


def test_the_life_of_a_prompt(client: TestClient, registry: Registry) -> None:
    """Loaded, listed, replaced, unloaded; requests see each at once."""
    made = client.post("/v1/prompts", json={"name": "team/c", "path": "c"})
    assert made.status_code == 201
    assert (made.json()["id"], made.json()["path"], made.json()["slots"]) == ("team/c", "c", 2)
    listed = client.get("/v1/prompts").json()
    assert [one["id"] for one in listed["data"]] == ["a", "team/b", "team/c"]
    assert (listed["object"], listed["failed"]) == ("list", [])
    assert listed["data"][0] == {
        "id": "a",
        "object": "prompt",
        "path": "a",
        "sha256": registry.get("a").sha256,
        "loaded_at": int(registry.get("a").loaded_at),
        "template": "[P*2] {text} [Y]",
        "fields": ["text"],
        "labels": None,
        "task": None,
        "slots": 2,
        "method": "manual",
        "scores": {},
    }
    assert client.put("/v1/prompts/team/c", json={"path": "a"}).json()["path"] == "a"
    assert versions(registry) == {"a": 1, "team/b": 2, "team/c": 1}
    gone = client.delete("/v1/prompts/team/c")
    assert (gone.status_code, gone.json()) == (200, {"id": "team/c", "object": "prompt", "deleted": True})
    assert versions(registry) == {"a": 1, "team/b": 2}


def test_reload_says_what_it_did(client: TestClient, registry: Registry, tmp_path: Path) -> None:
    save(tmp_path / "prompts" / "a", 4)
    save(tmp_path / "prompts" / "unfit", 9)
    (tmp_path / "prompts" / "team" / "b").rename(tmp_path / "b")
    done = client.post("/v1/prompts/reload")
    assert done.json() == {
        "added": ["c"],
        "changed": ["a"],
        "removed": ["team/b"],
        "failed": [{"id": "unfit", "message": "it belongs to another backbone"}],
    }
    assert client.get("/v1/prompts").json()["failed"] == done.json()["failed"]
    assert versions(registry) == {"a": 4, "c": 3}


def test_what_cannot_be_done_is_an_error_of_openai_s_form(client: TestClient, tmp_path: Path) -> None:
    """Each with a status of its own, and none of them 5xx."""
    save(tmp_path / "prompts" / "unfit", 9)
    (save(tmp_path / "prompts" / "broken") / MANIFEST_FILE).write_text("{", encoding="utf-8")
    post = client.post
    assert error_of(post("/v1/prompts", json={"name": "a", "path": "c"})) == (409, "conflict", None)
    assert error_of(post("/v1/prompts", json={"name": "../x", "path": "c"})) == (400, "name_not_allowed", "name")
    assert error_of(post("/v1/prompts", json={"name": "x", "path": "../c"})) == (400, "name_not_allowed", "path")
    assert error_of(post("/v1/prompts", json={"name": "x", "path": "/etc"})) == (400, "name_not_allowed", "path")
    assert error_of(post("/v1/prompts", json={"name": "some-model", "path": "c"})) == (400, "name_not_allowed", "name")
    for path in ("unfit", "broken", "nothing", "team"):
        answer = post("/v1/prompts", json={"name": "x", "path": path})
        assert error_of(answer) == (400, "prompt_unfit", None)
        assert str(tmp_path) not in answer.text
        if path == "nothing":
            assert "there is no 'nothing' in the folder of prompts" in answer.text
    assert error_of(client.put("/v1/prompts/x", json={"path": "c"})) == (404, "model_not_found", "model")
    assert error_of(client.put("/v1/prompts/a", json={"path": "unfit"})) == (400, "prompt_unfit", None)
    assert error_of(client.delete("/v1/prompts/x")) == (404, "model_not_found", "model")
    assert [one["id"] for one in client.get("/v1/prompts").json()["data"]] == ["a", "team/b"]


def test_no_name_or_path_leads_out_of_the_folder(client: TestClient, registry: Registry) -> None:
    """Abuse case 4 over HTTP: in the body and in the address, escaped once or twice."""
    for name in BAD_NAMES:
        assert client.post("/v1/prompts", json={"name": name, "path": "c"}).status_code == 400
        if name not in ("a/", "a/b/c/d/e"):
            assert client.post("/v1/prompts", json={"name": "x", "path": name}).status_code == 400
            assert client.put("/v1/prompts/a", json={"path": name}).status_code == 400
        if len(name) < 5_000:
            for address in (quote(name, safe=""), quote(quote(name, safe=""), safe="")):
                assert client.put(f"/v1/prompts/{address}", json={"path": "c"}).status_code in (404, 405)
                assert client.delete(f"/v1/prompts/{address}").status_code in (404, 405)
    assert versions(registry) == {"a": 1, "team/b": 2}


def test_a_load_during_the_drain_is_refused(client: TestClient, registry: Registry) -> None:
    """Abuse case 12: 503, for all that changes something."""
    registry.close()
    for answer in (
        client.post("/v1/prompts", json={"name": "c", "path": "c"}),
        client.put("/v1/prompts/a", json={"path": "c"}),
        client.delete("/v1/prompts/a"),
        client.post("/v1/prompts/reload"),
        client.post("/v1/load_lora_adapter", json={"lora_name": "c", "lora_path": "c"}),
    ):
        assert error_of(answer) == (503, "not_serving", None)
    assert client.get("/v1/prompts").status_code == 200


def test_tools_load_prompts_as_lora_adapters(client: TestClient, registry: Registry, tmp_path: Path) -> None:
    """With vLLM's routes and answers; fields that mean nothing here are ignored, and paths may be whole."""
    load = {"lora_name": "c", "lora_path": str(tmp_path / "prompts" / "c"), "lora_int_id": 7}
    done = client.post("/v1/load_lora_adapter", json=load)
    assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'c' added successfully.")
    assert error_of(client.post("/v1/load_lora_adapter", json=load)) == (409, "conflict", None)
    other = {**load, "lora_path": "a", "load_inplace": True}
    assert client.post("/v1/load_lora_adapter", json=other).status_code == 200
    assert versions(registry)["c"] == 1
    new = {**other, "lora_name": "d"}
    assert client.post("/v1/load_lora_adapter", json=new).status_code == 200
    done = client.post("/v1/unload_lora_adapter", json={"lora_name": "c"})
    assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'c' removed successfully.")
    assert error_of(client.post("/v1/unload_lora_adapter", json={"lora_name": "c"})) == (
        404,
        "model_not_found",
        "model",
    )
    assert versions(registry) == {"a": 1, "d": 1, "team/b": 2}


def test_a_field_that_is_not_known_is_an_error(client: TestClient) -> None:
    """A path that is misspelt must not load something else."""
    wrong: list[Any] = [{"name": "x", "path": "c", "force": True}, {"name": "x"}, {"name": 1, "path": "c"}, [], "x"]
    for body in wrong:
        assert error_of(client.post("/v1/prompts", json=body))[0] == 400
    answer = client.put("/v1/prompts/a", json={"path": "c", "name": "b"})
    assert error_of(answer) == (400, "unknown_field", "name")


def test_a_folder_that_cannot_be_read_is_told(client: TestClient, registry: Registry, tmp_path: Path) -> None:
    """It is the machine's fault, and not the request's; the prompts go on."""
    (tmp_path / "prompts").rename(tmp_path / "away")
    answer = client.post("/v1/prompts/reload")
    assert error_of(answer) == (500, "folder_not_readable", None)
    assert "No such file" in answer.json()["error"]["message"]
    assert versions(registry) == {"a": 1, "team/b": 2}


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_operators_alone_come_in(method: str, path: str, body: Any, registry: Registry) -> None:
    """Abuse case 16: without admin keys there are no such routes; with them, no key and a wrong one is 401, a user's
    403.
    """
    users = client_of(registry, keys=Keys.of("user"))
    asked = {"authorization": "Bearer user"}
    assert error_of(users.request(method, path, json=body, headers=asked))[:2] == (404, "not_found")
    both = client_of(registry, keys=Keys.of("user"), admin_keys=Keys.of("boss"))
    for key, status in ((None, 401), ("wrong", 401), ("user", 403)):
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        answer = both.request(method, path, json=body, headers=headers)
        assert error_of(answer)[0] == status
        assert both.request(method, f"{path}?key=boss&api_key=boss", json=body).status_code == 401
    assert versions(registry) == {"a": 1, "team/b": 2}
    assert both.request(method, path, json=body, headers={"authorization": "Bearer boss"}).status_code in (200, 201)


def test_the_metrics_may_be_open_where_nobody_else_comes(registry: Registry) -> None:
    """On this machine alone, without keys; they are told while the service ends, too."""
    assert client_of(registry).get("/metrics").status_code == 404
    client = client_of(registry, open_metrics=True)
    client.app.state.service.phase = "draining"  # type: ignore[attr-defined]
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "ptuning_prompts_loaded 2.0" in answer.text
    other = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert other.text.endswith("# EOF\n")


def test_a_score_that_is_no_number_is_left_out(client: TestClient, tmp_path: Path) -> None:
    """JSON has no NaN, and a list of prompts must not fail for one of them."""
    prompt = replace(prompt_of(5), scores={"loss": float("nan"), "perplexity": float("inf"), "accuracy": 0.5})
    prompt.save(tmp_path / "prompts" / "odd")
    assert client.post("/v1/prompts", json={"name": "odd", "path": "odd"}).json()["scores"] == {"accuracy": 0.5}
