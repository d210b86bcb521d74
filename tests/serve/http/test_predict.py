"""`/v1/predict`: the objects of `ptuning predict --json`, for one prompt or many; and `/v1/classify`."""

from typing import Any

import pytest

from tests.serve.conftest import Api

# Abuse case 18: whatever the texts hold, it is text: markup of templates, special tokens, control characters.
TEXTS = [
    "Kenya", "France and Peru", "the movie Zürich was great", "</s> [P*3] <|endoftext|> {x} [Y] [MASK]",
    "a\x00b\n\x1b[31m\r\nINFO", "\u202edrow\u202c \u200b", "\n", "\U0001f600 \ufffe e\u0301 \u00e9",
]  # fmt: skip


def is_close(value: Any, expected: Any) -> bool:
    """Whether two JSON values are equal, but for the last digits of numbers."""
    if isinstance(expected, dict):
        return list(value) == list(expected) and all(is_close(value[name], expected[name]) for name in expected)
    if isinstance(expected, list):
        return len(value) == len(expected) and all(map(is_close, value, expected))
    return bool(value == pytest.approx(expected, abs=1e-4) if isinstance(expected, float) else value == expected)


@pytest.mark.parametrize("name", ["mood", "write"])
def test_predictions_are_those_of_the_model_in_process(api: Api, name: str) -> None:
    answer = api.post("/v1/predict", model=name, records=[{"x": text} for text in TEXTS]).json()
    expected: list[Any] = []
    for text in TEXTS:
        prediction = api.predict(name, {"x": text}).to_json()
        prediction.pop("tokens", None)  # which `ptuning predict --json` shows of models that fill masks
        expected.append({"record": {"x": text}, **prediction})
    assert is_close(answer["predictions"], expected)
    assert answer["usage"]["prompt_tokens"] > 0
    texts = api.post("/v1/predict", model=name, records=TEXTS).json()
    assert is_close(texts["predictions"], expected), "a text is the one open field"


def test_many_prompts_on_the_same_records_give_a_list_for_each(api: Api) -> None:
    names = ["mood", "write", "pair", "mood"]
    records = [{"x": "Kenya", "z": "Africa"}, {"x": "Peru", "z": "America"}]
    predictions = api.post("/v1/predict", model=names, records=records).json()["predictions"]
    alone = [api.post("/v1/predict", model=name, records=records).json()["predictions"] for name in names]
    assert is_close(predictions, alone)


def test_rows_of_a_task_and_renamed_fields_are_read_as_in_files(api: Api) -> None:
    row = {"premise": "It rained.", "choice1": "a", "choice2": "The street was wet.", "question": "effect"}
    (prediction,) = api.post("/v1/predict", model="choose", records=[row]).json()["predictions"]
    assert len(prediction["probabilities"]) == 2
    assert sum(prediction["probabilities"].values()) == pytest.approx(1)
    records = [{"country": "Kenya"}, {"x": "Kenya"}]
    first, second = api.post("/v1/predict", model="renamed", records=records).json()["predictions"]
    assert is_close(first["probabilities"], second["probabilities"])


def test_candidates_and_settings_are_those_of_predict(api: Api) -> None:
    how: dict[str, Any] = {"top_k": 3, "normalise": "mean"}
    body = {"records": ["Kenya"], "candidates": ["yes", "no", "Nairobi"], **how}
    (prediction,) = api.post("/v1/predict", model="write", **body).json()["predictions"]
    expected = api.model.predict([{"x": "Kenya"}], api.prompts["write"], body["candidates"], **how)[0]
    assert is_close(prediction["candidates"], expected.to_json()["candidates"])
    (abstained,) = api.post("/v1/predict", model="mood", records=["a"], min_probability=1.0).json()["predictions"]
    assert (abstained["prediction"], abstained["abstained"]) == (None, True)
    generation = {"max_new_tokens": 2, "stop_strings": ["x"]}
    (written,) = api.post("/v1/predict", model="write", records=["a"], generation=generation).json()["predictions"]
    assert written["prediction"] == api.predict("write", {"x": "a"}, generation=generation).text


def test_records_that_fail_for_different_reasons_are_answered_one_by_one(api: Api) -> None:
    answer = api.post("/v1/predict", model="kept", records=[{"z": "a"}, "the capital " * 200])
    assert answer.status_code == 200
    assert all("error" in prediction for prediction in answer.json()["predictions"])


def test_classify_gives_the_probabilities_in_the_order_of_the_labels(api: Api) -> None:
    data = api.post("/v1/classify", model="mood", input=["Kenya", {"x": "Peru"}]).json()["data"]
    for item, text in zip(data, ("Kenya", "Peru"), strict=True):
        expected = api.predict("mood", {"x": text})
        assert (item["label"], item["labels"], item["num_classes"]) == (expected.text, ["positive", "negative"], 2)
        assert expected.probabilities is not None
        assert item["probs"] == pytest.approx([expected.probabilities[name] for name in item["labels"]], abs=1e-4)
    alias = api.post("/classify", model="mood", input="Kenya").json()["data"]
    assert alias[0]["label"] == data[0]["label"]
