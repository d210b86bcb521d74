"""Routes of users: completions, chats, records, labels, tokens, models and health."""

import asyncio
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ptuning.config import GenerationSettings
from ptuning.data.questions import Question
from ptuning.data.reading import RawRows
from ptuning.errors import PTuningError, RecordError
from ptuning.prompt.inputs import InferenceInputs, typed_fields
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.rows import Answering, EchoRow, PromptRow, TextRow
from ptuning.provenance import VERSION
from ptuning.serve.engine.job import Outcome, Usage
from ptuning.serve.http.errors import ApiError, JsonResponse, as_api_error, invalid
from ptuning.serve.http.metrics import stats_of
from ptuning.serve.http.responses import (
    Body,
    ResponseBuilder,
    answered_rows,
    finite,
    log_prob_of,
    run_call,
    run_rows,
    stream_rows,
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
from ptuning.serve.registry import Served
from ptuning.template.language import Field, Literal, Piece, Slots, Target, Template, TextSlots
from ptuning.template.messages import SYSTEM
from ptuning.template.segments import FILLS_MASKS, Ids

router = APIRouter()


# Completions and chats: prompts answer the value of their one open field; the base model continues a text.


@router.post("/v1/completions")
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Answer texts, each ``n`` times. With ``echo``, a text is before its continuations, and its own tokens are scored,
    which a prompt allows whose template ends in its one field and the target.
    """
    served = Service.of(request).find(request, body.model, param="prompt" if body.fields is None else "fields")
    inputs = _completion_inputs(body, served)
    if not body.echo:
        if body.max_tokens == 0:
            raise invalid("max_tokens", "max_tokens is 0, which goes with echo only; it must be 1 or more")
        return await _answer(body, request, served, inputs, body.logprobs)
    prompt = None if served is None else served.prompt
    if body.fields is not None or (prompt is not None and prompt.answer_space.is_closed):
        message = "echo is for a text that the model continues, not for fields, labels or choices"
        raise invalid("echo", message, "unsupported")
    if body.stream:
        raise invalid("echo", "echo and stream do not go together; leave one out", "unsupported")
    texts = [text for text in inputs if not isinstance(text, Question)]
    echoes = [EchoRow(text, body.logprobs or 0, prompt) for text in texts]
    continued = [] if body.max_tokens == 0 else _rows(body, request, served, texts, body.logprobs)
    outcomes = await answered_rows(request, [*echoes, *continued])
    heads, tails = outcomes[: len(echoes)], outcomes[len(echoes) :]
    builder, joined = _builder(body, request, served, body.logprobs), []
    for at, (text, head) in enumerate(zip(texts, heads, strict=True)):
        shown = text if isinstance(text, str) else "".join(token.text for token in head.tokens)
        none = Outcome(usage=Usage(head.usage.prompt_tokens), finish="length")
        for tail in tails[at * builder.choices : (at + 1) * builder.choices] or [none] * builder.choices:
            whole = shown if tail.prediction is None else shown + tail.prediction.text
            prediction = Prediction(whole, (Candidate(whole, 0.0),))
            joined.append(replace(tail, prediction=prediction, tokens=(*head.tokens, *tail.tokens)))
    return JsonResponse(builder.response(joined))


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer the last user message, ``n`` times."""
    served = Service.of(request).find(request, body.model, param="messages" if body.fields is None else "fields")
    if served is None:
        raise invalid("model", "the base model has no chat format here; ask it at /v1/completions", "unsupported")
    limit_name, limit = body.token_limit()
    if limit == 0:
        raise invalid(limit_name, f"{limit_name} is 0; it must be 1 or more")
    question = _chat_question(body, served.prompt)
    alternatives = body.top_logprobs or 0 if body.logprobs else None
    return await _answer(body, request, served, [question], alternatives)


async def _answer(
    body: SamplingRequest,
    request: Request,
    served: Served | None,
    inputs: Sequence[Question | str | Ids],
    log_probs: int | None,
) -> Response:
    rows, builder = _rows(body, request, served, inputs, log_probs), _builder(body, request, served, log_probs)
    if body.stream:
        return await stream_rows(request, rows, builder)
    return JsonResponse(builder.response(await answered_rows(request, rows)))


def _builder(body: SamplingRequest, request: Request, served: Served | None, log_probs: int | None) -> ResponseBuilder:
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    fingerprint, is_chat = Service.of(request).fingerprint(served), isinstance(body, ChatRequest)
    return ResponseBuilder(body.model, fingerprint, is_chat, body.n or 1, log_probs, with_usage)


def _rows(
    body: SamplingRequest,
    request: Request,
    served: Served | None,
    inputs: Sequence[Question | str | Ids],
    alternatives: int | None,
) -> list[PromptRow | TextRow]:
    """Return the engine's rows, ``n`` for each input."""
    prompt = None if served is None else served.prompt
    context, (name, limit) = Service.of(request).context, body.token_limit()
    if prompt is not None and prompt.answer_space.is_closed:
        settings = [GenerationSettings()] * (body.n or 1)  # labels and choices are scored: sampling changes nothing
    elif limit is not None and limit > context:
        message = f"{name} is {limit}, and the model reads and generates {context} tokens together"
        raise invalid(name, message, "context_length_exceeded")
    else:
        settings = body.settings()
    rows: list[PromptRow | TextRow] = []
    for item in inputs:
        for generation in settings:
            how = Answering(generation=generation, alternatives=alternatives, pieces=bool(body.stream))
            if isinstance(item, Question):
                assert prompt is not None
                rows.append(PromptRow(prompt, item, how))
            else:
                rows.append(TextRow(item, how, prompt))
    return rows


def _completion_inputs(body: CompletionRequest, served: Served | None) -> list[Question | str | Ids]:
    """Return questions for a prompt, and texts or token ids for the base model and echo."""
    given = body.prompt
    if body.fields is not None:
        if served is None:
            message = "fields are those of a prompt's template, and the base model has none; give a prompt"
            raise invalid("fields", message)
        if given:
            raise invalid("prompt", "the request has a prompt and fields; give one of them")
        return [*_questions(served.prompt, body.fields, param="fields")]
    if given is None:
        raise invalid("prompt", "the field 'prompt' is missing")
    texts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
    are_texts = all(isinstance(text, str) for text in texts)
    if served is not None and not body.echo and served.prompt.answer_space.is_closed and not are_texts:
        message = "token ids are for answers that are generated, and this prompt chooses; give texts"
        raise invalid("prompt", message, "unsupported")
    if not are_texts:
        return [text if isinstance(text, str) else tuple(text) for text in texts]
    if served is None or body.echo:
        return texts
    return [*_questions(served.prompt, texts, param="prompt")]


def _chat_question(body: ChatRequest, prompt: Prompt) -> Question:
    messages = body.messages
    if body.fields is not None:
        if messages:
            raise invalid("messages", "the request has messages and fields; with fields, send an empty list")
        questions = _questions(prompt, body.fields, param="fields")
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
    return _typed_question(prompt, _text(messages[0], 0), where="messages[0].content")


def _conversation(messages: Sequence[Message], prompt: Prompt) -> Question:
    """Return the question of a conversation, whose last turn is the user's."""
    last = len(messages) - 1
    if messages[last].role != "user":
        raise invalid(f"messages[{last}]", "the last message must be the user's, which is answered", "unsupported")
    turns = [{"role": message.role, "content": _text(message, at)} for at, message in enumerate(messages)]
    try:
        (question,) = _row_questions(prompt, {"messages": turns}, where="the request")
    except RecordError as error:
        place = re.search(r"messages\[\d+\](\.\w+)?", str(error))
        raise invalid(place[0] if place else "messages", str(error)) from error
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


def _typed_question(prompt: Prompt, text: str, *, where: str) -> Question:
    """Return the question of a text, the value of the template's one open field."""
    if prompt.answer_space.has_choices:
        raise invalid(where, "rows of this prompt's task have choices of their own; give a row as 'fields'")
    names = typed_fields(prompt)
    if not names and not text:
        return Question({})
    if len(names) != 1:
        listed = ", ".join(names) or "none"
        raise invalid(where, f"a text fills one field, and the prompt reads {listed}; give 'fields', an object with it")
    return InferenceInputs.typed(prompt, {names[0]: text}, where=where).questions[0]


def _row_questions(prompt: Prompt, row: object, *, where: str) -> list[Question]:
    """Return the questions of a row of data: one, unless the prompt's task reads a list in it."""
    if isinstance(row, str):
        return [_typed_question(prompt, row, where=where)]
    if not isinstance(row, Mapping):
        raise RecordError(f"{where}: a record is an object with named fields, or a text for the one open field")
    raw = RawRows([(where, row)], name=where, digest="", format="json", columns=list(row))
    questions = list(InferenceInputs.of(prompt, raw).questions)
    if not questions:
        raise RecordError(f"{where} holds no rows of the prompt's task")
    return questions


def _questions(prompt: Prompt, rows: object, *, param: str) -> list[Question]:
    """Return the questions of a row, or of a list of them."""
    listed = rows if isinstance(rows, list) else [rows]
    return [
        question
        for at, row in enumerate(listed)
        for question in _row_questions(prompt, row, where=f"{param}[{at}]" if len(listed) > 1 else param)
    ]


@router.post("/v1/predict")
async def predict(body: PredictRequest, request: Request) -> Response:
    """Answer records as ``ptuning predict --json`` prints them, by one prompt or by many. A record that fails does so
    alone, and its answer is ``{"error": {...}}``; if all fail with one code, that is the error of the request.
    """
    service = Service.of(request)
    prompts = []
    for name in [body.model] if isinstance(body.model, str) else body.model:
        served = service.find(request, name, param="records")
        if served is None:
            message = "records are answered by a prompt, and this is the base model; ask it at /v1/completions"
            raise invalid("model", message, "unsupported")
        prompts.append(served)
    how = body.answering()

    def read() -> list[tuple[int, int, Question | Exception]]:
        """Return (prompt, record, question or error); questions to one record are neighbours, which share it."""
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
    rows = [PromptRow(prompts[number].prompt, question, how)
            for number, _, question in questions if isinstance(question, Question)]  # fmt: skip
    outcomes = iter(await run_rows(request, rows) if rows else [])
    answers: list[list[Body]] = [[] for _ in prompts]
    answered: list[Outcome] = []
    errors: list[ApiError] = []
    for number, at, question in questions:
        try:
            if isinstance(question, Exception):
                raise question
            outcome = next(outcomes)
            if isinstance(outcome, Exception):
                raise outcome
            answered.append(outcome)
            prediction = outcome.prediction
            assert prediction is not None
            if service.engine.model.backbone.kind not in FILLS_MASKS:
                prediction = replace(prediction, tokens=None)  # only a model that fills masks chooses a length
            shown = {name: finite(value) for name, value in prediction.to_json().items()}
            answers[number].append({"record": dict(question.record), **shown})
        except Exception as error:  # noqa: BLE001 - it fails alone
            errors.append(as_api_error(error, request_id=stats_of(request).id, param=f"records[{at}]"))
            answers[number].append({"error": errors[-1].to_json()})
    if len(errors) == len(questions) and len({error.code for error in errors}) == 1:
        raise errors[0]
    return JsonResponse(
        {
            "model": body.model,
            "predictions": answers[0] if isinstance(body.model, str) else answers,
            "usage": usage_json(answered),
            "system_fingerprint": service.fingerprint(prompts[0] if len(prompts) == 1 else None),
        }
    )


@router.post("/v1/classify")
@router.post("/classify", include_in_schema=False)
async def classify(body: ClassifyRequest, request: Request) -> Response:
    """Classify texts, or rows of a task, as vLLM's clients read it. ``probs`` are in the order of ``labels``."""
    service = Service.of(request)
    served = service.find(request, body.model, param="input")
    if served is None or not served.prompt.answer_space.is_closed:
        message = "this model generates its answers; a prompt with label words or choices classifies"
        raise invalid("model", message, "unsupported")
    questions = await asyncio.to_thread(_questions, served.prompt, body.input, param="input")
    outcomes = await answered_rows(request, [PromptRow(served.prompt, question) for question in questions])
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
            "usage": usage_json(outcomes),
            "system_fingerprint": service.fingerprint(served),
        }
    )


# The tokenizer, as vLLM's clients and lm-eval ask for it; all prompts share it.


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Return the token ids of a text."""
    service = Service.of(request)
    if body.model is not None:
        service.find(request, body.model)
    tokenizer = service.engine.model.backbone.tokenizer

    def work() -> tuple[list[int], list[str] | None]:
        ids = tokenizer.read(body.prompt, add_special_tokens=body.add_special_tokens)
        return ids, [tokenizer.token(token) for token in ids] if body.return_token_strs else None

    ids, texts = await run_call(request, work)
    return JsonResponse({"count": len(ids), "max_model_len": service.context, "tokens": ids, "token_strs": texts})


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """Return the text of token ids."""
    service = Service.of(request)
    if body.model is not None:
        service.find(request, body.model)
    backbone = service.engine.model.backbone
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
        "slots": served.prompt.total_slots,
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
