"""The tokenizer over HTTP, and labels as vLLM's clients read them."""

from __future__ import annotations

import json

import pytest

from ptuning.backbone.backbone import Backbone
from tests.serve.http.conftest import Asked


def test_tokenize_there_and_back(asked: Asked, tiny: Backbone) -> None:
    found = asked.post("/tokenize", model="tiny", prompt="Kenya is", return_token_strs=True).json()
    assert found["tokens"] == tiny.tokenizer.read("Kenya is")
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 64
    assert asked.post("/detokenize", tokens=found["tokens"]).json() == {"prompt": "Kenya is"}
    special = asked.post("/tokenize", prompt="<|endoftext|>", add_special_tokens=False).json()
    assert special["tokens"] == [tiny.tokenizer.stop_id]


def test_the_tokenizers_special_tokens(asked: Asked) -> None:
    found = asked.client.get("/tokenizer_info").json()
    assert found["eos_token"] == "<|endoftext|>"
    assert found["model_max_length"] == 64


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {"model": "nope", "prompt": "a"}, 404),
        ("/tokenize", {"prompt": "\ud800"}, 400),
        ("/detokenize", {"tokens": [10**8]}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
    ],
)
def test_wrong_tokens(asked: Asked, path: str, body: dict[str, object], status: int) -> None:
    assert (
        asked.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"}).status_code
        == status
    )


def test_classify_gives_the_probabilities_in_the_order_of_the_labels(asked: Asked) -> None:
    found = asked.post("/v1/classify", model="mood", input=["Kenya", {"x": "Peru"}]).json()
    wanted = asked.model.predict([{"x": "Kenya"}, {"x": "Peru"}], asked.prompts["mood"])
    for item, one in zip(found["data"], wanted, strict=True):
        assert (item["label"], item["labels"], item["num_classes"]) == (one.text, ["positive", "negative"], 2)
        assert one.probabilities is not None
        assert item["probs"] == pytest.approx([one.probabilities[name] for name in item["labels"]], abs=1e-4)
    assert asked.post("/classify", model="mood", input="Kenya").json()["data"][0]["label"] == wanted[0].text


@pytest.mark.parametrize("model", ["write", "tiny"])
def test_what_writes_does_not_classify(asked: Asked, model: str) -> None:
    found = asked.post("/v1/classify", model=model, input="a")
    assert (found.status_code, found.json()["error"]["code"]) == (400, "unsupported")
