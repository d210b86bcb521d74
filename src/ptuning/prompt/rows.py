"""Rows to answer with prompts: settings, checks, filled templates for the runner, and predictions from its results."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from ptuning.backbone.backbone import Backbone
from ptuning.config import GenerationSettings
from ptuning.data.answer_space import AnswerSpace
from ptuning.data.questions import Question, Questions
from ptuning.engine.decoding import StopCriteria
from ptuning.engine.objective import candidate_request, request_parts, warn_truncated
from ptuning.engine.prefix_store import PROBES, ModelRow, PreparedPrompt
from ptuning.engine.runner import Generation, MaskFilling, Scoring, TextScoring, Work, decoding_work, generation_work
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import BackboneError, PromptError, RecordError, shown
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.prompt.prompt import Prompt
from ptuning.template.ambiguity import check_candidates, warn
from ptuning.template.encode import Example, TokenizedTemplate, TooLongError
from ptuning.template.labels import Normalise
from ptuning.template.language import Field
from ptuning.template.segments import Ids

# A generated answer may have this many tokens more than the longest target of the training data.
MORE_TOKENS = 2
# The maximum length of the base model's answers by default, as in OpenAI's interface.
BASE_TOKENS = 16
# The most logits of a text whose tokens are scored: they take about a gigabyte.
ECHO_LOGITS = 1 << 27


@dataclass(frozen=True)
class Answering:
    """How rows are answered; names and defaults are those of :meth:`ptuning.prompt.predict.PromptModel.predict`.

    Args:
        alternatives: Number of likeliest tokens that are reported for each generated token; 0 for the generated one
            alone, None for no token details.
        pieces: Whether a generated answer is streamed.
    """

    candidates: Sequence[str] | None = None
    top_k: int = 1
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    normalise: Normalise | None = None
    calibrate: bool | None = None
    count_stop: bool = False
    min_probability: float | None = None
    alternatives: int | None = None
    pieces: bool = False

    def check(self, prompt: Prompt) -> AnswerSpace:
        """Return the answers of a prompt as they are scored; a ConfigError if a setting would change nothing."""
        if self.top_k < 1:
            raise RecordError(f"top_k is {self.top_k}; it must be 1 or more")
        if self.candidates is not None:
            check_listed(self.candidates)
        is_listed, own = self.candidates is not None, prompt.answer_space
        answers = own.scored(normalise=self.normalise, calibrate=self.calibrate, candidates=is_listed)
        own.check_threshold(self.min_probability, candidates=is_listed)
        if self.count_stop:
            prompt.check_stop_counts(candidates=is_listed)
        return answers


def check_listed(candidates: Sequence[str]) -> None:
    """Raise a RecordError unless candidates are texts, not empty, and different."""
    if isinstance(candidates, str):
        raise RecordError(f"candidates are a list of texts, and not the text '{candidates}'")
    if not candidates:
        raise RecordError("there are no candidates to choose from")
    seen: set[str] = set()
    for text in candidates:
        if not isinstance(text, str):
            raise RecordError(f"candidates are texts, and one is {shown(text)}")
        if not text.strip():
            raise RecordError("a candidate is empty")
        if text in seen:
            raise RecordError(f"the candidate '{text}' is given twice; candidates must differ")
        seen.add(text)


@dataclass(frozen=True)
class PromptRow:
    """A record, or a question of a task, to answer with a prompt."""

    prompt: Prompt
    question: Question
    how: Answering = Answering()


@dataclass(frozen=True)
class TextRow:
    """A text, or token ids, that the base model continues; after a prompt's prefix, if one is given: its template must
    end in one field and the target, and the text is the field's.
    """

    text: str | Ids
    how: Answering = Answering()
    prompt: Prompt | None = None


@dataclass(frozen=True)
class EchoRow:
    """A text, or token ids, whose own tokens are scored by the base model; with a ``prompt`` as in :class:`TextRow`."""

    text: str | Ids
    alternatives: int = 0
    prompt: Prompt | None = None


class Preprocessor:
    """Fills the templates of prompts for one backbone; prepared prompts are kept as long as the prompts live."""

    def __init__(self, backbone: Backbone, *, force: bool = False) -> None:
        self._backbone = backbone
        self._force = force
        self._prepared: WeakKeyDictionary[Prompt, PreparedPrompt] = WeakKeyDictionary()
        self._prefixes: WeakKeyDictionary[PreparedPrompt, Example | None] = WeakKeyDictionary()
        self._base = PreparedPrompt(PromptBatch.none(backbone.width))

    def prepared(self, prompt: Prompt) -> PreparedPrompt:
        """Return a prompt ready for rows; a PTuningError if it does not fit the backbone."""
        if prompt not in self._prepared:
            bound = prompt.bind(self._backbone, force=self._force)
            self._prepared[prompt] = PreparedPrompt(prompt.learned(self._backbone).to(self._backbone.device), bound)
        return self._prepared[prompt]

    def works(self, prompt: Prompt, questions: Questions, how: Answering) -> Iterator[list[Work]]:
        """Yield the work of questions in parts, each filled when it is asked for, so that the labels, choices or
        candidates of a few questions are in memory at a time.
        """
        answers, prepared = how.check(prompt), self.prepared(prompt)
        bound = prepared.bound
        if how.candidates is not None:
            for question in questions:
                (examples,) = bound.answers([question.record], [how.candidates], with_stop=how.count_stop)
                request = replace(candidate_request(examples), normalise=answers.scoring.normalise)
                yield [Scoring.of(request, prepared, how.candidates, examples)]
        elif answers.is_closed:
            left = iter(questions)
            parts = request_parts(bound, questions, answers, labelled=False)
            for part in warn_truncated(parts, questions.name, bound.max_length):
                yield [
                    Scoring.of(request, prepared, answers.names(question))
                    for request, question in zip(part, left, strict=False)
                ]
                del part  # while the next one is made
        else:
            yield generation_work(
                self._backbone,
                prepared,
                [question.record for question in questions],
                max_tokens=how.generation.max_new_tokens or prompt.target_tokens + MORE_TOKENS,
                settings=how.generation,
                top_k=how.top_k,
                alternatives=how.alternatives,
            )

    def work(self, row: PromptRow | TextRow | EchoRow) -> Work:
        """Return the work of one row."""
        if isinstance(row, TextRow):
            return self._continuation(row)
        if isinstance(row, EchoRow):
            return self._echo(row)
        ((work,),) = self.works(row.prompt, Questions([row.question], name="the request"), row.how)
        return work

    def _continuation(self, row: TextRow) -> Generation:
        ids, settings, limit = self.ids(row.text, row.prompt), row.how.generation, self._limit(row.prompt)
        begun = self._after_prefix(row.prompt, ids)
        length = begun.example.length
        room = limit - length + 1
        if not ids or room < 1:
            raise (TooLongError if ids else RecordError)(
                f"the text has {length} tokens; the model reads from 1 to {limit}"
            )
        if row.prompt is None:
            ending = StopCriteria(
                self._backbone,
                max_tokens=min(settings.max_new_tokens or BASE_TOKENS, room),
                multiline=True,
                stop_strings=settings.stop_strings,
                as_is=True,
            )
        else:
            most = settings.max_new_tokens or row.prompt.target_tokens + MORE_TOKENS
            bound = self.prepared(row.prompt).bound
            ending = StopCriteria.of(self._backbone, bound, min(most, room), stop_strings=settings.stop_strings)
        example = replace(begun.example, logit_positions=(length - 1,), target_ids=())
        return decoding_work(
            self._backbone, ModelRow(example, begun.prompt), ending, settings, alternatives=row.how.alternatives
        )

    def _echo(self, row: EchoRow) -> TextScoring:
        ids = self.ids(row.text, row.prompt)
        begun = self._after_prefix(row.prompt, ids)
        length = begun.example.length
        most = min(self._limit(row.prompt), ECHO_LOGITS // self._backbone.vocabulary)
        if not ids or not 2 <= length <= most:
            raise (TooLongError if length > 2 else RecordError)(
                f"the text has {length} tokens; from 2 to {most} can be scored (echo)"
            )
        return TextScoring((begun,), row.alternatives)

    def ids(self, text: str | Ids, prompt: Prompt | None = None) -> Ids:
        """Return the token ids of a text as the tokenizer begins and ends it (after a prompt's prefix without its
        beginning), or given ids after a check.
        """
        if isinstance(text, str):
            tokenizer = self._backbone.tokenizer
            own = tokenizer.encode([text])[0]
            return (*tokenizer.prefix_ids, *own) if prompt is None else tuple(own)
        outside = [token for token in text if not 0 <= token < self._backbone.vocabulary]
        if outside:
            raise RecordError(f"token id {outside[0]} is outside the vocabulary of {self._backbone.vocabulary}")
        return tuple(text)

    def _after_prefix(self, prompt: Prompt | None, ids: Ids) -> ModelRow:
        """Return a row of ids after a prompt's prefix; they are its targets, the first one only if there is something
        before it.
        """
        if prompt is None:
            return ModelRow(Example(ids, (), tuple(range(len(ids) - 1)), ids, len(ids)), self._base)
        prepared = self.prepared(prompt)
        if prepared not in self._prefixes:
            self._prefixes[prepared] = _prefix(prepared.bound)
        prefix = self._prefixes[prepared]
        if prefix is None:
            raise PromptError(
                "token ids and echo are for templates that end in one field and the target, with nothing but slots or "
                f"whole words in front of the field, as in [P*8]{{x}} [Y]; this one is '{prompt.template}'"
            )
        positions = range(max(0, len(prefix.token_ids) - 1), len(prefix.token_ids) + len(ids) - 1)
        example = replace(
            prefix,
            token_ids=(*prefix.token_ids, *ids),
            logit_positions=tuple(positions),
            target_ids=ids,
            own_tokens=len(ids),
        )
        return ModelRow(example, prepared)

    def _limit(self, prompt: Prompt | None) -> int:
        if prompt is None:
            return self._backbone.tokenizer.max_tokens
        return self.prepared(prompt).bound.max_length


def _prefix(bound: TokenizedTemplate) -> Example | None:
    """Return the prefix of a template's one field, if the field's own tokens follow and nothing else up to the target;
    else None.
    """
    fields = bound.template.fields
    if bound.kind != "causal" or sum(isinstance(piece, Field) for piece in bound.template.pieces) != 1:
        return None
    prefixes = []
    for text, own in zip(PROBES, bound.tokenizer.encode(PROBES), strict=True):
        (example,) = bound.contexts([{fields[0]: text}])
        size = len(example.token_ids) - len(own)
        if example.token_ids[size:] != tuple(own):
            return None
        prefixes.append(replace(example, token_ids=example.token_ids[:size], logit_positions=()))
    return prefixes[0] if prefixes[0] == prefixes[1] else None


def candidates_of(work: Work) -> list[Candidate]:
    """Return the possible answers of work that is done, best first; on a tie in the given order."""
    if isinstance(work, Scoring):
        values, collisions = work.log_probs, work.request.collisions
        if work.candidates:
            if work.request.normalise == "mean":
                lengths = (len(choice.target_ids) for choice in work.request.choices)
                values = [value / length for value, length in zip(values, lengths, strict=True)]
            warn(check_candidates(collisions, work.names))
        return Candidate.ranked(work.names, values, collisions)
    assert isinstance(work, MaskFilling | Generation)
    return [Candidate(answer.text, answer.log_prob) for answer in work.answers]


def prediction_of(work: Work, how: Answering) -> Prediction:
    """Return the prediction of work that is done."""
    candidates = candidates_of(work)
    if isinstance(work, MaskFilling | Generation):
        first = work.answers[0]
        return Prediction(first.text, tuple(candidates), tokens=first.tokens, stopped=first.stopped)
    if how.candidates is not None:
        return Prediction(candidates[0].text, tuple(candidates[: how.top_k]))
    return Prediction.of_classes(candidates, top_k=how.top_k, min_probability=how.min_probability)


def check_finite(log_probs: Iterable[float]) -> None:
    """Raise a BackboneError if a log-probability is no number (NaN)."""
    if any(math.isnan(value) for value in log_probs):
        raise BackboneError("the model gave no numbers (NaN) for this row; load it in another number format (dtype)")
