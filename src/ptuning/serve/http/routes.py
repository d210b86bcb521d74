"""Routes of users: completions, chats, records, labels, tokens, models and health."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ptuning.config import GenerationSettings
from ptuning.data.conversations import read_conversations
from ptuning.data.questions import Question
from ptuning.data.reading import RawRows
from ptuning.errors import PTuningError, RecordError
from ptuning.files import sha256
from ptuning.prompt.inputs import InferenceInputs, typed_fields
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.rows import Answering, EchoRow, PromptRow, TextRow
from ptuning.provenance import VERSION
from ptuning.serve.engine.job import Outcome, Row, Usage
from ptuning.serve.http.errors import ApiError, JsonResponse, as_api_error, invalid
from ptuning.serve.http.openai_format import (
    Body,
    ChatBuilder,
    CompletionBuilder,
    finite,
    log_prob_of,
    text_of,
    total,
    usage_json,
)
from ptuning.serve.http.schemas import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    PredictRequest,
    SamplingRequest,
    TokenizeRequest,
)
from ptuning.serve.http.service import MANUAL, Service
from ptuning.serve.http.streaming import run_call, run_rows, stream_rows
from ptuning.serve.registry import Served
from ptuning.template.language import Field, Literal, Piece, Slots, Target, Template, TextSlots
from ptuning.template.messages import SYSTEM
from ptuning.template.segments import FILLS_MASKS, Ids

router = APIRouter()

Input = Question | str | Ids


# Completions and chats: prompts answer the value of their one open field; the base model continues a text.


@router.post("/v1/completions")
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Answer texts, each ``n`` times."""
    service, served = _open(body, request, param="prompt" if body.fields is None else "fields")
    inputs = _completion_inputs(body, served)
    builder = CompletionBuilder(
        body.model, service.fingerprint(served), **_builder_options(body), log_probs=body.logprobs
    )
    if body.echo:
        return await _echo(body, request, builder, served, inputs)
    if body.max_tokens == 0:
        raise invalid("max_tokens", "max_tokens is 0, which goes with echo only; it must be 1 or more")
    rows = _rows(body, service, served, inputs, alternatives=body.logprobs)
    if body.stream:
        return await stream_rows(request, rows, builder)
    return JsonResponse(builder.response(_checked(await run_rows(request, rows))))


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer the last user message, ``n`` times."""
    service, served = _open(body, request, param="messages" if body.fields is None else "fields")
    if served is None:
        raise invalid("model", "the base model has no chat format here; ask it at /v1/completions", "unsupported")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "top_logprobs goes with logprobs: true")
    limit_name, limit = body.token_limit()
    if limit == 0:
        raise invalid(limit_name, f"{limit_name} is 0; it must be 1 or more")
    question = _chat_question(body, served)
    alternatives = body.top_logprobs or 0 if body.logprobs else None
    builder = ChatBuilder(body.model, service.fingerprint(served), **_builder_options(body), log_probs=alternatives)
    rows = _rows(body, service, served, [question], alternatives=alternatives)
    if body.stream:
        return await stream_rows(request, rows, builder)
    return JsonResponse(builder.response(_checked(await run_rows(request, rows))))


def _open(body: SamplingRequest, request: Request, *, param: str) -> tuple[Service, Served | None]:
    """Check the common fields; return the service and the prompt, None for the base model."""
    service = Service.of(request)
    served = service.find(request, body.model, param=param)
    body.check_extras()
    limit = service.settings.max_choices
    if body.n is not None and body.n > limit:
        raise invalid("n", f"n is {body.n}; a request may ask for {limit} answers to a text")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "stream_options go with stream: true")
    return service, served


def _builder_options(body: SamplingRequest) -> dict[str, Any]:
    options = body.stream_options
    return {"choices": body.n or 1, "with_usage": options is not None and options.include_usage}


def _rows(
    body: SamplingRequest,
    service: Service,
    served: Served | None,
    inputs: Sequence[Input],
    *,
    alternatives: int | None,
) -> list[Row]:
    """Return the engine's rows, ``n`` for each input."""
    prompt, (name, limit) = None if served is None else served.prompt, body.token_limit()
    if prompt is not None and prompt.answer_space.is_closed:
        settings = [GenerationSettings()] * (body.n or 1)  # labels and choices are scored: sampling changes nothing
    elif limit is not None and limit > service.context:
        message = f"{name} is {limit}, and the model reads and generates {service.context} tokens together"
        raise invalid(name, message, "context_length_exceeded")
    else:
        settings = body.settings()
    rows: list[Row] = []
    for item in inputs:
        for generation in settings:
            how = Answering(generation=generation, alternatives=alternatives, pieces=bool(body.stream))
            if isinstance(item, Question):
                assert prompt is not None
                rows.append(PromptRow(prompt, item, how))
            else:
                rows.append(TextRow(item, how, prompt))
    return rows


