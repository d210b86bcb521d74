"""Answers in OpenAI's format: choices, log-probabilities, usage, and the chunks of a stream."""

from __future__ import annotations

import math
import secrets
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ptuning.engine.decoding import Token
from ptuning.files import Json
from ptuning.serve.engine.job import Outcome, Usage

Body = dict[str, object]
# JSON has no infinity; OpenAI's clients know this value of a probability of 0.
MIN_LOG_PROB = -9999.0
NO_TOKEN = -1


@dataclass(frozen=True)
class Piece:
    """Growth of a generated answer."""

    row: int
    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class RowEnd:
    """Answer or error of a row."""

    row: int
    outcome: Outcome | Exception


Event = Piece | RowEnd


def log_prob_of(value: float) -> float:
    """Return a log-probability as JSON has it; a ValueError if it is NaN."""
    if math.isnan(value):
        raise ValueError("a log-probability is not a number")
    return max(value, MIN_LOG_PROB)


def finite(value: Json) -> Json:
    """Return JSON whose numbers are as :func:`log_prob_of` has them; a ValueError if one is NaN."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return log_prob_of(value) if isinstance(value, float) else value


def tokens_of(outcome: Outcome) -> Sequence[Token]:
    """Return the tokens of an answer. A label or choice counts as one token, with all others as alternatives."""
    prediction = outcome.prediction
    if prediction is None or prediction.probabilities is None:
        return outcome.tokens
    logs = {name: math.log(value) if value > 0 else MIN_LOG_PROB for name, value in prediction.probabilities.items()}
    return (Token(NO_TOKEN, prediction.text, logs.get(prediction.text, MIN_LOG_PROB), tuple(logs.items())),)


def text_of(outcome: Outcome) -> str:
    """Return the text of an answer."""
    return "" if outcome.prediction is None else outcome.prediction.text


def total(usages: Sequence[Usage], *, choices: int = 1) -> Usage:
    """Return the usage of a request. The input of several answers to it counts once."""
    inputs = usages[::choices]
    return Usage(
        sum(usage.prompt_tokens for usage in inputs),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.cached_tokens for usage in inputs),
    )


def usage_json(usage: Usage) -> Body:
    """Return a usage as clients read it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


@dataclass
class ResponseBuilder:
    """Builds the response to one request; a subclass for each route.

    Args:
        model: The model's name in the request.
        fingerprint: ``system_fingerprint``.
        choices: Number of answers to each text.
        log_probs: Number of alternatives per token; None for no log-probabilities.
        with_usage: Whether a stream ends with its usage.
    """

    model: str
    fingerprint: str
    choices: int = 1
    log_probs: int | None = None
    with_usage: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    _sent: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    _usages: dict[int, Usage] = field(default_factory=dict)

    kind = stream_kind = prefix = ""

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"

    def choice(self, outcome: Outcome) -> Body:
        """Return the content of a complete choice."""
        raise NotImplementedError

    def delta(self, text: str, tokens: Sequence[Token], *, offset: int) -> Body:
        """Return the content of a chunk by which a choice grows."""
        raise NotImplementedError

    def first_delta(self) -> Body | None:
        """Return the content of a chunk before the first piece of a choice, if there is one."""
        return None

    def last_delta(self) -> Body:
        """Return the content of the last chunk of a choice."""
        raise NotImplementedError

    def response(self, outcomes: Sequence[Outcome]) -> Body:
        """Return the response to a request that is not streamed."""
        choices = [_choice(at, self.choice(outcome), outcome.finish) for at, outcome in enumerate(outcomes)]
        usage = total([outcome.usage for outcome in outcomes], choices=self.choices)
        return {**self._head(self.kind), "choices": choices, "usage": usage_json(usage)}

    def chunks(self, event: Event) -> Iterator[Body]:
        """Yield the chunks of an event; the error of a row is raised."""
        if isinstance(event, Piece):
            yield from self._grow(event.row, event.text, event.tokens)
            return
        outcome = event.outcome
        if isinstance(outcome, Exception):
            raise outcome
        text, sent = text_of(outcome), self._sent.get(event.row, "")
        is_new = event.row not in self._sent
        if is_new or (len(text) > len(sent) and text.startswith(sent)):
            yield from self._grow(event.row, text[len(sent) :], tokens_of(outcome) if is_new else ())
        self._usages[event.row] = outcome.usage
        yield self._chunk(event.row, self.last_delta(), outcome.finish)

    def last_chunks(self) -> Iterator[Body]:
        """Yield the chunks after those of all choices."""
        if self.with_usage:
            usage = total([self._usages[at] for at in sorted(self._usages)], choices=self.choices)
            yield {**self._head(self.stream_kind), "choices": [], "usage": usage_json(usage)}

    def _grow(self, row: int, text: str, tokens: Sequence[Token]) -> Iterator[Body]:
        first = self.first_delta() if row not in self._sent else None
        if first is not None:
            yield self._chunk(row, first, None)
        offset = len(self._sent[row])
        self._sent[row] += text
        if text or tokens:
            yield self._chunk(row, self.delta(text, tokens, offset=offset), None)

    def _chunk(self, row: int, content: Mapping[str, object], finish: str | None) -> Body:
        usage: Body = {"usage": None} if self.with_usage else {}
        return {**self._head(self.stream_kind), "choices": [_choice(row, content, finish)], **usage}

    def _head(self, kind: str) -> Body:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


