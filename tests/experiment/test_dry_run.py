"""Estimates: tokens times passes over a measured speed, finished cells left out, nothing run but the measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.questions import as_questions
from ptuning.experiment import dry_run as module
from ptuning.experiment.cells import Job
from ptuning.experiment.dry_run import Estimate, estimate
from ptuning.experiment.plan import methods as known
from ptuning.experiment.suite import Suite
from ptuning.method.base import Setup, Task
from ptuning.method.in_context import in_context_tokens
from ptuning.records import Record
from ptuning.template.language import Template
from tests.conftest import WARM, bound

WORDS = ("yes", "good", "great")
FACTS: list[Record] = [{"x": f"Kenya {at}", "y": WORDS[at % 3]} for at in range(30)]
FAST = TrainConfig(epochs=4, batch_size=4)


def suite(
    backbone: Backbone, out: Path, methods: Sequence[str], *, config: TrainConfig = FAST, tries: int = 1, seeds: int = 1
) -> Suite:
    train, dev = as_questions(FACTS[:20]), as_questions(FACTS[20:24])
    task = Task("P1", train, dev, Template.parse("[X] is [Y] ."), Template.parse(WARM), WORDS, single_token=True)
    job = Job(task, as_questions(FACTS[24:]), {})
    return Suite(out, jobs=[job], methods=methods, seeds=seeds, backbone=backbone, config=config, tries=tries)


@pytest.fixture
def at_100_tokens_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_tokens_per_second", lambda *_: 100.0)


def seconds(found: Sequence[Estimate]) -> dict[str, Any]:
    return {one.cell.method: one.seconds for one in found}


@pytest.mark.usefixtures("at_100_tokens_per_second")
def test_an_estimate_is_tokens_times_passes_over_speed(causal: Backbone, tmp_path: Path) -> None:
    examples = bound(causal, WARM).examples(FACTS[:20])
    tokens = sum(len(example.token_ids) for example in examples) / 20
    found = seconds(estimate(suite(causal, tmp_path, ["majority", "manual", "p-tuning", "fine-tuning", "in-context"])))
    assert found["majority"] == 0.0  # never asks the backbone
    assert found["manual"] == pytest.approx(6 * tokens / 100)
    for name in ("p-tuning", "fine-tuning"):
        on_train, on_dev = known[name].passes or (0.0, 0.0)
        assert found[name] == pytest.approx((6 + 4 * (on_train * 20 + on_dev * 4)) * tokens / 100)
    setup = Setup(causal, FAST)
    task = next(iter(suite(causal, tmp_path, []).jobs.values())).task
    assert found["in-context"] == pytest.approx(in_context_tokens(task, setup, 6) / 100)  # no epochs


@pytest.mark.usefixtures("at_100_tokens_per_second")
def test_tries_and_starts_and_epochs_count_where_something_is_trained(causal: Backbone, tmp_path: Path) -> None:
    def of(config: TrainConfig = FAST, tries: int = 1) -> dict[str, Any]:
        names = ["manual", "p-tuning", "p-tuning@random-weights", "p-tuning+fine-tuning", "fine-tuning"]
        return seconds(estimate(suite(causal, tmp_path, names, config=config, tries=tries)))

    plain = of()
    test_part = plain["manual"]
    assert plain["p-tuning@random-weights"] == plain["p-tuning"]

    def training(found: dict[str, Any], name: str) -> float:
        return float((found[name] - test_part) / (plain[name] - test_part))

    twice, starts, epochs = of(tries=2), of(replace(FAST, starts=3)), of(replace(FAST, epochs=8))
    assert [found["manual"] for found in (twice, starts, epochs)] == [test_part] * 3
    assert [training(twice, name) for name in ("p-tuning", "fine-tuning")] == pytest.approx([2, 2])
    # Several prompts are trained where there are slots.
    assert training(starts, "fine-tuning") == pytest.approx(1)
    slots = ("p-tuning", "p-tuning@random-weights", "p-tuning+fine-tuning")
    assert [training(starts, name) for name in slots] == pytest.approx([3, 3, 3])
    assert training(epochs, "p-tuning") == pytest.approx(2)


@pytest.mark.usefixtures("at_100_tokens_per_second")
def test_rows_without_labels_are_answered_too(causal: Backbone, tmp_path: Path) -> None:
    def of(unlabelled: int) -> list[Any]:
        found = suite(causal, tmp_path, ["manual", "p-tuning", "in-context"])
        (name, job) = next(iter(found.jobs.items()))
        found.jobs = {name: replace(job, unlabelled=as_questions(FACTS[:unlabelled]) if unlabelled else None)}
        return list(seconds(estimate(found)).values())

    assert all(more > plain for more, plain in zip(of(3), of(0), strict=True))


def test_finished_cells_take_no_time_and_need_no_measurement(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(suite(causal, tmp_path, ["manual"]).run())
    found = estimate(suite(causal, tmp_path, ["manual", "in-context"], seeds=2))
    assert [(one.cell.method, one.cell.seed, one.seconds is None) for one in found] == [
        ("manual", 0, True), ("in-context", 0, False), ("in-context", 1, False),
    ]  # fmt: skip
    monkeypatch.setattr(module, "_tokens_per_second", None)  # would raise if it were called
    assert [one.seconds for one in estimate(suite(causal, tmp_path, ["manual"]))] == [None]


def test_the_measurement_leaves_nothing(backbone: Backbone, tmp_path: Path) -> None:
    found = estimate(suite(backbone, tmp_path / "out", ["manual", "p-tuning"]))
    assert all(one.seconds is not None and one.seconds > 0 for one in found)
    assert not (tmp_path / "out").exists()
