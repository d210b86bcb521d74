"""Wordings of a relation: which a model can use, that all have the same facts, and how far their scores are apart."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.relations import Relation
from ptuning.errors import RecordError
from ptuning.experiment.cells import CellResult
from ptuning.experiment.paraphrases import compare_wordings, paraphrases, usable_wordings
from ptuning.experiment.results import Collector
from ptuning.records import Records
from ptuning.report.results_file import Cell, RelationWordings, Results, Wording, WordingSpread
from tests.conftest import bound
from tests.experiment.test_compare import LIST, ROWS, lines

PATTERNS = ("So [X] is [Y] .", "[Y] is what [X] is .", "[X] is [Y] !", "In all [X] was [Y]")
FAST = TrainConfig(epochs=1, batch_size=8)


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


def run(data: Path, backbone: Backbone, **options: Any) -> Results:
    options = {"methods": "manual", "config": FAST, "out": data.parent / "out", "relations": "P36", **options}
    return paraphrases(data, backbone=backbone, **options)


def test_a_masked_model_can_use_every_wording() -> None:
    found = usable_wordings(relation("[X] is [Y] .", *PATTERNS), kind="masked")
    assert found == ["[X] is [Y] .", *PATTERNS]
    assert usable_wordings(relation(None, *PATTERNS, PATTERNS[0], f"{PATTERNS[3]} "), kind="masked") == [*PATTERNS]


def test_a_causal_model_needs_all_fields_in_front_and_sees_nothing_behind() -> None:
    found = usable_wordings(relation("[X] is [Y] .", *PATTERNS, "[X] in {y2} is [Y] of {y2}"), kind="causal")
    assert found == ["[X] is [Y] .", "So [X] is [Y] .", "In all [X] was [Y]"]  # "[X] is [Y] !" is the first one again


def test_every_wording_is_a_task_over_the_same_facts(data: Path, backbone: Backbone) -> None:
    found = run(data, backbone)
    told: Any = found.task_info
    wordings = usable_wordings(relation("[X] is [Y] .", *PATTERNS), kind=backbone.kind)
    assert [told[task]["manual"] for task in told] == wordings
    assert list(told) == [f"P36.{place:02d}" for place in range(1, len(wordings) + 1)]
    digests = [{part: one["sha256"] for part, one in told[task]["data"].items()} for task in told]
    assert all(digest == digests[0] for digest in digests)
    # Without the relation's label, which would give every wording the same help.
    assert not any("capital" in told[task]["template"] for task in told)


def test_a_fact_must_be_one_token_in_all_wordings(data: Path, make_backbone: Callable[[str], Backbone]) -> None:
    """At the start of a sentence RoBERTa's words are cut otherwise, so a wording that begins with [Y] costs facts for
    all of them.
    """
    backbone = make_backbone("roberta")
    rows = [{"x": row["sub_label"], "y": row["obj_label"]} for row in ROWS]
    cut = sum(one.own_tokens > 1 for one in bound(backbone, PATTERNS[1]).examples(rows))
    assert 0 < cut < len(rows)
    told: Any = run(data, backbone).task_info
    assert [told[task]["dropped"] for task in told] == [{"object is not one token": cut}] * 5


def test_it_says_where_wordings_are_looked_for(data: Path, causal: Backbone) -> None:
    """Beside a file of facts, too; and a folder of ParaRel's name is found."""
    says = (
        r"none of the relations has two wordings\. They are read from .*LAMA/paraphrases/P17\.jsonl or .*LAMA/patterns/"
    )
    with pytest.raises(RecordError, match=says):
        run(data, causal, relations="P17")
    (data / "paraphrases").rename(data / "patterns")
    assert len(run(data, causal).paraphrases["P36"].patterns) == 3
    (data / "patterns").rename(data / "unknown")
    with pytest.raises(RecordError, match=r"read from .*LAMA/TREx/paraphrases/P36\.jsonl or"):
        paraphrases(data / "TREx" / "P36.jsonl", methods="manual", backbone=causal, out=data.parent / "out")


def test_relations_with_one_wording_are_left_out_with_a_notice(
    data: Path, causal: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ptuning"):
        found = run(data, causal, relations="all")
    assert "P17: fewer than two wordings that a causal model can use; left out" in caplog.text
    assert {task.partition(".")[0] for task in found.tasks} == {"P36"}
    with pytest.raises(RecordError, match="none of the relations has two wordings"):
        run(data, causal, relations="P17", out=data.parent / "other")
    assert not (data.parent / "other").exists()


def test_at_most_so_many_wordings_and_facts(data: Path, causal: Backbone) -> None:
    found = run(data, causal, wordings=2, limit=10)
    assert list(found.tasks) == ["P36.01", "P36.02"]
    told: Any = found.task_info
    assert sum(part["rows"] for part in told["P36.01"]["data"].values()) == 10


def test_results_hold_the_spread(data: Path, causal: Backbone) -> None:
    found = run(data, causal, methods="manual,p-tuning")
    saved = json.loads((data.parent / "out" / "results.json").read_text(encoding="utf-8"))
    told = saved["paraphrases"]["P36"]
    assert saved["suite"] == "paraphrases"
    assert [one["pattern"] for one in told["patterns"]] == ["[X] is [Y] .", "So [X] is [Y] .", "In all [X] was [Y]"]
    for method in ("manual", "p-tuning"):
        values = [found.tasks[f"P36.{place:02d}"][method]["p_at_1"].value for place in (1, 2, 3)]
        assert [one["scores"][method]["value"] for one in told["patterns"]] == values
        assert told["spread"][method]["range"] == max(values) - min(values)


def results(scores: dict[str, dict[str, list[float]]]) -> Results:
    cells = [
        CellResult(Cell(task, method, 0), "done", {"p_at_1": hits, "exact_match": hits})
        for task, methods in scores.items()
        for method, hits in methods.items()
    ]
    return Collector(Results("paraphrases"), ["manual", "p-tuning"], dict.fromkeys(scores)).collect(cells)


def test_the_spread_by_hand() -> None:
    found = results(
        {
            "P1.01": {"manual": [0, 0, 0, 1], "p-tuning": [1, 1, 0, 1]},
            "P1.02": {"manual": [1, 1, 1, 1]},
            "P1.03": {"manual": [1, 0, 0, 1]},
        }
    )
    told = compare_wordings(found, {"P1": {"P1.01": "a", "P1.02": "b", "P1.03": "c"}, "P2": {"P2.01": "d"}})
    std = (((0.25 - 7 / 12) ** 2 + (1 - 7 / 12) ** 2 + (0.5 - 7 / 12) ** 2) / 2) ** 0.5
    assert told["P1"].spread["manual"].std == pytest.approx(std)
    assert replace(told["P1"].spread["manual"], std=None) == WordingSpread(0.25, 1.0, 0.75, None, 3)
    # One wording is not a spread, and one without results is listed without scores.
    assert told["P1"].spread["p-tuning"] == WordingSpread(0.75, 0.75, 0.0, None, 1)
    assert [list(one.scores) for one in told["P1"].patterns] == [["manual", "p-tuning"], ["manual"], ["manual"]]
    assert told["P2"] == RelationWordings([Wording("d", {})], {})
