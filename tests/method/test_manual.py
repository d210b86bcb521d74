"""Manual prompts, asked as they are or among the task's objects only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.data.questions import as_questions
from ptuning.method import manual as manual_module
from ptuning.method.base import Setup, Task
from ptuning.method.manual import is_multiline, manual, manual_restricted, target_tokens
from ptuning.metrics import Answer
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.score import answer_records
from ptuning.records import Record, Records
from ptuning.template.language import Template
from tests.conftest import WARM, bound

MANUAL = "[X] is [Y] ."
WORDS = ("yes", "good", "great", "bad")
TRAIN: list[Record] = [{"x": f"P {at}", "y": WORDS[at % 4]} for at in range(40)]
DEV: list[Record] = [{"x": f"Kenya {at}", "y": WORDS[at % 3]} for at in range(6)]


def task(train: Sequence[Record] = TRAIN, dev: Sequence[Record] = DEV, *, pattern: str = MANUAL, **more: Any) -> Task:
    objects = tuple(sorted({row["y"] for row in [*train, *dev]}))
    more = {"single_token": True, **more}
    return Task(
        "P1", as_questions(train), as_questions(dev), Template.parse(pattern), Template.parse(WARM), objects, **more
    )


def test_the_manual_prompt_is_asked_as_it_is(backbone: Backbone) -> None:
    plain = Prompt.manual(MANUAL)
    for closed in (None, ("yes", "bad")):
        solution = manual(task(vocabulary=closed), Setup(backbone))
        expected = answer_records(PromptModel(backbone), plain, Records(DEV), closed=closed, single_token=True)
        assert solution.answer(as_questions(DEV)) == expected
        assert solution.record == {"prompt": MANUAL}


def test_the_restricted_prompt_chooses_among_the_tasks_objects(backbone: Backbone) -> None:
    for single in (True, False):
        found = manual_restricted(task(single_token=single), Setup(backbone)).answer(as_questions(DEV))
        assert {answer.text for answer in found} <= set(WORDS)
        assert all(answer.rank is not None and answer.rank <= 4 for answer in found)


def test_written_answers_get_as_long_as_the_longest_training_target(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"x": "a", "y": "yes"}, {"x": "b", "y": "a good film"}]
    here = task(rows, [{"x": "c", "y": "a good film and a bad one"}], single_token=False)
    longest = max(example.own_tokens for example in bound(causal, MANUAL).examples(rows))
    assert target_tokens(here, Setup(causal)) == longest
    asked: list[int | None] = []

    def answer_records(*_: object, max_tokens: int | None, **__: object) -> list[Answer]:
        asked.append(max_tokens)
        return []

    monkeypatch.setattr(manual_module, "answer_records", answer_records)
    manual(here, Setup(causal)).answer(as_questions(DEV))
    assert asked == [longest]


def test_answers_of_several_lines_do_not_end_with_the_first(causal: Backbone) -> None:
    rows = [{"x": "Kenya", "y": "yes\nno"}]
    assert is_multiline(task(rows))
    assert not is_multiline(task())
    seen: list[bool] = []
    for train in (rows, TRAIN):
        found = manual(task(train, single_token=False), Setup(causal)).answer(as_questions(DEV))
        seen.append(any("\n" in answer.text for answer in found))
    assert seen[1] is False
