"""The majority answer, counted in the training part."""

from __future__ import annotations

from ptuning.backbone.backbone import Backbone
from ptuning.data.questions import as_questions
from ptuning.method.base import Setup
from ptuning.method.majority import majority
from ptuning.metrics import Answer
from tests.method.test_manual import task


def test_the_majority_is_counted_in_the_training_part(causal: Backbone) -> None:
    rows = [{"x": "a", "y": y} for y in ("yes", "no", " yes", "no ", "good")]
    solution = majority(task(rows, [{"x": "b", "y": "great"}] * 9), Setup(causal))
    assert solution.record == {"answer": "no"}  # of equally frequent ones the first in the alphabet
    test = as_questions([{"x": "c", "y": y} for y in ("no", "yes", "good", "great")])
    assert solution.answer(test) == [Answer("no", at == 1, at) for at in (1, 2, 3, 0)]
