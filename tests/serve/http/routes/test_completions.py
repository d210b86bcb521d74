"""`/v1/completions`: answers of prompts, continuations and log-probabilities of the base model, whole and streamed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.engine.decoding import Token
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.prompt.rows import PromptRow, TextRow
from ptuning.serve.engine.job import Job, Outcome, Usage
from tests.conftest import learned, plain_logits
from tests.serve.http.conftest import Asked, Shelf


def events_of(text: str) -> list[dict[str, Any]]:
    """Return the chunks of a stream, which must end as OpenAI's do."""
    parts = [part.removeprefix("data: ") for part in text.split("\n\n") if part and not part.startswith(":")]
    assert parts[-1] == "[DONE]"
    return [json.loads(part) for part in parts[:-1]]


def written(asked: Asked, text: str, **how: Any) -> str:
    return asked.model.predict([{"x": text}], asked.prompts["write"], generation=how)[0].text


def test_a_prompt_answers_the_value_of_its_field(asked: Asked) -> None:
    found = asked.post("/v1/completions", model="write", prompt=["Kenya", "Peru"])
    answer = found.json()
    assert [one["text"] for one in answer["choices"]] == [written(asked, "Kenya"), written(asked, "Peru")]
    assert [one["index"] for one in answer["choices"]] == [0, 1]
    assert answer["object"] == "text_completion"
    assert answer["system_fingerprint"].endswith("-abababababab")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


def test_labels_are_the_text_and_their_log_probabilities_those_of_one_token(asked: Asked) -> None:
    choice = asked.post("/v1/completions", model="mood", prompt="Kenya", logprobs=5).json()["choices"][0]
    (wanted,) = asked.model.predict([{"x": "Kenya"}], asked.prompts["mood"], top_k=2)
    assert (choice["text"], choice["finish_reason"]) == (wanted.text, "stop")
    assert choice["logprobs"]["tokens"] == [wanted.text]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx([wanted.log_prob], abs=1e-4)
    best = {one.text: one.log_prob for one in wanted.candidates}
    assert choice["logprobs"]["top_logprobs"] == [pytest.approx(best, abs=1e-4)]


def test_what_clients_always_send_changes_no_label(asked: Asked) -> None:
    plain = asked.post("/v1/completions", model="mood", prompt="Kenya").json()["choices"]
    sent = {"temperature": 0.7, "max_tokens": 256, "stop": ["\n"], "seed": 1, "top_p": 0.9, "user": "me"}
    sent |= {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "best_of": 1, "suffix": None}
    assert asked.post("/v1/completions", model="mood", prompt="Kenya", **sent).json()["choices"] == plain


def test_the_base_model_goes_on_with_a_text_or_with_ids(asked: Asked, tiny: Backbone) -> None:
    ids = tiny.tokenizer.encode(["Kenya is"])[0]
    by_text = asked.post("/v1/completions", model="tiny", prompt="Kenya is", max_tokens=3).json()
    by_ids = asked.post("/v1/completions", model="tiny", prompt=ids, max_tokens=3).json()
    assert by_text["choices"] == by_ids["choices"]
    assert by_text["usage"]["completion_tokens"] == 3
    several = asked.post("/v1/completions", model="tiny", prompt=[ids, ids[:1]], max_tokens=3).json()
    assert several["choices"][0]["text"] == by_ids["choices"][0]["text"]


@pytest.mark.parametrize("most", [0, 1])
def test_echo_scores_the_tokens_of_a_text_as_lm_eval_asks(asked: Asked, tiny: Backbone, most: int) -> None:
    """`local-completions` reads token_logprobs[context:-1] behind max_tokens 1, and whether each was the likeliest."""
    ids = tiny.tokenizer.encode(["the capital of Kenya is"])[0]
    body = {"prompt": [ids, ids[:4]], "echo": True, "max_tokens": most, "logprobs": 1, "temperature": 0, "seed": 1234}
    found = asked.post("/v1/completions", model="tiny", **body).json()
    for choice, own in zip(found["choices"], (ids, ids[:4]), strict=True):
        told = choice["logprobs"]
        logs = plain_logits(tiny, own).log_softmax(-1)
        wanted = [float(logs[at, token]) for at, token in enumerate(own[1:])]
        assert told["token_logprobs"][0] is None
        assert told["top_logprobs"][0] is None
        assert told["token_logprobs"][1 : len(own)] == pytest.approx(wanted, abs=1e-4)
        assert len(told["tokens"]) == len(told["top_logprobs"]) == len(told["text_offset"]) == len(own) + most
        for value, best, row in zip(told["token_logprobs"][1 : len(own)], told["top_logprobs"][1:], logs, strict=False):
            assert max(best.values()) == pytest.approx(float(row.max()), abs=1e-4)
            assert value in best.values()
    assert found["usage"]["completion_tokens"] == 2 * most


