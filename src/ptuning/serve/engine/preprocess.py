"""Rows as the model reads them: templates filled with a request's records, one row at a time."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from ptuning.data.answer_space import AnswerSpace
from ptuning.data.questions import Questions
from ptuning.engine.decoding.decoder import GenerationInput, OutputSequence, StopCriteria
from ptuning.engine.decoding.generate import BatchKey, generation_contexts
from ptuning.engine.objective import ScoringRequest, build_requests, candidate_request
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import PromptError, PTuningError, RecordError
from ptuning.prompt.predict import PromptModel, check_answering, longest_answer
from ptuning.prompt.prompt import Prompt
from ptuning.serve.engine.job import EchoRow, PromptRow, TextRow
from ptuning.serve.engine.prefix_cache import ModelRow, constant_prefix_tokens
from ptuning.template.encode import Example, TokenizedTemplate, TooLongError
from ptuning.template.language import Field
from ptuning.template.segments import Ids

# The longest answer of the base model where none is asked for, as in OpenAI's interface.
BASE_TOKENS = 16
# The most logits of a text whose tokens are scored: they take about a gigabyte.
ECHO_LOGITS = 1 << 27
# Values that differ in their first letter, to see what all rows of a prompt begin with.
PROBES = ("a", "Zebra")


@dataclass(frozen=True, eq=False)
class PreparedPrompt:
    """A prompt that is ready for rows: bound to the tokenizer, with what it has learned on the device."""

    bound: TokenizedTemplate
    learned: PromptBatch
    digest: bytes
    constant: int


@dataclass(frozen=True)
class ScoringRow:
    """A row whose answers are labels or choices: what is scored, the rows to read, and the names of its classes."""

    item: ScoringRequest
    names: tuple[str, ...]
    rows: tuple[ModelRow, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens that the model reads."""
        return self.item.tokens


@dataclass(frozen=True)
class DecodingRow:
    """A row whose answer is written: the row to read, its line, and which rows it can be written with."""

    row: ModelRow
    line: OutputSequence
    company: BatchKey

    @property
    def rows(self) -> tuple[ModelRow, ...]:
        """The row to read, alone."""
        return (self.row,)

    @property
    def tokens(self) -> int:
        """Number of tokens that the model reads before it writes."""
        return len(self.row.example.token_ids)


