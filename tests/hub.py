"""A stand-in for the hub's HTTP routes: a model in versions, behind an access token or silent."""

import base64
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
        folder = self.commits[commit]
        listed = [
            {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": _digest(file)}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        ]
        return 200, {}, json.dumps(listed).encode()

    def take(self, path: str, token: str | None, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Make a repository, or a commit in the folder of the main branch; return as :meth:`answer`."""
        if self.token is not None and token != f"Bearer {self.token}":
            return 401, {"X-Error-Message": "Invalid username or password."}, b""
        if path == "/api/repos/create":
            return 200, {}, json.dumps({"url": f"{self.url}/{self.repo}", "id": self.repo}).encode()
        if path == "/api/validate-yaml":
            return 200, {}, json.dumps({"errors": [], "warnings": []}).encode()
        if "/preupload/" in path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return 200, {}, json.dumps({"files": files}).encode()
        if "/commit/" not in path:
            return 404, {}, b""
        folder = self.commits[self.refs["main"]]
        for line in body.decode().splitlines():
            found = json.loads(line)
            if found["key"] == "file":
                target = folder / found["value"]["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(found["value"]["content"]))
        commit = {"commitUrl": f"{self.url}/{self.repo}/commit/{self.refs['main']}", "commitOid": self.refs["main"]}
        return 200, {}, json.dumps({"success": True, "pullRequestUrl": None, **commit}).encode()


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
            self.reply(*hub.answer(path, self.headers.get("authorization")))

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.seen.append(path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.reply(*hub.take(path, self.headers.get("authorization"), body))

        def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
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
