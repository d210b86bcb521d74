"""`/v1/chat/completions`: a message is the value of a prompt's one field, or all are a conversation."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.loading import load_backbone
from ptuning.prompt.predict import PromptModel
from ptuning.serve.engine.engine import Engine
from ptuning.template.chat import chat_template
from tests.conftest import learned
from tests.serve.conftest import Api, api_of
from tests.serve.http.test_completions import events_of

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "Kenya"}]
TALK = [*ASK, {"role": "assistant", "content": "Nairobi"}, {"role": "user", "content": "and Peru?"}]
# Short, since the tiny model reads 64 tokens.
JINJA = "{% for m in messages %}{{ ('is ' if m.role == 'assistant' else 'the ') + m.content + ' ' }}{% endfor %}"


def test_a_chat_is_the_completion_of_its_message(api: Api) -> None:
    answer = api.post(CHAT, model="write", messages=ASK, logprobs=True, top_logprobs=2).json()
    (choice,) = answer["choices"]
    expected = api.predict("write", {"x": "Kenya"}).text
    assert choice["message"] == {"role": "assistant", "content": expected, "refusal": None}
    assert answer["object"] == "chat.completion"
    same = api.post("/v1/completions", model="write", prompt="Kenya", logprobs=2).json()
    assert answer["usage"] == same["usage"]
    tokens, log_probs = same["choices"][0]["logprobs"]["tokens"], same["choices"][0]["logprobs"]["token_logprobs"]
    content = choice["logprobs"]["content"]
    assert [(token["token"], token["logprob"]) for token in content] == list(zip(tokens, log_probs, strict=True))
    assert all(len(token["top_logprobs"]) == 2 for token in content)
    assert content[0]["bytes"] == list(content[0]["token"].encode())


def test_a_message_in_parts_and_fields(api: Api) -> None:
    whole = api.post(CHAT, model="mood", messages=ASK).json()["choices"]
    parts = [{"type": "text", "text": "Ke"}, {"type": "text", "text": "nya"}]
    assert api.post(CHAT, model="mood", messages=[{"role": "user", "content": parts}]).json()["choices"] == whole
    fields = {"x": "Kenya", "z": "Africa"}
    (choice,) = api.post(CHAT, model="pair", messages=[], fields=fields).json()["choices"]
    assert choice["message"]["content"] == api.predict("pair", fields).text


@pytest.mark.parametrize("name", ["write", "mood"])
def test_a_stream_begins_with_the_role_and_adds_up(api: Api, name: str) -> None:
    whole = api.post(CHAT, model=name, messages=ASK).json()["choices"][0]
    chunks = events_of(api.post(CHAT, model=name, messages=ASK, stream=True).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert (deltas[0], deltas[-1]) == ({"role": "assistant", "content": ""}, {})
    assert "".join(delta.get("content", "") for delta in deltas) == whole["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


@pytest.fixture(scope="module")
def chatting(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A service with a chat prompt, on a model with a chat template."""
    folder = shutil.copytree(model_folder("gpt2"), tmp_path_factory.mktemp("chat") / "gpt2")
    (folder / "chat_template.jinja").write_text(JINJA, encoding="utf-8")
    backbone = load_backbone(str(folder), dtype="float32", device="cpu")
    engine = Engine(PromptModel(backbone))
    engine.start()
    prompt = learned(backbone, str(chat_template(backbone.tokenizer, "it")), seed=3)
    yield api_of(engine, {"chat": replace(prompt, target_tokens=6)})
    engine.stop()


def test_the_messages_are_the_conversation_of_a_chat_prompt(chatting: Api) -> None:
    sizes = []
    for messages in (ASK, TALK):
        answer = chatting.post(CHAT, model="chat", messages=messages).json()
        expected = chatting.predict("chat", {"messages": json.dumps(messages)})
        assert answer["choices"][0]["message"]["content"] == expected.text
        sizes.append(answer["usage"]["prompt_tokens"])
    assert sizes[0] < sizes[1]
    text = chatting.post("/v1/completions", model="chat", prompt="Kenya").json()
    fields = chatting.post(CHAT, model="chat", messages=[], fields={"messages": TALK}).json()
    assert [text["usage"]["prompt_tokens"], fields["usage"]["prompt_tokens"]] == sizes


@pytest.mark.parametrize(
    ("messages", "field", "fact"),
    [
        (TALK[:2], "messages[1]", "the user's"),
        ([{"role": "system", "content": "be kind"}, *ASK], "messages[0]", "system text"),
        ([*TALK[:2], {"role": "tool", "content": "a"}, *ASK], "messages[2].role", "roles"),
        ([*ASK, *ASK], "messages[1].content", "take turns"),
        ([{"role": "user", "content": " "}], "messages[0].content", "empty"),
        ([*TALK[:2], {"role": "user", "content": [{"type": "image_url"}]}], "messages[2].content[0]", "text"),
    ],
)
def test_messages_that_are_no_conversation(
    chatting: Api, messages: list[dict[str, Any]], field: str, fact: str
) -> None:
    answer = chatting.post(CHAT, model="chat", messages=messages)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field), answer.text
    assert fact in error["message"]
