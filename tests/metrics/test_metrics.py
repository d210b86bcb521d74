"""Scores of answers: ranks as LAMA counts them, and the metrics of SuperGLUE's tasks, by hand."""

import pytest

from ptuning.data.questions import Question, Questions
from ptuning.data.task_files import TaskFile
from ptuning.errors import TaskError
from ptuning.metrics import (
    METRICS,
    SCORES,
    TASK_METRICS,
    Answer,
    Confusion,
    called,
    exact_match,
    in_order,
    normalised,
    primary,
    score_values,
    word_f1,
)
from ptuning.statistics import rows_of, value_of


def labelled(said: str, right: str, groups: str = "") -> tuple[Questions, list[Answer]]:
    """Rows with labels of one letter, t and f for true and false."""
    names = {"t": "true", "f": "false"}
    rows = [
        Question({"x": str(at), "y": names.get(label, label)}, group=groups[at] if groups else None)
        for at, label in enumerate(right)
    ]
    answers = [Answer(names.get(text, text), text == label) for text, label in zip(said, right, strict=True)]
    return Questions(rows), answers


def values(questions: Questions, answers: list[Answer], *metrics: str) -> dict[str, float]:
    return {name: value_of(scored) for name, scored in score_values(answers, questions, metrics).items()}


def test_scores_of_ranked_and_of_generated_answers() -> None:
    """A target that is not among the ranked (rank 0) counts nowhere."""
    ranked = [Answer("a", True, 1), Answer("b", False, 4), Answer("c", False, 11), Answer("d", False, 0)]
    assert score_values(ranked) == {
        "p_at_1": [1.0, 0.0, 0.0, 0.0],
        "p_at_10": [1.0, 1.0, 0.0, 0.0],
        "mrr": [1.0, 0.25, 1 / 11, 0.0],
        "exact_match": [1.0, 0.0, 0.0, 0.0],
    }
    # Generated answers are compared with the target and with nothing else.
    assert score_values([Answer("a", True), Answer("b", False, 3)]) == {
        "p_at_1": [1.0, 0.0],
        "exact_match": [1.0, 0.0],
    }
    questions, answers = labelled("ttf", "tft")
    assert score_values(answers, questions, ("accuracy",)) == {"score": [1.0, 0.0, 0.0], "accuracy": [1.0, 0.0, 0.0]}


def test_accuracy_and_macro_f1_of_commitments() -> None:
    """F1 of e: 2 x 1 / (2 + 1), of c: 2 x 1 / (1 + 2), of n: 0."""
    scores = values(*labelled("eec", "ecc"), "accuracy", "macro_f1")
    assert scores == pytest.approx({"accuracy": 2 / 3, "macro_f1": 2 / 3, "score": 2 / 3})
    scores = values(*labelled("eecn", "eccc"), "accuracy", "macro_f1")
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)
    assert scores["score"] == pytest.approx((2 / 4 + (2 / 3 + 2 / 4) / 3) / 2)


def test_f1_over_answers_and_questions_wholly_right() -> None:
    """Three questions of two answers: said true 3 times, right 3 times, both twice; the last two are wholly right."""
    questions, answers = labelled("ttfftf", "tfffft"[:4] + "tf", "aabbcc")
    scores = score_values(answers, questions, ("f1a", "exact_match"))
    assert value_of(scores["f1a"]) == pytest.approx(2 * 2 / (3 + 2))
    assert scores["exact_match"] == [0.0, 1.0, 1.0]
    assert value_of(scores["score"]) == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert {rows_of(scored) for scored in scores.values()} == {3}  # n counts questions


def test_accuracy_beside_a_score_over_groups_is_over_groups_too() -> None:
    questions, answers = labelled("tft", "ttt", "aab")
    scores = score_values(answers, questions, ("accuracy", "exact_match"))
    assert value_of(scores["accuracy"]) == pytest.approx(2 / 3)  # of three rows, not of two groups
    assert rows_of(scores["accuracy"]) == rows_of(scores["exact_match"]) == 2


def test_words_of_names() -> None:
    """Several mentions are right; the closest one counts, and articles and points do not."""
    choices = ("Barack Obama", "Obama", "Bush", "the Senate")
    rows = Questions(
        [
            Question({"p": "", "y": "Barack Obama"}, choices, (0, 1), group="1"),
            Question({"p": "", "y": "Bush"}, choices, (2,), group="2"),
            Question({"p": "", "y": "the Senate"}, ("Senate", "the Senate"), (1,), group="3"),
        ]
    )
    answers = [Answer("Obama", True), Answer("Obama", False), Answer("Senate", False)]
    scores = score_values(answers, rows, ("f1", "exact_match"))
    assert scores["f1"] == [1.0, 0.0, 1.0]
    assert scores["exact_match"] == [1.0, 0.0, 1.0]
    near = score_values([Answer("Barack Bush", False)], Questions([rows[1]]), ("f1", "exact_match"))
    assert value_of(near["f1"]) == pytest.approx(2 / 3)
    assert near["exact_match"] == [0.0]


def test_an_unknown_metric() -> None:
    with pytest.raises(TaskError, match=r"'bleu'.*accuracy"):
        score_values([Answer("true", True)], labelled("t", "t")[0], ("bleu",))


