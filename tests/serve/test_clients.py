"""Other people's clients, as their users call them, on a real socket. Each takes a second or more to import, so that is
done in the tests.

Two are not installed: litellm brings 380 MB and wants an older python-dateutil, lm-eval brings 180 MB. They were
run by hand (docs/serving.md, "Clients"). litellm uses OpenAI's client; the requests of lm-eval are in
``http/test_completions.py`` and ``http/test_models.py``.
"""

from __future__ import annotations

import contextlib
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import uvicorn

from ptuning.backbone.backbone import Backbone
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.serve.engine.engine import Engine
from ptuning.serve.http.app import create_app
from ptuning.serve.server import address_of, listen
from ptuning.template.labels import LabelWords
from tests.conftest import ROOT, learned
from tests.serve.conftest import prompts_of, registry_of

if TYPE_CHECKING:
    from openai import OpenAI

TURN: Any = [{"role": "user", "content": "Kenya"}]


@contextlib.contextmanager
def running(backbone: Backbone, prompts: Mapping[str, Prompt], *, queue_rows: int) -> Iterator[tuple[str, Engine]]:
    """Run a service of these prompts; give its address, and its engine."""
    engine = Engine(PromptModel(backbone), queue_rows=queue_rows)
    engine.start()
    app = create_app(engine, registry_of(prompts))
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield address_of(listener), engine  # connections wait until it runs
        finally:
            server.should_exit = True
            thread.join()
            engine.stop()


@pytest.fixture(scope="module")
def service(tiny: Backbone) -> Iterator[tuple[str, Engine]]:
    """A service of the tests' prompts, and of one called ``demo``, with a short queue."""
    prompts = prompts_of(tiny)
    with running(tiny, prompts | {"demo": prompts["write"]}, queue_rows=4) as address_and_engine:
        yield address_and_engine


@pytest.fixture
def address(service: tuple[str, Engine]) -> str:
    return service[0]


@pytest.fixture(scope="module")
def kenya(tiny: Backbone) -> str:
    """The answer of the prompt ``write`` to Kenya."""
    return PromptModel(tiny).predict([{"x": "Kenya"}], prompts_of(tiny)["write"])[0].text


def test_eight_clients_of_64_prompts_get_their_own_answers(tiny: Backbone) -> None:
    """Abuse case 15: rows of all prompts share passes, and no answer is another prompt's or another text's."""
    records = [{"x": text} for text in ("Kenya", "a good film and a long one", "Peru")]
    words = LabelWords.of(["Paris", "Lima", "located", "people"])
    prompts, model = {}, PromptModel(tiny)
    for number in range(64):
        template = ("[P*3] {x} is [Y]", "{x} [P*2] is [Y]", "the capital of {x} [P*4] [Y]")[number % 3]
        prompts[f"p{number}"] = replace(learned(tiny, template, seed=number), label_words=words)
    expected = {name: model.predict(records, prompt) for name, prompt in prompts.items()}
    assert len({round(predictions[0].log_prob, 4) for predictions in expected.values()}) == len(prompts)

    def ask(url: str, seed: int) -> None:
        draw = random.Random(seed)
        with httpx2.Client(base_url=url, timeout=60) as client:
            for turn in range(24):
                names = [f"p{draw.randrange(64)}" for _ in range(1 + turn % 3)]
                chosen = [draw.randrange(len(records)) for _ in range(1 + turn % 2)]
                body = {"model": names, "records": [records[at] for at in chosen]}
                answer = client.post("/v1/predict", json=body).json()["predictions"]
                for name, predictions in zip(names, answer, strict=True):
                    for at, prediction in zip(chosen, predictions, strict=True):
                        probabilities = expected[name][at].probabilities
                        assert prediction["probabilities"] == pytest.approx(probabilities, abs=1e-4)

    with running(tiny, prompts, queue_rows=256) as (url, engine), ThreadPoolExecutor(8) as pool:
        for asking in [pool.submit(ask, url, seed) for seed in range(8)]:
            asking.result(120)
        assert engine.status.cached_tokens > 0


# OpenAI's client


