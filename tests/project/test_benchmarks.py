"""The benchmarks work (a smoke run of all of them), compare like with like, and say what they measured and no more."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import common, goals, peer, report, run

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.number_format import has_units
from ptuning.engine.forward import target_logits
from ptuning.engine.soft_prompt import PromptBatch
from tests.conftest import RECORDS, items_of, learned
from tests.processes import forked

ROOT = Path(__file__).resolve().parents[2]
NAMES = {
    "peft-short-16", "peft-short-64", "peft-short-16-auto", "peft-short-64-auto", "bf16-cpu", "ceiling-short-16",
    "ceiling-short-64", "late-sentences", "late-512", "shared-prefix", "time-to-peft-score", "fleet-16-cpu",
    "fleet-16-gpu", "workers-2", "ray-start", "reduced-bytes", "int8-memory", "int8-score", "candidates-100",
    "writing-32", "memory-worst", "rank-memory", "import-seconds", "help-seconds",
    "load-against-transformers", "serve-64-prompts", "serve-p99-64", "serve-peft-64", "serve-one-text",
    "serve-overhead-labels", "serve-overhead-written", "serve-overload", "serve-hot-load", "serve-1000-prompts",
    "deep-16", "deep-160", "deep-late-512", "deep-mixed-16", "deep-writing", "deep-memory",
}  # fmt: skip
WITHOUT_PEER = "peft is not installed"
WITHOUT_RAY = "a smoke run starts no Ray"
needs_peer = pytest.mark.skipif(not peer.is_installed(), reason=f"{WITHOUT_PEER}; make bench installs it")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a smoke run of all scripts."""
    out = tmp_path_factory.mktemp("smoke")
    program = f"""
import os, runpy, sys
os.chdir({str(ROOT)!r})
sys.path.insert(0, {str(ROOT)!r})
runpy.run_module("benchmarks.run", run_name="__main__", alter_sys=True)
"""
    with forked(program, "--smoke", "--threads=1", f"--out={out}", folder=out.parent / "said") as process:
        assert process.wait(800) == 0, process.out + process.err
    return out


@pytest.mark.timeout(900)  # several processes import torch; on a busy machine each takes its time
def test_every_script_runs_and_says_on_what(smoke: Path) -> None:
    results = goals.read_results(smoke)
    assert list(results) == run.known()
    for name, result in results.items():
        assert result["smoke"] is True
        assert result["cells"], name
        assert result["machine"]["cores"] >= 1
        assert result["versions"]["torch"]
        assert result["question"]
        assert result["method"]
        for found in spreads(result["cells"]):
            assert found["low"] <= found["median"] <= found["high"]


@pytest.mark.timeout(900)
def test_a_smoke_run_answers_what_it_can_and_gives_reasons(smoke: Path) -> None:
    summary = json.loads((smoke / "summary.json").read_text(encoding="utf-8"))
    assert summary.keys() == {"machine", "versions", "questions"}
    assert summary["questions"].keys() == NAMES
    for name, found in summary["questions"].items():
        assert found.keys() == {"goal", "measured", "low", "high", "unit", "note"}
        if name == "fleet-16-gpu":
            assert found["measured"] is None
            assert "no GPU" in found["note"]
        elif name == "bf16-cpu" and not has_units():
            assert found["note"] == "no units for bfloat16 on this processor"
        elif found["measured"] is None:
            # A random model may score anything; nothing else is an excuse.
            excused = (WITHOUT_PEER, WITHOUT_RAY, "torchao is not installed")
            random = ("late-sentences", "time-to-peft-score")
            assert name in random or any(text in found["note"] for text in excused), found["note"]
        elif name in ("int8-score", "serve-1000-prompts"):
            # A random model answers nothing right, and its prompts may find room in memory that is free already.
            assert found["measured"] >= 0
        else:
            assert 0 < found["low"] <= found["measured"] <= found["high"]


@pytest.mark.timeout(900)
def test_a_smoke_run_is_called_one_and_changes_no_document(smoke: Path) -> None:
    assert "smoke run" in (smoke / "report.md").read_text(encoding="utf-8")
    assert (smoke / "report.svg").read_text(encoding="utf-8").startswith("<svg")
    page = (smoke / "performance.md").read_text(encoding="utf-8")
    assert page != report.DOCS.read_text(encoding="utf-8")
    assert report.NOTHING not in page


def test_the_documented_tables_are_those_of_the_results() -> None:
    """Whoever commits results commits what is generated from them, too."""
    results = goals.read_results(common.RESULTS)
    page = report.DOCS.read_text(encoding="utf-8")
    assert not any(result["smoke"] for result in results.values())
    assert report.fill(page, report.tables(goals.summarise(results), results)) == page
    marks = {found[2] for found in report.MARKED.finditer(page)}
    assert marks == {"goals", "machine", "picture", *report.TABLES}


def spreads(value: Any) -> list[dict[str, float]]:
    """All medians with their repeats in a JSON value."""
    if isinstance(value, dict) and "median" in value:
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [found for one in inner for found in spreads(one)]


# Rounds and figures.


def test_rounds_run_each_contestant_once_in_a_drawn_order() -> None:
    seen: list[tuple[str, int]] = []

    def work(name: str) -> Any:
        def run(number: int) -> float:
            seen.append((name, number))
            return float(number)

        return run

    found = common.interleave({name: work(name) for name in "abc"}, repeats=20, seconds=60, seed=1)
    assert found == {name: [float(number) for number in range(20)] for name in "abc"}
    rounds = [tuple(name for name, number in seen if number == at) for at in range(20)]
    assert {tuple(sorted(order)) for order in rounds} == {("a", "b", "c")}
    assert len(set(rounds)) > 3
    first = list(seen)
    seen.clear()
    common.interleave({name: work(name) for name in "abc"}, repeats=20, seconds=60, seed=1)
    assert seen == first


