"""The ASGI application: all routes, the browser page, and errors in one format."""

import http
import logging
from importlib.resources import files

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ptuning.errors import cut
from ptuning.provenance import VERSION
from ptuning.serve.engine.engine import Engine
from ptuning.serve.http import admin, routes
from ptuning.serve.http.errors import ApiError
from ptuning.serve.http.metrics import Metrics, stats_of
from ptuning.serve.http.middleware import Middleware
from ptuning.serve.http.service import Service, Settings
from ptuning.serve.registry import Registry

CODES = {404: "not_found", 405: "method_not_allowed"}
VALIDATION_CODES = {"missing": "missing_field", "extra_forbidden": "unknown_field"}
# Statuses of any route with a body, for /openapi.json.
STATUSES: dict[int | str, dict[str, object]] = {
    code: {"description": http.HTTPStatus(code).phrase} for code in (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)
}
# Files of the browser page by the last part of their address.
PAGE_TYPES = {"/": "text/html", "page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
PAGE_FILES = {
    name: (files("ptuning.serve.http") / "page" / name.replace("/", "index.html")).read_bytes() for name in PAGE_TYPES
}

page = APIRouter(include_in_schema=False)


def create_app(
    engine: Engine, registry: Registry, settings: Settings | None = None, *, log: logging.Logger | None = None
) -> FastAPI:
    """Return the service over HTTP; its :class:`Service` is ``app.state.service``.

    Args:
        engine: Answers rows; it must have been started.
        registry: The prompts by name.
        settings: Keys and limits.
        log: The access log of :func:`~ptuning.serve.http.metrics.access_log`; None for no log.
    """
    app = FastAPI(
        title="ptuning", version=VERSION, docs_url=None, redoc_url=None, openapi_url="/openapi.json",
        responses=STATUSES, redirect_slashes=False,
    )  # fmt: skip
    settings = settings or Settings()
    app.state.service = service = Service(engine, registry, settings, Metrics(registry, engine, log))
    app.include_router(routes.router)
    app.include_router(page)
    if settings.admin_keys is not None:
        app.include_router(admin.router)
    if settings.admin_keys is not None or settings.open_metrics:
        app.include_router(admin.metrics_router)
    app.add_middleware(Middleware, service=service)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _routing_error)
    return app


@page.api_route("/", methods=["GET", "HEAD"])
@page.api_route("/static/{name}", methods=["GET", "HEAD"])
async def page_file(request: Request) -> Response:
    """Return the browser page, or a file of it."""
    name = request.path_params.get("name", "/")
    if name not in PAGE_FILES:
        raise HTTPException(404, "the page has no such file")
    # Files change with the version and their names do not, so browsers revalidate them.
    headers = {"Content-Type": f"{PAGE_TYPES[name]}; charset=utf-8", "Cache-Control": "no-cache"}
    return Response(PAGE_FILES[name], headers=headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    """Answer a body that is not JSON, or whose fields have wrong types: the first of them is named."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    kind = first["type"]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be read")
        return _error_response(request, ApiError(400, f"the body is not JSON: {reason}", code="invalid_json"))
    # The field as records[3].x, without the union members that pydantic adds.
    field = ""
    for at, part in enumerate(first["loc"][1:]):
        if isinstance(part, int):
            field += f"[{part}]"
        elif at == 0:
            field = part if part.isprintable() and part.isascii() else ascii(part)[1:-1]
        elif part.isidentifier() and part not in ("str", "int", "dict", "list", "float", "bool"):
            field += f".{part}"
    field = cut(field, 100)
    message = "the field is missing" if kind == "missing" else first["msg"].removeprefix("Value error, ")
    code = VALIDATION_CODES.get(kind, "invalid_value")
    message = f"'{field or 'the body'}': {message}"
    return _error_response(request, ApiError(400, message, code=code, param=field or None))


async def _routing_error(request: Request, error: Exception) -> Response:
    """Answer a request that no route takes."""
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code, "invalid_request")
    return _error_response(request, ApiError(error.status_code, error.detail, code=code, headers=error.headers))


def _error_response(request: Request, error: ApiError) -> Response:
    stats_of(request).error = error.code
    return error.to_response()
