"""`/v1/chat/completions`: one message of the user is the value of a prompt's one open field."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.loading import load_backbone
from ptuning.prompt.predict import PromptModel
from ptuning.serve.engine.engine import Engine
from ptuning.template.chat import chat_template
from tests.conftest import learned
from tests.serve.http.conftest import Asked, served
from tests.serve.http.routes.test_completions import events_of, written

# Short, since the tiny model reads 64 tokens.
JINJA = "{% for m in messages %}{{ ('is ' if m.role == 'assistant' else 'the ') + m.content + ' ' }}{% endfor %}"
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


TALK = [*ASK, {"role": "assistant", "content": "Nairobi"}, {"role": "user", "content": "and Peru?"}]


@pytest.fixture(scope="module")
def chatting(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """A service with a chat prompt, on a model with a chat template."""
    folder = shutil.copytree(model_folder("gpt2"), tmp_path_factory.mktemp("chat") / "gpt2")
    (folder / "chat_template.jinja").write_text(JINJA, encoding="utf-8")
    backbone = load_backbone(str(folder), dtype="float32", device="cpu")
    engine = Engine(PromptModel(backbone))
    engine.start()
    prompt = learned(backbone, str(chat_template(backbone.tokenizer, "it")), seed=3)
    yield served(engine, {"chat": dataclasses.replace(prompt, target_tokens=6)})
    engine.stop()


def test_the_messages_are_the_conversation_of_a_chat_prompt(chatting: Asked) -> None:
    """As in process: a row reads the turns in front of the last one, and its answer is that of their record."""
    answers = []
    for messages in (ASK, TALK):
        found = chatting.post("/v1/chat/completions", model="chat", messages=messages).json()
        record = {"messages": json.dumps(messages)}
        (wanted,) = chatting.model.predict([record], chatting.prompts["chat"])
        assert found["choices"][0]["message"]["content"] == wanted.text
        answers.append(found["usage"]["prompt_tokens"])
    assert answers[0] < answers[1]
    text = chatting.post("/v1/completions", model="chat", prompt="Kenya").json()
    assert text["usage"]["prompt_tokens"] == answers[0]
    fields = chatting.post("/v1/chat/completions", model="chat", messages=[], fields={"messages": TALK}).json()
    assert fields["usage"]["prompt_tokens"] == answers[1]


@pytest.mark.parametrize(
    ("messages", "param", "says"),
    [
        (TALK[:2], "messages[1]", "the last message must be the user's"),
        ([{"role": "system", "content": "be kind"}, *ASK], "messages[0]", "system text of its own"),
        ([*TALK[:2], {"role": "tool", "content": "a"}, *ASK], "messages[2].role", "known roles are"),
        ([*ASK, *ASK], "messages[1].content", "user and assistant take turns"),
        ([{"role": "user", "content": " "}], "messages[0].content", "is empty"),
        ([*TALK[:2], {"role": "user", "content": [{"type": "image_url"}]}], "messages[2].content[0]", "only parts"),
    ],
)
def test_messages_that_are_no_conversation(
    chatting: Asked, messages: list[dict[str, Any]], param: str, says: str
) -> None:
    found = chatting.client.post("/v1/chat/completions", json={"model": "chat", "messages": messages})
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (400, param), found.text
    assert says in error["message"]


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
