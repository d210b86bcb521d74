"""A server that works, and one for each thing that can be wrong with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.data.task_files import load_task
from ptuning.doctor import remote
from ptuning.doctor.checks import Check
from ptuning.doctor.prompts import ReadPrompt
from ptuning.doctor.remote import Remote
from ptuning.doctor.server import TIMED_REQUESTS, check_server
from ptuning.prompt.prompt import Prompt
from tests.conftest import learned
from tests.doctor.conftest import Page, StandIn, named, prompts_of, serves


@pytest.fixture
def prompts(causal: Backbone) -> dict[str, Prompt]:
    return prompts_of(causal)


def looked_at(
    one: StandIn, backbone: Backbone | None, prompts: dict[str, Prompt], key: str | None = None
) -> dict[str, Check]:
    read = [ReadPrompt(name, name, [], prompt) for name, prompt in prompts.items()]
    return named(list(check_server(Remote.of(one.url, key), read, backbone)))


def test_a_server_that_answers_as_we_do(stand_in: StandIn, causal: Backbone, prompts: dict[str, Prompt]) -> None:
    serves(stand_in, causal, prompts)
    found = looked_at(stand_in, causal, prompts)
    assert list(found) == [
        "health", "ready", "version", "models", "answer of facts", "answer of moods", "latency"
    ]  # fmt: skip
    assert {one.status for one in found.values()} == {"ok"}
    assert found["version"].found == "version 0.1.0"
    assert found["models"].found == "2: facts, moods"
    assert "as in process; log-probabilities differ by" in found["answer of moods"].found
    assert f"ms of {TIMED_REQUESTS} requests" in found["latency"].found
    assert "one record of facts: median " in found["latency"].found
    asked = [page for page, _ in stand_in.seen]
    assert asked.count("POST /v1/predict") == 2 + TIMED_REQUESTS


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prediction": "Nairobi!"}, "'Nairobi!' there, and '"),
        ({"prediction": None}, "no predictions as"),
        ({"candidates": []}, "other candidates beside it"),
        ({"candidates": [{"text": "Nairobi!", "log_prob": -1.0}]}, "other candidates beside it"),
        ({"candidates": "x"}, "no predictions as"),
        ({"candidates": [{"text": "a"}]}, "no predictions as"),
    ],
)
def test_another_answer_is_a_fault(
    changed: dict[str, Any], said: str, stand_in: StandIn, causal: Backbone, prompts: dict[str, Prompt]
) -> None:
    serves(stand_in, causal, {"facts": prompts["facts"]}, **changed)
    found = looked_at(stand_in, causal, {"facts": prompts["facts"]})
    assert (found["answer of facts"].status, said in found["answer of facts"].found) == ("failed", True), found
    assert found["latency"].found.startswith("GET /health: median ")


@pytest.mark.parametrize(("apart", "status"), [(5e-4, "ok"), (2e-3, "failed"), (float("nan"), "failed")])
def test_log_probabilities_may_differ_by_rounding(
    apart: float, status: str, stand_in: StandIn, causal: Backbone, prompts: dict[str, Prompt]
) -> None:
    """Every candidate counts, not only the answer."""
    serves(stand_in, causal, {"moods": prompts["moods"]})
    real = stand_in.pages["POST /v1/predict"]

    def predict(asked: Any) -> Page:
        assert callable(real)
        status, found, *_ = real(asked)
        assert not isinstance(found, bytes)
        found["predictions"][0]["candidates"][1]["log_prob"] += apart
        return status, found

    stand_in.pages["POST /v1/predict"] = predict
    found = looked_at(stand_in, causal, {"moods": prompts["moods"]})["answer of moods"]
    assert found.status == status, found


def test_an_error_of_the_server_is_told(stand_in: StandIn, causal: Backbone, prompts: dict[str, Prompt]) -> None:
    serves(stand_in, causal, {"facts": prompts["facts"]})
    stand_in.pages["POST /v1/predict"] = (500, {"error": {"message": "the engine has ended"}})
    found = looked_at(stand_in, causal, {"facts": prompts["facts"]})["answer of facts"]
    assert (found.status, found.found) == ("failed", "status 500: the engine has ended")


def test_a_server_that_went_away_is_not_asked_again(
    stand_in: StandIn, causal: Backbone, prompts: dict[str, Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request that ends by its clock would take minutes, and there may be a thousand prompts."""
    monkeypatch.setattr(remote, "LONG_SECONDS", 0.3)
    serves(stand_in, causal, prompts)
    stand_in.slow = "/v1/predict"
    found = looked_at(stand_in, causal, prompts)
    assert list(found)[-1] == "answer of facts"
    assert found["answer of facts"].found == "no whole answer in 0.3 s"


def test_a_prompt_that_is_not_served_is_a_warning(
    stand_in: StandIn, causal: Backbone, prompts: dict[str, Prompt]
) -> None:
    serves(stand_in, causal, {"moods": prompts["moods"]})
    found = looked_at(stand_in, causal, prompts)
    assert found["answer of facts"].status == "warning"
    assert found["answer of moods"].status == "ok"
    assert "one record of moods" in found["latency"].found