class Preprocessor:
    """Fills the templates of prompts for one model; it keeps what it knows of a prompt as long as the prompt lives."""

    def __init__(self, model: PromptModel) -> None:
        self._model = model
        self._backbone = model.backbone
        self._ready: WeakKeyDictionary[Prompt, PreparedPrompt] = WeakKeyDictionary()
        self._fronts: WeakKeyDictionary[PreparedPrompt, Example | None] = WeakKeyDictionary()
        self._nothing = PromptBatch.none(self._backbone.width)

    def ready(self, prompt: Prompt) -> PreparedPrompt:
        """Return a prompt ready for rows; a PTuningError if it does not fit the backbone."""
        if prompt not in self._ready:
            bound = prompt.bind(self._backbone, force=self._model.force)
            learned = prompt.learned(self._backbone)
            data = b"".join(one.numpy().tobytes() for one in learned.tensors)
            digest = hashlib.sha256(data).digest() if data else b""
            constant = _constant(bound) if self._backbone.shares_prefix else 0
            self._ready[prompt] = PreparedPrompt(bound, learned.to(self._backbone.device), digest, constant)
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

    def scored(self, row: PromptRow, answers: AnswerSpace) -> ScoringRow:
        """Fill a row for each different text of its labels or choices."""
        ready, questions = self.ready(row.prompt), Questions([row.question], name="the request")
        (item,) = build_requests(ready.bound, questions, answers, labelled=False)
        rows = tuple(pass_row(example, ready) for example in item.inputs)
        return ScoringRow(item, tuple(answers.names(row.question)), rows)

    def written(self, row: PromptRow) -> DecodingRow:
        """Fill a row whose answer is written."""
        ready, how = self.ready(row.prompt), row.how
        asked = GenerationInput(ready.bound, row.question.record, longest_answer(how.generation, row.prompt))
        (example,) = generation_contexts([asked])
        ending = StopCriteria.of(self._backbone, asked, stop_strings=how.generation.stop_strings)
        line = OutputSequence(ending, how.generation, alternatives=how.alternatives)
        return self._continued(pass_row(example, ready), line, asked.max_tokens)

    def read_whole(self, row: PromptRow) -> int:
        """Return how many tokens the model reads for a row that ``PromptModel.predict`` answers in one go: of all
        candidates, or up to the answer.
        """
        ready, how, record = self.ready(row.prompt), row.how, row.question.record
        if how.candidates is not None:
            (examples,) = ready.bound.answers([record], [how.candidates], with_stop=how.count_stop)
            return candidate_request(examples).tokens
        (example,) = generation_contexts(
            [GenerationInput(ready.bound, record, longest_answer(how.generation, row.prompt))]
        )
        return len(example.token_ids)

    def continued(self, row: TextRow) -> DecodingRow:
        """Return a row that the model goes on with."""
        ids, how = self.ids(row.text, behind=row.prompt), row.how
        begun = self._begun(row.prompt, ids)
        read, limit = begun.example.length, self._limit(row.prompt)
        room = limit - read + 1
        if not ids or room < 1:
            raise (TooLongError if ids else RecordError)(
                f"the text has {read} tokens; the model reads from 1 to {limit}"
            )
        asked = how.generation.max_new_tokens
        if row.prompt is None:
            most, multiline, ends = min(asked or BASE_TOKENS, room), True, frozenset[int]()
        else:
            most = min(longest_answer(how.generation, row.prompt), room)
            bound = self.ready(row.prompt).bound
            multiline, ends = bound.multiline, bound.end_ids
        stops, as_is = how.generation.stop_strings, row.prompt is None
        ending = StopCriteria(
            self._backbone, max_tokens=most, multiline=multiline, stop_strings=stops, as_is=as_is, end_ids=ends
        )
        example = replace(begun.example, logit_positions=(read - 1,), target_ids=())
        line = OutputSequence(ending, how.generation, alternatives=how.alternatives)
        return self._continued(replace(begun, example=example), line, most)

    def echoed(self, row: EchoRow) -> ModelRow:
        """Return a row whose ``target_ids``, its last tokens, are each scored by those in front of them."""
        ids = self.ids(row.text, behind=row.prompt)
        found = self._begun(row.prompt, ids)
        read = found.example.length
        most = min(self._limit(row.prompt), ECHO_LOGITS // self._backbone.vocabulary)
        if not ids or not 2 <= read <= most:
            raise (TooLongError if read > 2 else RecordError)(
                f"the text has {read} tokens; from 2 to {most} can be scored (echo)"
            )
        return found

    def ids(self, text: str | Ids, *, behind: Prompt | None = None) -> Ids:
        """Return the token ids of a text as the tokenizer begins and ends it, or given ids after a check. Text that
        stands ``behind`` a prompt's beginning has none of its own.
        """
        if isinstance(text, str):
            tokenizer = self._backbone.tokenizer
            own = tokenizer.encode([text])[0]
            return (*tokenizer.prefix_ids, *own) if behind is None else tuple(own)
        outside = [token for token in text if not 0 <= token < self._backbone.vocabulary]
        if outside:
            raise RecordError(f"token id {outside[0]} is outside the vocabulary of {self._backbone.vocabulary}")
        return tuple(text)

    def _begun(self, prompt: Prompt | None, ids: Ids) -> ModelRow:
        """Return a row of ids behind a prompt's beginning; they are its targets, the first one only if there is
        something in front of it.
        """
        if prompt is None:
            return self._plain(Example(ids, (), tuple(range(len(ids) - 1)), ids, len(ids)))
        ready = self.ready(prompt)
        if ready not in self._fronts:
            self._fronts[ready] = _front(ready.bound)
        front = self._fronts[ready]
        if front is None:
            raise PromptError(
                "token ids and echo are for templates that end in one field and the target, with nothing but slots or "
                f"whole words in front of the field, as in [P*8]{{x}} [Y]; this one is '{prompt.template}'"
            )
        positions = range(max(0, len(front.token_ids) - 1), len(front.token_ids) + len(ids) - 1)
        example = replace(
            front,
            token_ids=(*front.token_ids, *ids),
            logit_positions=tuple(positions),
            target_ids=ids,
            own_tokens=len(ids),
        )
        return pass_row(example, ready)

    def _limit(self, prompt: Prompt | None) -> int:
        return self._backbone.tokenizer.max_tokens if prompt is None else self.ready(prompt).bound.max_length

    def _plain(self, example: Example) -> ModelRow:
        return ModelRow(example, self._nothing, b"")

    def _continued(self, row: ModelRow, line: OutputSequence, most: int) -> DecodingRow:
        return DecodingRow(row, line, BatchKey.of(self._backbone, row.example, most))


def pass_row(example: Example, ready: PreparedPrompt) -> ModelRow:
    """Return a filled row of a prompt."""
    return ModelRow(example, ready.learned, ready.digest, ready.constant)


def _front(bound: TokenizedTemplate) -> Example | None:
    """Return what stands in front of a template's one field, if the field's own tokens follow and nothing else up to
    the target; else None.
    """
    fields = bound.template.fields
    if bound.kind != "causal" or sum(isinstance(piece, Field) for piece in bound.template.pieces) != 1:
        return None
    found = []
    for text, own in zip(PROBES, bound.tokenizer.encode(PROBES), strict=True):
        (example,) = bound.contexts([{fields[0]: text}])
        size = len(example.token_ids) - len(own)
        if example.token_ids[size:] != tuple(own):
            return None
        found.append(replace(example, token_ids=example.token_ids[:size], logit_positions=()))
    return found[0] if found[0] == found[1] else None


def _constant(bound: TokenizedTemplate) -> int:
    """Return with how many tokens and slots rows of a template begin, whatever their record."""
    try:
        one, other = (bound.contexts([dict.fromkeys(bound.template.fields, text)])[0] for text in PROBES)
    except PTuningError:
        return 0
    return constant_prefix_tokens(one, other)