def _checked(outcomes: Sequence[Outcome | Exception]) -> list[Outcome]:
    """Return the outcomes; the first error is that of the whole request, whose format has no place for it."""
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, Outcome)]


def _completion_inputs(body: CompletionRequest, served: Served | None) -> list[Input]:
    """Return what is answered: questions for a prompt, texts or token ids for the base model and echo."""
    given = body.prompt
    if served is not None and body.fields is not None:
        if given:
            raise invalid("prompt", "the request has a prompt and fields; give one of them")
        return list(_fields_questions(served.prompt, body.fields))
    if body.fields is not None:
        raise invalid("fields", "fields are those of a prompt's template, and the base model has none; give a prompt")
    if given is None:
        raise invalid("prompt", "the field 'prompt' is missing")
    texts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
    are_texts = all(isinstance(text, str) for text in texts)
    if served is not None and not body.echo and served.prompt.answer_space.is_closed and not are_texts:
        message = "token ids are for answers that are generated, and this prompt chooses; give texts"
        raise invalid("prompt", message, "unsupported")
    inputs: list[Input] = []
    for at, text in enumerate(texts):
        if not isinstance(text, str):
            inputs.append(tuple(text))
        elif served is None or body.echo:
            inputs.append(text)
        else:
            inputs.append(_typed_question(served.prompt, text, param=f"prompt[{at}]" if len(texts) > 1 else "prompt"))
    return inputs


async def _echo(
    body: CompletionRequest,
    request: Request,
    builder: CompletionBuilder,
    served: Served | None,
    inputs: Sequence[Input],
) -> Response:
    """Answer with the texts before their continuations, and the log-probabilities of both. The texts continue a prompt
    whose template ends in its one field and the target.
    """
    prompt = None if served is None else served.prompt
    if body.fields is not None or (prompt is not None and prompt.answer_space.is_closed):
        message = "echo is for a text that the model continues, not for fields, labels or choices"
        raise invalid("echo", message, "unsupported")
    if body.stream:
        raise invalid("echo", "echo and stream do not go together; leave one out", "unsupported")
    texts = [text for text in inputs if not isinstance(text, Question)]
    echoes: list[Row] = [EchoRow(text, body.logprobs or 0, prompt) for text in texts]
    service = Service.of(request)
    written = [] if body.max_tokens == 0 else _rows(body, service, served, texts, alternatives=body.logprobs)
    outcomes = _checked(await run_rows(request, [*echoes, *written]))
    heads, tails = outcomes[: len(echoes)], outcomes[len(echoes) :]
    joined = []
    for at, (text, head) in enumerate(zip(texts, heads, strict=True)):
        shown = text if isinstance(text, str) else "".join(token.text for token in head.tokens)
        for choice in range(builder.choices):
            if not tails:
                prediction = Prediction(shown, (Candidate(shown, 0.0),))
                joined.append(Outcome(prediction, Usage(head.usage.prompt_tokens), "length", head.tokens))
                continue
            tail = tails[at * builder.choices + choice]
            whole = shown + text_of(tail)
            prediction = Prediction(whole, (Candidate(whole, 0.0),))
            joined.append(Outcome(prediction, tail.usage, tail.finish, (*head.tokens, *tail.tokens)))
    return JsonResponse(builder.response(joined))