def test_without_a_backbone_or_with_broken_prompts_the_server_is_looked_at(
    stand_in: StandIn, causal: Backbone, prompts: dict[str, Prompt]
) -> None:
    serves(stand_in, causal, prompts)
    assert list(looked_at(stand_in, None, prompts)) == ["health", "ready", "version", "models", "latency"]
    broken = [ReadPrompt("facts", "facts", [])]
    found = named(list(check_server(Remote.of(stand_in.url), broken, causal)))
    assert list(found) == ["health", "ready", "version", "models", "latency"]


def test_nobody_there_is_one_fault(causal: Backbone, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    found = named(list(check_server(Remote.of("http://127.0.0.1:1"), [], causal)))
    assert list(found) == ["health"]
    assert found["health"].status == "failed"
    stand_in.pages["GET /health"] = (307, b"", {"Location": "http://elsewhere.example"})
    found = looked_at(stand_in, causal, {})
    assert list(found) == ["health"]
    assert "leads to http://elsewhere.example" in found["health"].found


@pytest.mark.parametrize(
    ("page", "answer", "name", "said"),
    [
        ("GET /health", (500, None), "health", "status 500"),
        ("GET /ready", (503, {"error": {"message": "loading"}}), "ready", "status 503: loading"),
        ("GET /ready", (500, None), "ready", "status 500"),
        ("GET /version", (500, None), "version", "status 500"),
        ("GET /v1/models", (500, None), "models", "status 500"),
        ("GET /v1/models", (200, {"data": 3}), "models", "not a list of models"),
        ("GET /v1/models", (200, [1]), "models", "not a list of models"),
        ("GET /v1/models", (200, b"<html>", {}), "models", "no JSON"),
    ],
)
def test_each_page_that_is_wrong_is_a_fault(
    page: str, answer: Page, name: str, said: str, stand_in: StandIn, causal: Backbone, prompts: dict[str, Prompt]
) -> None:
    serves(stand_in, causal, prompts)
    stand_in.pages[page] = answer
    found = looked_at(stand_in, causal, prompts)
    failed = {one.name: one.found for one in found.values() if one.status == "failed" and one.name != "latency"}
    assert list(failed) == [name]
    assert said in failed[name]
    assert ("try again" in found[name].remedy) == (answer[0] == 503)


def test_a_server_with_a_key(stand_in: StandIn, causal: Backbone, prompts: dict[str, Prompt]) -> None:
    serves(stand_in, causal, prompts)
    stand_in.key = "sk-secret"
    found = looked_at(stand_in, causal, prompts)
    assert found["models"].status == "failed"
    assert "--api-key-file" in found["models"].remedy
    found = looked_at(stand_in, causal, prompts, key="sk-secret")
    assert {one.status for one in found.values()} == {"ok"}
    assert "sk-secret" not in str(found)


def test_a_prompt_whose_rows_bring_choices_is_not_compared(stand_in: StandIn, causal: Backbone) -> None:
    prompt = replace(learned(causal, "{premise} [P*2] [Y]"), task=load_task("COPA"))
    serves(stand_in, causal, {"copa": prompt})
    found = looked_at(stand_in, causal, {"copa": prompt})
    assert found["answer of copa"].found == "not compared: its rows bring choices of their own"


def test_prompts_of_tasks_are_asked_as_a_row_of_theirs_would_be(stand_in: StandIn, causal: Backbone) -> None:
    """A text fills the one field of a task; a row of several is not made up."""
    sentiment, entails = load_task("sentiment"), load_task("RTE")
    one = Prompt.manual("{text} It was [Y]", task=sentiment)
    several = Prompt.manual("{premise}? [Y], {hypothesis}", task=entails)
    serves(stand_in, causal, {"one": one, "several": several})
    found = looked_at(stand_in, causal, {"one": one, "several": several})
    assert found["answer of one"].status == "ok", found
    assert "as in process" in found["answer of one"].found
    assert found["answer of several"].found == "not compared: a row of its task RTE has several fields"


@pytest.mark.parametrize("on", [True, False])
def test_what_vllm_takes(on: bool, stand_in: StandIn, causal: Backbone, prompts: dict[str, Prompt]) -> None:
    """Nothing is loaded there: the adapter's page is asked for by a method that it does not have."""
    off = {"error": {"message": "You must set `--enable-prompt-embeds` to input `prompt_embeds`."}}
    bad = {"error": {"message": "prompt_embeds is not base64"}}
    stand_in.pages |= {
        "GET /version": (200, {"version": "0.32.0"}),
        "GET /v1/models": (200, {"data": [{"id": "tiny", "owned_by": "vllm"}]}),
        "POST /v1/completions": (400, bad if on else off),
    }
    if on:
        stand_in.pages["GET /v1/load_lora_adapter"] = (405, {"detail": "Method Not Allowed"})
    found = looked_at(stand_in, causal, prompts)
    assert list(found) == ["health", "ready", "version", "models", "LoRA", "prompt_embeds", "latency"]
    assert {one.status for one in found.values()} == {"ok"}
    assert found["LoRA"].found.startswith("loaded on request" if on else "not loaded on request")
    assert found["prompt_embeds"].found.startswith("seem to be taken" if on else "not taken")
    assert {page for page, _ in stand_in.seen if page.startswith("POST")} == {"POST /v1/completions"}
