"""``POST /v1/classify`` and ``/classify``: labels or choices with their probabilities, as vLLM's clients read them."""

from __future__ import annotations

import asyncio
import secrets
import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from ptuning.data.questions import Question
from ptuning.serve.engine.job import Outcome, PromptRow
from ptuning.serve.http.errors import JsonResponse, refused
from ptuning.serve.http.questions import fields_questions
from ptuning.serve.http.replies import answered
from ptuning.serve.http.routes.completions import checked
from ptuning.serve.http.schemas import ClassifyRequest
from ptuning.serve.http.service import ServedPrompt, Service
from ptuning.serve.http.shapes import Shape, added, log_prob_of, usage_json

router = APIRouter()


@router.post("/v1/classify")
@router.post("/classify", include_in_schema=False)
async def classify(asked: ClassifyRequest, request: Request) -> Response:
    """Classify texts, or rows of a task. ``probs`` are in the order of ``labels``."""
    service = Service.of(request)
    served = service.find(request, asked.model, param="input")
    if served is None or not served.prompt.answer_space.is_closed:
        raise refused("model", "this model writes its answers; a prompt with label words or choices classifies",
                      "unsupported")  # fmt: skip
    questions = await asyncio.to_thread(fields_questions, served.prompt, asked.input, param="input")
    outcomes = checked(await answered(request, [PromptRow(served.prompt, one) for one in questions]))
    return JsonResponse(
        {
            "id": f"classify-{secrets.token_hex(12)}",
            "object": "list",
            "created": int(time.time()),
            "model": asked.model,
            "data": [_item(at, served, *pair) for at, pair in enumerate(zip(questions, outcomes, strict=True))],
            "usage": usage_json(added([one.usage for one in outcomes])),
            "system_fingerprint": service.fingerprint(served),
        }
    )


def _item(at: int, served: ServedPrompt, question: Question, outcome: Outcome) -> Shape:
    prediction = outcome.prediction
    assert prediction is not None
    assert prediction.probabilities is not None
    log_prob_of(prediction.log_prob)
    names = list(served.prompt.answer_space.names(question))
    probabilities = [prediction.probabilities[name] for name in names]
    return {
        "index": at,
        "label": prediction.text,
        "probs": probabilities,
        "labels": names,
        "num_classes": len(names),
    }
