"""ASGI middleware before all routes: request id, host, API key, body limits, security headers, metrics."""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders

from ptuning.serve.http.errors import ApiError, ClientGoneError, as_api_error
from ptuning.serve.http.metrics import CLIENT_GONE, UNKNOWN
from ptuning.serve.http.service import Service

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/health", "/ready", "/version", "/")
STATIC = "/static/"
METRICS = "/metrics"  # also served while the service drains
ADMIN = re.compile(r"/v1/prompts(/.*)?|/v1/(un)?load_lora_adapter|/metrics")
# Routes that use the model: a full queue refuses them before the body is parsed.
ASKING = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/predict", "/v1/classify", "/classify"})
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# JSON without the brackets outside of strings.
NO_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[^][{}]+', re.DOTALL)
MAX_DEPTH = 32  # nested lists and objects in a body
# A body that is too large is read and dropped up to this multiple of the limit, so that the client gets its answer.
READ_ON = 4
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Middleware:
    """Checks a request, passes it on, and answers any error."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"
        stats = self.service.metrics.begin(request_id, scope["method"])
        scope.setdefault("state", {}).update(request_id=request_id, stats=stats)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                stats.status = message["status"]
                response_headers = MutableHeaders(scope=message)
                for name, value in {**HEADERS, "X-Request-Id": request_id}.items():
                    response_headers.setdefault(name, value)
                if not path.startswith(STATIC):
                    response_headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            self._check_access(path, headers)
            if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                receive = await self._with_body(headers, receive)
            if scope["method"] == "POST" and path in ASKING:
                self.service.engine.check_room()
            await self.app(scope, receive, send_with_headers)
        except ClientGoneError:
            stats.status = CLIENT_GONE
        except Exception as error:  # noqa: BLE001 - the client gets an answer to any error
            api_error = as_api_error(error, request_id=request_id, param=scope["state"].get("param"))
            stats.error = api_error.code
            if not stats.status:
                await api_error.to_response()(scope, receive, send_with_headers)
        finally:
            unrouted: str = path if path in ASKING else UNKNOWN
            self.service.metrics.end(stats, route=getattr(scope.get("route"), "path", unrouted))

    def _check_access(self, path: str, headers: Headers) -> None:
        """Check host, key and phase."""
        settings, phase = self.service.settings, self.service.phase
        if settings.hosts is not None and _host_name(headers.get("host", "")) not in settings.hosts:
            raise ApiError(403, "this server answers to its own names only (header Host)", code="wrong_host")
        if path in OPEN or path.startswith(STATIC):
            return
        needs_admin = ADMIN.fullmatch(path) is not None and settings.admin_keys is not None
        if needs_admin or settings.keys is not None:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            key = key.strip()
            if scheme.lower() != "bearer" or not key:
                raise ApiError(401, "send a key: Authorization: Bearer KEY", code="missing_api_key")
            is_admin = settings.admin_keys is not None and settings.admin_keys.hold(key)
            if not is_admin and not (settings.keys is not None and settings.keys.hold(key)):
                raise ApiError(401, "the key is not one of this server's", code="invalid_api_key")
            if needs_admin and not is_admin:
                raise ApiError(403, "this is for operators; the key is a user's", code="admin_only")
        if phase != "serving" and path != METRICS:
            message = f"the service is {phase}; ask again later"
            raise ApiError(503, message, code="not_serving", headers={"Retry-After": "5"})

    async def _with_body(self, headers: Headers, receive: Receive) -> Receive:
        """Read and check the body; return a ``receive`` that replays it."""
        settings = self.service.settings
        try:
            body = await asyncio.wait_for(_read(receive, settings.body_bytes), settings.body_seconds)
        except asyncio.TimeoutError:
            message = "the body of the request did not arrive in time"
            raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None
        if body:
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                message = "send JSON, with the header Content-Type: application/json"
                raise ApiError(415, message, code="unsupported_type")
            if headers.get("content-encoding", "identity").lower() != "identity":
                raise ApiError(415, "send the body without Content-Encoding", code="unsupported_type")
            # JSON parsers recurse, so nesting is checked before.
            is_suspect = body.count(b"[") + body.count(b"{") > MAX_DEPTH
            if is_suspect and await asyncio.to_thread(_depth, body) > MAX_DEPTH:
                message = f"lists and objects are nested more than {MAX_DEPTH} deep"
                raise ApiError(400, message, code="invalid_json")
        messages: list[Message] = [{"type": "http.request", "body": body}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return replay


async def _read(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    while more and size <= READ_ON * limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size <= limit:
            parts.append(part)
    if size > limit:
        headers = {"Connection": "close"} if more else None
        raise ApiError(413, f"the body of a request has at most {limit:,} bytes", code="too_large", headers=headers)
    return b"".join(parts)


def _depth(body: bytes) -> int:
    brackets = NO_BRACKETS.sub(b"", body)
    return max(itertools.accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0)


def _host_name(host: str) -> str:
    """Return the name in a header Host, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
