"""The shapes of answers in OpenAI's interface: choices, log-probabilities, usage, and the chunks of a stream."""

from __future__ import annotations

import math
import secrets
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ptuning.files import Json
from ptuning.serve.engine.job import Outcome, Token, Usage
from ptuning.serve.http.replies import End, Event, Piece

Shape = dict[str, object]
# What stands for a probability of nothing, since JSON has no infinity; OpenAI's clients know it.
LEAST_LOG_PROB = -9999.0
NO_TOKEN = -1


def log_prob_of(value: float) -> float:
    """Return a log-probability as JSON has it; a ValueError if it is not a number."""
    if math.isnan(value):
        raise ValueError("a log-probability is not a number")
    return max(value, LEAST_LOG_PROB)


def finite(value: Json) -> Json:
    """Return JSON whose numbers are as :func:`log_prob_of` has them; a ValueError if one is not a number."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return log_prob_of(value) if isinstance(value, float) else value


def tokens_of(outcome: Outcome) -> Sequence[Token]:
    """Return the tokens of an answer. A label or choice counts as one, beside all others."""
    found = outcome.prediction
    if found is None or found.probabilities is None:
        return outcome.tokens
    logs = {name: math.log(value) if value > 0 else LEAST_LOG_PROB for name, value in found.probabilities.items()}
    return (Token(NO_TOKEN, found.text, logs.get(found.text, LEAST_LOG_PROB), tuple(logs.items())),)


def text_of(outcome: Outcome) -> str:
    """Return the text of an answer."""
    return "" if outcome.prediction is None else outcome.prediction.text


def text_log_probs(tokens: Sequence[Token], most: int, *, offset: int = 0) -> Shape:
    """Return log-probabilities as ``/v1/completions`` has them. The first token of a text has none."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [None if one.log_prob is None else log_prob_of(one.log_prob) for one in tokens],
        "top_logprobs": [_ranked(token, most) for token in tokens],
        "text_offset": offsets,
    }


def _ranked(token: Token, most: int) -> dict[str, float] | None:
    """Return the likeliest tokens by their text, and the chosen one. Of those with one text, the likelier counts."""
    if token.log_prob is None:
        return None
    found: dict[str, float] = {}
    for text, value in (*token.alternatives[:most], (token.text, token.log_prob)):
        found.setdefault(text, log_prob_of(value))
    return found


def chat_log_probs(tokens: Sequence[Token], most: int) -> Shape:
    """Return log-probabilities as ``/v1/chat/completions`` has them."""
    content = [
        {
            **_token(token.text, LEAST_LOG_PROB if token.log_prob is None else token.log_prob),
            "top_logprobs": [_token(text, value) for text, value in token.alternatives[:most]],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token(text: str, log_prob: float) -> Shape:
    return {"token": text, "logprob": log_prob_of(log_prob), "bytes": list(text.encode("utf-8", "replace"))}


def added(usages: Sequence[Usage], *, choices: int = 1) -> Usage:
    """Return the usage of a request. The text of several answers to it counts once."""
    read = usages[::choices]
    return Usage(
        sum(one.prompt_tokens for one in read),
        sum(one.completion_tokens for one in usages),
        sum(one.cached_tokens for one in read),
    )


def usage_json(usage: Usage) -> Shape:
    """Return a usage as the clients read it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


@dataclass
class Told:
    """How the answers to one request are told; a subclass for each of the two routes.

    Args:
        model: The model's name in the request.
        fingerprint: What the answers are made with.
        choices: Number of answers to each text.
        log_probs: So many likeliest tokens in each place; None for no log-probabilities.
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

    def choice(self, outcome: Outcome) -> Shape:
        """Return the content of a whole choice."""
        raise NotImplementedError

    def grown(self, text: str, tokens: Sequence[Token], *, offset: int) -> Shape:
        """Return the content of a choice in a stream that has grown by a text."""
        raise NotImplementedError

    def begun(self) -> Shape | None:
        """Return the content of a choice before its first piece, if it has any."""
        return None

    def ended(self) -> Shape:
        """Return the content of the last chunk of a choice."""
        raise NotImplementedError

    def whole(self, outcomes: Sequence[Outcome]) -> Shape:
        """Return the answer to a request that is not streamed."""
        listed = [self._framed(at, self.choice(one), one.finish) for at, one in enumerate(outcomes)]
        usage = added([one.usage for one in outcomes], choices=self.choices)
        return {**self._head(self.kind), "choices": listed, "usage": usage_json(usage)}

    def chunks(self, event: Event) -> Iterator[Shape]:
        """Yield the chunks of an event of a stream; the error of a row is raised."""
        if isinstance(event, Piece):
            yield from self._grow(event.row, event.text, event.tokens)
            return
        yield from self._end(event)

    def _end(self, event: End) -> Iterator[Shape]:
        outcome = event.outcome
        if isinstance(outcome, Exception):
            raise outcome
        text, sent = text_of(outcome), self._sent.get(event.row, "")
        is_new = event.row not in self._sent
        if is_new or (len(text) > len(sent) and text.startswith(sent)):
            yield from self._grow(event.row, text[len(sent) :], tokens_of(outcome) if is_new else ())
        self._usages[event.row] = outcome.usage
        yield self._chunk(event.row, self.ended(), outcome.finish)

    def last(self) -> Iterator[Shape]:
        """Yield what comes behind all choices of a stream."""
        if self.with_usage:
            usage = added([self._usages[at] for at in sorted(self._usages)], choices=self.choices)
            yield {**self._head(self.stream_kind), "choices": [], "usage": usage_json(usage)}

    def _grow(self, row: int, text: str, tokens: Sequence[Token]) -> Iterator[Shape]:
        first = self.begun() if row not in self._sent else None
        if first is not None:
            yield self._chunk(row, first, None)
        offset = len(self._sent[row])
        self._sent[row] += text
        if text or tokens:
            yield self._chunk(row, self.grown(text, tokens, offset=offset), None)

    def _chunk(self, row: int, content: Mapping[str, object], finish: str | None) -> Shape:
        usage: Shape = {"usage": None} if self.with_usage else {}
        return {**self._head(self.stream_kind), "choices": [self._framed(row, content, finish)], **usage}

    def _framed(self, at: int, content: Mapping[str, object], finish: str | None) -> Shape:
        return {"index": at, **content, "finish_reason": finish}

    def _head(self, kind: str) -> Shape:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
