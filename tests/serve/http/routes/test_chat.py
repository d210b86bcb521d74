"""`/v1/chat/completions`: one message of the user is the value of a prompt's one open field."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.http.conftest import Asked
from tests.serve.http.routes.test_completions import events_of, written

ASK = [{"role": "user", "content": "Kenya"}]


def test_a_chat_is_the_completion_of_its_message(asked: Asked) -> None:
    found = asked.post("/v1/chat/completions", model="write", messages=ASK, logprobs=True, top_logprobs=2).json()
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": written(asked, "Kenya"), "refusal": None}
    assert found["object"] == "chat.completion"
    same = asked.post("/v1/completions", model="write", prompt="Kenya", logprobs=2).json()
    assert found["usage"] == same["usage"]
    content = choice["logprobs"]["content"]
    assert [one["token"] for one in content] == same["choices"][0]["logprobs"]["tokens"]
    assert [one["logprob"] for one in content] == same["choices"][0]["logprobs"]["token_logprobs"]
    assert all(len(one["top_logprobs"]) == 2 for one in content)
    assert content[0]["bytes"] == list(content[0]["token"].encode())


def test_parts_of_text_are_one_text(asked: Asked) -> None:
    parts = [{"type": "text", "text": "Ke"}, {"type": "text", "text": "nya"}]
    whole = asked.post("/v1/chat/completions", model="mood", messages=ASK).json()["choices"]
    found = asked.post("/v1/chat/completions", model="mood", messages=[{"role": "user", "content": parts}])
    assert found.json()["choices"] == whole


def test_fields_come_with_an_empty_list_of_messages(asked: Asked) -> None:
    found = asked.post("/v1/chat/completions", model="pair", messages=[], fields={"x": "Kenya", "z": "Africa"})
    (wanted,) = asked.model.predict([{"x": "Kenya", "z": "Africa"}], asked.prompts["pair"])
    assert found.json()["choices"][0]["message"]["content"] == wanted.text


def test_a_stream_begins_with_who_speaks_and_adds_up(asked: Asked) -> None:
    for name in ("write", "mood"):
        whole = asked.post("/v1/chat/completions", model=name, messages=ASK).json()["choices"][0]
        chunks = events_of(asked.post("/v1/chat/completions", model=name, messages=ASK, stream=True).text)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert deltas[-1] == {}
        assert "".join(one.get("content", "") for one in deltas) == whole["message"]["content"]
        assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"model": "tiny"}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "be kind"}, *ASK]}, "messages[0]"),
        ({"messages": [*ASK, {"role": "assistant", "content": "Nairobi"}, *ASK]}, "messages[1]"),
        ({"messages": [*ASK, *ASK]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"fields": {"x": "a"}}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"model": "pair"}, "messages[0].content"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(asked: Asked, more: dict[str, Any], param: str) -> None:
    found = asked.client.post("/v1/chat/completions", json={"model": "write", "messages": ASK, **more})
    assert (found.status_code, found.json()["error"]["param"]) == (400, param), found.text
