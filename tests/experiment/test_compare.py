"""A comparison on one's own data: what the parts and templates are, and what is refused before anything runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.splits import split_records
from ptuning.errors import RecordError, TemplateError
from ptuning.experiment.compare import compare
from ptuning.records import Record, Records
from ptuning.report.results_file import Results
from ptuning.template.language import Template

WORDS = ("yes", "good", "great", "bad")
ROWS = [{"sub_label": f"Kenya {at}", "obj_label": WORDS[at % 4]} for at in range(20)]
LIST: Sequence[Mapping[str, str]] = [
    {"relation": "P36", "template": "[X] is [Y] .", "label": "capital", "type": "1-1"},
    {"relation": "P17", "template": "In [X] it was [Y] .", "label": "country", "type": "N-1"},
]
FACTS: list[Record] = [{"x": f"Kenya {at}", "y": WORDS[at % 4]} for at in range(24)]
MANUAL = "[X] is [Y] ."


def lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_compare(backbone: Backbone, out: Path, **options: Any) -> Results:
    options = {"dev": FACTS[12:18], "test": FACTS[18:], "methods": "majority", "manual": MANUAL, **options}
    return compare(options.pop("data", FACTS[:12]), backbone=backbone, out=out, **options)


def info(found: Results, task: str = "task") -> Any:
    return json.loads(json.dumps(found.to_json()))["task_info"][task]


def test_without_development_data_a_share_is_set_aside(causal: Backbone, tmp_path: Path) -> None:
    config = TrainConfig(seed=5, dev_fraction=0.25)
    found = run_compare(causal, tmp_path, dev=None, config=config, data=FACTS[:16])
    told = info(found)
    train, dev = split_records(Records(FACTS[:16]), fraction=0.25, seed=5)
    assert told["data"]["train"]["sha256"] == Records(train).sha256
    assert told["data"]["dev"]["sha256"] == Records(dev).sha256
    assert told["data"]["test"]["sha256"] == Records(FACTS[18:]).sha256
    assert told["split"] == "25% of the training part set aside to choose by, seed 5"
    assert info(run_compare(causal, tmp_path / "given"))["split"] == "the parts given"


def test_learning_from_fewer_records_leaves_the_others(causal: Backbone, tmp_path: Path) -> None:
    whole = info(run_compare(causal, tmp_path / "whole", dev=None))["data"]
    small = info(run_compare(causal, tmp_path / "small", dev=None, train_size=4))["data"]
    assert small["train"]["rows"] == 4
    assert (small["dev"], small["test"]) == (whole["dev"], whole["test"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data": []}, r"the train data \(in memory\) holds no records"),
        ({"test": []}, "the test data .* holds no records"),
        ({"dev": []}, "the dev data .* holds no records"),
        ({"test": [{"x": "Kenya"}]}, "in memory, record 1: no target; the field 'y' is missing or empty"),
        ({"data": [{"x": "a", "y": " "}]}, "no target"),
        ({"data": FACTS[:1], "dev": None}, "too few different records to set some aside"),
    ],
)
def test_data_that_cannot_be_used(causal: Backbone, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RecordError, match=says):
        run_compare(causal, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_templates_that_cannot_be_used(causal: Backbone, tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"the manual template .* has slots; give it as the template to learn"):
        run_compare(causal, tmp_path / "out", manual="[P*2] [X] [Y]")
    with pytest.raises(TemplateError, match=r"the template '\[X\] \[Y\]' has no slots"):
        run_compare(causal, tmp_path / "out", template="[X] [Y]")
    with pytest.raises(TemplateError, match="no field 'country'"):
        run_compare(causal, tmp_path / "out", manual="{country} is [Y]")
    assert not (tmp_path / "out").exists()


def test_targets_are_ranked_where_all_are_one_token_and_written_else(causal: Backbone, tmp_path: Path) -> None:
    ranked = run_compare(causal, tmp_path / "one", methods="manual").tasks["task"]["manual"]
    assert list(ranked) == ["p_at_1", "p_at_10", "mrr", "exact_match"]
    longer = [*FACTS[18:], {"x": "Kenya", "y": "a good film"}]
    written = run_compare(causal, tmp_path / "many", methods="manual", test=longer).tasks["task"]["manual"]
    assert list(written) == ["p_at_1", "exact_match"]


def test_a_vocabulary_that_lacks_targets_is_said(
    causal: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "words.txt"
    path.write_text("yes\ngood\ngreat\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING, "ptuning"):
        found = run_compare(causal, tmp_path / "out", vocabulary=path, methods="manual")
    bad = sum(row["y"] == "bad" for row in FACTS[18:])
    assert f"{bad} of 6 test targets are not in {path}: never right" in caplog.text
    assert found.tasks["task"]["manual"]["p_at_10"].value == pytest.approx(1 - bad / 6)
    caplog.clear()
    run_compare(causal, tmp_path / "objects", vocabulary="objects", methods="manual")
    assert caplog.text == ""


def test_the_template_to_learn_is_made_of_the_manual_one(causal: Backbone, tmp_path: Path) -> None:
    told = info(run_compare(causal, tmp_path / "out", name="mine"), "mine")
    assert (told["manual"], told["template"]) == (MANUAL, str(Template.from_manual(MANUAL)))
    assert told["rows"] == 24