@dataclass
class CompletionBuilder(ResponseBuilder):
    """Responses of ``/v1/completions``."""

    kind = stream_kind = "text_completion"
    prefix = "cmpl"

    def choice(self, outcome: Outcome) -> Body:
        """Return the content of a complete choice."""
        return self.delta(text_of(outcome), tokens_of(outcome), offset=0)

    def delta(self, text: str, tokens: Sequence[Token], *, offset: int) -> Body:
        """Return the content of a chunk."""
        if self.log_probs is None:
            return {"text": text, "logprobs": None}
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        log_probs = {
            "tokens": [token.text for token in tokens],
            # The first token of a text has none.
            "token_logprobs": [None if token.log_prob is None else log_prob_of(token.log_prob) for token in tokens],
            "top_logprobs": [_top_log_probs(token, self.log_probs) for token in tokens],
            "text_offset": offsets,
        }
        return {"text": text, "logprobs": log_probs}

    def last_delta(self) -> Body:
        """Return the content of the last chunk."""
        return {"text": "", "logprobs": None}


@dataclass
class ChatBuilder(ResponseBuilder):
    """Responses of ``/v1/chat/completions``."""

    kind = "chat.completion"
    stream_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, outcome: Outcome) -> Body:
        """Return the content of a complete choice."""
        message = {"role": "assistant", "content": text_of(outcome), "refusal": None}
        return {"message": message, "logprobs": self._log_probs(tokens_of(outcome))}

    def first_delta(self) -> Body:
        """Return the content of the first chunk: the role."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def delta(self, text: str, tokens: Sequence[Token], *, offset: int) -> Body:  # noqa: ARG002
        """Return the content of a chunk."""
        return {"delta": {"content": text}, "logprobs": self._log_probs(tokens)}

    def last_delta(self) -> Body:
        """Return the content of the last chunk."""
        return {"delta": {}, "logprobs": None}

    def _log_probs(self, tokens: Sequence[Token]) -> Body | None:
        if self.log_probs is None:
            return None
        content = [
            {
                **_chat_token(token.text, MIN_LOG_PROB if token.log_prob is None else token.log_prob),
                "top_logprobs": [_chat_token(*other) for other in token.alternatives[: self.log_probs]],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _choice(index: int, content: Mapping[str, object], finish: str | None) -> Body:
    return {"index": index, **content, "finish_reason": finish}


def _top_log_probs(token: Token, count: int) -> dict[str, float] | None:
    """Return the likeliest tokens by their text, and the chosen one; of tokens with the same text, the likeliest."""
    if token.log_prob is None:
        return None
    log_probs: dict[str, float] = {}
    for text, value in (*token.alternatives[:count], (token.text, token.log_prob)):
        log_probs.setdefault(text, log_prob_of(value))
    return log_probs


def _chat_token(text: str, log_prob: float) -> Body:
    return {"token": text, "logprob": log_prob_of(log_prob), "bytes": list(text.encode("utf-8", "replace"))}
