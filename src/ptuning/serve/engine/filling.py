"""Rows as the model reads them: templates filled with a request's records, one row at a time."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ptuning.data.answer_space import AnswerSpace
from ptuning.data.questions import Questions
from ptuning.engine.objective import Item, question_items
from ptuning.engine.writing.ending import Ending, OpenRow
from ptuning.engine.writing.generate import Company, contexts
from ptuning.engine.writing.writer import Line
from ptuning.errors import PTuningError, RecordError
from ptuning.prompt.predict import PromptModel, check_answering, longest_answer
from ptuning.prompt.prompt import Prompt
from ptuning.serve.engine.beginnings import PassRow, constant_tokens
from ptuning.serve.engine.job import EchoRow, PromptRow, TextRow
from ptuning.template.fill import BoundTemplate, Example, TooLongError
from ptuning.template.segments import Ids

# The longest answer of the base model where none is asked for, as in OpenAI's interface.
BASE_TOKENS = 16
# The most logits of a text whose tokens are scored: they take about a gigabyte.
ECHO_LOGITS = 1 << 27
# Values that differ in their first letter, to see what all rows of a prompt begin with.
PROBES = ("a", "Zebra")


@dataclass(frozen=True)
class Ready:
    """A prompt that is ready for rows: bound to the tokenizer, with its vectors on the device."""

    bound: BoundTemplate
    vectors: Tensor
    digest: bytes
    constant: int


@dataclass(frozen=True)
class ClosedRow:
    """A row whose answers are labels or choices: what is scored, the rows to read, and the names of its classes."""

    item: Item
    names: tuple[str, ...]
    rows: tuple[PassRow, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens that the model reads."""
        return self.item.tokens


@dataclass(frozen=True)
class WrittenRow:
    """A row whose answer is written: the row to read, its line, and which rows it can be written with."""

    row: PassRow
    line: Line
    company: Company

    @property
    def rows(self) -> tuple[PassRow, ...]:
        """The row to read, alone."""
        return (self.row,)

    @property
    def tokens(self) -> int:
        """Number of tokens that the model reads before it writes."""
        return len(self.row.example.token_ids)


class Filling:
    """Fills the templates of prompts for one model; it keeps what it knows of a prompt as long as the prompt lives."""

    def __init__(self, model: PromptModel) -> None:
        self._model = model
        self._backbone = model.backbone
        self._ready: WeakKeyDictionary[Prompt, Ready] = WeakKeyDictionary()
        self._nothing = torch.zeros(0, self._backbone.width)

    def ready(self, prompt: Prompt) -> Ready:
        """Return a prompt ready for rows; a PTuningError if it does not fit the backbone."""
        if prompt not in self._ready:
            bound = prompt.bind(self._backbone, force=self._model.force)
            vectors = prompt.learned(self._backbone).vectors
            digest = hashlib.sha256(vectors.numpy().tobytes()).digest() if len(vectors) else b""
            constant = _constant(bound) if self._backbone.shares_prefix else 0
            self._ready[prompt] = Ready(bound, vectors.to(self._backbone.device), digest, constant)
        return self._ready[prompt]

    def answers(self, row: PromptRow) -> AnswerSpace:
        """Check how a row shall be answered, and return its answer space."""
        how = row.how
        if how.top_k < 1:
            raise RecordError(f"top_k is {how.top_k}; it must be 1 or more")
        return check_answering(
            row.prompt,
            candidates=how.candidates,
            normalise=how.normalise,
            calibrate=how.calibrate,
            count_stop=how.count_stop,
            min_probability=how.min_probability,
        )

    def scored(self, row: PromptRow, answers: AnswerSpace) -> ClosedRow:
        """Fill a row for each different text of its labels or choices."""
        ready, questions = self.ready(row.prompt), Questions([row.question], name="the request")
        (item,) = question_items(ready.bound, questions, answers, labelled=False)
        rows = tuple(pass_row(example, ready) for example in item.inputs)
        return ClosedRow(item, tuple(answers.names(row.question)), rows)

    def written(self, row: PromptRow) -> WrittenRow:
        """Fill a row whose answer is written."""
        ready, how = self.ready(row.prompt), row.how
        asked = OpenRow(ready.bound, row.question.record, longest_answer(how.generation, row.prompt))
        (example,) = contexts([asked])
        ending = Ending.of(self._backbone, asked, stop_strings=how.generation.stop_strings)
        line = Line(ending, how.generation, alternatives=how.alternatives)
        return self._continued(pass_row(example, ready), line, asked.max_tokens)

    def continued(self, row: TextRow) -> WrittenRow:
        """Return a row that the base model goes on with."""
        ids, how = self.ids(row.text), row.how
        room = self._backbone.tokenizer.max_tokens - len(ids) + 1
        if not ids or room < 1:
            raise (TooLongError if ids else RecordError)(
                f"the text has {len(ids)} tokens; the model reads from 1 to {self._backbone.tokenizer.max_tokens}"
            )
        most = min(how.generation.max_new_tokens or BASE_TOKENS, room)
        ending = Ending(
            self._backbone, max_tokens=most, multiline=True, stop_strings=how.generation.stop_strings, as_is=True
        )
        example = Example(ids, (), (len(ids) - 1,), (), 0)
        return self._continued(self._plain(example), Line(ending, how.generation, alternatives=how.alternatives), most)

    def echoed(self, row: EchoRow) -> PassRow:
        """Return a row of which each token is scored by those in front of it."""
        ids = self.ids(row.text)
        most = min(self._backbone.tokenizer.max_tokens, ECHO_LOGITS // self._backbone.vocabulary)
        if not 2 <= len(ids) <= most:
            raise (TooLongError if ids[1:] else RecordError)(
                f"the text has {len(ids)} tokens; from 2 to {most} can be scored (echo)"
            )
        return self._plain(Example(ids, (), tuple(range(len(ids))), (), 0))

    def ids(self, text: str | Ids) -> Ids:
        """Return the token ids of a text as the tokenizer begins and ends it, or given ids after a check."""
        if isinstance(text, str):
            tokenizer = self._backbone.tokenizer
            return (*tokenizer.prefix_ids, *tokenizer.encode([text])[0])
        outside = [token for token in text if not 0 <= token < self._backbone.vocabulary]
        if outside:
            raise RecordError(f"token id {outside[0]} is outside the vocabulary of {self._backbone.vocabulary}")
        return tuple(text)

    def _plain(self, example: Example) -> PassRow:
        return PassRow(example, self._nothing, b"")

    def _continued(self, row: PassRow, line: Line, most: int) -> WrittenRow:
        return WrittenRow(row, line, Company.of(self._backbone, row.example, most))


def pass_row(example: Example, ready: Ready) -> PassRow:
    """Return a filled row of a prompt."""
    return PassRow(example, ready.vectors, ready.digest, ready.constant)


def _constant(bound: BoundTemplate) -> int:
    """Return with how many tokens and slots rows of a template begin, whatever their record."""
    try:
        one, other = (bound.contexts([dict.fromkeys(bound.template.fields, text)])[0] for text in PROBES)
    except PTuningError:
        return 0
    return constant_tokens(one, other)