def _chat_question(body: ChatRequest, served: Served) -> Question:
    prompt, messages = served.prompt, body.messages
    if body.fields is not None:
        if messages:
            raise invalid("messages", "the request has messages and fields; with fields, send an empty list")
        questions = _fields_questions(prompt, body.fields)
        if len(questions) != 1:
            raise invalid("fields", f"a chat has one answer, and fields are {len(questions)} rows; ask /v1/completions")
        return questions[0]
    if not messages:
        raise invalid("messages", "there is no message; send one of the user")
    if prompt.template.has_conversation:
        return _conversation(messages, prompt)
    for at, message in enumerate(messages):
        if message.role != "user" or at > 0:
            raise invalid(
                f"messages[{at}]" if message.role != "user" else "messages",
                "the prompt's template is the whole input, so it takes one message of the user and no other turns "
                f"(the request has {', '.join(message.role[:20] for message in messages[:8])})",
                "unsupported",
            )
    return _typed_question(prompt, _text(messages[0], 0), param="messages[0].content")


def _conversation(messages: Sequence[Message], prompt: Prompt) -> Question:
    """Return the question of a conversation, whose last turn is the user's."""
    last = len(messages) - 1
    if messages[last].role != "user":
        raise invalid(f"messages[{last}]", "the last message must be the user's, which is answered", "unsupported")
    turns = [{"role": message.role, "content": _text(message, at)} for at, message in enumerate(messages)]
    rows = RawRows([("the request", {"messages": turns})], name="the request", digest="", format="json")
    try:
        (question,) = read_conversations(rows, ask=True).questions
    except RecordError as error:
        place = re.search(r"messages\[\d+\](\.\w+)?", str(error))
        raise invalid(place[0] if place else "messages", str(error)) from error
    missing = [name for name in prompt.template.fields if name not in question.record]
    if missing:
        raise invalid("messages", f"the prompt also reads {', '.join(missing)}; give 'fields'")
    if SYSTEM in question.record and SYSTEM not in prompt.template.fields:
        message = "the prompt has a system text of its own, which it has learned; leave this message out"
        raise invalid("messages[0]", message, "unsupported")
    return question


def _text(message: Message, number: int) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    for at, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            raise invalid(f"messages[{number}].content[{at}]", "only parts of the type text can be read", "unsupported")
    return "".join(part.text or "" for part in message.content)


# Rows of prompts. A template with one open field takes a text; one with several, or whose task's rows have choices,
# takes an object with the row's fields. Rows of a task are read as its files are.


def _typed_question(prompt: Prompt, text: str, *, param: str) -> Question:
    """Return the question of a text, the value of the template's one open field."""
    if prompt.answer_space.has_choices:
        raise invalid(param, "rows of this prompt's task have choices of their own; give a row as 'fields'")
    names = typed_fields(prompt)
    if not names and not text:
        return Question({})
    if len(names) != 1:
        listed = ", ".join(names) or "none"
        raise invalid(param, f"a text fills one field, and the prompt reads {listed}; give 'fields', an object with it")
    return InferenceInputs.typed(prompt, {names[0]: text}, where=param).questions[0]


def _row_questions(prompt: Prompt, row: object, *, where: str) -> list[Question]:
    """Return the questions of a row of data: one, unless the prompt's task reads a list in it."""
    if isinstance(row, str):
        return [_typed_question(prompt, row, param=where)]
    if not isinstance(row, Mapping):
        raise RecordError(f"{where}: a record is an object with named fields, or a text for the one open field")
    digest = sha256(json.dumps(row, sort_keys=True).encode())
    raw = RawRows([(where, row)], name=where, digest=digest, format="json", columns=list(row))
    questions = list(InferenceInputs.of(prompt, raw).questions)
    if not questions:
        raise RecordError(f"{where} holds no rows of the prompt's task")
    return questions


def _fields_questions(prompt: Prompt, fields: object, *, param: str = "fields") -> list[Question]:
    """Return the questions of ``fields``: an object for one row, or a list of them."""
    rows = fields if isinstance(fields, list) else [fields]
    return [
        question
        for at, row in enumerate(rows)
        for question in _row_questions(prompt, row, where=f"{param}[{at}]" if len(rows) > 1 else param)
    ]


