"""Routes of operators: list, load, replace, unload and reload prompts, and read the metrics.

They exist only if there are admin keys. Two of them are those by which tools load LoRA adapters into vLLM.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import PlainTextResponse, Response

from ptuning.errors import FileError
from ptuning.serve.http.errors import ApiError, JsonResponse
from ptuning.serve.http.responses import Body
from ptuning.serve.http.service import Service
from ptuning.serve.registry import Registry, Served

router = APIRouter(tags=["admin"])
metrics_router = APIRouter(tags=["admin"])


class PromptPath(BaseModel, extra="forbid"):
    """A prompt's folder within the service's folder of prompts."""

    path: str


class NamedPrompt(PromptPath):
    """A prompt's folder, and its name in service."""

    name: str


class AdapterLoad(BaseModel):
    """Body that tools send to vLLM; its other fields are ignored."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class AdapterUnload(BaseModel):
    """Body that tools send to vLLM."""

    lora_name: str


# Plain functions run in threads of the server: they read files and wait for the engine.
@router.get("/v1/prompts")
def list_prompts(request: Request) -> Response:
    """List the prompts in service, and those that could not be loaded."""
    registry = Service.of(request).registry
    data = [_describe(registry, served) for _, served in sorted(registry.served.items())]
    return JsonResponse({"object": "list", "data": data, "failed": _failures(registry.failures)})


@router.post("/v1/prompts", status_code=201)
def load_prompt(body: NamedPrompt, request: Request) -> Response:
    """Load a prompt under a new name."""
    registry = Service.of(request).registry
    return JsonResponse(_describe(registry, registry.load(body.name, body.path)), status_code=201)


@router.post("/v1/prompts/reload")
def reload_prompts(request: Request) -> Response:
    """Make the service equal to the folder of prompts; return what changed, and what failed."""
    try:
        changes = Service.of(request).registry.reload()
    except FileError as error:
        raise ApiError(500, str(error), code="folder_not_readable") from error
    return JsonResponse({**asdict(changes), "failed": _failures(changes.failed)})


@router.put("/v1/prompts/{name:path}")
def replace_prompt(name: str, body: PromptPath, request: Request) -> Response:
    """Replace the prompt of a name; running requests end with the old one."""
    registry = Service.of(request).registry
    return JsonResponse(_describe(registry, registry.load(name, body.path, replaces=True)))


@router.delete("/v1/prompts/{name:path}")
def unload_prompt(name: str, request: Request) -> Response:
    """Unload a prompt; running requests end with it, and its files stay."""
    served = Service.of(request).registry.unload(name)
    return JsonResponse({"id": served.name, "object": "prompt", "deleted": True})


@router.post("/v1/load_lora_adapter")
def load_adapter(body: AdapterLoad, request: Request) -> Response:
    """Load a prompt as tools load a LoRA adapter into vLLM."""
    registry = Service.of(request).registry
    replaces = body.load_inplace and body.lora_name in registry.served
    registry.load(body.lora_name, body.lora_path, replaces=replaces)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
def unload_adapter(body: AdapterUnload, request: Request) -> Response:
    """Unload a prompt as tools unload a LoRA adapter from vLLM."""
    served = Service.of(request).registry.unload(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{served.name}' removed successfully.")


@metrics_router.get("/metrics", response_class=PlainTextResponse)
def metrics(request: Request) -> Response:
    """Return the metrics for Prometheus."""
    body, content_type = Service.of(request).metrics.exposition(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})


def _describe(registry: Registry, served: Served) -> Body:
    prompt = served.prompt
    return {
        "id": served.name,
        "object": "prompt",
        "path": registry.path_of(served.folder),
        "sha256": served.sha256,
        "loaded_at": int(served.loaded_at),
        "template": str(prompt.template),
        "fields": list(prompt.template.fields),
        "labels": list(prompt.label_words.labels) if prompt.label_words else None,
        "task": prompt.task.name if prompt.task else None,
        "slots": prompt.total_slots,
        "method": prompt.method,
        "scores": {name: value for name, value in prompt.scores.items() if math.isfinite(value)},
    }


def _failures(failures: Mapping[str, str]) -> list[Body]:
    return [{"id": name, "message": message} for name, message in failures.items()]
