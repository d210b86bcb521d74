"""The doctor and the service itself, which a stand-in passes requests on to."""

from __future__ import annotations

import pytest

from ptuning.doctor.prompts import ReadPrompt
from ptuning.doctor.remote import Remote
from ptuning.doctor.server import check_server
from tests.doctor.conftest import Page, StandIn, named
from tests.serve.http.conftest import Asked, asked, engine, tiny  # noqa: F401 - fixtures


def test_the_service_answers_as_its_prompts_do(
    asked: Asked,  # noqa: F811
    stand_in: StandIn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def passed_on(page: str, key: str | None, body: bytes) -> Page:
        method, path = page.split()
        headers = {"Content-Type": "application/json"} if body else {}
        found = asked.client.request(method, path, content=body, headers=headers)
        return found.status_code, found.content, {}

    monkeypatch.setattr(stand_in, "answer", passed_on)
    prompts = [ReadPrompt(name, name, [], prompt) for name, prompt in asked.prompts.items()]
    found = named(list(check_server(Remote.of(stand_in.url), prompts, asked.model.backbone)))
    assert {one.status for one in found.values()} == {"ok"}, found
    compared = [name for name, one in found.items() if "as in process" in one.found]
    assert compared == [f"answer of {name}" for name in ("write", "mood", "pair", "renamed", "kept")]
    assert found["answer of choose"].found.startswith("not compared")