@pytest.fixture
def client(address: str) -> Iterator[OpenAI]:
    from openai import OpenAI

    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_openai_asks_prompts_and_the_base_model(client: OpenAI, kenya: str) -> None:
    """Completions, chats, labels as text, several answers, fields, streams, usage, the list of models."""
    assert {"tiny", "write", "mood"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("write").id == "write"
    completion = client.completions.create(model="write", prompt="Kenya")
    assert completion.choices[0].text == kenya
    assert completion.usage is not None
    assert completion.usage.prompt_tokens > 3
    chat = client.chat.completions.create(model="write", messages=TURN)
    assert chat.choices[0].message.content == kenya
    label = client.completions.create(model="mood", prompt="a good film")
    assert label.choices[0].text in ("positive", "negative")
    several = client.completions.create(model="write", prompt=["Kenya", "Peru"], n=2, temperature=0.8, seed=5)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    base = client.completions.create(model="tiny", prompt="The capital of", max_tokens=3)
    assert base.choices[0].finish_reason in ("stop", "length")
    extra: Any = {"fields": {"x": "Nairobi", "z": "Kenya"}}
    fields = client.completions.create(model="pair", prompt="", extra_body=extra)
    assert fields.choices[0].text in ("positive", "negative")
    pieces = client.completions.create(model="write", prompt="Kenya", stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == kenya
    chunks = list(client.chat.completions.create(
        model="write", messages=TURN, stream=True, stream_options={"include_usage": True}
    ))  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == kenya
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


def test_openai_reads_log_probs(client: OpenAI) -> None:
    """Of generated tokens, and of a text's own tokens as evaluations request them (echo, lists of ids)."""
    scores: Any = client.completions.create(model="write", prompt="Kenya", logprobs=2).choices[0].logprobs
    assert len(scores.token_logprobs) == len(scores.top_logprobs) > 0
    echoed = client.completions.create(model="tiny", prompt=[[5, 6, 7, 8]], max_tokens=1, logprobs=1, echo=True)
    scores = echoed.choices[0].logprobs
    assert (scores.token_logprobs[0], len(scores.token_logprobs)) == (None, 5)
    chat = client.chat.completions.create(model="write", messages=TURN, logprobs=True, top_logprobs=2)
    scores = chat.choices[0].logprobs
    assert scores.content


def test_openai_understands_errors(client: OpenAI) -> None:
    from openai import BadRequestError, NotFoundError

    with pytest.raises(NotFoundError) as unknown:
        client.completions.create(model="nope", prompt="Kenya")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(BadRequestError) as wrong:
        client.completions.create(model="write", prompt="Kenya", presence_penalty=1.0)
    assert wrong.value.param == "presence_penalty"


def test_openai_tries_again_after_a_full_queue(service: tuple[str, Engine]) -> None:
    """429 with Retry-After: the client waits as long and succeeds, without a line of its user."""
    from openai import OpenAI, RateLimitError

    address, engine = service
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        let_go.wait(60)

    with (
        OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=5) as patient,
        OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as impatient,
        ThreadPoolExecutor(3) as pool,
    ):

        def ask(client: OpenAI, prompts: list[str]) -> int:
            return len(client.completions.create(model="write", prompt=prompts).choices)

        try:
            holding = pool.submit(engine.call, hold)
            assert held.wait(60)
            first = pool.submit(ask, patient, ["Kenya"] * 4)
            while engine.status.rows_waiting < 4:
                time.sleep(0.01)
            with pytest.raises(RateLimitError):
                ask(impatient, ["Peru"])
            second = pool.submit(ask, patient, ["Peru"])
        finally:
            let_go.set()
        assert (first.result(60), second.result(60)) == (4, 1)
        holding.result(60)


# Other clients


def test_langchain(address: str, kenya: str) -> None:
    """Chats and completions, whole, streamed and several; labels; an unknown model is its own class of error."""
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai needs Python 3.11")
    from openai import DefaultHttpxClient

    with DefaultHttpxClient() as web:
        named: dict[str, Any] = {"base_url": f"{address}/v1", "api_key": "none", "max_retries": 0, "http_client": web}
        chat = langchain.ChatOpenAI(model="write", stream_usage=True, **named)
        message = chat.invoke("Kenya")
        assert message.content == kenya
        assert message.usage_metadata["output_tokens"] > 0
        pieces = list(chat.stream("Kenya"))
        assert "".join(piece.content for piece in pieces) == kenya
        assert sum((piece.usage_metadata or {}).get("output_tokens", 0) for piece in pieces) > 0
        texts = langchain.OpenAI(model="write", temperature=0, max_tokens=8, **named)
        assert texts.batch(["Kenya", "Kenya"]) == [kenya, kenya]
        assert "".join(texts.stream("Kenya")) == kenya
        assert langchain.OpenAI(model="mood", **named).invoke("a good film") in ("positive", "negative")
        with pytest.raises(langchain.chat_models.base.OpenAIModelNotFoundError, match="nope"):
            langchain.ChatOpenAI(model="nope", **named).invoke("Kenya")


def test_llm(address: str, kenya: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts named in its file of other models, as completions and as chats, whole and streamed. Its plugins are left
    out: the package of the default backbone's weights is one, and needs a compiled llama.cpp to be loaded.
    """
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")
    models = "".join(
        f"- model_id: {name}\n  model_name: {served}\n  api_base: {address}/v1\n  completion: {how}\n"
        for name, served, how in (
            ("texts", "write", "true"), ("turns", "write", "false"), ("label", "mood", "true"),
            ("gone", "nope", "false"),
        )
    )  # fmt: skip
    (tmp_path / "extra-openai-models.yaml").write_text(models, encoding="utf-8")
    import llm
    import openai

    made = openai.OpenAI
    with contextlib.ExitStack() as opened:  # it leaves its connections to the garbage collector
        monkeypatch.setattr(openai, "OpenAI", lambda **named: opened.enter_context(made(**named)))
        for name in ("texts", "turns"):
            model = llm.get_model(name)
            assert model.prompt("Kenya", stream=False).text() == kenya
            assert "".join(model.prompt("Kenya")) == kenya
        assert llm.get_model("label").prompt("a good film").text() in ("positive", "negative")
        with pytest.raises(openai.NotFoundError, match="nope"):
            llm.get_model("gone").prompt("Kenya").text()


def test_the_lines_of_the_readme(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's example of OpenAI's client runs as it stands, at this address."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if "openai" in block]
    assert "http://127.0.0.1:8000" in block
    exec(compile(block.replace("http://127.0.0.1:8000", address), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
