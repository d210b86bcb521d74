"""The benchmarks run (a smoke run), compare like with like, and are documented as measured."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import common, goals, load, peer, report, run, serving

from ptuning.backbone.backbone import Backbone
from ptuning.engine.forward import target_logits
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.prompt.prediction import Candidate, Prediction
from tests.conftest import RECORDS, ROOT, items_of, learned
from tests.processes import forked

# Scripts that start many processes, which takes minutes.
SLOW = {"startup", "memory", "workers", "training", "serving"}
needs_peer = pytest.mark.skipif(not peer.is_installed(), reason="peft is not installed; make bench installs it")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a smoke run."""
    out = tmp_path_factory.mktemp("smoke")
    program = f"""
import os, runpy, sys
os.chdir({str(ROOT)!r})
sys.path.insert(0, {str(ROOT)!r})
runpy.run_module("benchmarks.run", run_name="__main__", alter_sys=True)
"""
    names = [name for name in run.known() if name not in SLOW]
    options = ["--smoke", "--threads=1", f"--out={out}", "--only", *names]
    with forked(program, *options, folder=out.parent / "said") as process:
        assert process.wait(800) == 0, process.out + process.err
    return out


@pytest.mark.timeout(900)
def test_a_smoke_run(smoke: Path) -> None:
    """It measures every goal that it can, is called a smoke run, and changes no document."""
    results = goals.read_results(smoke)
    assert set(results) == set(run.known()) - SLOW
    for name, result in results.items():
        assert result["smoke"] is True
        assert result["cells"], name
        assert result["versions"]["torch"]
    questions = json.loads((smoke / "summary.json").read_text(encoding="utf-8"))["questions"]
    assert questions.keys() == goals.GOALS.keys()
    assert sum(question["measured"] is not None for question in questions.values()) > 12
    for question in questions.values():
        if question["measured"] is None:
            assert question["note"]
        else:
            assert 0 <= question["low"] <= question["measured"] <= question["high"]
    assert "smoke run" in (smoke / "report.md").read_text(encoding="utf-8")
    page = (smoke / "performance.md").read_text(encoding="utf-8")
    assert page != report.DOCS.read_text(encoding="utf-8")


def test_the_documented_tables_are_those_of_the_results() -> None:
    """Whoever commits results commits what is generated from them, too."""
    results = goals.read_results(common.RESULTS)
    page = report.DOCS.read_text(encoding="utf-8")
    assert not any(result["smoke"] for result in results.values())
    assert report.fill(page, report.tables(goals.summarise(results), results)) == page


def test_rounds_run_each_contestant_once_in_a_drawn_order() -> None:
    seen: list[tuple[str, int]] = []

    def work(name: str) -> Callable[[int], int]:
        def run(number: int) -> int:
            seen.append((name, number))
            return number

        return run

    contestants = {name: work(name) for name in "abc"}
    rounds = common.interleave(contestants, repeats=20, seconds=60, seed=1)
    assert rounds == {name: list(range(20)) for name in "abc"}
    orders = {tuple(name for name, number in seen if number == at) for at in range(20)}
    assert {tuple(sorted(order)) for order in orders} == {("a", "b", "c")}
    assert len(orders) > 3
    assert common.interleave(contestants, repeats=9, seconds=0, seed=0) == {name: [0] for name in "abc"}


def test_latency_counts_from_when_a_request_was_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender that is late must not make the service look faster: two requests were due five seconds ago."""
    monkeypatch.setattr(load, "plan", lambda *_: [load.Arrival(-5.0, 0, 0), load.Arrival(-5.0, 1, 1)])
    material = load.Material("http://127.0.0.1:9", ("a", "b"), ("Kenya", "Peru"))
    sent = asyncio.run(load.send(load.Load(1.0, 1.0), material))
    assert [request.status for request in sent.requests] == [load.NO_ANSWER] * 2
    assert min(sent.late, *(request.latency for request in sent.requests)) >= 5.0


@pytest.mark.parametrize(("text", "log_prob", "same"), [("a", -1.001, True), ("a", -1.1, False), ("b", -1.0, False)])
def test_the_server_is_timed_only_if_its_answers_are_those_in_process(text: str, log_prob: float, same: bool) -> None:
    theirs = [{"prediction": text, "candidates": [{"text": text, "log_prob": log_prob}]}]
    assert serving.compared(theirs, [Prediction("a", (Candidate("a", -1.0),))])[0] is same


@needs_peer
@pytest.mark.filterwarnings("ignore")  # the peer's own
def test_the_peer_scores_what_we_score_and_leaves_the_backbone_as_it_was(causal: Backbone) -> None:
    """The same vectors in front give the same log-probabilities; with one adapter, and with one for each question."""
    before = {name: weight.clone() for name, weight in causal.model.state_dict().items()}
    prompt = learned(causal, "[P*3] [X] is [Y]")
    assert prompt.slot_vectors is not None
    items = items_of(causal, "[P*3] [X] is [Y]", RECORDS, with_stop=False)
    vectors = [prompt.slot_vectors, prompt.slot_vectors + 0.5]

    def score(item: Any, prompt_vectors: torch.Tensor) -> float:
        logits = target_logits(causal, [reordered(item.inputs[0])], PromptBatch(prompt_vectors))
        ids = torch.tensor(item.choices[0].target_ids)
        return float(logits.log_softmax(-1).gather(1, ids[:, None]).sum())

    with peer.Peer(causal, slots=3, vectors=vectors[0]) as other:
        theirs, _ = other.score(peer.rows_of(items), batch_rows=2)
    assert theirs == pytest.approx([score(item, vectors[0]) for item in items], abs=1e-3)
    owners = [at % 2 for at in range(len(items))]
    with peer.Peers(causal, vectors) as many:
        scores = many.score([peer.rows_of([item]) for item in items], owners)
    expected = [score(item, vectors[owner]) for item, owner in zip(items, owners, strict=True)]
    assert [first for (first,) in scores] == pytest.approx(expected, abs=1e-3)
    assert not causal.model.training
    assert not any(weight.requires_grad for weight in causal.model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in causal.model.state_dict().items())


def reordered(example: Any) -> Any:
    """Put the slots of a row before everything else, BOS included, as the peer does."""
    rest = [token for at, token in enumerate(example.token_ids) if at not in example.slot_positions]
    count = len(example.slot_positions)
    return replace(example, token_ids=(*([0] * count), *rest), slot_positions=tuple(range(count)))
