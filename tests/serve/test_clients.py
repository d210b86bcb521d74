"""Clients of others, as their users call them, on a real socket."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from openai import BadRequestError, NotFoundError, OpenAI, RateLimitError

from ptuning.backbone.backbone import Backbone
from ptuning.config import GenerationSettings
from ptuning.prompt.predict import PromptModel
from ptuning.serve.engine.engine import Engine
from ptuning.serve.http.app import create_app
from ptuning.serve.http.watch import Monitor
from ptuning.serve.server import address_of, listening
from tests.serve.http.conftest import Shelf, prompts_of, tiny

__all__ = ["tiny"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def engine(tiny: Backbone) -> Iterator[Engine]:
    made = Engine(PromptModel(tiny), queue_rows=4)
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def address(engine: Engine, tiny: Backbone) -> Iterator[str]:
    """The address of a service of the tests' prompts, and of one called ``demo``."""
    prompts = prompts_of(tiny)
    shelf = Shelf.of(prompts | {"demo": prompts["write"]})
    app = create_app(engine, shelf, watch=Monitor(shelf, status=lambda: engine.status))
    with listening("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield address_of(listener)
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_openai_asks_prompts_and_the_base_model(client: OpenAI, tiny: Backbone) -> None:
    """Completions, chat, labels as text, several answers, usage, the list of models."""
    prompts, model = prompts_of(tiny), PromptModel(tiny)
    assert {"tiny", "write", "mood"} <= {one.id for one in client.models.list()}
    assert client.models.retrieve("write").id == "write"
    (wanted,) = model.predict([{"x": "Kenya"}], prompts["write"])
    found = client.completions.create(model="write", prompt="Kenya")
    assert found.choices[0].text == wanted.text
    assert found.usage is not None
    assert found.usage.prompt_tokens > 3
    chat = client.chat.completions.create(model="write", messages=[{"role": "user", "content": "Kenya"}])
    assert chat.choices[0].message.content == wanted.text
    label = client.completions.create(model="mood", prompt="a good film")
    assert label.choices[0].text == model.predict([{"x": "a good film"}], prompts["mood"])[0].text
    several = client.completions.create(model="write", prompt=["Kenya", "Peru"], n=2, temperature=0.8, seed=5)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    base = client.completions.create(model="tiny", prompt="The capital of", max_tokens=3)
    assert base.choices[0].finish_reason in ("stop", "length")


def test_openai_streams(client: OpenAI, tiny: Backbone) -> None:
    """Pieces of completions and of chats make the text that is given without a stream."""
    settings = GenerationSettings(max_new_tokens=8)
    (wanted,) = PromptModel(tiny).predict([{"x": "Peru"}], prompts_of(tiny)["write"], generation=settings)
    pieces = client.completions.create(model="write", prompt="Peru", max_tokens=8, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == wanted.text
    chat = client.chat.completions.create(
        model="write",
        messages=[{"role": "user", "content": "Peru"}],
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    told = list(chat)
    assert "".join(one.choices[0].delta.content or "" for one in told if one.choices) == wanted.text
    assert told[-1].usage is not None
    assert told[-1].usage.completion_tokens > 0


def test_openai_reads_log_probs(client: OpenAI) -> None:
    """Of written tokens, and of a text's own tokens as evaluations ask for them (echo, lists of ids)."""
    found = client.completions.create(model="write", prompt="Kenya", logprobs=2).choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert len(found.token_logprobs) == len(found.top_logprobs)
    echoed = client.completions.create(model="tiny", prompt=[[5, 6, 7, 8]], max_tokens=1, logprobs=1, echo=True)
    assert echoed.choices[0].logprobs is not None
    values = echoed.choices[0].logprobs.token_logprobs
    assert values is not None
    assert values[0] is None
    assert len(values) == 5
    chat = client.chat.completions.create(
        model="write", messages=[{"role": "user", "content": "Kenya"}], logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content


def test_openai_understands_errors(client: OpenAI) -> None:
    """Each is of the client's own class, with a code; none is tried again."""
    with pytest.raises(NotFoundError) as unknown:
        client.completions.create(model="nope", prompt="Kenya")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(BadRequestError) as wrong:
        client.completions.create(model="write", prompt="Kenya", presence_penalty=1.0)
    assert wrong.value.param == "presence_penalty"
    with pytest.raises(BadRequestError):
        client.completions.create(model="pair", prompt="Kenya")
    extra: Any = {"fields": {"x": "Nairobi", "z": "Kenya"}}
    answered = client.completions.create(model="pair", prompt="", extra_body=extra)
    assert answered.choices[0].text in ("positive", "negative")


def test_openai_tries_again_after_a_full_queue(address: str, engine: Engine) -> None:
    """429 with Retry-After: the client waits as long and succeeds, without a line of its user."""
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        let_go.wait(60)

    holding = threading.Thread(target=lambda: engine.call(hold))
    holding.start()
    assert held.wait(60)
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=5) as patient:
        texts: list[str] = []

        def ask(prompts: list[str]) -> None:
            texts.extend(one.text for one in patient.completions.create(model="write", prompt=prompts).choices)

        asking = [threading.Thread(target=ask, args=(["Kenya"] * 4,)), threading.Thread(target=ask, args=(["Peru"],))]
        asking[0].start()
        while engine.status.rows_waiting < 4:
            time.sleep(0.01)
        with (
            OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as impatient,
            pytest.raises(RateLimitError),
        ):
            impatient.completions.create(model="write", prompt="Peru")
        asking[1].start()
        let_go.set()
        for one in (*asking, holding):
            one.join(60)
    assert len(texts) == 5


def test_the_lines_of_the_readme(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's example of OpenAI's client runs as it stands, at this address."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [
        one for one in re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE) if "openai" in one
    ]
    assert "http://127.0.0.1:8000" in block
    exec(compile(block.replace("http://127.0.0.1:8000", address), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