@pytest.mark.parametrize("most", [0, 1])
def test_a_prompt_in_front_of_a_text_is_scored_as_peft_would(asked: Asked, tiny: Backbone, most: int) -> None:
    """Its slots stand in front of ids and of a text alike, each of whose tokens has a log-probability."""
    prompt = dataclasses.replace(learned(tiny, "[P*3]{x} [Y]", seed=4), target_tokens=6)
    asked.service.registry.served["front"] = Shelf.of({"front": prompt}).served["front"]  # type: ignore[index]
    text = "the capital of Kenya is"
    ids = tiny.tokenizer.encode([text])[0]
    rows = torch.cat([prompt.slot_vectors, tiny.embed(torch.tensor([ids]))[0]])[None]  # type: ignore[list-item]
    with torch.no_grad():
        logs = tiny.model(inputs_embeds=rows).logits[0].log_softmax(-1)
    wanted = [float(logs[2 + at, token]) for at, token in enumerate(ids)]
    for given in (ids, text, [ids], [text]):
        body = {"prompt": given, "echo": True, "max_tokens": most, "logprobs": 1}
        found = asked.post("/v1/completions", model="front", **body).json()
        (choice,) = found["choices"]
        told = choice["logprobs"]
        assert told["token_logprobs"][: len(ids)] == pytest.approx(wanted, abs=1e-4)
        assert len(told["tokens"]) == len(ids) + most
        assert found["usage"]["prompt_tokens"] == len(ids) + 3
        assert choice["text"].startswith(text)
    written = asked.post("/v1/completions", model="front", prompt=[ids, ids[:2]], max_tokens=4).json()["choices"]
    for choice, own in zip(written, (text, tiny.tokenizer.decode(ids[:2])), strict=True):
        (same,) = asked.model.predict([{"x": own}], prompt, generation={"max_new_tokens": 4})
        assert choice["text"] == same.text


@pytest.mark.parametrize("name", ["write", "mood", "pair", "renamed"])
def test_ids_and_echo_need_a_template_that_ends_in_its_field(asked: Asked, name: str) -> None:
    for body in ({"prompt": [5, 6]}, {"prompt": "a", "echo": True}):
        found = asked.post("/v1/completions", model=name, **body)
        assert found.status_code == 400
        assert found.json()["error"]["param"] in ("prompt", "echo")


def test_echo_gives_the_text_back(asked: Asked) -> None:
    alone = asked.post("/v1/completions", model="tiny", prompt="Kenya is", max_tokens=2).json()["choices"][0]["text"]
    both = asked.post("/v1/completions", model="tiny", prompt="Kenya is", max_tokens=2, echo=True).json()["choices"][0]
    assert both["text"] == f"Kenya is{alone}"
    assert both["logprobs"] is None


