"""What SuperGLUE's server takes: line by line, as its tasks want it, and the files of whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.data.task_files import load_task
from ptuning.errors import FileError
from ptuning.files import Json
from tests.conftest import load_script
from tests.experiment.test_superglue import few, lines, run, whole

__all__ = ["few", "whole"]  # fixtures

script = load_script("superglue_server")

CHOICES: Json = ["Peru", "Kenya"]


@pytest.mark.parametrize(
    ("task", "row", "line"),
    [
        ("BoolQ", {"idx": 3, "prediction": "true"}, {"idx": 3, "label": "true"}),
        ("WiC", {"idx": 3, "prediction": "false"}, {"idx": 3, "label": "false"}),
        ("CB", {"idx": 3, "prediction": "neutral"}, {"idx": 3, "label": "neutral"}),
        ("RTE", {"idx": 3, "prediction": "not_entailment"}, {"idx": 3, "label": "not_entailment"}),
        ("COPA", {"idx": 3, "prediction": "Kenya", "choices": CHOICES}, {"idx": 3, "label": 1}),
        ("WSC", {"idx": 3, "prediction": "Peru", "choices": CHOICES}, {"idx": 3, "label": "True"}),
        ("WSC", {"idx": 3, "prediction": "Kenya", "choices": CHOICES}, {"idx": 3, "label": "False"}),
        (
            "ReCoRD",
            {"idx": {"passage": 1, "query": 7}, "prediction": "Kenya", "choices": CHOICES},
            {"idx": 7, "label": "Kenya"},
        ),
        ("CB", {"prediction": "neutral"}, {"idx": 0, "label": "neutral"}),  # a file without numbers: its order
    ],
)
def test_a_line(task: str, row: dict[str, Json], line: dict[str, Json]) -> None:
    assert script.server_lines(load_task(task), [row]) == [line]


def test_answers_stand_within_their_questions_and_passages() -> None:
    numbers = [(1, 1, 1), (1, 1, 2), (1, 2, 3), (2, 5, 9)]
    rows: list[dict[str, Json]] = [
        {"idx": {"passage": one, "question": two, "answer": three}, "prediction": "true" if three % 2 else "false"}
        for one, two, three in numbers
    ]
    assert script.server_lines(load_task("MultiRC"), rows) == [
        {
            "idx": 1,
            "passage": {
                "questions": [
                    {"idx": 1, "answers": [{"idx": 1, "label": 1}, {"idx": 2, "label": 0}]},
                    {"idx": 2, "answers": [{"idx": 3, "label": 1}]},
                ]
            },
        },
        {"idx": 2, "passage": {"questions": [{"idx": 5, "answers": [{"idx": 9, "label": 1}]}]}},
    ]


def test_what_the_server_takes(causal: Backbone, few: Path, whole: Path, tmp_path: Path) -> None:
    def served(out: str, task: str, method: str = "majority") -> list[Any]:
        path = tmp_path / out / "server" / method / "seed-0" / f"{task}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    run(causal, few, tmp_path / "few", methods=("majority", "manual"))
    script.write_server_files(tmp_path / "few")
    assert served("few", "COPA") == [{"idx": at, "label": 0} for at in range(30, 39)]
    assert served("few", "WSC") == [{"idx": at, "label": "True"} for at in range(30, 39)]
    assert served("few", "ReCoRD")[0] == {"idx": 20, "label": "Kenya"}
    assert {row["label"] for row in served("few", "CB", "manual")} <= {"entailment", "contradiction", "neutral"}
    run(causal, whole, tmp_path / "whole", methods=("majority", "manual"))
    script.write_server_files(tmp_path / "whole")
    assert [row["idx"] for row in served("whole", "CB")] == [50, 51, 52, 53]  # the test part, not the validation part
    first = served("whole", "MultiRC")[0]
    assert first == {
        "idx": 30,
        "passage": {
            "questions": [
                {"idx": 300 + q, "answers": [{"idx": 3000 + 10 * q + a, "label": 0} for a in range(2)]}
                for q in range(2)
            ]
        },
    }
    note = (tmp_path / "whole/server/README.md").read_text(encoding="utf-8")
    assert "CB: the test split" in note
    assert "MultiRC: the part that is reported here" in note


def test_yes_and_no_as_the_server_writes_them(causal: Backbone, tmp_path: Path) -> None:
    rows = [{"question": f"is {at} good", "passage": "a film", "label": at % 3 > 0, "idx": at} for at in range(9)]
    lines(tmp_path / "data/BoolQ/train.jsonl", rows)
    lines(tmp_path / "data/BoolQ/val.jsonl", rows[:3])
    run(causal, tmp_path / "data", tmp_path / "out")
    script.write_server_files(tmp_path / "out")
    text = (tmp_path / "out/server/majority/seed-0/BoolQ.jsonl").read_text(encoding="utf-8")
    assert text.splitlines()[0] == '{"idx": 0, "label": "true"}'


def test_a_folder_that_cannot_be_handed_in(causal: Backbone, few: Path, tmp_path: Path) -> None:
    run(causal, few, tmp_path / "out", tasks="CB", limit=3)
    with pytest.raises(FileError, match=r"a draw of the rows \(--limit\)"):
        script.write_server_files(tmp_path / "out")
    assert not (tmp_path / "out/server").exists()


def test_answers_of_an_earlier_run_go(causal: Backbone, few: Path, tmp_path: Path) -> None:
    stale = tmp_path / "out/server/manual/seed-0/CB.jsonl"
    run(causal, few, tmp_path / "out", tasks="COPA")
    lines(stale, [{"idx": 0, "label": "neutral"}])
    script.write_server_files(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out/server").rglob("*.jsonl")] == ["COPA.jsonl"]