@router.post("/v1/predict")
async def predict(body: PredictRequest, request: Request) -> Response:
    """Answer records as ``ptuning predict --json`` prints them, by one prompt or by many. A record that fails does so
    alone, and its answer is ``{"error": {...}}``; if all fail with one code, that is the error of the request.
    """
    service = Service.of(request)
    names = [body.model] if isinstance(body.model, str) else body.model
    prompts = []
    for name in names:
        served = service.find(request, name, param="records")
        if served is None:
            message = "records are answered by a prompt, and this is the base model; ask it at /v1/completions"
            raise invalid("model", message, "unsupported")
        prompts.append(served)
    if body.normalise not in (None, "sum", "mean"):
        raise invalid("normalise", f"normalise is {body.normalise!r}; it must be sum or mean")
    how = Answering(
        candidates=None if body.candidates is None else tuple(body.candidates),
        top_k=body.top_k,
        generation=body.settings(),
        normalise=body.normalise,  # type: ignore[arg-type]  # checked above
        calibrate=body.calibrate,
        count_stop=body.count_stop,
        min_probability=body.min_probability,
    )

    def read() -> list[tuple[int, int, Question | Exception]]:
        """Return (prompt, record, question or what is wrong); questions to one record are neighbours: they share it."""
        questions: list[tuple[int, int, Question | Exception]] = []
        for at, record in enumerate(body.records):
            for number, served in enumerate(prompts):
                try:
                    listed = _row_questions(served.prompt, record, where=f"records[{at}]")
                    questions += [(number, at, question) for question in listed]
                except (PTuningError, ApiError) as error:
                    questions.append((number, at, error))
        return questions

    questions = await asyncio.to_thread(read)
    rows: list[Row] = [PromptRow(prompts[number].prompt, question, how)
                       for number, _, question in questions if isinstance(question, Question)]  # fmt: skip
    outcomes = iter(await run_rows(request, rows) if rows else [])
    request_id = request.scope["state"]["request_id"]
    answers: list[list[Body]] = [[] for _ in names]
    usages: list[Usage] = []
    errors: list[ApiError] = []
    for number, at, question in questions:
        try:
            if isinstance(question, Exception):
                raise question
            outcome = next(outcomes)
            if isinstance(outcome, Exception):
                raise outcome
            usages.append(outcome.usage)
            answers[number].append(_prediction(question, outcome, service))
        except Exception as error:  # noqa: BLE001 - it fails alone
            api_error = as_api_error(error, request_id=request_id, param=f"records[{at}]")
            errors.append(api_error)
            answers[number].append({"error": api_error.to_json()})
    if len(errors) == len(questions) and len({error.code for error in errors}) == 1:
        raise errors[0]
    return JsonResponse(
        {
            "model": body.model,
            "predictions": answers[0] if isinstance(body.model, str) else answers,
            "usage": usage_json(total(usages)),
            "system_fingerprint": service.fingerprint(prompts[0] if len(prompts) == 1 else None),
        }
    )


def _prediction(question: Question, outcome: Outcome, service: Service) -> Body:
    prediction = outcome.prediction
    assert prediction is not None
    if service.engine.model.backbone.kind not in FILLS_MASKS:
        prediction = replace(prediction, tokens=None)  # only a model that fills masks chooses a length
    return {"record": dict(question.record)} | {name: finite(value) for name, value in prediction.to_json().items()}


@router.post("/v1/classify")
@router.post("/classify", include_in_schema=False)
async def classify(body: ClassifyRequest, request: Request) -> Response:
    """Classify texts, or rows of a task, as vLLM's clients read it. ``probs`` are in the order of ``labels``."""
    service = Service.of(request)
    served = service.find(request, body.model, param="input")
    if served is None or not served.prompt.answer_space.is_closed:
        message = "this model generates its answers; a prompt with label words or choices classifies"
        raise invalid("model", message, "unsupported")
    questions = await asyncio.to_thread(_fields_questions, served.prompt, body.input, param="input")
    outcomes = _checked(await run_rows(request, [PromptRow(served.prompt, question) for question in questions]))
    data = []
    for at, (question, outcome) in enumerate(zip(questions, outcomes, strict=True)):
        prediction = outcome.prediction
        assert prediction is not None
        assert prediction.probabilities is not None
        log_prob_of(prediction.log_prob)
        labels = list(served.prompt.answer_space.names(question))
        probs = [prediction.probabilities[label] for label in labels]
        data.append(
            {"index": at, "label": prediction.text, "probs": probs, "labels": labels, "num_classes": len(labels)}
        )
    return JsonResponse(
        {
            "id": f"classify-{secrets.token_hex(12)}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "data": data,
            "usage": usage_json(total([outcome.usage for outcome in outcomes])),
            "system_fingerprint": service.fingerprint(served),
        }
    )


# The tokenizer, as vLLM's clients and lm-eval ask for it; all prompts share it.


