"""A stand-in for the hub's HTTP routes: a model in versions, behind an access token or silent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest


@dataclass
class Hub:
    """One model ``repo`` with a folder for each commit; ``refs`` are branches and tags. Set ``silent`` to get no answer
    to what begins with it, and ``token`` to be asked for one. ``seen`` are the requests.
    """

    repo: str
    commits: Mapping[str, Path]
    refs: dict[str, str]
    url: str = ""
    token: str | None = None
    silent: str | None = None
    seen: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body."""
        if self.token is not None and token != f"Bearer {self.token}":
            return 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}, b""
        api, files = f"/api/models/{self.repo}", f"/{self.repo}/resolve/"
        if path.startswith(files):
            commit, _, name = path.removeprefix(files).partition("/")
            file = self.commits[commit] / name
            if not file.is_file():
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            return 200, {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": commit}, file.read_bytes()
        if not path.startswith(api):
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        asked = path.removeprefix(api).strip("/").split("/")
        revision = asked[1] if len(asked) > 1 else "main"
        commit = self.refs.get(revision, revision)
        if commit not in self.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if asked[0] != "tree":
            return 200, {}, json.dumps({"id": self.repo, "sha": commit, "siblings": []}).encode()
        listed = [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _digest(file)}
            for file in sorted(self.commits[commit].iterdir())
        ]
        return 200, {}, json.dumps(listed).encode()


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a hub on this machine, and point huggingface_hub to it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.seen.append(path)
            if hub.silent is not None and path.startswith(hub.silent):
                hub.released.wait(30)
                return
            status, headers, body = hub.answer(path, self.headers.get("authorization"))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - the name that the server looks for

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
