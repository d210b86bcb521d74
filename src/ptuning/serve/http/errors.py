"""Errors as the clients of OpenAI read them: ``{"error": {"message", "type", "code", "param"}}``."""

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
    ConfigError,
    FileError,
    LabelWordError,
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

MESSAGE_CHARACTERS = 2000
RETRY_SECONDS = (1, 60)
# A path of this machine: what stands in front of its last part is nobody's business.
PATH = re.compile(r"(?<![\w./:\\])(?:[A-Za-z]:)?(?:[\\/][^\s\\/'\"`,;:()]+)+(?=[\\/])[\\/]")
# Advice about an option of the command line, at the end of a message: a client has none.
OPTION = re.compile(r"[.;] [^.;]*\s--[a-z]{2,}[^.;]*$")
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# The first class that an error is of -> status and code.
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
    (LabelWordError, 400, "invalid_value"),
    (ConfigError, 400, "invalid_value"),
    (BackboneError, 400, "unsupported"),
)


class ApiError(Exception):
    """An error with its HTTP status. ``param`` names the field of the request that is wrong."""

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
        message = cut(without_paths(str(self)), MESSAGE_CHARACTERS)
        return {"message": message, "type": kind, "code": self.code, "param": self.param}


class ClientGoneError(Exception):
    """The client went away before the answer was there."""


def refused(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """Return the error of a request whose field ``param`` is wrong."""
    return ApiError(400, message, code=code, param=param)


def api_error(error: Exception, *, request_id: str, param: str | None = None) -> ApiError:
    """Return any error as one for the client. What is the service's own fault goes into the log, under the request's
    id, and the client is told the id alone.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        least, most = RETRY_SECONDS
        seconds = str(min(max(math.ceil(error.retry_after), least), most))
        return ApiError(429, str(error), code="rate_limit_exceeded", headers={"Retry-After": seconds})
    for kind, status, code in CODES:
        if isinstance(error, kind):
            where = error.param if isinstance(error, RefusedNameError) else "model" if status == 404 else param
            told = OPTION.sub(".", str(error)) if kind is RecordError else str(error)
            return ApiError(status, told, code=code, param=where)
    if isinstance(error, PTuningError) and not isinstance(error, FileError):
        return ApiError(400, str(error), code="invalid_value", param=param)
    log_fault(error, request_id)
    return ApiError(500, f"the service failed at this request; its log says why, under the id {request_id}",
                    code="internal_error")  # fmt: skip


def log_fault(error: Exception, request_id: str) -> None:
    """Log a fault of the service. Texts of requests may be in its message, so nothing in it can begin a line."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    what = cut(ascii(str(error)), MESSAGE_CHARACTERS)
    logger.error("request %s failed: %s: %s\n%s", request_id, type(error).__name__, what, frames)


def without_paths(text: str) -> str:
    """Return a message with the last part alone of each path in it."""
    return PATH.sub("", text)


class JsonResponse(Response):
    """A response of JSON. What is not a number is an error; half a character becomes a question mark."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Return the bytes."""
        return as_json(content)


def as_json(content: object) -> bytes:
    """Return JSON; a ValueError if something in it is not a number."""
    written = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return written.encode("utf-8", "replace")


def error_response(error: ApiError) -> JsonResponse:
    """Return an error as a response."""
    headers = dict(error.headers)
    if error.status == 401:
        headers.setdefault("WWW-Authenticate", "Bearer")
    return JsonResponse({"error": error.to_json()}, status_code=error.status, headers=headers)
