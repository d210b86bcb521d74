"""`/v1/completions`: answers of prompts, continuations and log-probabilities of the base model, whole and streamed."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.engine.decoding import Token
from ptuning.prompt.rows import PromptRow, TextRow
from ptuning.serve.engine.job import Job
from tests.conftest import learned, plain_logits
from tests.serve.conftest import ANSWER, Api, api_of


def events_of(text: str) -> list[dict[str, Any]]:
    """Return the chunks of a stream, which must end as OpenAI's do."""
    parts = [part.removeprefix("data: ") for part in text.split("\n\n") if part and not part.startswith(":")]
    assert parts[-1] == "[DONE]"
    return [json.loads(part) for part in parts[:-1]]


def test_a_prompt_answers_the_value_of_its_field(api: Api) -> None:
    answer = api.post("/v1/completions", model="write", prompt=["Kenya", "Peru"]).json()
    expected = [api.predict("write", {"x": text}).text for text in ("Kenya", "Peru")]
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == list(enumerate(expected))
    assert answer["object"] == "text_completion"
    assert answer["system_fingerprint"].endswith("-abababababab")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


def test_a_label_is_a_text_of_one_token(api: Api) -> None:
    choice = api.post("/v1/completions", model="mood", prompt="Kenya", logprobs=5).json()["choices"][0]
    expected = api.predict("mood", {"x": "Kenya"}, top_k=2)
    assert (choice["text"], choice["finish_reason"]) == (expected.text, "stop")
    assert choice["logprobs"]["tokens"] == [expected.text]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx([expected.log_prob], abs=1e-4)
    scores = {candidate.text: candidate.log_prob for candidate in expected.candidates}
    assert choice["logprobs"]["top_logprobs"] == [pytest.approx(scores, abs=1e-4)]
    sent = {"temperature": 0.7, "max_tokens": 256, "stop": ["\n"], "seed": 1, "top_p": 0.9, "user": "me"}
    sent |= {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "best_of": 1, "suffix": None}
    same = api.post("/v1/completions", model="mood", prompt="Kenya", logprobs=5, **sent).json()["choices"][0]
    assert same["text"] == choice["text"], "what clients always send changes no label"


def test_the_base_model_continues_a_text_or_token_ids(api: Api, tiny: Backbone) -> None:
    ids = tiny.tokenizer.encode(["Kenya is"])[0]
    by_text, by_ids, several = (
        api.post("/v1/completions", model="tiny", prompt=prompt, max_tokens=3).json()
        for prompt in ("Kenya is", ids, [ids, ids[:1]])
    )
    assert by_text["choices"] == by_ids["choices"]
    assert by_text["usage"]["completion_tokens"] == 3
    assert several["choices"][0]["text"] == by_ids["choices"][0]["text"]
    echoed = api.post("/v1/completions", model="tiny", prompt="Kenya is", max_tokens=3, echo=True).json()["choices"][0]
    assert (echoed["text"], echoed["logprobs"]) == (f"Kenya is{by_text['choices'][0]['text']}", None)


@pytest.mark.parametrize("new", [0, 1])
def test_echo_scores_the_tokens_of_a_text_as_lm_eval_reads_them(api: Api, tiny: Backbone, new: int) -> None:
    """`local-completions` reads token_logprobs[context:-1] of max_tokens 1, and whether each was the likeliest."""
    ids = tiny.tokenizer.encode(["the capital of Kenya is"])[0]
    body = {"prompt": [ids, ids[:4]], "echo": True, "max_tokens": new, "logprobs": 1, "temperature": 0, "seed": 1234}
    answer = api.post("/v1/completions", model="tiny", **body).json()
    for choice, own in zip(answer["choices"], (ids, ids[:4]), strict=True):
        scores = choice["logprobs"]
        logs = plain_logits(tiny, own).log_softmax(-1)
        expected = [float(logs[at, token]) for at, token in enumerate(own[1:])]
        assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
        assert scores["token_logprobs"][1 : len(own)] == pytest.approx(expected, abs=1e-4)
        assert len(scores["tokens"]) == len(scores["top_logprobs"]) == len(scores["text_offset"]) == len(own) + new
        for value, top, row in zip(scores["token_logprobs"][1:], scores["top_logprobs"][1:], logs, strict=False):
            assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4)
            assert value in top.values()
    assert answer["usage"]["completion_tokens"] == 2 * new


