"""Health, the list of models, the tokenizer, and the browser page."""

import re
from collections.abc import Callable

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.data.task_files import load_task
from ptuning.serve.http.app import PAGE_FILES, PAGE_TYPES
from tests.serve.conftest import BASE, Api


def test_health_and_readiness_follow_the_phase_and_the_engine(fake_api: Callable[..., Api]) -> None:
    api = fake_api()
    assert [api.client.get(path).status_code for path in ("/health", "/ready", "/version")] == [200, 200, 200]
    api.service.phase = "draining"
    assert api.client.get("/health").status_code == api.client.head("/health").status_code == 200
    assert api.client.head("/ready").status_code == 503
    assert api.client.get("/ready").json()["error"]["code"] == "not_serving"
    refused = api.post("/v1/predict", model="mood", records=["a"])
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert api.client.get("/").status_code == api.client.get("/static/page.js").status_code == 200
    api.engine.is_alive = False
    assert api.client.get("/health").status_code == api.client.get("/ready").status_code == 503


def test_models_are_the_base_and_the_prompts_without_their_paths(api: Api) -> None:
    listed = api.client.get("/v1/models")
    assert [card["id"] for card in listed.json()["data"]] == [BASE, *sorted(api.prompts)]
    assert "secret" not in listed.text
    assert api.client.get(f"/v1/models/{BASE}").json()["parent"] is None
    mood = api.client.get("/v1/models/mood").json()
    assert (mood["parent"], mood["root"], mood["labels"]) == (BASE, "mood", ["positive", "negative"])
    assert mood["pieces"] == [
        {"kind": "slots", "count": 2},
        {"kind": "text", "text": " "},
        {"kind": "field", "name": "x"},
        {"kind": "text", "text": " It was "},
        {"kind": "target"},
    ]
    assert (mood["manual"]["id"], mood["manual"]["template"]) == ("mood:manual", "[X] It was [Y]")
    cards = {card["id"]: card for card in listed.json()["data"]}
    assert cards["pair"]["manual"] is None
    assert (cards["pair"]["columns"], cards["choose"]["answers"]) == (["x", "z"], "choices")
    assert set(cards["choose"]["columns"]) == set(load_task("copa").columns)


def test_a_prompt_without_its_slots_answers_under_a_name_of_its_own(api: Api) -> None:
    answer = api.post("/v1/predict", model=["mood", "mood:manual"], records=[{"x": "a b"}]).json()
    manual = api.prompts["mood"].without("slots")
    for prompt, [prediction] in zip((api.prompts["mood"], manual), answer["predictions"], strict=True):
        [expected] = api.model.predict([{"x": "a b"}], prompt)
        assert prediction["probabilities"] == pytest.approx(expected.probabilities, abs=1e-4)
    own, other = (
        api.post("/v1/predict", model=name, records=["a"]).json()["system_fingerprint"]
        for name in ("mood", "mood:manual")
    )
    assert own != other


def test_tokenize_and_back(api: Api, tiny: Backbone) -> None:
    answer = api.post("/tokenize", model="tiny", prompt="Kenya is", return_token_strs=True).json()
    assert answer["tokens"] == tiny.tokenizer.read("Kenya is")
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 64
    assert api.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": "Kenya is"}
    # lm-eval finds the tokenizer by these requests.
    about = api.client.get("/tokenizer_info", headers={"Content-Type": "application/json"}).json()
    assert (about["eos_token"], about["model_max_length"]) == ("<|endoftext|>", 64)
    special = api.post("/tokenize", prompt=about["eos_token"], add_special_tokens=False).json()
    assert special["tokens"] == [tiny.tokenizer.stop_id]


# The page


@pytest.mark.parametrize("name", sorted(PAGE_TYPES))
def test_files_of_the_page_have_their_types_and_a_strict_policy(api: Api, name: str) -> None:
    answer = api.client.get("/" if name == "/" else f"/static/{name}")
    assert (answer.status_code, answer.headers["content-type"]) == (200, f"{PAGE_TYPES[name]}; charset=utf-8")
    assert answer.headers["content-security-policy"].startswith("default-src 'self'; ")
    assert (answer.headers["x-content-type-options"], answer.headers["cache-control"]) == ("nosniff", "no-cache")
    assert answer.content == PAGE_FILES[name]
    assert len(answer.content) < 64_000


@pytest.mark.parametrize(
    "path", ["/static/", "/static/index.html", "/static/nope.js", "/static/..%2Fapp.py", "/static/%2e%2e/app.py"]
)
def test_there_are_no_other_files(api: Api, path: str) -> None:
    assert api.client.get(path).status_code == 404


def test_the_page_uses_no_other_host_no_inline_code_and_no_storage() -> None:
    texts = {name: data.decode() for name, data in PAGE_FILES.items()}
    for name, text in texts.items():
        hosts = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", re.sub(r"^\s*//.*", "", text, flags=re.MULTILINE)))
        assert hosts <= {"http://www.w3.org"}, name  # the name of a namespace
    for name, forbidden in (
        ("page.css", r"@import|url\("),
        ("/", r"<style|\sstyle=|\son\w+=|javascript:|<script(?![^>]*\ssrc=)"),
        ("page.js", r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|Parser|setHTML"),
        ("page.js", r"localStorage|sessionStorage|indexedDB|cookie|history\.|location\.(?!origin)"),
    ):
        assert not re.search(forbidden, texts[name]), name
