"""Clients of others, as their users call them, on a real socket. Each takes a second or more to import, so that is done
in the tests that use it.

Two are not installed: litellm brings 380 MB and wants an older python-dateutil, lm-eval brings 180 MB. They were
run by hand (docs/serving.md, "Clients"); here stand the requests that they sent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import uvicorn

from ptuning.backbone.backbone import Backbone
from ptuning.config import GenerationSettings
from ptuning.prompt.predict import PromptModel
from ptuning.serve.engine.engine import Engine
from ptuning.serve.http.app import create_app
from ptuning.serve.http.metrics import Metrics
from ptuning.serve.server import address_of, listen
from ptuning.template.labels import LabelWords
from tests.conftest import learned, plain_logits
from tests.serve.http.conftest import Shelf, prompts_of, tiny

if TYPE_CHECKING:
    from openai import OpenAI

__all__ = ["tiny"]
ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def running(backbone: Backbone, shelf: Any, *, queue_rows: int) -> Iterator[tuple[str, Engine]]:
    """Run a service of these prompts; give its address, and its engine."""
    engine = Engine(PromptModel(backbone), queue_rows=queue_rows)
    engine.start()
    app = create_app(engine, shelf, metrics=Metrics(shelf, status=lambda: engine.status))
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield address_of(listener), engine
        finally:
            server.should_exit = True
            thread.join()
            engine.stop()


@pytest.fixture(scope="module")
def service(tiny: Backbone) -> Iterator[tuple[str, Engine]]:
    """A service of the tests' prompts, and of one called ``demo``, with a short queue."""
    prompts = prompts_of(tiny)
    with running(tiny, Shelf.of(prompts | {"demo": prompts["write"]}), queue_rows=4) as found:
        yield found


@pytest.fixture
def engine(service: tuple[str, Engine]) -> Engine:
    return service[1]


@pytest.fixture
def address(service: tuple[str, Engine]) -> str:
    return service[0]


def test_eight_clients_of_64_prompts_get_their_own_answers(tiny: Backbone) -> None:
    """Abuse case 15: rows of all prompts share passes, and no answer is another prompt's or another text's."""
    records = [{"x": text} for text in ("Kenya", "a good film and a long one", "Peru")]
    words = LabelWords.of(["Paris", "Lima", "located", "people"])
    prompts, model = {}, PromptModel(tiny)
    for number in range(64):
        template = ("[P*3] {x} is [Y]", "{x} [P*2] is [Y]", "the capital of {x} [P*4] [Y]")[number % 3]
        prompts[f"p{number}"] = dataclasses.replace(learned(tiny, template, seed=number), label_words=words)
    expected = {name: model.predict(records, prompt) for name, prompt in prompts.items()}
    assert len({round(found[0].log_prob, 4) for found in expected.values()}) == len(prompts)

    def ask(url: str, seed: int) -> int:
        draw = random.Random(seed)
        with httpx2.Client(base_url=url, timeout=60) as client:
            for turn in range(24):
                names = [f"p{draw.randrange(64)}" for _ in range(1 + turn % 3)]
                chosen = [draw.randrange(len(records)) for _ in range(1 + turn % 2)]
                asked = {"model": names, "records": [records[at] for at in chosen]}
                answer = client.post("/v1/predict", json=asked)
                for name, found in zip(names, answer.json()["predictions"], strict=True):
                    for at, one in zip(chosen, found, strict=True):
                        assert one["probabilities"] == pytest.approx(expected[name][at].probabilities, abs=1e-4)
        return turn

    with running(tiny, Shelf.of(prompts), queue_rows=256) as (url, engine), ThreadPoolExecutor(8) as pool:
        assert [one.result(120) for one in [pool.submit(ask, url, seed) for seed in range(8)]] == [23] * 8
        assert engine.status.cached_tokens > 0


@pytest.fixture
def client(address: str) -> Iterator[OpenAI]:
    from openai import OpenAI

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
    from openai import BadRequestError, NotFoundError

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
    from openai import OpenAI, RateLimitError

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


@pytest.fixture
def wanted(tiny: Backbone) -> str:
    """What the prompt ``write`` answers to Kenya."""
    return PromptModel(tiny).predict([{"x": "Kenya"}], prompts_of(tiny)["write"])[0].text


def test_langchain(address: str, wanted: str) -> None:
    """Chats and completions, whole, streamed and several; labels; an unknown model is its own class of error."""
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai needs Python 3.11")
    from openai import DefaultHttpxClient

    with DefaultHttpxClient() as web:
        named: dict[str, Any] = {"base_url": f"{address}/v1", "api_key": "none", "max_retries": 0, "http_client": web}
        chat = langchain.ChatOpenAI(model="write", stream_usage=True, **named)
        told = chat.invoke("Kenya")
        assert told.content == wanted
        assert told.usage_metadata["output_tokens"] > 0
        pieces = list(chat.stream("Kenya"))
        assert "".join(piece.content for piece in pieces) == wanted
        assert sum((piece.usage_metadata or {}).get("output_tokens", 0) for piece in pieces) > 0
        texts = langchain.OpenAI(model="write", temperature=0, max_tokens=8, **named)
        assert texts.batch(["Kenya", "Kenya"]) == [wanted, wanted]
        assert "".join(texts.stream("Kenya")) == wanted
        assert langchain.OpenAI(model="mood", **named).invoke("a good film") in ("positive", "negative")
        with pytest.raises(langchain.chat_models.base.OpenAIModelNotFoundError, match="no prompt 'nope'"):
            langchain.ChatOpenAI(model="nope", **named).invoke("Kenya")


