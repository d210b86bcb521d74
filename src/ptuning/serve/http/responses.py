"""Rows to the engine and outcomes back: whole, or as server-sent events, in OpenAI's format.

Nothing here waits for the model on the event loop. If a client disconnects, its job is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, cast

from starlette.responses import StreamingResponse

from ptuning.engine.decoding import Token
from ptuning.files import Json
from ptuning.serve.engine.job import CallRow, Job, Listener, Outcome, Row
from ptuning.serve.http.errors import ClientGoneError, as_api_error, as_json, invalid
from ptuning.serve.http.metrics import RequestStats, stats_of
from ptuning.serve.http.service import Service

if TYPE_CHECKING:
    from starlette.requests import Request

T = TypeVar("T")
Body = dict[str, object]
# JSON has no infinity; OpenAI's clients know this value of a probability of 0.
MIN_LOG_PROB = -9999.0
NO_TOKEN = -1
HEADERS = {"X-Accel-Buffering": "no"}  # a proxy must not collect the chunks
KEEP_ALIVE = b": keep-alive\n\n"


@dataclass(frozen=True)
class Piece:
    """New text and tokens of a generated answer."""

    text: str
    tokens: tuple[Token, ...]


Event = tuple[int, Piece | Outcome | Exception]  # of a row


class Replies(Listener):
    """Events of a job, written by the engine's thread and read on the event loop."""

    def __init__(self, rows: Sequence[Row], stats: RequestStats, *, max_pending: int) -> None:
        super().__init__(len(rows))
        self.job = Job(rows, self)
        self._stats, self._max_pending = stats, max_pending
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    def piece(self, row: int, text: str, tokens: Sequence[Token]) -> None:
        """Take a piece; if the client does not read, so that too many are pending, the job is cancelled."""
        self._stats.note_first_token()
        self._notify(row, Piece(text, tuple(tokens)))

    def ended(self, row: int, outcome: Outcome | Exception) -> None:
        """Take an answer or an error."""
        if isinstance(outcome, Outcome):
            self._stats.add_outcome(self.job.rows[row], outcome)
        super().ended(row, outcome)
        self._notify(row, outcome)

    def _notify(self, row: int, event: Piece | Outcome | Exception) -> None:
        def put() -> None:
            if isinstance(event, Piece) and self._events.qsize() >= self._max_pending:
                self.job.cancel()
            else:
                self._events.put_nowait((row, event))

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(put)

    async def events(self, request: Request, *, keep_alive: float | None = None) -> AsyncGenerator[Event | None, None]:
        """Yield events until all rows have ended, and None after each ``keep_alive`` seconds without one. A job that is
        left before its end is cancelled. A ClientGoneError if the client disconnects.
        """

        async def note_disconnect() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self._events.put_nowait(None)

        unanswered, watching = len(self.outcomes), asyncio.ensure_future(note_disconnect())
        try:
            while unanswered:
                try:
                    event = await asyncio.wait_for(self._events.get(), keep_alive)
                except asyncio.TimeoutError:
                    yield None
                    continue
                if event is None:
                    raise ClientGoneError
                unanswered -= not isinstance(event[1], Piece)
                yield event
        finally:
            if unanswered:
                self.job.cancel()
            watching.cancel()


def submit_rows(request: Request, rows: Sequence[Row]) -> Replies:
    """Hand rows to the engine.

    Raises:
        QueueFullError: If they do not fit into the queue now.
        ApiError: If they never will.
    """
    service, stats = Service.of(request), stats_of(request)
    limit = service.engine.queue_rows
    if len(rows) > limit:
        raise invalid("records", f"the request has {len(rows)} rows, and a request may have {limit}", "too_many_rows")
    replies = Replies(rows, stats, max_pending=service.settings.pending_pieces)
    service.engine.submit(replies.job)
    stats.add_job(replies.job)
    return replies


async def run_rows(request: Request, rows: Sequence[Row]) -> list[Outcome | Exception]:
    """Answer rows, and return the outcome or the error of each. A ClientGoneError if the client disconnects."""
    replies = submit_rows(request, rows)
    async for _ in replies.events(request):
        pass
    return cast("list[Outcome | Exception]", replies.outcomes)


