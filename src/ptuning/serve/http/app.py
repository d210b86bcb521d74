"""The ASGI application: all routes behind one front, with errors in one shape."""

from __future__ import annotations

import http

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ptuning.errors import cut
from ptuning.provenance import VERSION
from ptuning.serve.http.errors import ApiError, error_response
from ptuning.serve.http.front import Front
from ptuning.serve.http.routes import about, admin, chat, classify, completions, page, predict, tokens
from ptuning.serve.http.service import Prompts, RowEngine, Service, Settings
from ptuning.serve.http.watch import Monitor, seen_of

CODES = {404: "not_found", 405: "method_not_allowed"}
# The statuses that any route with a body may answer with, for /openapi.json.
STATUSES: dict[int | str, dict[str, object]] = {
    code: {"description": http.HTTPStatus(code).phrase} for code in (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)
}


def create_app(
    engine: RowEngine, registry: Prompts, settings: Settings | None = None, *, watch: Monitor | None = None
) -> FastAPI:
    """Return the service over HTTP. ``app.state.service`` has its phase.

    Args:
        engine: Answers rows; it must have been started.
        registry: The prompts by name.
        settings: Keys and limits.
        watch: Is told of every request that is done.
    """
    app = FastAPI(
        title="ptuning", version=VERSION, docs_url=None, redoc_url=None, openapi_url="/openapi.json",
        responses=STATUSES, redirect_slashes=False,
    )  # fmt: skip
    service = Service(
        engine, registry, settings or Settings(), watch or Monitor(registry, status=lambda: engine.status)
    )
    app.state.service = service
    for part in (about, completions, chat, predict, classify, tokens, page):
        app.include_router(part.router)
    if service.settings.admin_keys is not None:
        app.include_router(admin.router)
    if service.settings.admin_keys is not None or service.settings.open_metrics:
        app.include_router(admin.metrics_router)
    app.add_middleware(Front, service=service)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    return app


async def _invalid(request: Request, error: Exception) -> Response:
    """Answer a body that is not JSON, or whose fields have wrong types: the first of them is named."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    first = found[0] if found else {}
    if first.get("type") == "json_invalid":
        why = first.get("ctx", {}).get("error", "it cannot be read")
        return _told(request, ApiError(400, f"the body is not JSON: {why}", code="invalid_json"))
    where = _place(first.get("loc", ()))
    what = (
        "the field is missing"
        if first.get("type") == "missing"
        else str(first.get("msg", "it is not valid")).removeprefix("Value error, ")
    )
    code = {"missing": "missing_field", "extra_forbidden": "unknown_field"}.get(str(first.get("type")), "invalid_value")
    return _told(request, ApiError(400, f"'{where or 'the body'}': {what}", code=code, param=where or None))


def _place(found: tuple[int | str, ...]) -> str:
    """Return the field that an error is about, as ``records[3].x``. Pydantic puts in which alternative of a type it has
    tried; those are not the request's words.
    """
    text = ""
    for at, part in enumerate(found[1:]):
        if isinstance(part, int):
            text += f"[{part}]"
        elif at == 0:
            text = part if part.isprintable() and part.isascii() else ascii(part)[1:-1]
        elif part.isidentifier() and part not in ("str", "int", "dict", "list", "float", "bool"):
            text += f".{part}"
    return cut(text, 100)


async def _refused(request: Request, error: Exception) -> Response:
    """Answer what no route takes."""
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code, "invalid_request")
    return _told(request, ApiError(error.status_code, str(error.detail), code=code, headers=error.headers))


def _told(request: Request, error: ApiError) -> Response:
    seen_of(request).refused(error.code)
    return error_response(error)