def test_no_round_begins_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def work(number: int) -> int:
        now[0] += 10.0
        return number

    assert common.interleave({"a": work}, repeats=9, seconds=35, seed=0) == {"a": [0, 1, 2]}
    assert common.interleave({"a": work}, repeats=9, seconds=0, seed=0) == {"a": [0]}  # one is always run


def test_figures_are_medians_with_their_ends_and_ratios_stay_within_a_round() -> None:
    assert common.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "values": [3.0, 1.0, 2.0]}
    assert common.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert common.answer([2.0, 3.0], "facts") == {"measured": 2.5, "low": 2.0, "high": 3.0, "note": "facts; 2 rounds"}
    assert common.no_answer("no GPU") == {"measured": None, "low": None, "high": None, "note": "no GPU"}


# The summary and what is generated from it.


def result(**answers: object) -> dict[str, Any]:
    return {
        "smoke": False,
        "written": "2026-01-01",
        "machine": {"cores": 2, "memory_bytes": 2**34, "processor": "P|Q", "system": "Linux x", "gpu": None},
        "versions": {"torch": "2", "peft": None},
        "answers": answers,
        "cells": [],
        "question": "how fast?",
        "method": "so",
        "peer": None,
        "seconds": 1.0,
    }


def test_the_summary_has_every_goal_and_nothing_else() -> None:
    assert goals.GOALS.keys() == NAMES
    found = goals.summarise({"prefix": result(**{"shared-prefix": common.answer([4.0, 5.0]), "other": 1})})
    questions: Any = found["questions"]
    assert questions.keys() == NAMES
    assert questions["shared-prefix"] == {
        "goal": 4.0, "measured": 4.5, "low": 4.0, "high": 5.0, "unit": "times", "note": "2 rounds"
    }  # fmt: skip
    assert questions["late-512"]["measured"] is None
    assert questions["late-512"]["note"] == goals.NOT_RUN
    assert goals.summarise({})["machine"] is None


@pytest.mark.parametrize(
    ("name", "measured", "met"),
    [
        ("peft-short-16", 1.8, True),
        ("peft-short-16", 1.7, False),
        ("memory-worst", 0.9, True),
        ("help-seconds", 0.6, False),
    ],
)
def test_more_is_better_except_for_memory_and_seconds(name: str, measured: float, met: bool) -> None:
    assert goals.is_met(name, measured) is met


def test_a_script_that_fails_leaves_no_older_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "performance.md"
    page.write_text(report.DOCS.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(report, "DOCS", page)
    out = tmp_path / "results"
    common.write_json(out / "training.json", result())
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    assert run.main(common.Settings(out=out), ["training"]) == 1
    assert sorted(path.name for path in out.iterdir()) == ["summary.json"]


# Like with like.


def test_the_peer_reads_the_tokens_that_we_read(causal: Backbone) -> None:
    template = "[P*3] [X] [P*3] [Y]"
    items = items_of(causal, template, RECORDS)
    for item, row in zip(items, peer.rows_of(items), strict=True):
        own = item.choices[0].own_tokens
        assert len(row.ids) + 6 == item.tokens  # the stop token stands in no input
        assert row.ids == tuple(
            t for at, t in enumerate(item.inputs[0].token_ids) if at not in item.inputs[0].slot_positions
        )
        assert row.ids[-row.scored :] == item.choices[0].target_ids[:own]
        labels = row.labelled()["labels"]
        assert labels == [peer.IGNORED] * (len(row.ids) - own) + list(row.ids[-own:])


@needs_peer
@pytest.mark.filterwarnings("ignore")  # the peer's own
def test_the_peer_scores_what_we_score_and_leaves_the_backbone_as_it_was(causal: Backbone) -> None:
    """The same vectors in front give the same log-probabilities: what is compared in speed is the same computation."""
    template = "[P*3] [X] is [Y]"
    before = {name: weight.clone() for name, weight in causal.model.state_dict().items()}
    prompt = learned(causal, template)
    assert prompt.slot_vectors is not None
    items = items_of(causal, template, RECORDS, with_stop=False)
    # A BOS stands in front of our slots and behind the peer's.
    examples = [item.inputs[0] for item in items]
    rows = peer.rows_of(items)
    with peer.Peer(causal, slots=3, vectors=prompt.slot_vectors) as other:
        theirs, _ = other.score(rows, batch_rows=2)
    shifted = [reordered(example) for example in examples]
    ours = []
    for example, item in zip(shifted, items, strict=True):
        logits = target_logits(causal, [example], PromptBatch(prompt.slot_vectors))
        ids = torch.tensor(item.choices[0].target_ids)
        ours.append(float(logits.log_softmax(-1).gather(1, ids[:, None]).sum()))
    assert theirs == pytest.approx(ours, abs=1e-3)
    with peer.Peer(causal, slots=3) as other:
        trained = [weight for weight in other.model.parameters() if weight.requires_grad]
        started = [weight.detach().clone() for weight in trained]
        assert other.train(rows, epochs=1, batch_size=2) > 0
        assert trained
        assert not any(torch.equal(weight, start) for weight, start in zip(trained, started, strict=True))
    assert not causal.model.training
    assert not any(weight.requires_grad for weight in causal.model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in causal.model.state_dict().items())


def reordered(example: Any) -> Any:
    """Put the slots of a row in front of everything else, BOS included, as the peer does."""
    rest = [token for at, token in enumerate(example.token_ids) if at not in example.slot_positions]
    count = len(example.slot_positions)
    return replace(example, token_ids=(*([0] * count), *rest), slot_positions=tuple(range(count)))
