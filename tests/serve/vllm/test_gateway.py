"""The gateway to vLLM: the answers are those in process, computed by a server that knows ids and embeddings only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import GenerationSettings
from ptuning.data.questions import Question
from ptuning.errors import BackboneError, ConfigError, PTuningError
from ptuning.prompt.predict import PromptModel
from ptuning.serve.engine.engine import Engine
from ptuning.serve.engine.job import (
    Answering,
    CancelledError,
    EchoRow,
    Job,
    Outcome,
    PromptRow,
    QueueFullError,
    RemoteError,
    Row,
    StoppedError,
    TextRow,
)
from ptuning.serve.vllm.gateway import Gateway
from ptuning.serve.vllm.remote import VllmServer
from ptuning.template.fill import TooLongError
from tests.conftest import RECORDS, learned
from tests.serve.engine.test_engine import CANDIDATES, Heard, alike, prompts_of
from tests.serve.vllm.stand_in import StandIn, serving


@pytest.fixture
def there(causal: Backbone) -> Iterator[StandIn]:
    """A server with the same model."""
    with serving(causal) as server:
        yield server


@pytest.fixture
def gateway(causal: Backbone, there: StandIn) -> Iterator[Gateway]:
    """A gateway to it."""
    made = Gateway(PromptModel(causal), VllmServer(there.url), queue_rows=64, connections=8)
    made.start()
    yield made
    made.stop()


def test_answers_are_those_in_process(causal: Backbone, gateway: Gateway, there: StandIn) -> None:
    """Labels of one and of several tokens, calibrated or not, candidates, and written answers, slots anywhere."""
    model = PromptModel(causal)
    for prompt in (one for one in prompts_of(causal) if one.deep is None):
        for record in RECORDS[:3]:
            row = PromptRow(prompt, Question({"x": record["x"]}))
            listed = replace(row, how=Answering(candidates=CANDIDATES, normalise="mean", top_k=2))
            for asked in (row, listed):
                (outcome,) = gateway.ask([asked])
                assert outcome.prediction is not None
                how = asked.how
                wanted = model.predict([record], prompt, how.candidates, top_k=how.top_k, normalise=how.normalise)[0]
                alike(outcome.prediction, wanted)
                assert outcome.prediction.tokens == wanted.tokens
    assert any("prompt_embeds" in body for body in there.asked)
    assert all(body["model"] == "tiny" for body in there.asked)


def test_streams_log_probs_and_the_base_model(causal: Backbone, gateway: Gateway) -> None:
    """Pieces make the text, tokens have their log-probabilities, and the base model is what the engine says."""
    engine = Engine(PromptModel(causal))
    engine.start()
    how = Answering(generation=GenerationSettings(max_new_tokens=7, stop_strings=("zz",)), alternatives=2, pieces=True)
    rows: list[Row] = [
        PromptRow(prompts_of(causal)[0], Question(RECORDS[2]), how),
        TextRow("The capital", how),
        EchoRow("The capital of Kenya", 2),
        TextRow("The capital", how, learned(causal, "[P*2]{x} [Y]")),
    ]
    heard = Heard(4)
    gateway.submit(Job(rows, heard))
    assert heard.ready.wait(60)
    for found, wanted in zip(heard.found, engine.ask(rows), strict=True):
        assert isinstance(found, Outcome)
        assert [token.id for token in found.tokens] == [token.id for token in wanted.tokens]
        assert [token.log_prob for token in found.tokens] == pytest.approx(
            [token.log_prob for token in wanted.tokens], abs=1e-4
        )
        assert [[text for text, _ in token.alternatives] for token in found.tokens] == [
            [text for text, _ in token.alternatives] for token in wanted.tokens
        ]
        assert found.finish == wanted.finish
        assert found.usage == wanted.usage
    for pieces, found in zip(heard.pieces[:2], heard.found[:2], strict=True):
        assert isinstance(found, Outcome)
        assert found.prediction is not None
        assert "".join(pieces) == found.prediction.text
    engine.stop()


def test_a_server_that_tells_the_likeliest_only(causal: Backbone) -> None:
    """Labels whose tokens are not among them fail with what to do; nothing is guessed."""
    with serving(causal, tells_ids=False) as server:
        gateway = Gateway(PromptModel(causal), VllmServer(server.url))
        gateway.start()
        closed = [one for one in prompts_of(causal) if one.answer_space.is_closed and one.deep is None]
        failed = 0
        for row in [PromptRow(prompt, Question(record)) for prompt in closed for record in RECORDS]:
            heard = Heard(1)
            gateway.submit(Job([row], heard))
            assert heard.ready.wait(60)
            found = heard.found[0]
            if isinstance(found, Outcome):
                assert found.prediction is not None
                alike(found.prediction, PromptModel(causal).predict([row.question.record], row.prompt)[0])
            else:
                assert "logprob_token_ids" in str(found)
                failed += isinstance(found, RemoteError)
        assert failed > 0
        gateway.stop()


def test_a_server_that_reads_less_than_the_model(causal: Backbone) -> None:
    """What it has no room for is an error of the request, not of the server; answers end where its room does."""
    words = "the capital of Kenya and of Peru " * 4
    prompt = replace(prompts_of(causal)[0], multiline=True)
    long = GenerationSettings(max_new_tokens=40, stop_strings=("never",))
    rows: list[Row] = [
        PromptRow(prompt, Question({"x": words})),
        PromptRow(prompts_of(causal)[1], Question({"x": words})),
        TextRow(words),
        EchoRow(words),
    ]
    with serving(causal, max_model_len=20) as server:
        gateway = Gateway(PromptModel(causal), VllmServer(server.url))
        gateway.start()
        for row in rows:
            with pytest.raises(TooLongError, match="reads and writes 20 together"):
                gateway.ask([row])
        (found,) = gateway.ask([PromptRow(prompt, Question({"x": "Kenya"}), Answering(generation=long))])
        assert found.usage.prompt_tokens + found.usage.completion_tokens == 20
        assert found.finish == "length"
        gateway.stop()


def test_another_model_is_refused(loaded: Callable[[str], Backbone], causal: Backbone) -> None:
    """The server's answers show it; and so is a model that vLLM does not serve."""
    other = loaded("gpt2" if causal.model.config.model_type == "llama" else "llama")
    with serving(other) as server, pytest.raises((ConfigError, RemoteError)):
        Gateway(PromptModel(causal), VllmServer(server.url))
    with serving(causal) as server, pytest.raises(BackboneError, match="masked"):
        Gateway(PromptModel(loaded("bert")), VllmServer(server.url))
    with pytest.raises(RemoteError, match="is it running"):
        VllmServer("http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="--engine-url"):
        VllmServer("localhost:8000")


def test_a_full_or_broken_server(causal: Backbone, gateway: Gateway, there: StandIn) -> None:
    """429 and 503 are ours to pass on, with their time; other answers are an error with what was said."""
    row = PromptRow(prompts_of(causal)[1], Question(RECORDS[0]))
    there.fails = (429, {"Retry-After": "7"})
    with pytest.raises(QueueFullError) as refused:
        gateway.ask([row])
    assert refused.value.retry_after == 7
    there.fails = (500, {})
    with pytest.raises(RemoteError, match=r"500.*no room"):
        gateway.ask([row])
    there.fails = None
    assert gateway.ask([row])[0].prediction is not None
    assert gateway.status.rows_failed == 2


def test_rows_that_cannot_be_asked_fail_alone(causal: Backbone, gateway: Gateway) -> None:
    """Beams, penalties, too many candidates, a missing field."""
    open_prompt, closed = prompts_of(causal)[0], prompts_of(causal)[1]
    rows = [
        PromptRow(open_prompt, Question(RECORDS[0]), Answering(top_k=2)),
        PromptRow(open_prompt, Question(RECORDS[0]), Answering(generation=GenerationSettings(repetition_penalty=1.2))),
        PromptRow(open_prompt, Question(RECORDS[0]), Answering(candidates=tuple(f"c{n}" for n in range(101)))),
        PromptRow(closed, Question({"no": "field"})),
        PromptRow(closed, Question(RECORDS[0])),
    ]
    heard = Heard(len(rows))
    gateway.submit(Job(rows, heard))
    assert heard.ready.wait(60)
    assert [isinstance(found, PTuningError) for found in heard.found] == [True] * 4 + [False]


def test_deep_slots_are_refused(causal: Backbone, gateway: Gateway) -> None:
    found = [one for one in prompts_of(causal) if one.deep is not None]
    assert len(found) > 1
    for prompt in found:
        with pytest.raises(ConfigError, match=r"deep slots.*--engine embedded"):
            gateway.ask([PromptRow(prompt, Question(RECORDS[0]))])


def test_echo_behind_a_prompt_is_refused_and_not_the_base_models(causal: Backbone, gateway: Gateway) -> None:
    with pytest.raises(ConfigError, match="echo is for the base model alone"):
        gateway.ask([EchoRow("The capital", 2, learned(causal, "[P*2]{x} [Y]"))])


def test_cancelled_answers_end_there_as_well(causal: Backbone, gateway: Gateway, there: StandIn) -> None:
    """A cancelled stream is not read on, a row that waits is not asked for."""
    prompt = replace(prompts_of(causal)[0], multiline=True)
    how = Answering(generation=GenerationSettings(max_new_tokens=40, stop_strings=("never",)), pieces=True)
    heard = Heard(1)
    job = Job([PromptRow(prompt, Question(RECORDS[0]), how)], heard)
    gateway.submit(job)
    assert heard.first.wait(60)
    job.cancel()
    assert heard.ready.wait(60)
    assert isinstance(heard.found[0], Outcome | CancelledError)
    assert gateway.drain(60)
    with pytest.raises(StoppedError):
        gateway.ask([PromptRow(prompt, Question(RECORDS[0]))])


def test_calls_and_stop(causal: Backbone, gateway: Gateway) -> None:
    """A call runs in the thread of the tokenizer; a stopped gateway answers nothing more."""
    assert gateway.call(threading.get_ident) == gateway._thread.ident
    assert gateway.is_alive
    gateway.stop()
    assert not gateway.is_alive
    with pytest.raises(StoppedError):
        gateway.call(threading.get_ident)
