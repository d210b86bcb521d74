"""What operators may do while the service runs: list, load, replace, unload and reload prompts, and read the metrics.

These routes are there only if there are admin keys. Two of them are those by which tools load LoRA adapters into vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import PlainTextResponse, Response

from ptuning.errors import FileError
from ptuning.serve.http.errors import ApiError, JsonResponse
from ptuning.serve.http.service import Service
from ptuning.serve.http.shapes import Shape
from ptuning.serve.registry import Registry, Served

router = APIRouter(tags=["admin"])
metrics_router = APIRouter(tags=["admin"])


class PromptPlace(BaseModel):
    """A name, and the folder of its prompt within the service's folder of prompts."""

    model_config = ConfigDict(extra="forbid")
    name: str
    path: str


class PromptChange(BaseModel):
    """The folder of the prompt that takes another's place; the name stands in the address."""

    model_config = ConfigDict(extra="forbid")
    path: str


class AdapterLoad(BaseModel):
    """As tools send it to vLLM; what else they send is of no meaning here."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class AdapterUnload(BaseModel):
    """As tools send it to vLLM."""

    lora_name: str


# Plain functions: they read files and wait for the engine, and so run in threads of the server's.
@router.get("/v1/prompts")
def list_prompts(request: Request) -> Response:
    """List the prompts in service, and those that could not be loaded."""
    registry = _registry(request)
    data = [_described(registry, one) for _, one in sorted(registry.served.items())]
    return JsonResponse({"object": "list", "data": data, "failed": _listed(registry.failures)})


@router.post("/v1/prompts", status_code=201)
def load_prompt(asked: PromptPlace, request: Request) -> Response:
    """Take a prompt into service under a new name."""
    registry = _registry(request)
    return JsonResponse(_described(registry, registry.load(asked.name, asked.path)), status_code=201)


@router.post("/v1/prompts/reload")
def reload_prompts(request: Request) -> Response:
    """Make the service equal to the folder of prompts; say what that was, and what failed."""
    try:
        done = _registry(request).reload()
    except FileError as error:
        raise ApiError(500, str(error), code="folder_not_readable") from error
    told = {"added": done.added, "changed": done.changed, "removed": done.removed, "failed": _listed(done.failed)}
    return JsonResponse(told)


@router.put("/v1/prompts/{name:path}")
def replace_prompt(name: str, asked: PromptChange, request: Request) -> Response:
    """Put another prompt under a name; running requests end with the one that they began with."""
    registry = _registry(request)
    return JsonResponse(_described(registry, registry.replace(name, asked.path)))


@router.delete("/v1/prompts/{name:path}")
def unload_prompt(name: str, request: Request) -> Response:
    """Take a prompt out of service; running requests end with it, and its files stay."""
    gone = _registry(request).unload(name)
    return JsonResponse({"id": gone.name, "object": "prompt", "deleted": True})


@router.post("/v1/load_lora_adapter")
def load_adapter(asked: AdapterLoad, request: Request) -> Response:
    """Load a prompt as tools load a LoRA adapter into vLLM."""
    registry = _registry(request)
    replaces = asked.load_inplace and asked.lora_name in registry.served
    (registry.replace if replaces else registry.load)(asked.lora_name, asked.lora_path)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
def unload_adapter(asked: AdapterUnload, request: Request) -> Response:
    """Unload a prompt as tools unload a LoRA adapter from vLLM."""
    gone = _registry(request).unload(asked.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{gone.name}' removed successfully.")


@metrics_router.get("/metrics", response_class=PlainTextResponse)
def metrics(request: Request) -> Response:
    """Tell Prometheus what was counted."""
    body, content_type = Service.of(request).watch.exposition(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})


def _registry(request: Request) -> Registry:
    return cast("Registry", Service.of(request).registry)


def _described(registry: Registry, served: Served) -> Shape:
    """Return what an operator wants to know of a prompt in service."""
    prompt = served.prompt
    return {
        "id": served.name,
        "object": "prompt",
        "path": registry.path_of(served),
        "sha256": served.sha256,
        "loaded_at": int(served.loaded_at),
        "template": str(prompt.template),
        "fields": list(prompt.template.fields),
        "labels": list(prompt.label_words.labels) if prompt.label_words else None,
        "task": prompt.task.name if prompt.task else None,
        "slots": prompt.every_slot,
        "method": prompt.method,
        "scores": {name: value for name, value in prompt.scores.items() if math.isfinite(value)},
    }


def _listed(failures: Mapping[str, str]) -> list[Shape]:
    return [{"id": name, "message": message} for name, message in failures.items()]