async def answered_rows(request: Request, rows: Sequence[Row]) -> list[Outcome]:
    """Answer rows; the first error is that of the request, whose format has no place for it."""
    outcomes = await run_rows(request, rows)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return cast("list[Outcome]", outcomes)


async def run_call(request: Request, work: Callable[[], T]) -> T:
    """Do something short with the model or its tokenizer in the engine's thread, and return its result."""
    (outcome,) = await answered_rows(request, [CallRow(work)])
    return cast("T", outcome.value)


async def stream_rows(request: Request, rows: Sequence[Row], builder: ResponseBuilder) -> StreamingResponse:
    """Answer rows piece by piece. An error before the first piece is raised, and so has its own status; a later one is
    an event of the stream.
    """
    replies = submit_rows(request, rows)
    events = replies.events(request, keep_alive=Service.of(request).settings.keep_alive)
    first = await anext(events)
    if first is not None and isinstance(first[1], Exception):
        await events.aclose()
        raise first[1]

    async def chunks() -> AsyncIterator[bytes]:
        async with contextlib.aclosing(events):
            try:
                yield KEEP_ALIVE if first is None else _encoded(builder.chunks(*first))
                async for event in events:
                    yield KEEP_ALIVE if event is None else _encoded(builder.chunks(*event))
                yield _encoded(builder.last_chunks(cast("list[Outcome]", replies.outcomes)))
            except ClientGoneError:
                return
            except Exception as error:  # noqa: BLE001 - the status is sent, so the error is an event
                api_error = as_api_error(error, request_id=stats_of(request).id)
                stats_of(request).error = api_error.code
                yield _encoded([{"error": api_error.to_json()}])
            yield b"data: [DONE]\n\n"

    return StreamingResponse(chunks(), media_type="text/event-stream", headers=HEADERS)


def _encoded(chunks: Iterable[Body]) -> bytes:
    return b"".join(b"data: " + as_json(chunk) + b"\n\n" for chunk in chunks)


def log_prob_of(value: float) -> float:
    """Return a log-probability as JSON has it; a ValueError if it is NaN."""
    if math.isnan(value):
        raise ValueError("a log-probability is not a number")
    return max(value, MIN_LOG_PROB)


