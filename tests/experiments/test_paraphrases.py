"""Wordings of a relation: which a model can use, that all have the same facts, and their spread."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from experiments.paraphrases import Wordings, paraphrases, table, usable_wordings

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.lama import Relation
from ptuning.errors import RecordError
from ptuning.records import Records
from tests.conftest import bound
from tests.experiment.test_compare import LIST, ROWS, lines

PATTERNS = ("So [X] is [Y] .", "[Y] is what [X] is .", "[X] is [Y] !", "In all [X] was [Y]")


def relation(template: str | None, *patterns: str) -> Relation:
    return Relation("P1", template, None, None, {"facts": Records([])}, patterns, "here")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two relations, one of them with paraphrases."""
    folder = tmp_path / "LAMA"
    lines(folder / "relations.jsonl", LIST)
    lines(folder / "TREx" / "P36.jsonl", ROWS)
    lines(folder / "TREx" / "P17.jsonl", ROWS[:10])
    lines(folder / "paraphrases" / "P36.jsonl", [{"pattern": pattern} for pattern in PATTERNS])
    return folder


def run(data: Path, backbone: Backbone, **options: Any) -> tuple[dict[str, Wordings], dict[str, Any]]:
    options = {"methods": "manual", "out": data.parent / "out", "relations": "P36", **options}
    wordings = paraphrases(data, backbone=backbone, config=TrainConfig(epochs=1, batch_size=8), **options)
    return wordings, json.loads((options["out"] / "results.json").read_text(encoding="utf-8"))


def test_which_wordings_a_model_can_use() -> None:
    usable = usable_wordings(relation("[X] is [Y] .", *PATTERNS), kind="masked")
    assert usable == ["[X] is [Y] .", *PATTERNS]
    assert usable_wordings(relation(None, *PATTERNS, PATTERNS[0], f"{PATTERNS[3]} "), kind="masked") == [*PATTERNS]
    # A causal model needs all fields first, and does not see what comes after the target.
    usable = usable_wordings(relation("[X] is [Y] .", *PATTERNS, "[X] in {y2} is [Y] of {y2}"), kind="causal")
    assert usable == ["[X] is [Y] .", "So [X] is [Y] .", "In all [X] was [Y]"]


def test_every_wording_is_a_task_over_the_same_facts(data: Path, make_backbone: Callable[[str], Backbone]) -> None:
    """At the start of a sentence RoBERTa's words are cut otherwise, so a wording that begins with [Y] costs facts for
    all of them. No template has the relation's label.
    """
    backbone = make_backbone("roberta")
    rows = [{"x": row["sub_label"], "y": row["obj_label"]} for row in ROWS]
    cut = sum(example.own_tokens > 1 for example in bound(backbone, PATTERNS[1]).examples(rows))
    assert 0 < cut < len(rows)
    _, results = run(data, backbone)
    tasks = results["task_info"]
    assert list(tasks) == [f"P36.{at:02d}" for at in range(1, 6)]
    assert [task["dropped"] for task in tasks.values()] == [{"object is not one token": cut}] * 5
    digests = [{name: split["sha256"] for name, split in task["data"].items()} for task in tasks.values()]
    assert all(digest == digests[0] for digest in digests)
    assert not any("capital" in task["template"] for task in tasks.values())


def test_the_spread_and_its_table(data: Path, causal: Backbone) -> None:
    spreads, results = run(data, causal, methods="manual,p-tuning", wordings=2, limit=10)
    assert list(spreads["P36"].patterns.values()) == ["[X] is [Y] .", "So [X] is [Y] ."]
    for method in ("manual", "p-tuning"):
        values = {task: results["tasks"][task][method]["p_at_1"]["value"] for task in ("P36.01", "P36.02")}
        assert spreads["P36"].scores[method] == values
    assert (data.parent / "out" / "wordings.md").read_text(encoding="utf-8") == table(spreads["P36"])
    scores = {"manual": {"P1.01": 0.25, "P1.02": 1.0}, "p-tuning": {"P1.02": 0.5}}
    lines = table(Wordings({"P1.01": "a", "P1.02": "b"}, scores)).splitlines()
    assert lines[2:] == [
        "| a | 0.250 |  |",
        "| b | 1.000 | 0.500 |",
        "| range | 0.250 to 1.000, sd 0.530 | 0.500 to 0.500 |",
    ]


def test_relations_with_one_wording_are_left_out_with_a_warning(
    data: Path, causal: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ptuning"):
        spreads, _ = run(data, causal, relations="all")
    assert list(spreads) == ["P36"]
    assert "P17" in caplog.text
    with pytest.raises(RecordError, match="paraphrases/RELATION"):
        run(data, causal, relations="P17", out=data.parent / "other")
    assert not (data.parent / "other").exists()
