"""Answer spaces: labels, choices and written text each say what a row can be answered with."""

import pytest

from ptuning.data.answer_space import TRAIN_CHOICES, AnswerSpace
from ptuning.data.questions import Question, Questions
from ptuning.errors import ConfigError, RecordError
from ptuning.template.labels import LabelWords, Scoring

WORDS = LabelWords({"good": ("great", "fine"), "bad": ("poor",)})
LABELS, CHOICES, WRITTEN = AnswerSpace(WORDS), AnswerSpace(own_choices=True), AnswerSpace()
ROW = Question({"x": "it", "y": "bad"})
OWN = Question({"x": "it", "y": "two"}, choices=("one", "two", "three"), answers=(1, 2))


def test_labels_are_classes_with_a_text_for_each_word() -> None:
    assert (LABELS.is_closed, LABELS.has_choices, LABELS.score_name) == (True, False, "accuracy")
    assert (LABELS.described, list(LABELS.names(ROW))) == ("2 labels", ["good", "bad"])
    assert (list(LABELS.texts(ROW)), LABELS.classes(ROW)) == (["great", "fine", "poor"], (0, 0, 1))
    assert (LABELS.right(ROW), LABELS.right(Question({"x": "it"}))) == ((1,), ())
    assert LABELS.verbalized(ROW.record) == {"x": "it", "y": "poor"}


def test_each_choice_of_a_row_is_a_class_and_a_text() -> None:
    assert (CHOICES.is_closed, CHOICES.has_choices, CHOICES.score_name) == (True, True, "accuracy")
    assert CHOICES.described == "own choices"
    assert CHOICES.names(OWN) == CHOICES.texts(OWN) == ("one", "two", "three")
    assert (CHOICES.classes(OWN), CHOICES.right(OWN)) == ((0, 1, 2), (1, 2))
    assert CHOICES.verbalized(OWN.record) is OWN.record


def test_written_answers_have_no_classes() -> None:
    assert (WRITTEN.is_closed, WRITTEN.has_choices, WRITTEN.score_name) == (False, False, "exact_match")
    assert (WRITTEN.described, WRITTEN.labels, WRITTEN.right(ROW)) == ("any text", (), ())
    assert (tuple(WRITTEN.texts(ROW)), tuple(WRITTEN.texts(Question({"x": "it"})))) == (("bad",), ())


def test_label_words_come_before_choices() -> None:
    both = AnswerSpace(WORDS, own_choices=True)
    assert not both.has_choices
    assert list(both.names(OWN)) == ["good", "bad"]


def test_scoring_changes_only_where_it_is_asked_for() -> None:
    space = AnswerSpace(WORDS, scoring=Scoring("mean", calibrate=True, keep=("x",)))
    assert space.scored() == space
    assert space.scored(normalise="sum").scoring == Scoring("sum", calibrate=True, keep=("x",))
    assert space.scored(calibrate=False).scoring == Scoring("mean", calibrate=False, keep=("x",))


def test_a_setting_that_is_wrong_or_would_change_nothing_is_an_error() -> None:
    for space, asked, message in (
        (LABELS, {"normalise": "avg"}, r"normalise is sum or mean, not 'avg'"),
        (WRITTEN, {"normalise": "avg", "candidates": True}, "is sum or mean, not 'avg'"),
        (WRITTEN, {"normalise": "mean"}, "goes with a closed set of answers"),
        (WRITTEN, {"calibrate": True}, "is for label words and a task's choices"),
        (CHOICES, {"calibrate": True, "candidates": True}, "is for label words and a task's choices"),
    ):
        with pytest.raises(ConfigError, match=message):
            space.scored(**asked)
    assert WRITTEN.scored(normalise="mean", candidates=True).scoring.normalise == "mean"
    assert WRITTEN.scored(normalise="sum", calibrate=False) == WRITTEN


def test_questions_that_cannot_be_answered() -> None:
    wrong = Questions([ROW, Question({"x": "it", "y": "ugly"})], name="d.jsonl")
    with pytest.raises(RecordError, match=r"d.jsonl, record 2: 'ugly' is not one of the labels good, bad"):
        LABELS.check(wrong)
    LABELS.check(wrong, labelled=False)
    with pytest.raises(RecordError, match=r"d.jsonl, row 1 has no choices to choose among; read the rows with their"):
        CHOICES.check(wrong)
    WRITTEN.check(wrong)


def test_learning_takes_few_choices() -> None:
    many = Question({"x": "it", "y": "0"}, choices=tuple(map(str, range(30))), answers=(7,))
    (few,) = CHOICES.to_learn(Questions([many]), seed=0)
    assert len(few.choices) == TRAIN_CHOICES
    assert CHOICES.names(few)[CHOICES.right(few)[0]] == "7"
    rows = Questions([ROW])
    assert LABELS.to_learn(rows, seed=0) is rows
