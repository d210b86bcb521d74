"""The answer space of a task: what its rows are answered with, and how the answers are scored.

There are three: labels with their words (a verbalizer), choices that each row brings, and text that the model writes.
To add one, add a case here: training, scoring, prediction and methods read what they need from :class:`AnswerSpace`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ptuning.data.questions import Question, Questions
from ptuning.data.splits import with_few_choices
from ptuning.errors import ConfigError, RecordError
from ptuning.metrics import ACCURACY, EXACT_MATCH
from ptuning.records import TARGET_FIELD, Record, references_of
from ptuning.template.labels import PLAIN, LabelWords, Normalise, Scoring

# A row with more choices learns from a draw of this many. Source: PET's code, ReCoRD (Schick and Schuetze 2021).
TRAIN_CHOICES = 10


@dataclass(frozen=True)
class AnswerSpace:
    """What rows are answered with: labels with their ``words``, choices of their own, or text that the model writes.

    Labels and choices are closed: an answer is one of K classes, and each class has one or more texts that are scored.
    Label words come before choices. A ``head`` scores the labels themselves (a classification head), not their words.
    """

    words: LabelWords | None = None
    own_choices: bool = False
    scoring: Scoring = PLAIN
    head: bool = False

    @property
    def has_choices(self) -> bool:
        """Whether rows are answered with one of their own choices."""
        return self.own_choices and self.words is None

    @property
    def is_closed(self) -> bool:
        """Whether there is a closed set of answers."""
        return self.own_choices or self.words is not None

    @property
    def score_name(self) -> str:
        """The name of the share of right answers."""
        return ACCURACY if self.is_closed else EXACT_MATCH

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels."""
        return self.words.labels if self.words is not None else ()

    @property
    def described(self) -> str:
        """The answers in a word or two."""
        if self.words is not None:
            return f"{len(self.labels)} labels"
        return "own choices" if self.own_choices else "any text"

    def scored(
        self, *, normalise: Normalise | None = None, calibrate: bool | None = None, candidates: bool = False
    ) -> AnswerSpace:
        """Return the same answers, or ``candidates`` in their place, scored in another way; None leaves a setting as it
        is. Raises ConfigError if a setting is wrong, or would change nothing here.
        """
        own = self.scoring
        calibrated = own.calibrate if calibrate is None else calibrate
        how = replace(own, normalise=own.normalise if normalise is None else normalise, calibrate=calibrated)
        if normalise == "mean" and not (candidates or self.is_closed):
            raise ConfigError(
                "normalise goes with a closed set of answers: candidates, label words, or a task's choices"
            )
        if calibrate and (candidates or not self.is_closed):
            raise ConfigError("calibrate is for label words and a task's choices; leave it out here")
        return replace(self, scoring=how)

    def check_threshold(self, probability: float | None, *, candidates: bool = False) -> None:
        """Raise a ConfigError if answers cannot be held back below a probability: it is none, or answers are open."""
        if probability is None:
            return
        if not 0 <= probability <= 1:
            raise ConfigError(f"min_probability is {probability:g}; a probability lies between 0 and 1")
        if candidates or not self.is_closed:
            raise ConfigError(
                "min_probability is for labels and choices, whose probabilities add up to 1; "
                f"{'candidates' if candidates else 'answers that are written'} have none that do"
            )

    def names(self, question: Question) -> Sequence[str]:
        """Return the names of a question's K classes, which are its possible answers."""
        return self.labels or question.choices

    def texts(self, question: Question) -> Sequence[str]:
        """Return the texts that are filled in for the target when a question is scored."""
        if self.words is not None:
            return [word for _, word in self.words.flat]
        return question.choices if self.own_choices else question.right[:1]

    def classes(self, question: Question) -> tuple[int, ...]:
        """Return the class of each text."""
        if self.words is not None:
            return tuple(label for label, _ in self.words.flat)
        return tuple(range(len(question.choices)))

    def right(self, question: Question) -> tuple[int, ...]:
        """Return the right classes, of which choices may have several; none if the label is not known."""
        if self.words is None:
            return question.answers
        return (self.words.label_of(question.record, where="the row"),) if TARGET_FIELD in question.record else ()

    def verbalized(self, record: Record) -> Record:
        """Return a record as an example shows it to the model: with a word of the label as the target."""
        if self.words is None:
            return record
        return {**record, TARGET_FIELD: self.words.words[record[TARGET_FIELD]][0]}

    def check(self, questions: Questions, *, labelled: bool = True) -> None:
        """Check that every question has choices and, if ``labelled``, a known label; else raise a RecordError."""
        if self.words is not None and labelled:
            for number, question in enumerate(questions, start=1):
                if len(references_of(question.record)) > 1:
                    raise RecordError(
                        f"{questions.name}, row {number} has a list of targets, which are references of a text; a row "
                        "has one label"
                    )
            self.words.check_records(questions.records)
        for number, question in enumerate(questions if self.has_choices else (), start=1):
            if not question.choices:
                raise RecordError(
                    f"{questions.name}, row {number} has no choices to choose among; read the rows with their task "
                    "(load_task(NAME).read(FILE))"
                )

    def to_learn(self, questions: Questions, *, seed: int) -> Questions:
        """Return the questions to learn from, with at most :data:`TRAIN_CHOICES` choices: each costs a pass."""
        return with_few_choices(questions, TRAIN_CHOICES, seed=seed) if self.has_choices else questions
