"""The browser page: its files, and the manual prompts that it asks."""

from __future__ import annotations

import re

import pytest

from ptuning.data.task_files import load_task
from ptuning.serve.http.app import PAGE_FILES, PAGE_TYPES
from tests.serve.http.conftest import BASE, Asked

LARGEST = 64_000  # bytes of a file of the page


def texts() -> dict[str, str]:
    return {name: data.decode() for name, data in PAGE_FILES.items()}


@pytest.mark.parametrize("name", sorted(PAGE_TYPES))
def test_files_have_their_types_and_a_strict_policy(asked: Asked, name: str) -> None:
    found = asked.client.get("/" if name == "index.html" else f"/static/{name}")
    assert (found.status_code, found.headers["content-type"]) == (200, f"{PAGE_TYPES[name]}; charset=utf-8")
    assert found.headers["content-security-policy"].startswith("default-src 'self'; ")
    assert (found.headers["x-content-type-options"], found.headers["cache-control"]) == ("nosniff", "no-cache")
    assert found.content == PAGE_FILES[name]
    assert len(found.content) < LARGEST


@pytest.mark.parametrize(
    "path", ["/static/", "/static/index.html", "/static/nope.js", "/static/..%2Fapp.py", "/static/%2e%2e/app.py"]
)
def test_other_files_are_not_there(asked: Asked, path: str) -> None:
    assert asked.client.get(path).status_code == 404


def test_the_page_is_there_while_the_service_ends(asked: Asked) -> None:
    asked.service.phase = "draining"
    assert asked.client.get("/").status_code == asked.client.get("/static/page.js").status_code == 200


def test_the_page_asks_no_other_host() -> None:
    assert not re.search(r"@import|url\(", texts()["page.css"])
    for name, text in texts().items():
        hosts = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", re.sub(r"^\s*//.*", "", text, flags=re.MULTILINE)))
        assert hosts <= {"http://www.w3.org"}, name  # the name of a namespace


def test_nothing_is_inline_and_nothing_is_read_as_html() -> None:
    found = texts()
    html, script = found["index.html"], found["page.js"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script(?![^>]*\ssrc=)", html)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|Parser|setHTML", script
    )
    assert not re.search(r"localStorage|sessionStorage|indexedDB|cookie|history\.|location\.(?!origin)", script)


def test_models_tell_the_template_in_pieces_and_the_manual_prompt(asked: Asked) -> None:
    cards = {one["id"]: one for one in asked.client.get("/v1/models").json()["data"]}
    mood = cards["mood"]
    assert mood["pieces"] == [
        {"kind": "slots", "count": 2},
        {"kind": "text", "text": " "},
        {"kind": "field", "name": "x"},
        {"kind": "text", "text": " It was "},
        {"kind": "target"},
    ]
    assert (mood["manual"]["id"], mood["manual"]["template"]) == ("mood:manual", "[X] It was [Y]")
    assert cards["pair"]["manual"] is None
    assert (cards["pair"]["columns"], cards["choose"]["answers"]) == (["x", "z"], "choices")
    assert set(cards["choose"]["columns"]) == set(load_task("copa").columns)


def test_a_prompt_without_its_slots_answers_under_a_name_of_its_own(asked: Asked) -> None:
    found = asked.post("/v1/predict", model=["mood", "mood:manual"], records=[{"x": "a b"}]).json()["predictions"]
    twin = asked.prompts["mood"].without("slots")
    for prompt, [answer] in zip((asked.prompts["mood"], twin), found, strict=True):
        [expected] = asked.model.predict([{"x": "a b"}], prompt)
        assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-4)
    marks = {
        asked.post("/v1/predict", model=name, records=["a"]).json()["system_fingerprint"]
        for name in ("mood", "mood:manual")
    }
    assert len(marks) == 2
    mood = asked.service.registry.get("mood")
    assert asked.service._without_slots(mood) is asked.service._without_slots(mood)
    assert {name for _, names, _ in asked.watch.requests for name in names} == {"mood"}


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [("pair:manual", 400, "unsupported"), ("nope:manual", 404, "model_not_found"), (f"{BASE}:manual", 404, None),
     ("mood:manual:manual", 404, None), (":manual", 404, None)],
)  # fmt: skip
def test_names_that_have_no_manual_prompt_are_refused(asked: Asked, name: str, status: int, code: str | None) -> None:
    found = asked.post("/v1/predict", model=name, records=["a"])
    assert found.status_code == status
    assert code in (None, found.json()["error"]["code"])
