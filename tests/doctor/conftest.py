"""What the tests of the doctor share: a stand-in for a server of language models, and prompts with a fault each."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.data.questions import Questions
from ptuning.doctor import Check
from ptuning.files import sha256
from ptuning.names import MANIFEST_FILE, VECTORS_FILE, VECTORS_KEY
from ptuning.prompt.inputs import InferenceInputs, typed_fields
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import BackboneId
from ptuning.template.labels import LabelWords
from ptuning.template.language import Template
from tests.conftest import WARM, learned

# What a page answers: status and JSON, or raw bytes with headers of its own.
Page = tuple[int, Any] | tuple[int, bytes, dict[str, str]]


@dataclass
class StandIn:
    """A server: ``pages`` has what each "GET /path" answers, or a function of the request that returns it. With ``key``
    all but the health ask for one. Set ``slow`` to a path whose answer comes byte by byte, and never whole.
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
        found = self.pages.get(page, (404, {"error": {"message": "Not Found"}}))
        return found(json.loads(body)) if callable(found) else found


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    """Serve a stand-in on this machine."""
    one = StandIn({"GET /health": (200, None), "GET /ready": (200, {"status": "ready"})})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = one.answer(f"{self.command} {self.path}", self.headers.get("Authorization"), body)
            data = found[1] if isinstance(found[1], bytes) else json.dumps(found[1]).encode()
            self.send_response(found[0])
            for name, value in (found[2] if len(found) == 3 else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if one.slow == self.path:
                while not one.released.wait(0.01):
                    self.wfile.write(b" ")
                return
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
    one.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield one
    finally:
        one.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def serves(one: StandIn, backbone: Backbone, prompts: Mapping[str, Prompt], **changed: Any) -> None:
    """Let a stand-in answer as `ptuning serve` does, with prompts of a backbone; ``changed`` replaces parts of its
    first prediction.
    """
    model = PromptModel(backbone)

    def predict(asked: Any) -> Page:
        prompt = prompts[asked["model"]]
        rows = [one if isinstance(one, dict) else {typed_fields(prompt)[0]: one} for one in asked["records"]]
        questions = [InferenceInputs.typed(prompt, row, where="here").questions[0] for row in rows]
        found = model.predict(Questions(questions), prompt, top_k=asked["top_k"])
        shown = [one.to_json() for one in found]
        return 200, {"predictions": [{**shown[0], **changed}, *shown[1:]]}

    listed = [{"id": name, "object": "model", "owned_by": "ptuning"} for name in prompts]
    one.pages |= {
        "GET /version": (200, {"version": "0.1.0"}),
        "GET /v1/models": (200, {"object": "list", "data": listed}),
        "POST /v1/predict": predict,
    }


def named(checks: list[Check]) -> dict[str, Check]:
    """Return checks by their names, which differ."""
    found = {one.name: one for one in checks}
    assert len(found) == len(checks), [one.name for one in checks]
    for one in checks:
        assert (one.remedy == "") == (one.status == "ok"), one
        assert "\n" not in one.detail + one.remedy
    return found


def prompts_of(backbone: Backbone) -> dict[str, Prompt]:
    """Return two sound prompts: one that writes, one with labels."""
    words = LabelWords.parse("positive=great,good; negative=terrible")
    base = learned(backbone, "{text} [P:It was] [Y]")
    labels = Prompt(base.template, base.slot_vectors, base.backbone, words, method="test")
    return {"facts": learned(backbone, WARM), "moods": labels}


def _truncated(folder: Path, _: Backbone) -> None:
    file = folder / VECTORS_FILE
    file.write_bytes(file.read_bytes()[:-7])


def _changed(folder: Path, _: Backbone) -> None:
    file = folder / VECTORS_FILE
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(bytes(data))


def _not_finite(folder: Path, _: Backbone) -> None:
    file = folder / VECTORS_FILE
    vectors = safetensors.torch.load_file(file)[VECTORS_KEY]
    vectors[1, 3] = torch.nan
    file.write_bytes(safetensors.torch.save({VECTORS_KEY: vectors}, {"format": "pt"}))
    _rewrite(folder, vectors_sha256=sha256(file.read_bytes()))


def _no_template(folder: Path, _: Backbone) -> None:
    _rewrite(folder, template="[P*3 [X] [Y]")


def _other_backbone(folder: Path, _: Backbone) -> None:
    other: dict[str, Any] = {
        "name": "other/model",
        "revision": None,
        "fingerprint": "0" * 16 + "-" + "1" * 16,
        "loaded": {},
    }
    _rewrite(folder, backbone=other)


def _other_slots(folder: Path, backbone: Backbone) -> None:
    """As if words that slots start at were one token more to this tokenizer."""
    vectors = torch.ones(2, backbone.width)
    Prompt(Template.parse(WARM), vectors, BackboneId.of(backbone), method="test").save(folder, overwrite=True)


def _unknown_words(folder: Path, _: Backbone) -> None:
    _rewrite(folder, label_words={"good": ["great"], "bad": [" great "]})


def _rewrite(folder: Path, **changed: Any) -> None:
    file = folder / MANIFEST_FILE
    found = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**found, **changed}), encoding="utf-8")


# A fault -> what makes it in a sound prompt's folder, the check that finds it, and what that says.
FAULTS: Mapping[str, tuple[Callable[[Path, Backbone], None], str, str]] = {
    "cut off": (_truncated, "files", "its sha256 is not the one in prompt.json"),
    "changed": (_changed, "files", "its sha256 is not the one in prompt.json"),
    "NaN": (_not_finite, "vectors", "NaN or infinity in slot 2 of"),
    "a template that cannot be read": (_no_template, "prompt.json", "is damaged"),
    "another backbone": (_other_backbone, "backbone", "trained on other/model (0000000000000000-1111111111111111)"),
    "slots of another tokenizer": (_other_slots, "tokenizer", "slots with this tokenizer, and the prompt has 2"),
    "label words": (_unknown_words, "prompt.json", "the word 'great' is given twice"),
}
