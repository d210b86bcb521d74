"""Requests to a server, each with an end: of time, of size, and at a redirect."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from ptuning.errors import ConfigError
from ptuning.files import Json, parse_json, read_bytes

# How long a request may take in all, and one that computes answers.
SECONDS, LONG_SECONDS = 10.0, 120.0
MOST_BYTES = 2**22
MOST_KEY_BYTES = 2**16
EXAMPLE = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class RemoteAnswer:
    """What a server answers: the status, 0 if there is none, and the JSON; or a ``problem`` that says why there is
    none.
    """

    status: int
    value: Json = None
    problem: str = ""
    seconds: float = math.nan

    @property
    def is_ok(self) -> bool:
        """Whether the server did what it was asked for, and answered with JSON."""
        return self.status == 200 and not self.problem

    @property
    def told(self) -> str:
        """What is wrong, in words: the server's own message if it has one."""
        if self.status in (0, 200):
            return self.problem
        error = self.value.get("error") if isinstance(self.value, Mapping) else None
        message = error.get("message") if isinstance(error, Mapping) else None
        return f"status {self.status}" + (f": {message}" if isinstance(message, str) else f" {self.problem}".rstrip())


@dataclass(frozen=True)
class Remote:
    """A server by its URL, with the key that it asks for. Proxies are not used, and redirects not followed."""

    host: str
    port: int
    base: str = ""
    is_secure: bool = False
    key: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, url: str, key: str | None = None) -> Remote:
        """Read a URL; a ConfigError if it is none, or holds a password."""
        wrong = ConfigError(f"the URL of a server (--url) is such as {EXAMPLE}, not '{url}'")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise wrong from error
        if parts.username is not None or parts.password is not None:
            raise ConfigError("the URL (--url) holds a password; keys are read from a file (--api-key-file)")
        host = parts.hostname or ""
        plain = (
            url.isprintable()
            and re.fullmatch(r"[\w.:%-]+", host, re.ASCII)
            and re.fullmatch(r"[\w./~-]*", parts.path, re.ASCII)
        )
        if parts.scheme not in ("http", "https") or not plain or parts.query or parts.fragment or port == 0:
            raise wrong
        is_secure = parts.scheme == "https"
        # The address that clients of OpenAI's are given ends in /v1.
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(host, port or (443 if is_secure else 80), base, is_secure, key)

    def get(self, path: str) -> RemoteAnswer:
        """Read a page."""
        return self._ask("GET", path, None, SECONDS)

    def post(self, path: str, body: Mapping[str, Json]) -> RemoteAnswer:
        """Ask for what is computed."""
        return self._ask("POST", path, json.dumps(body).encode(), LONG_SECONDS)

    def _ask(self, method: str, path: str, body: bytes | None, seconds: float) -> RemoteAnswer:
        kind = http.client.HTTPSConnection if self.is_secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=seconds)
        headers = {"Accept": "application/json", "Connection": "close"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key is not None else {}
        headers |= {"Content-Type": "application/json"} if body is not None else {}
        late, began = threading.Event(), time.perf_counter()
        try:
            connection.connect()
            with _ended_after(seconds, connection.sock, late):
                connection.request(method, self.base + path, body, headers)
                answer = connection.getresponse()
                data = answer.read(MOST_BYTES + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            is_late = late.is_set() or isinstance(error, TimeoutError)
            return RemoteAnswer(0, problem=f"no whole answer in {seconds:g} s" if is_late else _why(error))
        finally:
            connection.close()
        if late.is_set():
            return RemoteAnswer(0, problem=f"no whole answer in {seconds:g} s")
        return _read(answer, data, seconds=time.perf_counter() - began)


def read_key(file: Path) -> str:
    """Read the first key of a file such as `ptuning serve` takes, which may have comments and more keys.
    A FileError if it cannot be read; a ConfigError if that is no key.
    """
    lines = map(str.strip, read_bytes(file, at_most=MOST_KEY_BYTES).decode("utf-8", "replace").splitlines())
    key = next((line for line in lines if line and not line.startswith("#")), "")
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{file} holds no key: the first line that is no comment is one, of letters and digits")
    return key


@contextlib.contextmanager
def _ended_after(seconds: float, connected: socket.socket, late: threading.Event) -> Iterator[None]:
    """End a connection after some time, whatever it waits for: the timeout of a socket begins anew with every byte."""

    def end() -> None:
        late.set()
        with contextlib.suppress(OSError):
            connected.shutdown(socket.SHUT_RDWR)

    clock = threading.Timer(seconds, end)
    clock.daemon = True
    clock.start()
    try:
        yield
    finally:
        clock.cancel()


def _why(error: Exception) -> str:
    """Return why there is no answer, in a few words."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return f"no answer: {text}"


def _read(answer: http.client.HTTPResponse, data: bytes, *, seconds: float) -> RemoteAnswer:
    status = answer.status
    if 300 <= status < 400:
        return RemoteAnswer(status, problem=f"leads to {answer.headers.get('Location')}, which is not followed")
    if len(data) > MOST_BYTES:
        return RemoteAnswer(status, problem=f"an answer of more than {MOST_BYTES:,} bytes")
    if not data.strip():
        return RemoteAnswer(status, seconds=seconds)
    try:
        return RemoteAnswer(status, parse_json(data.decode("utf-8")), seconds=seconds)
    except ValueError:
        return RemoteAnswer(status, problem="and the answer is no JSON", seconds=seconds)