def _tokenizer_service(name: str | None, request: Request) -> Service:
    service = Service.of(request)
    if name is not None:
        service.find(request, name)
    return service


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Return the token ids of a text."""
    service = _tokenizer_service(body.model, request)
    tokenizer = service.engine.model.backbone.tokenizer

    def work() -> tuple[list[int], list[str] | None]:
        ids = tokenizer.read(body.prompt, add_special_tokens=body.add_special_tokens)
        return ids, [tokenizer.token(token) for token in ids] if body.return_token_strs else None

    ids, texts = await run_call(request, work)
    return JsonResponse({"count": len(ids), "max_model_len": service.context, "tokens": ids, "token_strs": texts})


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """Return the text of token ids."""
    backbone = _tokenizer_service(body.model, request).engine.model.backbone
    outside = [token for token in body.tokens if token >= backbone.vocabulary]
    if outside:
        raise invalid("tokens", f"token id {outside[0]} is outside the vocabulary of {backbone.vocabulary}")
    return JsonResponse({"prompt": await run_call(request, lambda: backbone.tokenizer.decode(body.tokens))})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """Return the tokenizer's class and special tokens."""
    tokenizer = Service.of(request).engine.model.backbone.tokenizer
    return JsonResponse({**await run_call(request, tokenizer.described), "model_max_length": tokenizer.max_tokens})


# Health and models.


@router.get("/health")
@router.head("/health", include_in_schema=False)
async def health(request: Request) -> Response:
    """Return 200 if the engine is alive and makes progress, else 503."""
    if not Service.of(request).engine.is_alive:
        raise ApiError(503, "the engine has stopped, or hangs", code="not_alive")
    return JsonResponse({"status": "ok"})


@router.get("/ready")
@router.head("/ready", include_in_schema=False)
async def ready(request: Request) -> Response:
    """Return 200 if requests are accepted, 503 while the service ends."""
    service = Service.of(request)
    if service.phase != "serving" or not service.engine.is_alive:
        raise ApiError(503, f"the service is {service.phase}", code="not_serving")
    return JsonResponse({"status": service.phase})


@router.get("/version")
async def version() -> Response:
    """Return the version."""
    return JsonResponse({"version": VERSION})


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """List the prompts, and the model that they share."""
    service = Service.of(request)
    served = sorted(service.registry.served.values(), key=lambda prompt: prompt.name)
    return JsonResponse({"object": "list", "data": [_card(service, prompt) for prompt in (None, *served)]})


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> Response:
    """Describe one prompt, or the model."""
    service = Service.of(request)
    return JsonResponse(_card(service, service.find(request, name)))


def _card(service: Service, served: Served | None) -> Body:
    """Return the description of a prompt, or of the model (None); ``root`` is only the name of its folder."""
    base = service.registry.base_name
    card: Body = {
        "id": base if served is None else served.name,
        "object": "model",
        "created": int(service.started if served is None else served.loaded_at),
        "owned_by": "ptuning",
        "root": base if served is None else served.folder.name,
        "parent": None if served is None else base,
        "max_model_len": service.context,
    }
    if served is None:
        return card
    space, task, template = served.prompt.answer_space, served.prompt.task, served.prompt.template
    return {
        **card,
        **_template(template),
        "manual": {"id": served.name + MANUAL, **_template(template.without_slots())} if template.has_slots else None,
        "fields": list(task.fields if task else template.fields),
        "columns": list(task.columns if task else template.fields),
        "task": task.name if task else None,
        "labels": list(space.labels),
        "answers": "choices" if space.has_choices else "labels" if space.is_closed else "text",
        "slots": served.prompt.every_slot,
        "sha256": served.sha256,
    }


def _template(template: Template) -> Body:
    return {"template": str(template), "pieces": [_piece(piece) for piece in template.pieces]}


def _piece(piece: Piece) -> Body:
    """Return the kind of a template's piece, and its words, name or count."""
    if isinstance(piece, Slots):
        return {"kind": "slots", "count": piece.count}
    if isinstance(piece, TextSlots):
        return {"kind": "slots", "text": piece.text}
    if isinstance(piece, Field):
        return {"kind": "field", "name": piece.name}
    if isinstance(piece, Literal):
        return {"kind": "text", "text": piece.text}
    return {"kind": "target" if isinstance(piece, Target) else "decoder"}
