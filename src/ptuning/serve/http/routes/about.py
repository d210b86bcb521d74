"""What is here: whether the service lives and takes requests, its version, and the models."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from ptuning.provenance import VERSION
from ptuning.serve.http.errors import ApiError, JsonResponse
from ptuning.serve.http.service import MANUAL, ServedPrompt, Service
from ptuning.serve.http.shapes import Shape
from ptuning.template.language import Field, Literal, Piece, Slots, Target, Template, TextSlots

router = APIRouter()


@router.get("/health")
@router.head("/health", include_in_schema=False)  # as balancers ask
async def health(request: Request) -> Response:
    """Say whether the engine lives and gets on with its work: 200 or 503."""
    if not Service.of(request).engine.is_alive:
        raise ApiError(503, "the engine has stopped, or hangs", code="not_alive")
    return JsonResponse({"status": "ok"})


@router.get("/ready")
@router.head("/ready", include_in_schema=False)  # as balancers ask
async def ready(request: Request) -> Response:
    """Say whether requests are taken: 200, or 503 while the service starts or ends."""
    service = Service.of(request)
    if service.phase != "serving" or not service.engine.is_alive:
        raise ApiError(503, f"the service is {service.phase}", code="not_serving")
    return JsonResponse({"status": service.phase})


@router.get("/version")
async def version() -> Response:
    """Tell the version."""
    return JsonResponse({"version": VERSION})


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """List the prompts, and the model that they share."""
    service = Service.of(request)
    served = sorted(service.registry.served.values(), key=lambda one: one.name)
    return JsonResponse({"object": "list", "data": [_card(service, None), *(_card(service, one) for one in served)]})


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> Response:
    """Tell about one prompt, or the model."""
    service = Service.of(request)
    return JsonResponse(_card(service, service.find(request, name)))


def _card(service: Service, served: ServedPrompt | None) -> Shape:
    """Return what is told of a prompt, or of the model (None): ``root`` is the name of its folder alone."""
    base = service.registry.base_name
    card: Shape = {
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


def _template(template: Template) -> Shape:
    return {"template": str(template), "pieces": [_piece(one) for one in template.pieces]}


def _piece(piece: Piece) -> Shape:
    """Return a piece of a template: its kind, and the words, the name or the number that it has."""
    if isinstance(piece, Slots):
        return {"kind": "slots", "count": piece.count}
    if isinstance(piece, TextSlots):
        return {"kind": "slots", "text": piece.text}
    if isinstance(piece, Field):
        return {"kind": "field", "name": piece.name}
    if isinstance(piece, Literal):
        return {"kind": "text", "text": piece.text}
    return {"kind": "target" if isinstance(piece, Target) else "decoder"}