def test_sampling_is_asked_of_the_engine(stubbed: Callable[..., Asked]) -> None:
    jobs: list[Job] = []

    def take(job: Job) -> None:
        jobs.append(job)
        for at in range(len(job.rows)):
            job.listener.ended(at, Outcome(Prediction("a", (Candidate("a", -1.0),)), Usage(7, 1, 3)))

    asked = stubbed(take)
    body = {"prompt": ["a", "b"], "n": 2, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": "x", "max_tokens": 9}
    found = asked.post("/v1/completions", model="write", logprobs=4, **body).json()
    rows = jobs[0].rows
    assert all(isinstance(row, PromptRow) for row in rows)
    hows = [row.how for row in rows if isinstance(row, PromptRow)]
    assert [how.generation.seed for how in hows] == [3, 4, 3, 4]
    assert {how.generation.stop_strings for how in hows} == {("x",)}
    assert {(how.generation.do_sample, how.generation.temperature, how.generation.top_p) for how in hows} == {
        (True, 0.5, 0.9)
    }
    assert {(how.generation.max_new_tokens, how.alternatives, how.generation.top_k) for how in hows} == {(9, 4, 0)}
    # A text counts once, however many answers there are to it.
    assert (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]) == (14, 4)
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 6
    for temperature in (None, 0, 1e-9):
        asked.post("/v1/completions", model="tiny", prompt="a", temperature=temperature, top_p=0.5, seed=5)
        (row,) = jobs[-1].rows
        assert isinstance(row, TextRow)
        assert not row.how.generation.changed
    seeds = set()
    for _ in range(3):
        asked.post("/v1/completions", model="tiny", prompt="a", temperature=1)
        (row,) = jobs[-1].rows
        assert isinstance(row, TextRow)
        seeds.add(row.how.generation.seed)
    assert len(seeds) == 3, "who gives no seed gets another draw each time"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "b"}, "suffix"),
        ({"top_k": 5}, "top_k"),
        ({"wat": True}, "wat"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [5, 6]}, "prompt"),
        ({"echo": True}, "prompt"),
        ({"model": "mood", "echo": True}, "echo"),
        ({"fields": {"x": "b"}}, "prompt"),
        ({"model": "pair"}, "prompt"),
        ({"model": "choose"}, "prompt"),
        ({"model": "tiny", "fields": {"x": "a"}}, "fields"),
        ({"model": "tiny", "echo": True, "stream": True}, "echo"),
        ({"model": "tiny", "prompt": [100_000], "max_tokens": 1}, "prompt"),
        ({"model": "tiny", "prompt": ""}, "prompt"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(asked: Asked, more: dict[str, Any], param: str) -> None:
    found = asked.client.post("/v1/completions", json={"model": "write", "prompt": "a", **more})
    assert (found.status_code, found.json()["error"]["param"]) == (400, param), found.text


def test_several_fields_are_given_by_name(asked: Asked) -> None:
    rows = [{"x": "Kenya", "z": "Africa"}, {"x": "Peru", "z": "America"}]
    found = asked.post("/v1/completions", model="pair", fields=rows).json()
    wanted = asked.model.predict(rows, asked.prompts["pair"])
    assert [one["text"] for one in found["choices"]] == [one.text for one in wanted]
    missing = asked.post("/v1/completions", model="pair", fields={"x": "Kenya"})
    assert (missing.status_code, missing.json()["error"]["param"]) == (400, "fields")


@pytest.mark.parametrize("body", [{"model": "write", "prompt": ["Kenya", "Peru"]}, {"model": "mood", "prompt": "Kenya"},
                                  {"model": "tiny", "prompt": "Kenya is", "max_tokens": 5}])  # fmt: skip
def test_a_stream_adds_up_to_the_whole_answer(asked: Asked, body: dict[str, Any]) -> None:
    whole = asked.post("/v1/completions", logprobs=2, **body).json()
    found = asked.post("/v1/completions", logprobs=2, stream=True, stream_options={"include_usage": True}, **body)
    assert found.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events_of(found.text)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    for choice in whole["choices"]:
        own = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
        assert "".join(one["text"] for one in own) == choice["text"]
        assert [one["finish_reason"] for one in own][-1] == choice["finish_reason"]
        assert not any(one["finish_reason"] for one in own[:-1])
        tokens = [token for one in own if one["logprobs"] for token in one["logprobs"]["tokens"]]
        assert tokens == choice["logprobs"]["tokens"]


def test_without_being_asked_a_stream_has_no_usage(asked: Asked) -> None:
    found = events_of(asked.post("/v1/completions", model="write", prompt="a", stream=True).text)
    assert not any("usage" in chunk for chunk in found)


def test_a_row_that_fails_before_anything_is_written_has_its_status(asked: Asked) -> None:
    found = asked.post("/v1/completions", model="kept", prompt="the capital " * 200, stream=True)
    assert (found.status_code, found.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_fault_in_a_stream_is_told_in_it_and_ends_it(stubbed: Callable[..., Asked]) -> None:
    jobs: list[Job] = []

    def take(job: Job) -> None:
        jobs.append(job)
        job.listener.piece(0, "on", [Token(5, "on", -1.0)])
        job.listener.ended(0, RuntimeError("/secret/place"))

    found = stubbed(take).post("/v1/completions", model="write", prompt=["a", "b"], stream=True)
    assert found.status_code == 200
    *_, last = events_of(found.text)
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in found.text
    assert jobs[0].cancelled, "the other rows are of no use any more"
