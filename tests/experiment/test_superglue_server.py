"""What SuperGLUE's server takes, line by line, as its tasks want it (the files of whole runs: test_superglue)."""

from __future__ import annotations

import pytest

from ptuning.data.task_files import load_task
from ptuning.experiment.superglue_server import server_lines
from ptuning.files import Json

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
    assert server_lines(load_task(task), [row]) == [line]


def test_answers_stand_within_their_questions_and_passages() -> None:
    numbers = [(1, 1, 1), (1, 1, 2), (1, 2, 3), (2, 5, 9)]
    rows: list[dict[str, Json]] = [
        {"idx": {"passage": one, "question": two, "answer": three}, "prediction": "true" if three % 2 else "false"}
        for one, two, three in numbers
    ]
    assert server_lines(load_task("MultiRC"), rows) == [
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
