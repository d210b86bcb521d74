"""What every request passes first: its id, who may come in, how large it may be, and how it ends."""

from __future__ import annotations

import asyncio
import re
import secrets
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from ptuning.serve.http.errors import ApiError, ClientGoneError, api_error, error_response
from ptuning.serve.http.service import Service
from ptuning.serve.http.watch import CLIENT_GONE, UNKNOWN

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/health", "/ready", "/version", "/")
OPEN_FOLDER = "/static/"
METRICS = "/metrics"  # also told while the service loads or ends
ADMIN = re.compile(r"/v1/prompts(/.*)?|/v1/(un)?load_lora_adapter|/metrics")
# Whoever asks the model needs room in the queue. A full one refuses before anything of the body is looked at, which
# would take time from the answers that run.
ASKING = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/predict", "/v1/classify", "/classify"})
GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Words in quotes, and brackets outside of them.
BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)
# A body that is too large is read on and dropped up to so many times the limit, so that the client gets its answer.
READ_ON = 4
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Front:
    """The ASGI middleware in front of all routes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with an error."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if GIVEN_ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"
        seen = self.service.watch.begin(request_id, scope["method"])
        scope.setdefault("state", {}).update(request_id=request_id, seen=seen)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                own = MutableHeaders(scope=message)
                for name, value in {**HEADERS, "X-Request-Id": request_id}.items():
                    own.setdefault(name, value)
                if not scope["path"].startswith(OPEN_FOLDER):
                    own.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            self._check(scope["path"], headers)
            body = await _Body(self.service, headers, receive).read(scope["method"])
            if scope["method"] == "POST" and scope["path"] in ASKING:
                self.service.engine.check_room()
            await self.app(scope, body, sending)
        except ClientGoneError:
            seen.status = CLIENT_GONE
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the client gets an answer
            found = api_error(error, request_id=request_id, param=scope["state"].get("param"))
            seen.refused(found.code)
            if not seen.status:
                await error_response(found)(scope, receive, sending)
        finally:
            refused: str = scope["path"] if scope["path"] in ASKING else UNKNOWN  # before any route was looked for
            self.service.watch.end(seen, route=getattr(scope.get("route"), "path", refused))

    def _check(self, path: str, headers: Headers) -> None:
        """Raise an ApiError if a request may not come in."""
        hosts = self.service.settings.hosts
        if hosts is not None and _name_of(headers.get("host", "")) not in hosts:
            raise ApiError(403, "this server answers to its own names alone (header Host)", code="wrong_host")
        if path in OPEN or path.startswith(OPEN_FOLDER):
            return
        self._check_key(path, headers.get("authorization", ""))
        if self.service.phase != "serving" and path != METRICS:
            raise ApiError(
                503,
                f"the service is {self.service.phase}; ask again later",
                code="not_serving",
                headers={"Retry-After": "5"},
            )

    def _check_key(self, path: str, authorization: str) -> None:
        users, admins = self.service.settings.keys, self.service.settings.admin_keys
        is_admin = ADMIN.fullmatch(path) is not None and admins is not None
        if not is_admin and users is None:
            return
        scheme, _, key = authorization.partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise ApiError(401, "send a key: Authorization: Bearer KEY", code="missing_api_key")
        as_admin, as_user = admins is not None and admins.hold(key), users is not None and users.hold(key)
        if is_admin and as_user and not as_admin:
            raise ApiError(403, "this is for operators; the key is a user's", code="admin_only")
        if not (as_admin or (as_user and not is_admin)):
            raise ApiError(401, "the key is not one of this server's", code="invalid_api_key")


def _name_of(host: str) -> str:
    """Return the name in a header Host without its port."""
    return host.rpartition("]")[0].lstrip("[").lower() if host.startswith("[") else host.partition(":")[0].lower()


class _Body:
    """Reads a request's body within limits, before anything of it is looked at."""

    def __init__(self, service: Service, headers: Headers, receive: Receive) -> None:
        self._settings = service.settings
        self._headers = headers
        self._receive = receive

    async def read(self, method: str) -> Receive:
        """Return what gives the body, and then whether the client has gone away."""
        if method in ("GET", "HEAD", "OPTIONS"):
            return self._receive
        length = self._headers.get("content-length", "")
        is_large = length.isdecimal() and (len(length) > 15 or int(length) > self._settings.body_bytes)
        try:
            body = await asyncio.wait_for(self._all(is_large=is_large), self._settings.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError(
                408, "the body of the request did not come in time", code="timeout", headers={"Connection": "close"}
            ) from None
        if body:
            self._check_kind()
            await _check_depth(body, self._settings.depth)
        told = False

        async def replay() -> Message:
            nonlocal told
            if told:
                return await self._receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay

    async def _all(self, *, is_large: bool) -> bytes:
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            if size > READ_ON * self._settings.body_bytes:
                raise self._too_large(closes=True)
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            is_large = is_large or size > self._settings.body_bytes
            if is_large:
                parts.clear()
            else:
                parts.append(part)
        if is_large:
            raise self._too_large(closes=False)
        return b"".join(parts)

    def _too_large(self, *, closes: bool) -> ApiError:
        headers = {"Connection": "close"} if closes else {}
        most = self._settings.body_bytes
        return ApiError(413, f"the body of a request has at most {most:,} bytes", code="too_large", headers=headers)

    def _check_kind(self) -> None:
        kind = self._headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "send JSON, with the header Content-Type: application/json", code="unsupported_type")
        if self._headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "send the body as it is, without Content-Encoding", code="unsupported_type")


async def _check_depth(body: bytes, most: int) -> None:
    """Raise an ApiError if lists and objects stand too deep in each other: whoever reads JSON goes down there."""
    if body.count(b"[") + body.count(b"{") <= most:
        return
    if not await asyncio.to_thread(_is_flat, body, most):
        raise ApiError(400, f"lists and objects stand more than {most} deep in the body", code="invalid_json")


def _is_flat(body: bytes, most: int) -> bool:
    depth = 0
    for found in BRACKETS.finditer(body):
        sign = found[0]
        if sign in (b"[", b"{"):
            depth += 1
            if depth > most:
                return False
        elif sign in (b"]", b"}"):
            depth -= 1
    return True