def test_macro_f1_by_hand() -> None:
    """Label a: 2 of (3 predicted, 3 right), b: 2 of (4, 3), c: 2 of (3, 4)."""

    def macro_f1(predicted: str, right: str) -> float:
        return values(*labelled(predicted, right), "macro_f1")["macro_f1"]

    assert macro_f1("aaabbbbccc", "aacbbcabcc") == pytest.approx((4 / 6 + 4 / 7 + 4 / 7) / 3)
    # A label that is never right counts with an F1 of 0; one that is nowhere does not count.
    assert macro_f1("ab", "aa") == pytest.approx((2 / 3 + 0) / 2)
    assert macro_f1("a", "a") == 1.0
    # The majority answer finds none of the positive label.
    assert values(*labelled("fff", "tft", "aab"), "f1a")["f1a"] == 0.0


def test_words_of_answers_by_hand() -> None:
    assert normalised(" The U.S. Senate,  an ally ") == "us senate ally"
    assert exact_match("the Senate", ["House", "Senate."]) == 1.0
    assert exact_match("Senates", ["Senate"]) == 0.0
    # One of two words is right, and the answer has three: 2 x 1 / (2 + 3); the best answer counts.
    assert word_f1("Barack Hussein", ["John", "Obama the Barack Two"]) == pytest.approx(2 / 5)
    assert word_f1("Obama", ["Bush"]) == 0.0
    assert word_f1("Obama", []) == 0.0
    assert (word_f1("the", ["a"]), word_f1("the", ["b"])) == (1.0, 0.0)


def test_every_metric_can_be_used_everywhere() -> None:
    """One entry in the table is all that a metric takes: task files may name it, it is computed, named and ordered."""
    rows, answers = labelled("tf", "tt")
    for name in TASK_METRICS:
        text = f"""name = "two"
version = "1"
metrics = ["{name}"]
[labels]
true = ["yes"]
false = ["no"]
[[patterns]]
manual = "[X] [Y]"
learned = "[P:one] [X] [Y]"
"""
        assert TaskFile.parse(text, where="two.toml").metrics == (name,)
        scores = score_values(answers, rows, (name,))
        assert 0 < value_of(scores[name]) <= 1
        assert called(name) == METRICS[name].shown_as
    assert in_order(["zeta", *reversed(SCORES), "alpha"]) == [*SCORES, "zeta", "alpha"]
    assert called("some_score") == "some score"


def test_one_score_stands_for_all() -> None:
    """A task's own score, then P@1, then exact match; else the first one there."""
    assert primary(["accuracy", "p_at_1", "score"]) == "score"
    assert primary(["exact_match", "mrr", "p_at_1"]) == "p_at_1"
    assert primary(["mrr", "exact_match"]) == "exact_match"
    assert primary(["mrr", "accuracy"]) == "mrr"
    assert primary([]) == "score"


def test_labels_one_by_one() -> None:
    """As scikit-learn 1.9 counts them: ``precision_recall_fscore_support(..., zero_division=0)``."""
    targets = ["a", "a", "a", "a", "b", "b", "b", "c", "c", "d"]
    answers = ["a", "a", "b", "a", "b", "a", "b", "c", "a", "e"]
    scores = Confusion.of(["a", "b", "c", "d"], targets, answers)
    assert scores.counts == ((3, 1, 0, 0), (1, 2, 0, 0), (1, 0, 1, 0), (0, 0, 0, 0))
    kept = Confusion.of("abcd", targets[:9], answers[:9]).scores
    expected = {"a": (0.6, 0.75, 2 / 3, 4), "b": (2 / 3, 2 / 3, 2 / 3, 3), "c": (1.0, 0.5, 2 / 3, 2), "d": (0, 0, 0, 0)}
    for label, numbers in expected.items():
        assert tuple(vars(kept[label]).values()) == pytest.approx(numbers)


def test_the_most_frequent_labels_of_many_and_the_others_together() -> None:
    whole = Confusion(tuple("abcd"), ((1, 0, 2, 0), (0, 5, 0, 1), (0, 1, 0, 0), (3, 0, 0, 4)))
    assert whole.shortened(4, others="rest") is whole
    scores = whole.shortened(2, others="rest")
    assert scores == Confusion(("b", "d", "rest"), ((5, 1, 0), (0, 4, 3), (1, 0, 3)))
    assert sum(map(sum, scores.counts)) == sum(map(sum, whole.counts))


def test_an_empty_text_is_no_answer() -> None:
    """Not even where nothing is left of the right one without articles and punctuation."""
    assert exact_match(" ", ["the", "..."]) == word_f1(" ", ["the", "..."]) == 0.0
    assert exact_match("!", ["!"]) == word_f1("!", ["!"]) == 1.0


def test_a_row_whose_target_is_not_known_scores_nothing() -> None:
    """Whatever the answer's text is: a choice is named by its own text even if its tokens are those of another."""
    rows = Questions([Question({"x": "a", "y": "yes"})])
    answers = [Answer("yes", False, known=False)]
    assert set(values(rows, answers, "accuracy", "exact_match", "f1", "macro_f1").values()) == {0.0}
