"""Errors in OpenAI's format, ``{"error": {"message", "type", "code", "param"}}``, and JSON responses."""

from __future__ import annotations

import json
import logging
import math
import re
import traceback
from collections.abc import Mapping

from starlette.responses import Response

from ptuning.errors import (
    BackboneError,
    FileError,
    PromptError,
    PTuningError,
    RecordError,
    TemplateError,
    cut,
)
from ptuning.serve.engine.job import CancelledError, QueueFullError, StoppedError
from ptuning.serve.registry import ConflictError, RefusedNameError, UnknownPromptError
from ptuning.template.encode import TooLongError

logger = logging.getLogger(__name__)

MAX_MESSAGE = 2000
RETRY_SECONDS = (1, 60)
# The folders of a path of this machine, which no client needs to know.
PATH = re.compile(r"(?<![\w./:\\])(?:[A-Za-z]:)?(?:[\\/][^\s\\/'\"`,;:()]+)+(?=[\\/])[\\/]")
# Advice about a command-line option at the end of a message: a client has none.
OPTION = re.compile(r"[.;] [^.;]*\s--[a-z]{2,}[^.;]*$")
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# Error class -> status and code; the first that fits counts.
CODES: tuple[tuple[type[Exception], int, str], ...] = (
    (UnknownPromptError, 404, "model_not_found"),
    (ConflictError, 409, "conflict"),
    (RefusedNameError, 400, "name_not_allowed"),
    (StoppedError, 503, "not_serving"),
    (CancelledError, 503, "cancelled"),
    (TooLongError, 400, "context_length_exceeded"),
    (PromptError, 400, "prompt_unfit"),
    (RecordError, 400, "invalid_record"),
    (TemplateError, 400, "invalid_record"),
    (BackboneError, 400, "unsupported"),
    (PTuningError, 400, "invalid_value"),
)


class ApiError(Exception):
    """An error with its HTTP status; ``param`` names the wrong field of the request."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, object]:
        """Return the error as the body of a response holds it."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = cut(without_paths(str(self)), MAX_MESSAGE)
        return {"message": message, "type": kind, "code": self.code, "param": self.param}

    def to_response(self) -> JsonResponse:
        """Return the error as a response."""
        headers = {"WWW-Authenticate": "Bearer", **self.headers} if self.status == 401 else self.headers
        return JsonResponse({"error": self.to_json()}, status_code=self.status, headers=headers)


class ClientGoneError(Exception):
    """The client disconnected before the answer was complete."""


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """Return the error of a request whose field ``param`` is wrong."""
    return ApiError(400, message, code=code, param=param)


def as_api_error(error: Exception, *, request_id: str, param: str | None = None) -> ApiError:
    """Convert any error for the client. A fault of the service is logged under the request's id, and the client gets
    only the id.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        low, high = RETRY_SECONDS
        headers = {"Retry-After": str(min(max(math.ceil(error.retry_after), low), high))}
        return ApiError(429, str(error), code="rate_limit_exceeded", headers=headers)
    for kind, status, code in CODES:
        if isinstance(error, kind) and not isinstance(error, FileError):  # which is a fault of the service
            field = error.param if isinstance(error, RefusedNameError) else "model" if status == 404 else param
            message = OPTION.sub(".", str(error)) if kind is RecordError else str(error)
            return ApiError(status, message, code=code, param=field)
    # Texts of requests may be in the message, so nothing in it may begin a line of the log.
    frames, what = "".join(traceback.format_tb(error.__traceback__)), cut(ascii(str(error)), MAX_MESSAGE)
    logger.error("request %s failed: %s: %s\n%s", request_id, type(error).__name__, what, frames)
    message = f"the service failed at this request; its log says why, under the id {request_id}"
    return ApiError(500, message, code="internal_error")


def without_paths(text: str) -> str:
    """Return a message with only the last part of each path in it."""
    return PATH.sub("", text)


class JsonResponse(Response):
    """JSON; NaN in it is an error, and lone surrogates become question marks."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Return the bytes."""
        return as_json(content)


def as_json(content: object) -> bytes:
    """Return JSON; a ValueError if something in it is not a number."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")
