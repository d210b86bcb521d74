"""The majority baseline: the most frequent answer of the training part, whatever the question is."""

from __future__ import annotations

from collections import Counter

from ptuning.data.questions import Question
from ptuning.method.base import Method, Setup, Solution, Task
from ptuning.metrics import Answer
from ptuning.records import TARGET_FIELD
from ptuning.statistics import majority as most_frequent


def majority(task: Task, _: Setup) -> Solution:
    """Rank answers by their frequency in the training part."""
    if task.answer_space.has_choices:
        return _majority_place(task)
    counts = Counter(row.record[TARGET_FIELD].strip() for row in task.train)
    ranked = sorted(counts, key=lambda text: (-counts[text], text))
    return Solution.of_ranking(lambda _: ranked, answer=most_frequent(list(counts.elements())))


def _majority_place(task: Task) -> Solution:
    """Answer with the choice at the place that is right most often, for tasks whose rows bring their own choices."""
    counts = Counter(place for row in task.train for place in row.answers)
    places = sorted(counts, key=lambda place: (-counts[place], place))

    def ranked(row: Question) -> Answer:
        count = len(row.choices)
        texts = [row.choices[place] for place in (*places, *range(count)) if place < count]
        return Answer.of_ranked(list(dict.fromkeys(texts)), row.right)

    return Solution(lambda questions: list(map(ranked, questions)), {"answer": f"choice {places[0] + 1}"})


MAJORITY = Method(
    "majority",
    "the most frequent answer of the training part",
    majority,
    reads_manual=False,
    default_for=("compare", "lama", "superglue"),
)
