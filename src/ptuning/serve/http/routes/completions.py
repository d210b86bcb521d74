"""``POST /v1/completions``: prompts answer the value of their one open field; the base model goes on with a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ptuning.data.questions import Question
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.serve.engine.job import Answering, EchoRow, Outcome, PromptRow, Row, TextRow, Token, Usage
from ptuning.serve.http.errors import JsonResponse, refused
from ptuning.serve.http.questions import fields_questions, generation_of, typed_question
from ptuning.serve.http.replies import answered
from ptuning.serve.http.schemas import ChatRequest, CompletionRequest, Sampling
from ptuning.serve.http.service import ServedPrompt, Service
from ptuning.serve.http.shapes import Shape, Told, text_log_probs, text_of, tokens_of
from ptuning.serve.http.streams import streamed
from ptuning.template.segments import Ids

router = APIRouter()

Input = Question | str | Ids


@dataclass
class Texts(Told):
    """Answers as ``/v1/completions`` tells them."""

    kind = stream_kind = "text_completion"
    prefix = "cmpl"

    def choice(self, outcome: Outcome) -> Shape:
        """Return the content of a choice."""
        return self.grown(text_of(outcome), tokens_of(outcome), offset=0)

    def grown(self, text: str, tokens: Sequence[Token], *, offset: int) -> Shape:
        """Return the content of a choice that has grown by a text."""
        told = self.log_probs
        return {"text": text, "logprobs": None if told is None else text_log_probs(tokens, told, offset=offset)}

    def ended(self) -> Shape:
        """Return the content of the last chunk of a choice."""
        return {"text": "", "logprobs": None}


@router.post("/v1/completions")
async def complete(asked: CompletionRequest, request: Request) -> Response:
    """Answer texts, each ``n`` times."""
    service, served = opened(asked, request, param="prompt" if asked.fields is None else "fields")
    inputs = _inputs(asked, served)
    told = Texts(asked.model, service.fingerprint(served), **frame(asked), log_probs=asked.logprobs)
    if asked.echo:
        return await _echo(asked, request, told, served, inputs)
    if asked.max_tokens == 0:
        raise refused("max_tokens", "max_tokens is 0, which goes with echo alone; it must be 1 or more")
    rows = rows_of(asked, service, served, inputs, alternatives=asked.logprobs)
    if asked.stream:
        return await streamed(request, rows, told)
    return JsonResponse(told.whole(checked(await answered(request, rows))))


def opened(asked: Sampling, request: Request, *, param: str) -> tuple[Service, ServedPrompt | None]:
    """Return the service and the prompt that is asked for, None for the base model, after a look at the request."""
    service = Service.of(request)
    served = service.find(request, asked.model, param=param)
    asked.check_extras()
    most = service.settings.most_choices
    if asked.n is not None and asked.n > most:
        raise refused("n", f"n is {asked.n}; a request may ask for {most} answers to a text")
    if asked.stream_options is not None and not asked.stream:
        raise refused("stream_options", "stream_options go with stream: true")
    return service, served


def frame(asked: Sampling) -> dict[str, Any]:
    """Return what a request says of the form of its answer."""
    options = asked.stream_options
    return {"choices": asked.n or 1, "with_usage": options is not None and options.include_usage}


def rows_of(
    asked: CompletionRequest | ChatRequest,
    service: Service,
    served: ServedPrompt | None,
    inputs: Sequence[Input],
    *,
    alternatives: int | None,
) -> list[Row]:
    """Return the engine's rows: the answers to a text stand together."""
    rows: list[Row] = []
    prompt = None if served is None else served.prompt
    hows = [
        Answering(
            generation=generation_of(asked, service, prompt, choice=choice),
            alternatives=alternatives,
            pieces=bool(asked.stream),
        )
        for choice in range(asked.n or 1)
    ]
    for one in inputs:
        for how in hows:
            if isinstance(one, Question):
                assert prompt is not None
                rows.append(PromptRow(prompt, one, how))
            else:
                rows.append(TextRow(one, how, prompt))
    return rows


def checked(outcomes: Sequence[Outcome | Exception]) -> list[Outcome]:
    """Return the outcomes; the first error is that of the whole request, whose shape has no place for it."""
    for one in outcomes:
        if isinstance(one, Exception):
            raise one
    return [one for one in outcomes if isinstance(one, Outcome)]


def _inputs(asked: CompletionRequest, served: ServedPrompt | None) -> list[Input]:
    """Return what is to be answered: questions for a prompt, texts or ids for the base model."""
    given = asked.prompt
    if served is not None and asked.fields is not None:
        if given:
            raise refused("prompt", "the request has a prompt and fields; give one of them")
        return list(fields_questions(served.prompt, asked.fields))
    if asked.fields is not None:
        raise refused("fields", "fields are those of a prompt's template, and the base model has none; give a prompt")
    if given is None:
        raise refused("prompt", "the field 'prompt' is missing")
    texts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
    if served is None or asked.echo:
        return [one if isinstance(one, str) else tuple(one) for one in texts]
    if served.prompt.answer_space.is_closed and not all(isinstance(one, str) for one in texts):
        raise refused("prompt", "token ids are for answers that are written, and this prompt chooses; give texts",
                      "unsupported")  # fmt: skip
    return [
        typed_question(served.prompt, one, param=f"prompt[{at}]" if len(texts) > 1 else "prompt")
        if isinstance(one, str)
        else tuple(one)
        for at, one in enumerate(texts)
    ]


async def _echo(
    asked: CompletionRequest, request: Request, told: Texts, served: ServedPrompt | None, inputs: Sequence[Input]
) -> Response:
    """Answer with the texts in front of what the model goes on with, and the log-probabilities of both. A prompt whose
    template ends in its one field and the target stands in front of the texts.
    """
    prompt = None if served is None else served.prompt
    if asked.fields is not None or (prompt is not None and prompt.answer_space.is_closed):
        raise refused(
            "echo", "echo is for a text that the model goes on with, not for fields, labels or choices", "unsupported"
        )
    if asked.stream:
        raise refused("echo", "echo and stream do not go together; leave one out", "unsupported")
    texts = [one for one in inputs if not isinstance(one, Question)]
    echoes: list[Row] = [EchoRow(one, asked.logprobs or 0, prompt) for one in texts]
    service = Service.of(request)
    written = [] if asked.max_tokens == 0 else rows_of(asked, service, served, texts, alternatives=asked.logprobs)
    found = checked(await answered(request, [*echoes, *written]))
    heads, tails = found[: len(echoes)], found[len(echoes) :]
    shown = []
    for at, (text, head) in enumerate(zip(texts, heads, strict=True)):
        before = text if isinstance(text, str) else "".join(token.text for token in head.tokens)
        for choice in range(told.choices):
            tail = tails[at * told.choices + choice] if tails else None
            shown.append(_after(before, head, tail))
    return JsonResponse(told.whole(shown))


def _after(before: str, head: Outcome, tail: Outcome | None) -> Outcome:
    """Return an outcome whose text and tokens are a text and what was written behind it."""
    text = before + ("" if tail is None else text_of(tail))
    usage = Usage(head.usage.prompt_tokens) if tail is None else tail.usage
    tokens = head.tokens if tail is None else (*head.tokens, *tail.tokens)
    prediction = Prediction(text, (Candidate(text, 0.0),))
    return Outcome(prediction, usage, "length" if tail is None else tail.finish, tokens)
