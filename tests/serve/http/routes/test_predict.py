"""`/v1/predict`: the objects of `ptuning predict --json`, for one prompt or many; a record that fails does so alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.serve.engine.job import CancelledError, Job, Outcome, StoppedError
from tests.serve.http.conftest import Asked

TEXTS = ["Kenya", "France and Peru", "the movie Zürich was great", "</s> [P*3] <|endoftext|> {x}", "a\x00b\n\u202e"]


def close_to(found: Any, wanted: Any) -> None:
    """Equal, but for the last digits of numbers."""
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for name in wanted:
            close_to(found[name], wanted[name])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            close_to(one, other)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-4)
    else:
        assert found == wanted


@pytest.mark.parametrize("name", ["mood", "write"])
def test_predictions_are_those_of_the_model_in_process(asked: Asked, name: str) -> None:
    """Whatever the texts hold, it is text: markup of templates, names of special tokens, control characters."""
    records = [{"x": text} for text in TEXTS]
    found = asked.post("/v1/predict", model=name, records=records)
    assert found.status_code == 200, found.text
    wanted = []
    for record in records:
        answer = asked.model.predict([record], asked.prompts[name])[0].to_json()
        answer.pop("tokens", None)  # which `ptuning predict --json` tells of models that fill masks
        wanted.append({"record": record, **answer})
    close_to(found.json()["predictions"], wanted)
    assert found.json()["usage"]["prompt_tokens"] > 0


def test_texts_are_the_one_open_field(asked: Asked) -> None:
    found = asked.post("/v1/predict", model="mood", records=TEXTS).json()["predictions"]
    assert [one["record"] for one in found] == [{"x": text} for text in TEXTS]


def test_many_prompts_on_the_same_records_give_a_list_for_each(asked: Asked) -> None:
    names = ["mood", "write", "pair", "mood"]
    records = [{"x": "Kenya", "z": "Africa"}, {"x": "Peru", "z": "America"}]
    found = asked.post("/v1/predict", model=names, records=records).json()["predictions"]
    alone = [asked.post("/v1/predict", model=name, records=records).json()["predictions"] for name in names]
    close_to(found, alone)


def test_rows_of_a_task_are_read_as_its_files_are(asked: Asked) -> None:
    row = {"premise": "It rained.", "choice1": "a", "choice2": "The street was wet.", "question": "effect"}
    (found,) = asked.post("/v1/predict", model="choose", records=[row]).json()["predictions"]
    assert len(found["probabilities"]) == 2
    assert sum(found["probabilities"].values()) == pytest.approx(1)
    refused = asked.post("/v1/predict", model="choose", records=["It rained."])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "records[0]")


def test_fields_that_a_prompt_remembers_by_another_name(asked: Asked) -> None:
    found = asked.post("/v1/predict", model="renamed", records=[{"country": "Kenya"}, {"x": "Kenya"}])
    first, second = (one["probabilities"] for one in found.json()["predictions"])
    close_to(first, second)


def test_candidates_and_settings_are_those_of_predict(asked: Asked) -> None:
    body = {"records": ["Kenya"], "candidates": ["yes", "no", "Nairobi"], "top_k": 3, "normalise": "mean"}
    (found,) = asked.post("/v1/predict", model="write", **body).json()["predictions"]
    (wanted,) = asked.model.predict(
        [{"x": "Kenya"}], asked.prompts["write"], ["yes", "no", "Nairobi"], top_k=3, normalise="mean"
    )
    close_to(found["candidates"], wanted.to_json()["candidates"])
    (held,) = asked.post("/v1/predict", model="mood", records=["a"], min_probability=1.0).json()["predictions"]
    assert held["prediction"] is None
    assert held["abstained"] is True
    (written,) = asked.post(
        "/v1/predict", model="write", records=["a"], generation={"max_new_tokens": 2, "stop_strings": ["x"]}
    ).json()["predictions"]
    (wanted,) = asked.model.predict(
        [{"x": "a"}], asked.prompts["write"], generation={"max_new_tokens": 2, "stop_strings": ["x"]}
    )
    assert written["prediction"] == wanted.text


def test_a_record_that_fails_does_so_alone(asked: Asked) -> None:
    records = ["Kenya", {"z": "a"}, {"x": "the capital " * 200}, {"x": "Peru"}, "half \ud800 a letter"]
    body = json.dumps({"model": "kept", "records": records})
    found = asked.client.post("/v1/predict", content=body, headers={"content-type": "application/json"})
    assert found.status_code == 200, found.text
    answers = found.json()["predictions"]
    assert ["error" in one for one in answers] == [False, True, True, False, True]
    codes = [answers[at]["error"]["code"] for at in (1, 2, 4)]
    assert codes == ["invalid_record", "context_length_exceeded", "invalid_record"]
    assert [answers[at]["error"]["param"] for at in (1, 2, 4)] == ["records[1]", "records[2]", "records[4]"]
    # Without the advice about an option, which is for the command line.
    assert answers[1]["error"]["message"] == "records[1]: no text in the field 'x'; its fields: z."
    alone = asked.post("/v1/predict", model="kept", records=["Kenya", "Peru"]).json()["predictions"]
    close_to([answers[0], answers[3]], alone)


def test_strange_texts_are_texts(asked: Asked) -> None:
    """Abuse case 18: marks of slots and fields, special tokens, control characters, right-to-left marks."""
    texts = ["[P] [Y] {x}", "<s> </s> <|endoftext|> [MASK]", "a\x00\x1b[31m\r\nINFO b", "\u202edrow\u202c \u200b", "\n"]
    texts += ["\U0001f600 \ufffe", "e\u0301 \u00e9"]
    for name in ("mood", "write"):
        found = asked.post("/v1/predict", model=name, records=texts).json()["predictions"]
        for text, answer in zip(texts, found, strict=True):
            (expected,) = asked.model.predict([{"x": text}], asked.prompts[name])
            assert (answer["record"], answer["prediction"]) == ({"x": text}, expected.text)


def test_records_that_all_fail_alike_are_an_error_of_the_request(asked: Asked) -> None:
    found = asked.post("/v1/predict", model="mood", records=[{"z": "a"}, {"w": "b"}])
    assert (found.status_code, found.json()["error"]["code"]) == (400, "invalid_record")
    found = asked.post("/v1/predict", model="mood", records=["a"], count_stop=True)
    assert (found.status_code, found.json()["error"]["code"]) == (400, "invalid_value")
    mixed = asked.post("/v1/predict", model="kept", records=[{"z": "a"}, "the capital " * 200])
    assert mixed.status_code == 200
    assert all("error" in one for one in mixed.json()["predictions"])


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "tiny", "records": ["a"]}, 400, "model"),
        ({"model": ["mood", "nope"], "records": ["a"]}, 404, "model"),
        ({"model": [], "records": ["a"]}, 400, "model"),
        ({"model": "mood", "records": []}, 400, "records"),
        ({"model": "mood", "records": [3]}, 400, "records[0]"),
        ({"model": "mood", "records": "a"}, 400, "records"),
        ({"model": "mood", "records": ["a"], "top_k": 0}, 400, "top_k"),
        ({"model": "mood", "records": ["a"], "normalise": "max"}, 400, "normalise"),
        ({"model": "write", "records": ["a"], "generation": {"wat": 1}}, 400, "generation"),
        ({"model": "mood", "records": ["a"], "candidates": ["b", "b"]}, 400, "records[0]"),
        ({"model": "mood", "records": ["a"], "calibrate": "yes"}, 400, "calibrate"),
    ],
)
def test_what_is_wrong_is_named(asked: Asked, body: dict[str, Any], status: int, param: str) -> None:
    found = asked.client.post("/v1/predict", json=body)
    assert (found.status_code, found.json()["error"]["param"]) == (status, param), found.text


def test_an_answer_that_is_no_number_is_a_fault_and_its_neighbours_are_unhurt(
    stubbed: Callable[..., Asked], caplog: pytest.LogCaptureFixture
) -> None:
    def take(job: Job) -> None:
        for at, value in enumerate((-1.0, math.nan, -math.inf)):
            job.listener.ended(at, Outcome(Prediction("a", (Candidate("a", value),))))

    found = stubbed(take).post("/v1/predict", model="write", records=["a", "b", "c"])
    first, second, third = found.json()["predictions"]
    assert first["prediction"] == "a"
    assert second["error"]["code"] == "internal_error"
    assert third["candidates"][0]["log_prob"] == -9999.0


@pytest.mark.parametrize(
    ("error", "code"), [(StoppedError("it ends"), "not_serving"), (CancelledError("gone"), "cancelled")]
)
def test_an_engine_that_ends_is_503(stubbed: Callable[..., Asked], error: Exception, code: str) -> None:
    def take(job: Job) -> None:
        for at in range(len(job.rows)):
            job.listener.ended(at, error)

    for path, body in (("/v1/predict", {"records": ["a", "b"]}), ("/v1/completions", {"prompt": "a"})):
        found = stubbed(take).post(path, model="write", **body)
        assert (found.status_code, found.json()["error"]["code"]) == (503, code)
