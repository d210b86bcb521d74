"""Records from whatever people keep them in, and answers alike from all of them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pytest

from ptuning import PromptModel, TrainConfig, train
from ptuning.backbone.backbone import Backbone
from ptuning.errors import PTuningError, RecordError
from ptuning.prompt.score import score_prompt
from ptuning.records import as_records
from tests.conftest import learned

ROWS = [
    {"x": "Kenya", "y": "Nairobi", "n": 3},
    {"x": "France", "y": "Paris", "n": 4},
    {"x": "Peru", "y": "Lima", "n": 5},
    {"x": "Chad", "y": "film", "n": 6},
]
TEXTS = [{**row, "n": str(row["n"])} for row in ROWS]


class Polars:
    """A data frame with what polars' has."""

    columns = ("x", "y", "n")

    def iter_rows(self, *, named: bool) -> Iterator[dict[str, object]]:
        assert named
        yield from ROWS


def columns() -> dict[str, list[object]]:
    return {name: [row[name] for row in ROWS] for name in ROWS[0]}


TABLES: Mapping[str, Any] = {
    "a list": lambda: ROWS,
    "a generator": lambda: (row for row in ROWS),
    "a pandas data frame": lambda: pandas.DataFrame(ROWS),
    "a polars data frame": Polars,
    "a pyarrow table": lambda: pyarrow.table(columns()),
    "a data set": lambda: datasets.Dataset.from_list(ROWS),
    "a data set that streams": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
}


@pytest.mark.parametrize("kind", TABLES)
def test_every_kind_of_table_is_the_same_records(kind: str) -> None:
    found = as_records(TABLES[kind]())
    assert [dict(row) for row in found] == TEXTS
    assert found.sha256 == as_records(ROWS).sha256


def test_numbers_of_classes_become_their_names() -> None:
    """The labels of a data set are its names; -1 says that a row has none."""
    features = datasets.Features({"x": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"x": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    assert [row.get("y") for row in as_records(data)] == ["yes", "no", None]


def test_dates_of_a_table_are_text_and_nat_is_missing() -> None:
    table = pandas.DataFrame({"x": ["a", "b"], "day": pandas.to_datetime(["2026-11-27 10:30", None])})
    for data in (table, pyarrow.Table.from_pandas(table), datasets.Dataset.from_pandas(table)):
        assert [row.get("day") for row in as_records(data)] == ["2026-11-27 10:30:00", None]


@pytest.mark.parametrize("kind", ["a generator", "a pandas data frame", "a data set"])
def test_training_scoring_and_predicting_take_every_kind(kind: str, causal: Backbone) -> None:
    config = TrainConfig(epochs=1, batch_size=2)
    results = [
        train("[P*2] [X] is [Y]", data, dev=TABLES[kind](), backbone=causal, config=config)
        for data in (ROWS, TABLES[kind]())
    ]
    prompt = results[0].prompt
    assert prompt.slot_vectors is not None
    assert results[1].prompt.slot_vectors is not None
    assert prompt.slot_vectors.equal(results[1].prompt.slot_vectors)
    model = PromptModel(causal)
    assert model.predict(TABLES[kind](), prompt) == model.predict(TEXTS, prompt)
    assert score_prompt(model, TABLES[kind](), prompt).loss == score_prompt(model, as_records(TEXTS), prompt).loss


def test_a_prompt_is_named_by_its_folder(causal: Backbone, tmp_path: Path) -> None:
    first, second = (learned(causal, "[P*2] [X] is [Y]", seed=seed) for seed in range(2))
    first.save(tmp_path / "first")
    second.save(tmp_path / "second")
    model, rows = PromptModel(causal), TEXTS[:2]
    assert model.predict(rows, str(tmp_path / "first")) == model.predict(rows, first)
    mixed = [tmp_path / "first", tmp_path / "second"]
    assert model.predict(rows, mixed) == model.predict(rows, [first, second])
    with pytest.raises(PTuningError, match="not a prompt folder"):
        model.predict(rows, tmp_path / "third")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("facts.jsonl", "one str"),
        ({"x": "Kenya"}, "one dict"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), r"one DatasetDict; .* data\['train'\]"),
        (3, "a int"),
        (["Kenya"], "record 1: a record must be an object"),
        (pandas.DataFrame([["a", "b"]], columns=["x", "x"]), "the data frame: the column names x are there twice"),
        (pyarrow.table([["a"], ["b"]], names=["x", "x"]), "the table: the column names x are there twice"),
    ],
)
def test_what_is_no_table_is_an_error(data: Any, says: str) -> None:
    with pytest.raises(RecordError, match=says):
        as_records(data)


def test_no_rows_are_no_error_to_answer(causal: Backbone) -> None:
    assert PromptModel(causal).predict(pandas.DataFrame(), learned(causal, "[P] [X] [Y]")) == []