def finite(value: Json) -> Json:
    """Return JSON whose numbers are as :func:`log_prob_of` has them."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return log_prob_of(value) if isinstance(value, float) else value


def usage_json(outcomes: Sequence[Outcome], *, choices: int = 1) -> Body:
    """Return the usage of a request. The input of several answers to it (``choices``) counts once."""
    inputs = [outcome.usage for outcome in outcomes[::choices]]
    read = sum(usage.prompt_tokens for usage in inputs)
    written = sum(outcome.usage.completion_tokens for outcome in outcomes)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in inputs)},
    }


def _text_of(outcome: Outcome) -> str:
    return "" if outcome.prediction is None else outcome.prediction.text


def _tokens_of(outcome: Outcome) -> Sequence[Token]:
    """Return the tokens of an answer. A label or choice counts as one token, with all others as alternatives."""
    prediction = outcome.prediction
    if prediction is None or prediction.probabilities is None:
        return outcome.tokens
    logs = {name: math.log(value) if value > 0 else MIN_LOG_PROB for name, value in prediction.probabilities.items()}
    return (Token(NO_TOKEN, prediction.text, logs.get(prediction.text, MIN_LOG_PROB), tuple(logs.items())),)


@dataclass
class ResponseBuilder:
    """Builds the response to one request for a completion or a chat.

    Args:
        model: The model's name in the request.
        fingerprint: ``system_fingerprint``.
        is_chat: Whether it is a chat.
        choices: Number of answers to each text.
        log_probs: Number of alternatives per token; None for no log-probabilities.
        with_usage: Whether a stream ends with its usage.
    """

    model: str
    fingerprint: str
    is_chat: bool
    choices: int
    log_probs: int | None
    with_usage: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    _sent: dict[int, str] = field(default_factory=dict)  # text of each row

    def response(self, outcomes: Sequence[Outcome]) -> Body:
        """Return the response to a request that is not streamed."""
        choices: list[Body] = []
        for at, outcome in enumerate(outcomes):
            text, log_probs = _text_of(outcome), self._log_probs(_tokens_of(outcome), offset=0)
            message = {"role": "assistant", "content": text, "refusal": None}
            content: Body = {"message": message} if self.is_chat else {"text": text}
            choices.append({"index": at, **content, "logprobs": log_probs, "finish_reason": outcome.finish})
        head = self._head("chat.completion" if self.is_chat else "text_completion")
        return {**head, "choices": choices, "usage": usage_json(outcomes, choices=self.choices)}

    def chunks(self, row: int, event: Piece | Outcome | Exception) -> Iterator[Body]:
        """Yield the chunks of an event; the error of a row is raised."""
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Piece):
            yield from self._grow(row, event.text, event.tokens)
            return
        text, sent = _text_of(event), self._sent.get(row)
        if sent is None or (len(text) > len(sent) and text.startswith(sent)):
            yield from self._grow(row, text[len(sent or "") :], _tokens_of(event) if sent is None else ())
        yield self._chunk(row, {"delta": {}} if self.is_chat else {"text": ""}, finish=event.finish)

    def last_chunks(self, outcomes: Sequence[Outcome]) -> Iterator[Body]:
        """Yield the chunks after those of all choices."""
        if self.with_usage:
            yield {**self._chunk(0, {}), "choices": [], "usage": usage_json(outcomes, choices=self.choices)}

    def _grow(self, row: int, text: str, tokens: Sequence[Token]) -> Iterator[Body]:
        if row not in self._sent and self.is_chat:
            yield self._chunk(row, {"delta": {"role": "assistant", "content": ""}})
        sent = self._sent.get(row, "")
        self._sent[row] = sent + text
        if text or tokens:
            content: Body = {"delta": {"content": text}} if self.is_chat else {"text": text}
            yield self._chunk(row, content, self._log_probs(tokens, offset=len(sent)))

    def _chunk(self, row: int, content: Body, log_probs: Body | None = None, *, finish: str | None = None) -> Body:
        choice = {"index": row, **content, "logprobs": log_probs, "finish_reason": finish}
        usage: Body = {"usage": None} if self.with_usage else {}
        head = self._head("chat.completion.chunk" if self.is_chat else "text_completion")
        return {**head, "choices": [choice], **usage}

    def _head(self, kind: str) -> Body:
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _log_probs(self, tokens: Sequence[Token], *, offset: int) -> Body | None:
        """Return the log-probabilities of tokens, the first of which begins at a character of the answer."""
        if self.log_probs is None:
            return None
        if self.is_chat:
            content = [
                {
                    **_chat_token(token.text, token.log_prob),
                    "top_logprobs": [_chat_token(*other) for other in token.alternatives[: self.log_probs]],
                }
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        ends = itertools.accumulate((len(token.text) for token in tokens), initial=offset)
        return {
            "tokens": [token.text for token in tokens],
            # The first token of a text has none.
            "token_logprobs": [None if token.log_prob is None else log_prob_of(token.log_prob) for token in tokens],
            "top_logprobs": [self._top_log_probs(token) for token in tokens],
            "text_offset": [*ends][:-1],
        }

    def _top_log_probs(self, token: Token) -> dict[str, float] | None:
        """Return the likeliest tokens by their text, and the chosen one; of those with the same text, the likeliest."""
        if token.log_prob is None:
            return None
        log_probs: dict[str, float] = {}
        for text, value in (*token.alternatives[: self.log_probs], (token.text, token.log_prob)):
            log_probs.setdefault(text, log_prob_of(value))
        return log_probs


def _chat_token(text: str, log_prob: float | None) -> Body:
    value = MIN_LOG_PROB if log_prob is None else log_prob_of(log_prob)
    return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "replace"))}
