"""A stand-in for a server of language models, and prompts with a fault each."""

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.data.questions import Questions
from ptuning.doctor import Check
from ptuning.names import MANIFEST_FILE, VECTORS_FILE
from ptuning.prompt.inputs import InferenceInputs, typed_fields
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import BackboneId
from ptuning.template.labels import LabelWords
from ptuning.template.language import Template
from tests.conftest import WARM, learned

# Answer of a page: status and JSON, or raw bytes with headers of its own.
Page = tuple[int, Any] | tuple[int, bytes, dict[str, str]]


@dataclass
class StandIn:
    """A server: ``pages`` has what each "GET /path" answers, or a function of the request that returns it. With ``key``
    all but the health ask for one. Set ``slow`` to a path that is not answered while it is set.
    """

    pages: dict[str, Page | Callable[[Any], Page]]
    url: str = ""
    key: str | None = None
    slow: str | None = None
    seen: list[tuple[str, str | None]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def answer(self, page: str, key: str | None, body: bytes) -> Page:
        """Return what is answered."""
        self.seen.append((page, key))
        if self.key is not None and page not in ("GET /health", "GET /ready") and key != f"Bearer {self.key}":
            return 401, {"error": {"message": "no such key", "type": "invalid_request_error"}}
        answer = self.pages.get(page, (404, {"error": {"message": "Not Found"}}))
        return answer(json.loads(body)) if callable(answer) else answer


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    """Serve a stand-in on this machine."""
    server_pages = StandIn({"GET /health": (200, None), "GET /ready": (200, {"status": "ready"})})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer = server_pages.answer(f"{self.command} {self.path}", self.headers.get("Authorization"), body)
            data = answer[1] if isinstance(answer[1], bytes) else json.dumps(answer[1]).encode()
            self.send_response(answer[0])
            for name, value in (answer[2] if len(answer) == 3 else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if server_pages.slow == self.path:
                server_pages.released.wait()
            self.wfile.write(data)

        do_POST = do_GET  # noqa: N815 - the name that the server looks for

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Say nothing of clients that hang up."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    server_pages.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield server_pages
    finally:
        server_pages.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def serves(server: StandIn, backbone: Backbone, prompts: Mapping[str, Prompt], **changed: Any) -> None:
    """Let a stand-in answer as `ptuning serve` does, with prompts of a backbone; ``changed`` replaces parts of its
    first prediction.
    """
    model = PromptModel(backbone)

    def predict(body: Any) -> Page:
        prompt = prompts[body["model"]]
        rows = [row if isinstance(row, dict) else {typed_fields(prompt)[0]: row} for row in body["records"]]
        questions = [InferenceInputs.typed(prompt, row, where="here").questions[0] for row in rows]
        predictions = model.predict(Questions(questions), prompt, top_k=body["top_k"])
        first, *others = [prediction.to_json() for prediction in predictions]
        return 200, {"predictions": [{**first, **changed}, *others]}

    listed = [{"id": name, "object": "model", "owned_by": "ptuning"} for name in prompts]
    server.pages |= {
        "GET /version": (200, {"version": "0.1.0"}),
        "GET /v1/models": (200, {"object": "list", "data": listed}),
        "POST /v1/predict": predict,
    }


def named(checks: list[Check]) -> dict[str, Check]:
    """Return checks by their names, which differ."""
    by_name = {check.name: check for check in checks}
    assert len(by_name) == len(checks), [check.name for check in checks]
    for check in checks:
        assert (check.remedy == "") == (check.status == "ok"), check
        assert "\n" not in check.detail + check.remedy
    return by_name


def prompts_of(backbone: Backbone) -> dict[str, Prompt]:
    """Return two sound prompts: one that writes, one with labels."""
    words = LabelWords.parse("positive=great,good; negative=terrible")
    base = learned(backbone, "{text} [P:It was] [Y]")
    labels = Prompt(base.template, base.slot_vectors, base.backbone, words, method="test")
    return {"facts": learned(backbone, WARM), "moods": labels}


def rewrite(folder: Path, **changed: Any) -> None:
    """Change values of a prompt's manifest."""
    file = folder / MANIFEST_FILE
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changed}), encoding="utf-8")


OTHER: dict[str, Any] = {
    "name": "other/model",
    "revision": None,
    "fingerprint": "0000000000000000-1111111111111111",
    "loaded": {},
}


def _fewer_vectors(folder: Path, backbone: Backbone) -> None:
    """As if words that slots start at were one token more to this tokenizer."""
    vectors = torch.ones(2, backbone.width)
    Prompt(Template.parse(WARM), vectors, BackboneId.of(backbone), method="test").save(folder, overwrite=True)


# A fault -> a function that makes it in a sound prompt's folder, the check that finds it, and a fact in its detail.
FAULTS: Mapping[str, tuple[Callable[[Path, Backbone], None], str, str]] = {
    "cut off": (lambda folder, _: os.truncate(folder / VECTORS_FILE, 99), "files", "sha256"),
    "manifest": (lambda folder, _: rewrite(folder, template="[P*3 [X] [Y]"), "prompt.json", "is damaged"),
    "backbone": (lambda folder, _: rewrite(folder, backbone=OTHER), "backbone", "0000000000000000-1111111111111111"),
    "slots of another tokenizer": (_fewer_vectors, "tokenizer", "the prompt has 2"),
}