def test_llm(address: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts named in its file of other models, as completions and as chats, whole and streamed. Its plugins are left
    out: the package of the default backbone's weights is one, and needs a compiled llama.cpp to be loaded.
    """
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")
    models = "".join(
        f"- model_id: {name}\n  model_name: {served}\n  api_base: {address}/v1\n  completion: {how}\n"
        for name, served, how in (
            ("texts", "write", "true"),
            ("turns", "write", "false"),
            ("label", "mood", "true"),
            ("gone", "nope", "false"),
        )
    )
    (tmp_path / "extra-openai-models.yaml").write_text(models, encoding="utf-8")
    import llm
    import openai

    made = openai.OpenAI
    with contextlib.ExitStack() as opened:  # it leaves its connections to be found by the garbage collector
        monkeypatch.setattr(openai, "OpenAI", lambda **named: opened.enter_context(made(**named)))
        for name in ("texts", "turns"):
            model = llm.get_model(name)
            assert model.prompt("Kenya", stream=False).text() == wanted
            assert "".join(model.prompt("Kenya")) == wanted
        assert llm.get_model("label").prompt("a good film").text() in ("positive", "negative")
        with pytest.raises(openai.NotFoundError, match="no prompt 'nope'"):
            llm.get_model("gone").prompt("Kenya").text()


def test_what_litellm_sends(client: OpenAI, wanted: str) -> None:
    """litellm 1.110.2 asks through OpenAI's client, for raw answers; its ``NotFoundError`` is made of that client's."""
    from openai import NotFoundError

    chats, texts = client.chat.completions.with_raw_response, client.completions.with_raw_response
    turn: Any = [{"role": "user", "content": "Kenya"}]
    chat = chats.create(model="write", messages=turn, timeout=600)
    assert chat.parse().choices[0].message.content == wanted
    assert chat.headers["content-type"] == "application/json"
    chunks = chats.create(model="write", messages=turn, stream=True, timeout=600).parse()
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    assert texts.create(model="write", prompt="Kenya").parse().choices[0].text == wanted
    parts = texts.create(model="write", prompt="Kenya", stream=True).parse()
    assert "".join(part.choices[0].text for part in parts) == wanted
    for ask in (
        lambda: chats.create(model="nope", messages=turn),
        lambda: texts.create(model="nope", prompt="Kenya"),
    ):
        with pytest.raises(NotFoundError, match="no prompt 'nope'"):
            ask()


def test_what_lm_eval_sends(address: str, tiny: Backbone) -> None:
    """lm-eval 0.4.13, ``local-completions``: it finds the tokenizer here, tokenises each choice with and without its
    context, and sums what ``echo`` tells of the choice. That is what its ``hf`` computes.
    """
    with httpx2.Client(base_url=address) as web:

        def tokens(text: str) -> list[int]:
            sent = web.post("/tokenize", json={"prompt": text, "add_special_tokens": False})
            found: list[int] = sent.json()["tokens"]
            return found

        info = web.get("/tokenizer_info", headers={"Content-Type": "application/json"})
        assert info.status_code == 200
        assert tokens(info.json()["eos_token"]) == [tiny.tokenizer.stop_id]
        context = "the capital of Kenya is"
        for choice in (" Nairobi", " Lima"):
            ids, before = tokens(context + choice), len(tokens(context))
            body = {"model": "tiny", "prompt": [ids], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
            (told,) = web.post("/v1/completions", json={**body, "echo": True}).json()["choices"]
            values = told["logprobs"]["token_logprobs"][before:-1]
            best = [max(one.values()) for one in told["logprobs"]["top_logprobs"][before:-1]]
            logs = plain_logits(tiny, ids).log_softmax(-1)
            assert values == pytest.approx([float(logs[at - 1, ids[at]]) for at in range(before, len(ids))], abs=1e-4)
            assert best == pytest.approx([float(logs[at - 1].max()) for at in range(before, len(ids))], abs=1e-4)
            assert web.post("/detokenize", json={"tokens": ids}).json()["prompt"] == context + choice


def test_the_lines_of_the_readme(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's example of OpenAI's client runs as it stands, at this address."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [
        one for one in re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE) if "openai" in one
    ]
    assert "http://127.0.0.1:8000" in block
    exec(compile(block.replace("http://127.0.0.1:8000", address), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
