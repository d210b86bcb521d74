"""A stand-in for a vLLM server: the parts of its `/v1/completions` that the gateway asks for, on a tiny model.

Its answers have the shape of vllm 0.32: tokens named ``token_id:17``, a stream of ``data:`` lines, the likeliest 20.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone


class StandIn(ThreadingHTTPServer):
    """The server; ``asked`` are the bodies it got, ``fails`` the status it answers with instead, if any."""

    daemon_threads = True

    def __init__(self, backbone: Backbone, *, tells_ids: bool = True, max_model_len: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backbone, self.tells_ids, self.max_model_len = backbone, tells_ids, max_model_len
        self.lock = threading.Lock()
        self.asked: list[dict[str, Any]] = []
        self.fails: tuple[int, dict[str, str]] | None = None
        self.written = 0
        self.keys: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @torch.no_grad()
    def log_probs(self, embedded: Tensor) -> Tensor:
        """Return the log-probabilities behind each of (T, E) embeddings, (T, V)."""
        with self.lock:
            size = len(embedded)
            every = torch.arange(size)
            logits, _ = self.backbone.run(
                embedded[None],
                mask=torch.ones(1, size, dtype=torch.int64),
                positions=every[None],
                rows=torch.zeros_like(every),
                cols=every,
            )
            return logits.log_softmax(-1)

    @torch.no_grad()
    def embed(self, ids: list[int]) -> Tensor:
        with self.lock:
            return self.backbone.embed(torch.tensor([ids]))[0]


@contextmanager
def serving(backbone: Backbone, **named: Any) -> Iterator[StandIn]:
    """Run a stand-in in a thread."""
    server = StandIn(backbone, **named)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for a receipt of its head
    server: StandIn

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        card = {"id": "tiny", "object": "model", "max_model_len": self.server.max_model_len}
        self._json({"object": "list", "data": [card]})

    def do_POST(self) -> None:
        self.server.keys.add(self.headers["Authorization"])
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        if self.server.fails is not None:
            status, headers = self.server.fails
            self._json({"error": {"message": "no room"}}, status=status, headers=headers)
            return
        if "prompt_embeds" in body:
            raw = io.BytesIO(base64.b64decode(body["prompt_embeds"], validate=True))
            embedded = torch.load(raw, weights_only=True)
        else:
            embedded = self.server.embed(body["prompt"])
        most = self.server.max_model_len
        if most is not None and len(embedded) + body["max_tokens"] > most:
            self._json({"error": {"message": "longer than max_model_len"}}, status=400)
        elif body.get("stream"):
            self._stream(embedded, body)
        else:
            self._json({"choices": [self._choice(embedded, body)]})

    def _choice(self, embedded: Tensor, body: dict[str, Any]) -> dict[str, Any]:
        log_probs = self.server.log_probs(embedded)
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        if body.get("echo"):
            for at, token in enumerate(body["prompt"]):
                tokens.append(_name(token))
                values.append(None if not at else float(log_probs[at - 1, token]))
                tops.append(None if not at else self._top(log_probs[at - 1], body))
        token = int(log_probs[-1].argmax())
        tokens.append(_name(token))
        values.append(float(log_probs[-1, token]))
        tops.append(self._top(log_probs[-1], body))
        return {"text": "", "logprobs": {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}}

    def _top(self, log_probs: Tensor, body: dict[str, Any]) -> dict[str, float]:
        best = log_probs.topk(max(1, min(body["logprobs"], 20)))
        found = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        if self.server.tells_ids:
            found |= {token: float(log_probs[token]) for token in body.get("logprob_token_ids", ())}
        return {_name(token): value for token, value in found.items()}

    def _stream(self, embedded: Tensor, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(body["max_tokens"]):
            choice = self._choice(embedded, {**body, "echo": False})
            self.server.written += 1
            try:
                self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
                self.wfile.flush()
            except OSError:
                return
            token = int(choice["logprobs"]["tokens"][0].removeprefix("token_id:"))
            if token in self.server.backbone.tokenizer.end_ids:
                break
            embedded = torch.cat([embedded, self.server.embed([token]).to(embedded.dtype)])
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _json(self, value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _name(token: int) -> str:
    return f"token_id:{token}"
