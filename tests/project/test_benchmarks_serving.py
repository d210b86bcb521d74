"""The loads of the service's benchmark are what they say, and nothing is compared that is not the same."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from benchmarks import common, load, mixed, peer, service, serving
from benchmarks.load import Load, Material, Run, Sent

from ptuning.backbone.backbone import Backbone
from ptuning.engine.learned import Learned
from ptuning.engine.passes import target_logits
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


def test_requests_come_at_random_times_as_often_as_asked() -> None:
    found = load.plan(Load(rate=100.0, seconds=50.0, prompts=1), 3)
    times = [one.at for one in found]
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 50.0
    assert len(times) == pytest.approx(5000, rel=0.05)
    assert {one.text for one in found} == {0, 1, 2}
    assert len(load.plan(Load(rate=0.01, seconds=0.1), 1)) == 1  # one at least


def test_prompts_are_chosen_alike_by_zipfs_law_or_always_the_first() -> None:
    how = Load(rate=2000.0, seconds=10.0, prompts=4)
    counts = {
        choice: Counter(one.prompt for one in load.plan(replace(how, choice=choice), 1))
        for choice in ("uniform", "zipf", "one")
    }
    assert counts["one"].keys() == {0}
    assert max(counts["uniform"].values()) < 1.1 * min(counts["uniform"].values())
    shares = [counts["zipf"][at] / counts["zipf"][0] for at in range(4)]
    assert shares == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], rel=0.1)


def test_a_load_reaches_its_process_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    async def send(*given: object) -> Run:
        asked.extend(given)
        return run_of(sent(0.5))

    monkeypatch.setattr(load, "send", send)
    one = Load(rate=2.5, seconds=3.0, prompts=2, choice="zipf", seed=9)
    given, out = tmp_path / "material.json", tmp_path / "out.json"
    common.write_json(given, asdict(MATERIAL))
    load.main(load.arguments(one, given, out))
    assert asked[0] == one
    assert asked[1].body(1, 0) == MATERIAL.body(1, 0) == {"model": "b", "records": ["Kenya"]}
    assert Run.of(json.loads(out.read_text(encoding="utf-8"))) == run_of(sent(0.5))


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


@dataclasses.dataclass
class Keeps:
    """Stands for a server that answers each request after a while, none if there are more than ``most`` a second."""

    most: float
    seconds: list[float] = dataclasses.field(default_factory=list)

    def run(self, sent_load: Load) -> Run:
        self.seconds.append(sent_load.seconds)
        arrivals = load.plan(sent_load, 1)
        good = [Sent(one.at, 0.01, load.OK) for one in arrivals[:: max(1, round(sent_load.rate / self.most))]]
        rest = [Sent(one.at, 0.02, load.REFUSED) for one in arrivals] if sent_load.rate > self.most else []
        return run_of([*good, *rest])


def asked_of(most: float, capacity: float) -> Any:
    return serving.Asked(cast("Any", Keeps(most)), common.Settings(), capacity)


def test_a_load_that_is_no_burden_gives_no_figure() -> None:
    """A capacity that was measured too low, on a machine that was busy, is told as the reason."""
    for question, name in ((serving.throughput, "serve-64-prompts"), (serving.overload, "serve-overload")):
        _, found = question(asked_of(most=1000.0, capacity=20.0))
        assert found[name]["measured"] is None, found
    _, found = serving.overload(asked_of(most=50.0, capacity=50.0))
    assert found["serve-overload"]["measured"] is not None
    assert "99th percentile: 20 ms" in str(found["serve-overload"]["note"])
    _, found = serving.throughput(asked_of(most=26.0, capacity=40.0))
    assert found["serve-64-prompts"]["measured"] == pytest.approx(1.0)


def test_loads_last_longer_on_slow_machines() -> None:
    assert [asked_of(1.0, rate).seconds(8.0, 300) for rate in (100.0, 10.0, 0.5)] == [8.0, 30.0, 60.0]


# Like with like.


def prediction(text: str, log_prob: float) -> Prediction:
    return Prediction(text, (Candidate(text, log_prob),))


@pytest.mark.parametrize(("text", "log_prob", "same"), [("a", -1.001, True), ("a", -1.1, False), ("b", -1.0, False)])
def test_the_server_is_timed_only_if_its_answers_are_those_in_process(text: str, log_prob: float, same: bool) -> None:
    theirs = [{"prediction": text, "candidates": [{"text": text, "log_prob": log_prob}]}]
    assert serving.compared(theirs, [prediction("a", -1.0)])[0] is same


def test_mixed_rows_are_timed_only_if_log_probabilities_agree(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = common.Settings(smoke=True)
    monkeypatch.setattr(mixed, "largest_gap", lambda *_: 0.5)
    _, found = mixed.one_text(causal, settings)
    assert found["serve-one-text"]["measured"] is None
    assert "do not agree" in str(found["serve-one-text"]["note"])


def test_gaps_are_between_the_same_labels() -> None:
    ours = [Prediction("a", (), probabilities={"a": 0.75, "b": 0.25})]
    logs = torch.tensor([0.25, 0.75]).log().tolist()
    assert mixed.largest_gap(ours, [{"b": logs[0], "a": logs[1]}]) == pytest.approx(0, abs=1e-6)
    assert mixed.largest_gap(ours, [{"b": logs[1], "a": logs[0]}]) == pytest.approx(logs[1] - logs[0], abs=1e-6)


def test_prompts_of_one_template_differ(causal: Backbone) -> None:
    made = service.prompts(causal, service.LABELS, 3, seed=0)
    again = service.prompts(causal, service.LABELS, 3, seed=0)
    vectors = [one.slot_vectors for one in made if one.slot_vectors is not None]
    assert len(vectors) == 3
    assert not any(torch.equal(vectors[0], other) for other in vectors[1:])
    for one, other in zip(vectors, again, strict=True):
        assert other.slot_vectors is not None
        assert torch.equal(one, other.slot_vectors)
    assert all(one.answer_space.is_closed for one in made)


def test_without_the_packages_of_the_service_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert service.missing() is None
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert service.missing() == "uvicorn not installed; make bench installs it"


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
        (logits,) = [target_logits(causal, [reordered(item.inputs[0])], Learned(vectors[owner]))]
        ids = torch.tensor(item.choices[0].target_ids)
        expected = float(logits.log_softmax(-1).gather(1, ids[:, None]).sum())
        assert (first, second) == pytest.approx((expected, expected), abs=1e-3)
    assert not any(weight.requires_grad for weight in causal.model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in causal.model.state_dict().items())
