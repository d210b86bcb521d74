"""``POST /v1/predict``: records, answered as ``ptuning predict --json`` prints them, by one prompt or by many.

A record that fails does so alone: in its place stands ``{"error": {...}}``. If nothing is answered and all fail with
one code, that is the error of the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ptuning.config import GenerationSettings
from ptuning.data.questions import Question
from ptuning.errors import PTuningError
from ptuning.serve.engine.job import Answering, Outcome, PromptRow, Row
from ptuning.serve.http.errors import ApiError, JsonResponse, api_error, refused
from ptuning.serve.http.questions import read_row
from ptuning.serve.http.replies import answered
from ptuning.serve.http.schemas import PredictRequest
from ptuning.serve.http.service import ServedPrompt, Service
from ptuning.serve.http.shapes import Shape, added, finite, usage_json
from ptuning.template.segments import FILLS_MASKS

router = APIRouter()


@dataclass(frozen=True)
class AskedRecord:
    """A question to a prompt, or what was wrong with its record; with the places of prompt and record."""

    model: int
    record: int
    question: Question | Exception


@router.post("/v1/predict")
async def predict(asked: PredictRequest, request: Request) -> Response:
    """Answer records."""
    service = Service.of(request)
    names = [asked.model] if isinstance(asked.model, str) else asked.model
    prompts = [_prompt(service, request, name) for name in names]
    how = _how(asked)
    every = await asyncio.to_thread(_read, asked.records, prompts)
    rows: list[Row] = [PromptRow(prompts[one.model].prompt, one.question, how)
                       for one in every if isinstance(one.question, Question)]  # fmt: skip
    outcomes = iter(await answered(request, rows) if rows else [])
    found = [next(outcomes) if isinstance(one.question, Question) else one.question for one in every]
    request_id = request.scope["state"]["request_id"]
    shown: list[Shape | ApiError] = []
    for one, outcome in zip(every, found, strict=True):
        try:
            shown.append(_shown(one, outcome, service))
        except Exception as error:  # noqa: BLE001 - it fails alone
            shown.append(api_error(error, request_id=request_id, param=f"records[{one.record}]"))
    _raise_if_all_failed(shown)
    listed: list[list[Shape]] = [[] for _ in names]
    for one, answer in zip(every, shown, strict=True):
        listed[one.model].append({"error": answer.to_json()} if isinstance(answer, ApiError) else answer)
    usage = added([one.usage for one in found if isinstance(one, Outcome)])
    return JsonResponse(
        {
            "model": asked.model,
            "predictions": listed[0] if isinstance(asked.model, str) else listed,
            "usage": usage_json(usage),
            "system_fingerprint": service.fingerprint(prompts[0] if len(prompts) == 1 else None),
        }
    )


def _prompt(service: Service, request: Request, name: str) -> ServedPrompt:
    found = service.find(request, name, param="records")
    if found is None:
        raise refused("model", "records are answered by a prompt, and this is the base model; ask it at "
                      "/v1/completions", "unsupported")  # fmt: skip
    return found


def _how(asked: PredictRequest) -> Answering:
    if asked.normalise not in (None, "sum", "mean"):
        raise refused("normalise", f"normalise is {asked.normalise!r}; it must be sum or mean")
    try:
        generation = GenerationSettings.of(_listed_stops(asked.generation or {}))
    except PTuningError as error:
        raise refused("generation", str(error)) from error
    return Answering(
        candidates=None if asked.candidates is None else tuple(asked.candidates),
        top_k=asked.top_k,
        generation=generation,
        normalise=asked.normalise,  # type: ignore[arg-type]  # checked above
        calibrate=asked.calibrate,
        count_stop=asked.count_stop,
        min_probability=asked.min_probability,
    )


def _listed_stops(given: dict[str, Any]) -> dict[str, Any]:
    most = {"num_beams": 16, "max_new_tokens": 1 << 17}
    for name, limit in most.items():
        if isinstance(given.get(name), int) and given[name] > limit:
            raise refused(f"generation.{name}", f"{name} is {given[name]}; it must be {limit} or less")
    stops = given.get("stop_strings")
    if isinstance(stops, list) and len(stops) > 16:
        raise refused("generation.stop_strings", "there are more than 16 stop strings")
    return given


def _read(records: Sequence[object], prompts: Sequence[ServedPrompt]) -> list[AskedRecord]:
    """Return the questions of records to each prompt; those to one record stand together, since they share a text."""
    found = []
    for at, record in enumerate(records):
        for number, served in enumerate(prompts):
            try:
                listed: Sequence[Question | Exception] = read_row(served.prompt, record, where=f"records[{at}]")
            except (PTuningError, ApiError) as error:
                listed = [error]
            found += [AskedRecord(number, at, one) for one in listed]
    return found


def _shown(asked: AskedRecord, outcome: Outcome | Exception, service: Service) -> Shape:
    """Return an answer as ``ptuning predict --json`` prints it."""
    if isinstance(outcome, Exception):
        raise outcome
    prediction = outcome.prediction
    assert prediction is not None
    assert isinstance(asked.question, Question)
    if service.engine.model.backbone.kind not in FILLS_MASKS:
        prediction = replace(prediction, tokens=None)  # only a model that fills masks chooses a length
    answer = {name: finite(value) for name, value in prediction.to_json().items()}  # NaN is a fault of this row alone
    return {"record": dict(asked.question.record), **answer}


def _raise_if_all_failed(shown: Sequence[Shape | ApiError]) -> None:
    """Raise the error that all records have, if it is one."""
    errors = [one for one in shown if isinstance(one, ApiError)]
    if errors and len(errors) == len(shown) and len({error.code for error in errors}) == 1:
        raise errors[0]
