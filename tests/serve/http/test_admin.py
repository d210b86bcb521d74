"""The operator's routes: prompts listed, loaded, replaced, unloaded and reloaded over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient

from ptuning.errors import PromptError
from ptuning.names import MANIFEST_FILE
from ptuning.prompt.prompt import Prompt
from ptuning.serve.http.admin import router
from ptuning.serve.registry import Registry
from tests.serve.test_registry import BAD_NAMES, save, version_of, versions


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


@pytest.fixture
def client(registry: Registry) -> TestClient:
    app = FastAPI()
    app.include_router(router(registry))
    return TestClient(app, raise_server_exceptions=False)


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
    assert error_of(client.put("/v1/prompts/x", json={"path": "c"})) == (404, "model_not_found", None)
    assert error_of(client.put("/v1/prompts/a", json={"path": "unfit"})) == (400, "prompt_unfit", None)
    assert error_of(client.delete("/v1/prompts/x")) == (404, "model_not_found", None)
    assert [one["id"] for one in client.get("/v1/prompts").json()["data"]] == ["a", "team/b"]


@pytest.mark.parametrize("name", [name for name in BAD_NAMES if len(name) < 5_000], ids=ascii)
def test_no_name_or_path_leads_out_of_the_folder(name: str, client: TestClient, registry: Registry) -> None:
    """Abuse case 4 over HTTP: in the body and in the address, escaped or not."""
    assert client.post("/v1/prompts", json={"name": name, "path": "c"}).status_code == 400
    if name not in ("a/", "a/b/c/d/e"):
        assert client.post("/v1/prompts", json={"name": "x", "path": name}).status_code == 400
        assert client.put("/v1/prompts/a", json={"path": name}).status_code == 400
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
        assert error_of(answer) == (503, "shutting_down", None)
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
    assert error_of(client.post("/v1/unload_lora_adapter", json={"lora_name": "c"})) == (404, "model_not_found", None)
    assert versions(registry) == {"a": 1, "d": 1, "team/b": 2}


def test_a_field_that_is_not_known_is_an_error(client: TestClient) -> None:
    """A path that is misspelt must not load something else."""
    for body in ({"name": "x", "path": "c", "force": True}, {"name": "x"}, {"name": 1, "path": "c"}, [], "x"):
        assert client.post("/v1/prompts", json=body).status_code == 422
    assert client.put("/v1/prompts/a", json={"path": "c", "name": "b"}).status_code == 422


def test_nobody_comes_in_without_the_guard(registry: Registry) -> None:
    def guard() -> None:
        raise HTTPException(403)

    app = FastAPI()
    app.include_router(router(registry, guard=guard))
    client = TestClient(app)
    for route in app.routes:
        for method in getattr(route, "methods", None) or ():
            path = getattr(route, "path", "")
            if path.startswith("/v1"):
                body = {"name": "c", "path": "c", "lora_name": "c", "lora_path": "c"}
                body = {"path": "c"} if method == "PUT" else body if "lora" in path else {"name": "c", "path": "c"}
                assert client.request(method, path.replace("{name:path}", "a"), json=body).status_code == 403
    assert versions(registry) == {"a": 1, "team/b": 2}
