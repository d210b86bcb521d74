"""Answer spaces: what questions are answered with, and how the answers are scored.

There are three: labels with their words (a verbalizer), choices that each row brings, and text that the model writes.
To add a kind of answer, add a class here: training, scoring, prediction and methods read everything from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from ptuning.data.questions import Question, Questions
from ptuning.data.splits import with_few_choices
from ptuning.errors import RecordError
from ptuning.metrics import ACCURACY, EXACT_MATCH
from ptuning.records import TARGET_FIELD, Record
from ptuning.template.fill import BoundTemplate
from ptuning.template.labels import PLAIN, LabelWords, Normalise, Scoring

# A row with more choices learns from a draw of this many. Source: PET's code, ReCoRD (Schick and Schuetze 2021).
TRAIN_CHOICES = 10


@dataclass(frozen=True)
class AnswerSpace:
    """What a question can be answered with. What is written here holds for text that the model writes.

    A closed space has classes, and scores texts: one or more for each class.

    Args:
        scoring: How the texts of a closed space are scored.
    """

    scoring: Scoring = field(default=PLAIN, kw_only=True)

    # The share of right answers goes by this name.
    score_name: ClassVar[str] = EXACT_MATCH
    # Whether there is a closed set to choose from.
    is_closed: ClassVar[bool] = False
    # Whether each row brings its own choices.
    has_choices: ClassVar[bool] = False
    # What a prompt with a closed set does, in messages.
    closed_by: ClassVar[str] = ""

    @property
    def described(self) -> str:
        """The answers in a word or two."""
        return "any text"

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, where all questions have the same ones."""
        return ()

    def scored(self, *, normalise: Normalise | None = None, calibrate: bool | None = None) -> AnswerSpace:
        """Return the same answers, scored in another way; None leaves a setting as it is."""
        how = self.scoring
        calibrated = how.calibrate if calibrate is None else calibrate
        return replace(self, scoring=replace(how, normalise=normalise or how.normalise, calibrate=calibrated))

    def check(self, questions: Questions, *, labelled: bool = True) -> None:
        """Check that questions can be answered, and are labelled with answers of this space.

        Raises:
            RecordError: At the first one that is not.
        """

    def check_words(self, bound: BoundTemplate, record: Record, *, unknown_id: int | None) -> list[str]:
        """Check the label words' tokens, as :meth:`ptuning.template.labels.LabelWords.check_ids` does."""
        return []

    def names(self, question: Question) -> Sequence[str]:
        """Return the names of a question's classes, which are its possible answers."""
        return self.labels

    def texts(self, question: Question) -> Sequence[str]:
        """Return the texts that stand in the place of the target when a question is scored."""
        return (question.record[TARGET_FIELD],) if TARGET_FIELD in question.record else ()

    def classes(self, question: Question) -> tuple[int, ...]:
        """Return the class of each text."""
        return ()

    def right(self, question: Question) -> tuple[int, ...]:
        """Return the right classes; none where a question was read without its label."""
        return ()

    def spoken(self, record: Record) -> Record:
        """Return a record with its target as a text shows it to the model."""
        return record

    def to_learn(self, questions: Questions, *, seed: int) -> Questions:
        """Return the questions in the form to learn from: with few choices, where every choice costs a pass."""
        return questions


@dataclass(frozen=True)
class Written(AnswerSpace):
    """Any text, which the model writes."""


@dataclass(frozen=True)
class Labels(AnswerSpace):
    """The labels of a task, the same ones in every row. Each of their words is a text.

    Args:
        words: Label -> words.
    """

    words: LabelWords

    score_name: ClassVar[str] = ACCURACY
    is_closed: ClassVar[bool] = True

    closed_by: ClassVar[str] = "has label words, which are all its answers"

    @property
    def described(self) -> str:
        """The number of labels."""
        return f"{len(self.labels)} labels"

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels."""
        return self.words.labels

    def check(self, questions: Questions, *, labelled: bool = True) -> None:
        """Check that every target is a label."""
        if labelled:
            self.words.check_records(questions.records)

    def check_words(self, bound: BoundTemplate, record: Record, *, unknown_id: int | None) -> list[str]:
        """Check the words' tokens, and return a line for each word."""
        return self.words.check_ids(bound, record, unknown_id=unknown_id)

    def texts(self, question: Question) -> Sequence[str]:
        """Return every word of every label."""
        return [word for _, word in self.words.flat]

    def classes(self, question: Question) -> tuple[int, ...]:
        """Return the label of every word."""
        return tuple(label for label, _ in self.words.flat)

    def right(self, question: Question) -> tuple[int, ...]:
        """Return the row's label."""
        record = question.record
        return (self.words.label_of(record, where="the row"),) if TARGET_FIELD in record else ()

    def spoken(self, record: Record) -> Record:
        """Return the record with the first word of its label as its target."""
        return {**record, TARGET_FIELD: self.words.words[record[TARGET_FIELD]][0]}


@dataclass(frozen=True)
class Choices(AnswerSpace):
    """The choices that each row brings. Each is a text and a class of its own."""

    score_name: ClassVar[str] = ACCURACY
    is_closed: ClassVar[bool] = True
    has_choices: ClassVar[bool] = True
    closed_by: ClassVar[str] = "brings its own choices"

    @property
    def described(self) -> str:
        """Whose choices they are."""
        return "own choices"

    def check(self, questions: Questions, *, labelled: bool = True) -> None:
        """Check that every row has choices."""
        for number, question in enumerate(questions, start=1):
            if not question.choices:
                raise RecordError(
                    f"{questions.name}, row {number} has no choices to choose among; read the rows with their task "
                    "(--task NAME, or load_task(NAME).read(FILE))"
                )

    def names(self, question: Question) -> Sequence[str]:
        """Return the row's choices."""
        return question.choices

    def texts(self, question: Question) -> Sequence[str]:
        """Return the row's choices."""
        return question.choices

    def classes(self, question: Question) -> tuple[int, ...]:
        """Return a class for each choice."""
        return tuple(range(len(question.choices)))

    def right(self, question: Question) -> tuple[int, ...]:
        """Return the right choices, of which there may be several."""
        return question.answers

    def to_learn(self, questions: Questions, *, seed: int) -> Questions:
        """Return the questions with at most :data:`TRAIN_CHOICES` choices each."""
        return with_few_choices(questions, TRAIN_CHOICES, seed=seed)


def answer_space(words: LabelWords | None, *, has_choices: bool, scoring: Scoring = PLAIN) -> AnswerSpace:
    """Return the answer space of a task.

    Args:
        words: Its label words, if it has any.
        has_choices: Whether rows bring their own choices; label words come first.
        scoring: How the texts of a closed space are scored.
    """
    if words is not None:
        return Labels(words, scoring=scoring)
    return Choices(scoring=scoring) if has_choices else Written(scoring=scoring)
