"""LAMA: which facts are kept, what the parts and templates of a relation are, and what is refused before a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.data.lama import read_relations
from ptuning.errors import ConfigError, FileError, RecordError, TemplateError
from ptuning.experiment.cells import CellJob
from ptuning.experiment.compare import OneToken, are_listed, one_token
from ptuning.experiment.suites import lama, relation_job
from ptuning.records import Record
from ptuning.report.results_file import Results
from ptuning.template.language import Template
from tests.conftest import bound
from tests.experiment.test_compare import FACTS, LIST, MANUAL, ROWS, WORDS, info, lines

LONG = [{"sub_label": f"Peru {at}", "obj_label": "a good film"} for at in range(5)]
PAIR = (Template.parse(MANUAL), Template.parse("[P*2] [X] [P:is] [Y] ."))


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


def job(data: Path, backbone: Backbone, name: str = "P36", **options: Any) -> CellJob:
    (relation,) = read_relations(data, which=[name])
    return relation_job(relation, PAIR, backbone=backbone, name=name, **options)


def everything(job: CellJob) -> list[Record]:
    return [row.record for row in (*job.task.train, *job.task.dev, *job.test)]


def test_facts_are_kept_whose_object_is_one_token(data: Path, backbone: Backbone) -> None:
    results = job(data, backbone)
    rows = everything(results)
    assert sorted(row["x"] for row in rows) == sorted(row["sub_label"] for row in ROWS)
    assert results.info["dropped"] == {"object is not one token": 5}
    assert (results.info["rows"], results.task.single_token, results.task.vocabulary) == (25, True, None)
    assert results.task.objects == tuple(sorted(WORDS))
    assert results.type == "1-1"


def test_an_object_must_be_one_token_in_every_template(data: Path, make_backbone: Callable[[str], Backbone]) -> None:
    """At the start of a sentence byte-level words lack the space in front, and may be cut otherwise."""
    backbone = make_backbone("roberta")
    front = Template.parse("[Y] is [X]")
    whole = [example.own_tokens == 1 for example in bound(backbone, str(front)).examples(FACTS[:4])]
    wanted = {word for word, is_whole in zip(WORDS, whole, strict=True) if is_whole}
    assert 0 < len(wanted) < len(WORDS)
    assert {row["y"] for row in everything(job(data, backbone))} == set(WORDS)
    assert {row["y"] for row in everything(job(data, backbone, templates=[front]))} == wanted


def test_targets_of_any_length(data: Path, causal: Backbone) -> None:
    results = job(data, causal, targets="any")
    assert len(everything(results)) == 25
    assert (results.task.single_token, results.info["dropped"]) == (False, {})
    assert "a good film" in results.task.objects


def test_a_vocabulary_restricts_facts_and_answers(data: Path, causal: Backbone) -> None:
    words = ("yes", "good", "one", "a good film")
    results = job(data, causal, vocabulary=words)
    assert {row["y"] for row in everything(results)} == {"yes", "good"}
    assert results.info["dropped"] == {"object is not one token of the vocabulary": 15}
    assert results.task.vocabulary == words
    results = job(data, causal, vocabulary=words, targets="any")
    assert {row["y"] for row in everything(results)} == {"yes", "good", "a good film"}
    assert results.info["dropped"] == {"object is not in the vocabulary": 10}
    results = job(data, causal, vocabulary="objects")
    assert results.task.vocabulary == results.task.objects == tuple(sorted(WORDS))


def test_a_vocabulary_file_holds_for_all_methods(data: Path, causal: Backbone, tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text(
        json.dumps({"gpt": ["\u0120yes", "\u0120good", "no"], "bert": ["good", "yes"]})
    )
    results = run_lama(data, causal, relations="P36", vocabulary=tmp_path / "words.json", methods="manual,majority")
    cells = tmp_path / "out" / "cells" / "P36"
    for method in ("manual", "majority"):
        text = (cells / method / "seed-0" / "predictions.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        assert {row["prediction"] for row in rows} | {row["target"] for row in rows} <= {"yes", "good"}
    assert info(results, "P36")["dropped"] == {"object is not one token of the vocabulary": 15}


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
    results = run_lama(data, causal, methods="majority,manual")
    assert list(results.tasks) == ["P17", "P36"]
    assert list(results.by_type) == ["1-1", "N-1"]
    assert results.macro["majority"]["p_at_1"].n == 2
    described = info(results, "P17")
    assert (described["label"], described["type"], described["manual"]) == ("country", "N-1", "In [X] it was [Y] .")
    # The relation's label helps where no words in front of the subject say what is asked for.
    assert described["template"] == str(Template.from_manual("In [X] it was [Y] ."))
    assert info(results, "P36")["template"] == str(Template.from_manual(MANUAL, about="capital"))
    assert described["split"] == "60/20/20 by subject, seed 0"
    settings: Any = results.settings
    assert (settings["data"], settings["targets"], settings["split_seed"]) == (str(data), "token", 0)


@pytest.mark.parametrize(
    ("relations", "tasks"), [("P36", ["P36"]), ("N-1", ["P17"]), (" P36 ,P17,", ["P17", "P36"]), (["1-1"], ["P36"])]
)
def test_relations_by_name_and_type(data: Path, causal: Backbone, relations: Any, tasks: list[str]) -> None:
    assert list(run_lama(data, causal, relations=relations).tasks) == tasks


def test_a_manual_template_is_needed_only_where_a_method_reads_it(data: Path, causal: Backbone) -> None:
    lines(data / "relations.jsonl", LIST[:1])
    learned = {"relations": "P17", "template": "[P*3] [X] [P*3] [Y]", "targets": "any"}
    results = run_lama(data, causal, **learned, methods="majority,p-tuning", dry_run=True)
    assert (info(results, "P17")["manual"], info(results, "P17")["template"]) == (None, learned["template"])
    with pytest.raises(TemplateError, match=r"manual, in-context need .*manual.*methods"):
        run_lama(data, causal, **learned, methods="manual,in-context,p-tuning")
    with pytest.raises(TemplateError, match=r"p-tuning needs .*template"):
        run_lama(data, causal, relations="P17", methods="majority,p-tuning,fine-tuning")
    given = run_lama(data, causal, manual="[X] lies in [Y]", out=data.parent / "given")
    assert (info(given, "P36")["manual"], info(given, "P17")["manual"]) == ("[X] is [Y] .", "[X] lies in [Y]")


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"relations": "P63"}, RecordError, "'P63'.*'P36'"),
        ({"template": "[X] is [Y]"}, TemplateError, "no slots"),
        ({"data": "missing"}, FileError, "missing"),
        ({"methods": "majority,manual"}, TemplateError, r"P17 .*P17\.jsonl.*manual needs one"),
        ({"relations": "P36", "manual": "[X] is [Y]"}, ConfigError, "P36"),
        ({"targets": "tokens", "relations": "P36"}, ConfigError, "'tokens'.*token or any"),
    ],
)
def test_what_lama_refuses(
    data: Path, causal: Backbone, options: dict[str, Any], error: type[Exception], named: str
) -> None:
    lines(data / "relations.jsonl", LIST[:1])
    with pytest.raises(error, match=named):
        run_lama(data / options.pop("data", ""), causal, **options)
    assert not (data.parent / "out").exists()


def test_targets_of_one_token(backbone: Backbone) -> None:
    pattern = "The capital of [X] is [Y] ."
    rows = [{"x": "Kenya", "y": y} for y in ("good", " yes", "a good film", "1234567890a")]
    keeps = OneToken(backbone, [Template.parse(pattern)])
    assert keeps(rows) == [example.own_tokens == 1 for example in bound(backbone, pattern).examples(rows)]
    assert keeps(rows)[0]
    assert not keeps(rows)[2]
    assert keeps([]) == []
    templates = [Template.parse(pattern)]
    assert one_token(backbone, templates, rows[:1])
    assert one_token(backbone, templates, [])
    assert not one_token(backbone, templates, [*[rows[0]] * 70, rows[2]])


def test_the_token_for_unknown_text_is_no_answer(masked: Backbone) -> None:
    rows = [{"x": "Kenya", "y": "\u2603"}, {"x": "Kenya", "y": "Nairobi"}]
    template = Template.parse("[X] is [Y]")
    assert [example.own_tokens for example in bound(masked, "[X] is [Y]").examples(rows)] == [1, 1]
    assert OneToken(masked, [template])(rows) == [False, True]


def test_targets_of_a_list(causal: Backbone) -> None:
    rows = [{"x": "Kenya", "y": y} for y in ("good", " yes ", "a good film")]
    assert are_listed(rows, ["yes", "a good film"]) == [False, True, True]
    keeps = OneToken(causal, [Template.parse("[X] is [Y]")], words=["yes", "a good film"])
    assert keeps([rows[0], {"x": "Kenya", "y": "yes"}, rows[2]]) == [False, True, False]


def test_a_target_that_has_no_place_is_not_kept_and_a_missing_field_is_an_error(causal: Backbone) -> None:
    """One target too long for the context must not end a run over thirty relations."""
    rows = [{"x": "Kenya", "y": "good"}, {"x": "Kenya", "y": "good " * 500}, {"x": "Peru", "y": "yes"}]
    assert OneToken(causal, [Template.parse("[X] is [Y]")])(rows) == [True, False, True]
    with pytest.raises(TemplateError, match="no field 'country' in record 1"):
        OneToken(causal, [Template.parse("{country} is [Y]")])(rows)