@pytest.mark.parametrize("new", [0, 1])
def test_a_prompt_before_a_text_is_scored_as_peft_would(api: Api, tiny: Backbone, new: int) -> None:
    """Its slots are before ids and before a text alike, each of whose tokens has a log-probability."""
    prompt = replace(learned(tiny, "[P*3]{x} [Y]", seed=4), target_tokens=6)
    api = api_of(api.engine, {"front": prompt})
    text = "the capital of Kenya is"
    ids = tiny.tokenizer.encode([text])[0]
    rows = torch.cat([prompt.slot_vectors, tiny.embed(torch.tensor([ids]))[0]])[None]  # type: ignore[list-item]
    with torch.no_grad():
        logs = tiny.model(inputs_embeds=rows).logits[0].log_softmax(-1)
    expected = [float(logs[2 + at, token]) for at, token in enumerate(ids)]
    for given in (ids, text, [ids], [text]):
        body = {"prompt": given, "echo": True, "max_tokens": new, "logprobs": 1}
        answer = api.post("/v1/completions", model="front", **body).json()
        (choice,) = answer["choices"]
        assert choice["logprobs"]["token_logprobs"][: len(ids)] == pytest.approx(expected, abs=1e-4)
        assert len(choice["logprobs"]["tokens"]) == len(ids) + new
        assert answer["usage"]["prompt_tokens"] == len(ids) + 3
        assert choice["text"].startswith(text)
    choices = api.post("/v1/completions", model="front", prompt=[ids, ids[:2]], max_tokens=4).json()["choices"]
    for choice, own in zip(choices, (text, tiny.tokenizer.decode(ids[:2])), strict=True):
        assert choice["text"] == api.predict("front", {"x": own}, generation={"max_new_tokens": 4}).text


def test_sampling_parameters_reach_the_engine(fake_api: Callable[..., Api]) -> None:
    api = fake_api()
    api.engine.on_job = api.engine.answer

    def settings_of(**body: Any) -> tuple[list[Any], Any]:
        answer = api.post("/v1/completions", **body).json()
        rows = api.engine.jobs[-1].rows
        assert all(isinstance(row, PromptRow | TextRow) for row in rows)
        return [row.how for row in rows], answer["usage"]

    body = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": "x", "max_tokens": 9, "repetition_penalty": 1.5}
    hows, usage = settings_of(model="write", prompt=["a", "b"], n=2, logprobs=4, top_k=-1, **body)
    assert [how.generation.seed for how in hows] == [3, 4, 3, 4]
    assert {how.alternatives for how in hows} == {4}
    changed = hows[0].generation.model_dump(include=set(hows[0].generation.changed))
    assert changed == {
        "do_sample": True, "temperature": 0.5, "top_k": 0, "top_p": 0.9, "seed": 3, "stop_strings": ("x",),
        "max_new_tokens": 9, "repetition_penalty": 1.5,
    }  # fmt: skip
    # A text counts once, however many answers there are to it.
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (20, 8)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 8
    for temperature in (None, 0, 1e-9):
        [how], _ = settings_of(model="tiny", prompt="a", temperature=temperature, top_p=0.5, seed=5)
        assert not how.generation.changed
    seeds = {settings_of(model="tiny", prompt="a", temperature=1)[0][0].generation.seed for _ in range(3)}
    assert len(seeds) == 3, "without a seed, each request draws another one"


def test_several_fields_are_given_by_name(api: Api) -> None:
    rows = [{"x": "Kenya", "z": "Africa"}, {"x": "Peru", "z": "America"}]
    choices = api.post("/v1/completions", model="pair", fields=rows).json()["choices"]
    assert [choice["text"] for choice in choices] == [api.predict("pair", row).text for row in rows]


@pytest.mark.parametrize("body", [{"model": "write", "prompt": ["Kenya", "Peru"]}, {"model": "mood", "prompt": "Kenya"},
                                  {"model": "tiny", "prompt": "Kenya is", "max_tokens": 5}])  # fmt: skip
def test_a_stream_adds_up_to_the_whole_answer(api: Api, body: dict[str, Any]) -> None:
    whole = api.post("/v1/completions", logprobs=2, **body).json()
    answer = api.post("/v1/completions", logprobs=2, stream=True, stream_options={"include_usage": True}, **body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events_of(answer.text)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    for choice in whole["choices"]:
        own = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own] == [*[None] * (len(own) - 1), choice["finish_reason"]]
        tokens = [token for part in own if part["logprobs"] for token in part["logprobs"]["tokens"]]
        assert tokens == choice["logprobs"]["tokens"]
    plain = events_of(api.post("/v1/completions", stream=True, **body).text)
    assert not any("usage" in chunk for chunk in plain)


def test_a_fault_in_a_stream_is_its_last_event(fake_api: Callable[..., Api]) -> None:
    def fail(job: Job) -> None:
        job.listener.piece(0, "on", [Token(5, "on", -1.0)])
        job.listener.ended(1, ANSWER)
        job.listener.ended(0, RuntimeError("/secret/place"))

    api = fake_api(fail)
    answer = api.post("/v1/completions", model="write", prompt=["a", "b", "c"], stream=True)
    assert answer.status_code == 200
    *_, last = events_of(answer.text)
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert api.engine.jobs[0].cancelled, "the other rows are not needed any more"
