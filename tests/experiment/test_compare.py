"""Data -> tasks: which facts are kept, what the parts and templates are, and what is refused before anything runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.relations import read_relations
from ptuning.data.splits import split_records
from ptuning.errors import FileError, RecordError, TemplateError
from ptuning.experiment.cells import Job
from ptuning.experiment.compare import compare, lama, relation_job
from ptuning.experiment.results import Results
from ptuning.records import Record, Records
from ptuning.template.language import Template
from tests.conftest import bound

WORDS = ("yes", "good", "great", "bad")
ROWS = [{"sub_label": f"Kenya {at}", "obj_label": WORDS[at % 4]} for at in range(20)]
LONG = [{"sub_label": f"Peru {at}", "obj_label": "a good film"} for at in range(5)]
LIST: Sequence[Mapping[str, str]] = [
    {"relation": "P36", "template": "[X] is [Y] .", "label": "capital", "type": "1-1"},
    {"relation": "P17", "template": "In [X] it was [Y] .", "label": "country", "type": "N-1"},
]
FACTS: list[Record] = [{"x": f"Kenya {at}", "y": WORDS[at % 4]} for at in range(24)]
MANUAL = "[X] is [Y] ."
PAIR = (Template.parse(MANUAL), Template.parse("[P*2] [X] [P:is] [Y] ."))


def lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """LAMA's layout with two relations; a fifth of P36's facts have an object of several tokens."""
    folder = tmp_path / "LAMA"
    lines(folder / "relations.jsonl", LIST)
    lines(folder / "TREx" / "P36.jsonl", [*ROWS, *LONG])
    lines(folder / "TREx" / "P17.jsonl", ROWS[:10])
    return folder


def run_lama(data: Path, backbone: Backbone, **options: Any) -> Results:
    options = {"methods": "majority", "out": data.parent / "out", **options}
    return lama(data, backbone=backbone, **options)


def run_compare(backbone: Backbone, out: Path, **options: Any) -> Results:
    options = {"dev": FACTS[12:18], "test": FACTS[18:], "methods": "majority", "manual": MANUAL, **options}
    return compare(options.pop("data", FACTS[:12]), backbone=backbone, out=out, **options)


def info(found: Results, task: str = "task") -> Any:
    return json.loads(json.dumps(found.to_json()))["task_info"][task]


def job(data: Path, backbone: Backbone, name: str = "P36", **options: Any) -> Job:
    (relation,) = read_relations(data, which=[name])
    return relation_job(relation, PAIR, backbone=backbone, name=name, **options)


def everything(job: Job) -> list[Record]:
    return [row.record for row in (*job.task.train, *job.task.dev, *job.test)]


# -------------------------------------------------------------------------------------------------------------- lama


def test_facts_are_kept_whose_object_is_one_token(data: Path, backbone: Backbone) -> None:
    found = job(data, backbone)
    rows = everything(found)
    assert sorted(row["x"] for row in rows) == sorted(row["sub_label"] for row in ROWS)
    assert found.info["dropped"] == {"object is not one token": 5}
    assert (found.info["rows"], found.task.single_token, found.task.vocabulary) == (25, True, None)
    assert found.task.objects == tuple(sorted(WORDS))
    assert found.type == "1-1"


def test_an_object_must_be_one_token_in_every_template(data: Path, make_backbone: Callable[[str], Backbone]) -> None:
    """At the start of a sentence byte-level words lack the space in front, and may be cut otherwise."""
    backbone = make_backbone("roberta")
    front = Template.parse("[Y] is [X]")
    whole = [one.own_tokens == 1 for one in bound(backbone, str(front)).examples(FACTS[:4])]
    wanted = {word for word, is_whole in zip(WORDS, whole, strict=True) if is_whole}
    assert 0 < len(wanted) < len(WORDS)
    assert {row["y"] for row in everything(job(data, backbone))} == set(WORDS)
    assert {row["y"] for row in everything(job(data, backbone, templates=[front]))} == wanted


def test_targets_of_any_length(data: Path, causal: Backbone) -> None:
    found = job(data, causal, targets="any")
    assert len(everything(found)) == 25
    assert (found.task.single_token, found.info["dropped"]) == (False, {})
    assert "a good film" in found.task.objects


def test_a_vocabulary_restricts_facts_and_answers(data: Path, causal: Backbone) -> None:
    words = ("yes", "good", "one", "a good film")
    found = job(data, causal, vocabulary="words.txt", words=words)
    assert {row["y"] for row in everything(found)} == {"yes", "good"}
    assert found.info["dropped"] == {"object is not one token of the vocabulary": 15}
    assert found.task.vocabulary == words
    found = job(data, causal, vocabulary="words.txt", words=words, targets="any")
    assert {row["y"] for row in everything(found)} == {"yes", "good", "a good film"}
    assert found.info["dropped"] == {"object is not in the vocabulary": 10}
    found = job(data, causal, vocabulary="objects")
    assert found.task.vocabulary == found.task.objects == tuple(sorted(WORDS))


def test_a_vocabulary_file_holds_for_all_methods(data: Path, causal: Backbone, tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text(
        json.dumps({"gpt": ["\u0120yes", "\u0120good", "no"], "bert": ["good", "yes"]})
    )
    found = run_lama(data, causal, relations="P36", vocabulary=tmp_path / "words.json", methods="manual,majority")
    cells = tmp_path / "out" / "cells" / "P36"
    for method in ("manual", "majority"):
        text = (cells / method / "seed-0" / "predictions.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        assert {row["prediction"] for row in rows} | {row["target"] for row in rows} <= {"yes", "good"}
    assert info(found, "P36")["dropped"] == {"object is not one token of the vocabulary": 15}


def test_limit_and_size_of_the_training_part(data: Path, causal: Backbone) -> None:
    whole, few = job(data, causal), job(data, causal, limit=10)
    assert len(everything(few)) == 10
    assert few.info["dropped"] == {"object is not one token": 5, "over the limit": 10}
    small, other = (job(data, causal, train_size=4, seed=seed) for seed in (0, 1))
    assert len(small.task.train) == len(other.task.train) == 4
    assert (small.task.dev, small.test) == (whole.task.dev, whole.test)
    assert all(row in whole.task.train for row in small.task.train)
    assert small.task.train != other.task.train
    assert (small.task.train, small.test) == (job(data, causal, train_size=4).task.train, whole.test)


def test_a_part_left_empty_says_why(data: Path, causal: Backbone) -> None:
    lines(data / "TREx" / "P36.jsonl", LONG)
    with pytest.raises(RecordError, match=r"P36: the part train is empty.*dropped: 5 object is not one token"):
        job(data, causal)


def test_all_relations_of_a_folder(data: Path, causal: Backbone) -> None:
    found = run_lama(data, causal, methods="majority,manual")
    assert list(found.tasks) == ["P17", "P36"]
    assert list(found.by_type) == ["1-1", "N-1"]
    assert found.macro["majority"]["p_at_1"].n == 2
    told = info(found, "P17")
    assert (told["label"], told["type"], told["manual"]) == ("country", "N-1", "In [X] it was [Y] .")
    # The relation's label helps where no words in front of the subject say what is asked for.
    assert told["template"] == str(Template.from_manual("In [X] it was [Y] ."))
    assert info(found, "P36")["template"] == str(Template.from_manual(MANUAL, about="capital"))
    assert told["split"] == "60/20/20 by subject, seed 0"
    settings: Any = found.about["settings"]
    assert (settings["data"], settings["targets"], settings["split_seed"]) == (str(data), "token", 0)


@pytest.mark.parametrize(
    ("relations", "tasks"), [("P36", ["P36"]), ("N-1", ["P17"]), (" P36 ,P17,", ["P17", "P36"]), (["1-1"], ["P36"])]
)
def test_relations_by_name_and_type(data: Path, causal: Backbone, relations: Any, tasks: list[str]) -> None:
    assert list(run_lama(data, causal, relations=relations).tasks) == tasks


def test_one_template_for_all(data: Path, causal: Backbone) -> None:
    found = run_lama(data, causal, template="[P*3] [X] [P*3] [Y]", relations="P36")
    assert info(found, "P36")["template"] == "[P*3] [X] [P*3] [Y]"


def test_what_lama_refuses(data: Path, causal: Backbone) -> None:
    with pytest.raises(RecordError, match=r"no relation of the name 'P63'\. Did you mean 'P36'\?"):
        run_lama(data, causal, relations="P63")
    with pytest.raises(TemplateError, match="has no slots, so there is nothing to learn"):
        run_lama(data, causal, template="[X] is [Y]")
    with pytest.raises(FileError, match=r"no such|cannot|is no"):
        run_lama(data / "missing", causal)
    lines(data / "relations.jsonl", LIST[:1])
    with pytest.raises(TemplateError, match=r"P17 has no manual template \(.*P17\.jsonl\); leave it out"):
        run_lama(data, causal)
    assert not (data.parent / "out").exists()


# ----------------------------------------------------------------------------------------------------------- compare


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
