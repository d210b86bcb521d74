"""What a server answers that is no vLLM, or a broken one: one error that says so."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from ptuning.config import GenerationSettings
from ptuning.errors import ConfigError, PTuningError
from ptuning.serve.engine.job import QueueFullError, RemoteError
from ptuning.serve.vllm.remote import Read, VllmServer

LOG_PROBS: dict[str, Any] = {
    "tokens": ["token_id:7"],
    "token_logprobs": [-0.5],
    "top_logprobs": [{"token_id:7": -0.5, "token_id:3": -1.0}],
}
READ = Read(ids=(5, 6))


def answering(body: object, *, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None) -> VllmServer:
    """A server that answers this to every question but the first, which models it has."""
    text = body if isinstance(body, str) else json.dumps(body)

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/v1/models":
            return httpx2.Response(200, json={"data": [{"id": "tiny"}]})
        return httpx2.Response(status, text=text, headers=headers)

    return VllmServer("http://stand-in", transport=httpx2.MockTransport(answer))


def choice(**changed: object) -> dict[str, object]:
    return {"choices": [{"logprobs": {**LOG_PROBS, **changed}}]}


def test_the_likeliest_tokens_are_read() -> None:
    assert answering(choice()).log_probs(READ, [3, 7]) == {3: -1.0, 7: -0.5}


@pytest.mark.parametrize(
    "body",
    [
        "", "[" * 100_000, "9" * 5000, "[]", {"choices": []}, {"choices": [{"logprobs": None}]},
        choice(tokens=[]), choice(tokens=[], token_logprobs=[], top_logprobs=[]), choice(tokens=["token_id:²"]),
        choice(tokens=["token_id:" + "9" * 5000]), choice(token_logprobs=["many"]), choice(top_logprobs=[[1]]),
    ],
)  # fmt: skip
def test_what_is_no_answer_of_vllm_is_one_error(body: object) -> None:
    """Lists of different lengths, a superscript as an id and no token at all were errors of Python."""
    server = answering(body)
    with pytest.raises(RemoteError):
        server.log_probs(READ, [3, 7])
    line = body if isinstance(body, str) else json.dumps(body)
    streaming = answering(f"data: {line}\n\n")
    try:
        list(streaming.write(READ, GenerationSettings(), most=1, alternatives=1))
        server.echo((5, 6), alternatives=1)
    except PTuningError as error:
        assert str(error).strip()  # noqa: PT017  # a stream without tokens is one without a text


@pytest.mark.parametrize("after", ["3", "²", "soon"])
def test_a_full_server_says_when_to_come_again(after: str) -> None:
    with pytest.raises(QueueFullError) as refused:
        answering("", status=429, headers=[(b"retry-after", after.encode("latin-1"))]).log_probs(READ, [3])
    assert refused.value.retry_after == (3.0 if after == "3" else 1.0)


@pytest.mark.parametrize("url", ["stand-in:8000", "http://[", "http://a:b", "http://a\nb", "http://"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises((ConfigError, RemoteError)):
        VllmServer(url)
