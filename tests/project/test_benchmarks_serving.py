"""The loads of the service's benchmark are what they say, and nothing is compared that is not the same."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmarks import load, peer, serving
from benchmarks.load import Load, Material, Run, Sent

from ptuning.backbone.backbone import Backbone
from ptuning.engine.forward import target_logits
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.prompt.prediction import Candidate, Prediction
from tests.conftest import RECORDS, items_of
from tests.project.test_benchmarks import needs_peer, reordered

MATERIAL = Material("", ("a", "b"), ("Kenya", "Peru"))


def sent(*ends: float, status: int = load.OK) -> list[Sent]:
    return [Sent(0.0, end, status) for end in ends]


def run_of(requests: list[Sent]) -> Run:
    return Run(tuple(requests), late=0.0, cpu_seconds=0.5, wall_seconds=2.0)


# Loads.


def test_loads_that_differ_in_their_prompts_send_the_same_texts_at_the_same_times() -> None:
    """Only so can one prompt be compared with many within a round; another round has other draws."""
    same = Load(rate=50.0, seconds=4.0, prompts=8, seed=3)
    plans = [load.plan(replace(same, choice=choice), 5) for choice in ("uniform", "zipf", "one")]
    assert len({tuple((one.at, one.text) for one in found) for found in plans}) == 1
    assert len({tuple(one.prompt for one in found) for found in plans}) == 3
    assert load.plan(same, 5) == plans[0]
    assert load.plan(replace(same, seed=4), 5) != plans[0]


def test_requests_do_not_wait_for_earlier_answers() -> None:
    """An open loop: the service answers nothing until the last request is there. Refusals and broken connections are
    told, too.
    """
    one = Load(rate=200.0, seconds=0.1, prompts=2)
    count = len(load.plan(one, 2))
    assert count > 3
    there = asyncio.Event()
    bodies: list[Any] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line)
        bodies.append(json.loads(await reader.readexactly(size)))
        number = len(bodies)
        if number == count:
            there.set()
        await there.wait()
        if number > 1:
            status = b"429 Too Many" if number == 2 else b"200 OK"
            writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
            await writer.drain()
        writer.close()

    async def both() -> Run:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            return await asyncio.wait_for(load.send(one, replace(MATERIAL, url=f"http://127.0.0.1:{port}")), 60)

    found = asyncio.run(both())
    statuses = Counter(one.status for one in found.requests)
    assert statuses == {load.OK: count - 2, load.REFUSED: 1, load.NO_ANSWER: 1}
    assert [one.scheduled for one in found.requests] == [arrival.at for arrival in load.plan(one, 2)]
    # Counted from when they were due, all end behind the last one's time.
    assert all(one.ended >= found.requests[-1].scheduled for one in found.requests)
    assert Counter(json.dumps(body) for body in bodies) == Counter(
        json.dumps(MATERIAL.body(arrival.prompt, arrival.text)) for arrival in load.plan(one, 2)
    )


def test_latency_counts_from_when_a_request_was_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender that is late must not make the service look faster: two requests were due five seconds ago."""
    monkeypatch.setattr(load, "plan", lambda *_: [load.Arrival(-5.0, 0, 0), load.Arrival(-5.0, 1, 1)])
    found = asyncio.run(load.send(Load(1.0, 1.0), replace(MATERIAL, url="http://127.0.0.1:9")))
    assert [one.status for one in found.requests] == [load.NO_ANSWER] * 2
    assert min(found.late, *(one.latency for one in found.requests)) >= 5.0


def test_throughput_ends_with_an_answer() -> None:
    """Answers come in groups: of three at 1 s and three at 2 s, 6 in 2 s are counted, wherever the load's end lies."""
    found = run_of([*sent(1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 6.0, 6.0, 6.0), *sent(0.1, 0.1, status=load.REFUSED)])
    assert [found.per_second(until) for until in (1.5, 2.0, 2.9)] == [3.0, 3.0, 3.0]
    assert run_of(sent(1.0, 1.0, 1.0, 4.0, 4.0)).per_second() == 1.25
    assert run_of(sent(2.0, 2.0)).per_second(1.0) == 1.0  # nothing in time: what came
    assert run_of(sent(1.0, status=load.REFUSED)).per_second() == 0.0


def test_the_tail_is_that_of_good_answers_unless_refusals_are_meant() -> None:
    found = run_of([*sent(*range(1, 101)), *sent(500.0, status=load.REFUSED)])
    assert (found.latency(0.99), found.latency(0.5), found.latency(1.0)) == (99, 50, 100)
    assert found.latency(0.99, load.REFUSED) == 500.0
    assert found.latency(0.99, load.NO_ANSWER) is None
    cell = serving.load_cell("tail", "x", Load(9.0, 200.0), [found, found])
    assert (cell["answered"], cell["refused"], cell["failed"], cell["sender"]) == (200, 2, 0, 0.25)


# Like with like.


def prediction(text: str, log_prob: float) -> Prediction:
    return Prediction(text, (Candidate(text, log_prob),))


@pytest.mark.parametrize(("text", "log_prob", "same"), [("a", -1.001, True), ("a", -1.1, False), ("b", -1.0, False)])
def test_the_server_is_timed_only_if_its_answers_are_those_in_process(text: str, log_prob: float, same: bool) -> None:
    theirs = [{"prediction": text, "candidates": [{"text": text, "log_prob": log_prob}]}]
    assert serving.compared(theirs, [prediction("a", -1.0)])[0] is same


@needs_peer
@pytest.mark.filterwarnings("ignore")  # the peer's own
def test_many_adapters_score_what_their_prompts_score(causal: Backbone) -> None:
    """Each question by its own adapter, whatever stands in the same pass; choices of one context run once."""
    template = "[P*3] {x} is [Y]"
    before = {name: weight.clone() for name, weight in causal.model.state_dict().items()}
    vectors = [torch.randn(3, causal.width, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    items = items_of(causal, template, RECORDS, with_stop=False) * 2
    owners = [at % 2 for at in range(len(items))]
    rows = [peer.rows_of([item]) * 2 for item in items]
    with peer.Peers(causal, vectors) as other:
        theirs = other.score(rows, owners)
    for item, owner, (first, second) in zip(items, owners, theirs, strict=True):
        (logits,) = [target_logits(causal, [reordered(item.inputs[0])], PromptBatch(vectors[owner]))]
        ids = torch.tensor(item.choices[0].target_ids)
        expected = float(logits.log_softmax(-1).gather(1, ids[:, None]).sum())
        assert (first, second) == pytest.approx((expected, expected), abs=1e-3)
    assert not any(weight.requires_grad for weight in causal.model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in causal.model.state_dict().items())
