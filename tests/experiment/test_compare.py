"""A comparison on one's own data: what the parts and templates are, and what is refused before anything runs."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone import lora
from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.questions import as_questions
from ptuning.data.splits import split_questions
from ptuning.data.task_files import TaskFile
from ptuning.errors import ConfigError, FileError, RecordError, TemplateError
from ptuning.experiment.compare import compare
from ptuning.experiment.comparison import Watch
from ptuning.experiment.results import merged
from ptuning.experiment.suites import superglue
from ptuning.metrics.generation import score_texts
from ptuning.progress import Interrupted, Progress
from ptuning.prompt import score
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.records import Record, Records, references_of
from ptuning.report.results_file import Results, read_answers
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


def info(results: Results, task: str = "task") -> Any:
    return json.loads(json.dumps(results.to_json()))["task_info"][task]


def test_without_development_data_a_share_is_set_aside(causal: Backbone, tmp_path: Path) -> None:
    config = TrainConfig(seed=5, dev_fraction=0.25)
    results = run_compare(causal, tmp_path, dev=None, config=config, data=FACTS[:16])
    described = info(results)
    train, dev = split_questions(as_questions(Records(FACTS[:16])), fraction=0.25, seed=5)
    assert described["data"]["train"]["sha256"] == train.sha256
    assert described["data"]["dev"]["sha256"] == dev.sha256
    assert described["data"]["test"]["sha256"] == Records(FACTS[18:]).sha256
    assert described["split"] == "25% of the training part set aside to choose by, seed 5"
    assert info(run_compare(causal, tmp_path / "given"))["split"] == "the parts given"


def test_learning_from_fewer_records_leaves_the_others(causal: Backbone, tmp_path: Path) -> None:
    whole = info(run_compare(causal, tmp_path / "whole", dev=None))["data"]
    small = info(run_compare(causal, tmp_path / "small", dev=None, train_size=4))["data"]
    assert small["train"]["rows"] == 4
    assert (small["dev"], small["test"]) == (whole["dev"], whole["test"])


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"data": []}, RecordError, r"train data \(in memory\)"),
        ({"test": []}, RecordError, "test data"),
        ({"dev": []}, RecordError, "dev data"),
        ({"test": [{"x": "Kenya"}]}, RecordError, "record 1.*'y'"),
        ({"data": [{"x": "a", "y": " "}]}, RecordError, "no target"),
        ({"data": FACTS[:1], "dev": None}, RecordError, "too few"),
        ({"by": "digits"}, RecordError, "'digits'"),
        ({"manual": "[P*2] [X] [Y]"}, TemplateError, "the template to learn"),
        ({"template": "[X] [Y]"}, TemplateError, r"'\[X\] \[Y\]' has no slots"),
        ({"manual": "{country} is [Y]"}, TemplateError, "no field 'country'"),
        ({"labels": ";".join(WORDS), "vocabulary": "objects"}, ConfigError, "a vocabulary"),
        ({"labels": ";".join(WORDS), "num_beams": 2}, ConfigError, "num_beams.*labels or choices"),
        ({"labels": ";".join(WORDS), "metrics": "exact"}, ConfigError, "metrics.*labels or choices"),
        ({"labels": ";".join(WORDS), "gather": True}, ConfigError, "gather"),
        ({"vocabulary": "objects", "metrics": "exact"}, ConfigError, "vocabulary"),
        ({"num_beams": 2}, ConfigError, "one token"),
        ({"num_beams": 0}, ConfigError, "'num_beams' is 0"),
        ({"metrics": "blue"}, ConfigError, "'blue'"),
        ({"metrics": "coverage"}, RecordError, "'coverage'"),
    ],
)
def test_options_and_data_that_cannot_be_used(
    causal: Backbone, tmp_path: Path, options: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        run_compare(causal, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_models_that_fill_masks_have_no_beams(masked: Backbone, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fills masks"):
        run_compare(masked, tmp_path, **WRITTEN, num_beams=2)


def test_a_missing_package_is_said_before_anything_runs(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(epochs=1)
    results = run_compare(causal, tmp_path / "whole", methods="lora", config=config)
    monkeypatch.setattr(lora, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="need the package peft"):
        run_compare(causal, tmp_path / "out", methods="majority,lora", config=config)
    assert not (tmp_path / "out").exists()
    assert run_compare(causal, tmp_path / "whole", methods="lora", config=config).to_json() == results.to_json()


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
        results = run_compare(causal, tmp_path / "out", vocabulary=path, methods="manual")
    bad = sum(row["y"] == "bad" for row in FACTS[18:])
    assert f"{bad} of 6 test targets are not in {path}: never right" in caplog.text
    assert results.tasks["task"]["manual"]["p_at_10"].value == pytest.approx(1 - bad / 6)
    caplog.clear()
    run_compare(causal, tmp_path / "objects", vocabulary="objects", methods="manual")
    assert caplog.text == ""


def test_the_template_to_learn_is_made_of_the_manual_one(causal: Backbone, tmp_path: Path) -> None:
    described = info(run_compare(causal, tmp_path / "out", name="mine"), "mine")
    assert (described["manual"], described["template"]) == (MANUAL, str(Template.from_manual(MANUAL)))
    assert described["rows"] == 24


# Five contents with two texts each, a row for each text, as E2E has them.
TEXTS = [
    {"content": f"name[Place {at}], area[{area}]", "kind": "ab"[at % 2], "y": text}
    for at, area in enumerate(("city", "river", "hill", "city", "coast"))
    for text in (f"Place {at} is in the {area}.", f"There is Place {at} near the {area}.")
]
WRITTEN: dict[str, Any] = {
    "data": TEXTS, "dev": TEXTS, "test": TEXTS, "manual": "{content} : [Y]", "metrics": "coverage,bleu",
}  # fmt: skip


def test_texts_are_scored_by_metrics_with_all_references(causal: Backbone, tmp_path: Path) -> None:
    results = run_compare(causal, tmp_path, **WRITTEN, methods="majority,manual", gather=True)
    rows = list(read_answers(tmp_path / "cells/task/manual/seed-0/predictions.jsonl"))
    records = [row.record for row in rows]
    assert [len(references_of(record)) for record in records] == [2] * 5
    expected = score_texts([row.answer.text for row in rows], records, ["coverage", "bleu"])
    own = results.tasks["task"]["manual"]
    assert list(own) == ["coverage", "bleu"]
    for name, scored in expected.items():
        assert (own[name].value, own[name].low, own[name].high, own[name].n) == tuple(vars(scored.score).values())
    assert results.primary == "coverage"
    planned = run_compare(causal, tmp_path / "planned", **WRITTEN, methods="p-tuning", gather=True, dry_run=True)
    assert planned.settings["metric_for_best_model"] == "coverage"
    assert results.differences["majority - manual"].keys() == own.keys()
    said = info(results)
    assert said["text_metrics"] == ["coverage", "bleu"]
    assert said["signatures"] == {"bleu": expected["bleu"].signature}
    assert "nrefs:2" in said["signatures"]["bleu"]
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "bleu: nrefs:2" in report
    assert f" {own['bleu'].value:.1f} " in report  # of 100, so no percentage
    assert "(of bleu in points)" in report
    again = run_compare(causal, tmp_path, **WRITTEN, methods="majority,manual", gather=True)
    assert again.to_json() == results.to_json()
    assert merged([tmp_path]).tasks == results.tasks


def test_scores_by_the_values_of_a_field(causal: Backbone, tmp_path: Path) -> None:
    results = run_compare(causal, tmp_path, **WRITTEN, methods="majority", by="kind")
    rows = list(read_answers(tmp_path / "cells/task/majority/seed-0/predictions.jsonl"))
    assert list(results.by_value) == ["a", "b"]
    for kind, scores in results.by_value.items():
        own = [row for row in rows if row.record["kind"] == kind]
        expected = score_texts([row.answer.text for row in own], [row.record for row in own], ["coverage"])["coverage"]
        shown = scores["majority"]["coverage"]
        assert (shown.value, shown.n) == (expected.score.value, len(own))
    assert "coverage by kind" in (tmp_path / "report.md").read_text(encoding="utf-8")
    ranked = run_compare(causal, tmp_path / "ranked", by="y", methods="majority")
    assert {name: scores["majority"]["p_at_1"].value for name, scores in ranked.by_value.items()} == {
        word: float(word == min(WORDS)) for word in sorted({row["y"] for row in FACTS[18:]})
    }
    assert "by_value" not in run_compare(causal, tmp_path / "plain").to_json()


def test_tries_and_epochs_are_chosen_by_the_first_metric(causal: Backbone, tmp_path: Path) -> None:
    config = TrainConfig(epochs=1, batch_size=4)
    options = {**WRITTEN, "metrics": "chrf"}
    run_compare(causal, tmp_path, **options, methods="p-tuning", config=config, tries=2)
    tuned = json.loads((tmp_path / "cells/task/p-tuning/seed-0/run.json").read_text("utf-8"))
    for number, tried in enumerate(tuned["tried"], start=1):
        run = json.loads((tmp_path / f"cells/task/p-tuning/seed-0/try-{number}/run.json").read_text("utf-8"))
        epochs = [run["start"], *run["history"]]
        assert tried["dev_score"] == epochs[run["chosen_epoch"]]["dev_chrf"]


def test_every_method_writes_with_the_beams_that_are_asked_for(causal: Backbone, tmp_path: Path) -> None:
    options = {**WRITTEN, "methods": "majority,manual"}
    config = TrainConfig(max_length=64)
    results = run_compare(causal, tmp_path / "4", **options, num_beams=4, config=config)
    plain = run_compare(causal, tmp_path / "1", **options, config=config)
    assert "a search of 4 beams" in (tmp_path / "4/report.md").read_text(encoding="utf-8")
    assert (results.settings["num_beams"], "num_beams" in plain.settings) == (4, False)
    prompt = Prompt.manual(WRITTEN["manual"])
    longest = max(example.own_tokens for example in prompt.bind(causal).examples(Records(TEXTS)))
    written = {}
    for beams in (4, 1):
        rows = read_answers(tmp_path / f"{beams}/cells/task/manual/seed-0/predictions.jsonl")
        written[beams] = [row.answer.text for row in rows]
        generation = {"max_new_tokens": longest, "num_beams": beams}
        expected = PromptModel(causal).predict(TEXTS, prompt, generation=generation)
        assert written[beams] == [answer.text for answer in expected]
    assert written[4] != written[1]
    with pytest.raises(FileError, match="other settings"):
        run_compare(causal, tmp_path / "1", **options, num_beams=4, config=config)


@pytest.mark.parametrize("method", ["manual", "in-context"])
def test_a_stop_while_texts_are_written_does_not_wait_for_all(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(score, "WRITTEN_ROWS", 3)
    options = {**WRITTEN, "methods": method}
    whole = run_compare(causal, tmp_path / "whole", **options)
    reported: list[Progress] = []
    watch = Watch(report=reported.append, should_stop=lambda: reported[-1].stage == "predict" if reported else False)
    with pytest.raises(Interrupted, match="3 of 10 records"):
        run_compare(causal, tmp_path / "stopped", **options, watch=watch)
    assert [(now.done, now.total) for now in reported if now.stage == "predict"] == [(3, 10)]
    assert run_compare(causal, tmp_path / "stopped", **options).tasks == whole.tasks


def test_a_task_file_brings_its_metrics_and_gathers(causal: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "texts.toml"
    path.write_text(
        'name = "texts"\nversion = "1"\nlabel = "ref"\ngather = true\nmetrics = ["coverage"]\n'
        '[[patterns]]\nmanual = "{content} : [Y]"\n',
        encoding="utf-8",
    )
    task = TaskFile.parse(path.read_text(encoding="utf-8"))
    rows = task.read_rows([{"content": row["content"], "ref": row["y"]} for row in TEXTS])
    results = run_compare(
        causal, tmp_path / "out", data=rows, dev=None, test=rows, task=task, manual=task.manual[0],
        template=task.learned[0],
    )  # fmt: skip
    assert list(results.tasks["task"]["majority"]) == ["coverage"]
    assert results.tasks["task"]["majority"]["coverage"].n == 5
    assert [info(results)["data"][part]["rows"] for part in ("train", "dev", "test")] == [8, 1, 5]
    with pytest.raises(ConfigError, match=r"texts.*--task"):
        superglue(tmp_path, tasks=[str(path)], backbone=causal, out=tmp_path / "glue")
