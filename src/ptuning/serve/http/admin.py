"""What the operator may do to the prompts while the service runs: list, load, replace, unload and reload them.

The routes are there only if there are admin keys. Two of them are those by which tools load LoRA adapters into vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict

from ptuning.errors import PTuningError
from ptuning.files import Json
from ptuning.serve.engine.job import StoppedError
from ptuning.serve.registry import ConflictError, RefusedNameError, Registry, Served, UnknownPromptError

# Error -> status, type and code of the answer; anything else that a user can mend is a prompt that cannot be taken.
ANSWERS: dict[type[PTuningError], tuple[int, str, str]] = {
    UnknownPromptError: (404, "invalid_request_error", "model_not_found"),
    ConflictError: (409, "conflict_error", "conflict"),
    RefusedNameError: (400, "invalid_request_error", "name_not_allowed"),
    StoppedError: (503, "service_unavailable_error", "shutting_down"),
}
UNFIT = 400, "invalid_request_error", "prompt_unfit"


class Placement(BaseModel):
    """A name, and the folder of its prompt within the service's folder of prompts."""

    model_config = ConfigDict(extra="forbid")
    name: str
    path: str


class Replacement(BaseModel):
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


def router(registry: Registry, *, guard: Callable[..., object] | None = None) -> APIRouter:
    """Return the routes; ``guard`` is a dependency that lets nobody in without an admin key."""
    made = APIRouter(dependencies=[] if guard is None else [Depends(guard)], tags=["admin"])

    # Plain functions: they read files and wait for the engine, and so run in threads of the server's.
    @made.get("/v1/prompts")
    def list_prompts() -> dict[str, Any]:
        """List the prompts in service, and those that could not be loaded."""
        data = [describe(registry, one) for _, one in sorted(registry.served.items())]
        return {"object": "list", "data": data, "failed": _failed(registry.failures)}

    @made.post("/v1/prompts", status_code=201)
    def load_prompt(asked: Placement) -> Response:
        """Take a prompt into service under a new name."""
        return _answer(lambda: describe(registry, registry.load(asked.name, asked.path)), status=201)

    @made.post("/v1/prompts/reload")
    def reload_prompts() -> Response:
        """Make the service equal to the folder of prompts; say what that was, and what failed."""

        def work() -> dict[str, Json]:
            done = registry.reload()
            listed: dict[str, Json] = {
                "added": list(done.added), "changed": list(done.changed), "removed": list(done.removed)
            }  # fmt: skip
            return {**listed, "failed": _failed(done.failed)}

        return _answer(work)

    @made.put("/v1/prompts/{name:path}")
    def replace_prompt(name: str, asked: Replacement) -> Response:
        """Put another prompt under a name; running requests end with the one that they began with."""
        return _answer(lambda: describe(registry, registry.replace(name, asked.path)))

    @made.delete("/v1/prompts/{name:path}")
    def unload_prompt(name: str) -> Response:
        """Take a prompt out of service; running requests end with it, and its files stay."""
        return _answer(lambda: {"id": registry.unload(name).name, "object": "prompt", "deleted": True})

    @made.post("/v1/load_lora_adapter")
    def load_adapter(asked: AdapterLoad) -> Response:
        """Load a prompt as tools load a LoRA adapter into vLLM."""

        def work() -> str:
            replaces = asked.load_inplace and asked.lora_name in registry.served
            (registry.replace if replaces else registry.load)(asked.lora_name, asked.lora_path)
            return f"Success: LoRA adapter '{asked.lora_name}' added successfully."

        return _answer(work)

    @made.post("/v1/unload_lora_adapter")
    def unload_adapter(asked: AdapterUnload) -> Response:
        """Unload a prompt as tools unload a LoRA adapter from vLLM."""

        def work() -> str:
            return f"Success: LoRA adapter '{registry.unload(asked.lora_name).name}' removed successfully."

        return _answer(work)

    return made


def describe(registry: Registry, served: Served) -> dict[str, Json]:
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
        "slots": prompt.slots,
        "method": prompt.method,
        "scores": {name: value for name, value in prompt.scores.items() if math.isfinite(value)},
    }


def error_body(message: str, *, type_: str, code: str, param: str | None = None) -> dict[str, Json]:
    """Return an error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": type_, "code": code, "param": param}}


def _answer(work: Callable[[], dict[str, Json] | str], *, status: int = 200) -> Response:
    try:
        done = work()
    except PTuningError as error:
        number, type_, code = ANSWERS.get(type(error), UNFIT)
        param = error.param if isinstance(error, RefusedNameError) else None
        return JSONResponse(error_body(str(error), type_=type_, code=code, param=param), number)
    return PlainTextResponse(done, status) if isinstance(done, str) else JSONResponse(done, status)


def _failed(failures: Any) -> list[Json]:
    return [{"id": name, "message": message} for name, message in failures.items()]
