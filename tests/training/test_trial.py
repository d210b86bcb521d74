"""Trying a run out: what is chosen to be timed, how seconds are read off, and that nothing is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.engine import prefix_cache
from ptuning.progress import Progress
from ptuning.records import Record
from ptuning.training import trial
from ptuning.training.prepare import prepare
from ptuning.training.run import TrainingRun
from ptuning.training.spec import TrainSpec
from ptuning.training.trial import Seen, along, padded, spread, timed, try_out
from tests.conftest import WARM

LATE = "{x} and {x} [P:is] [P*2] [Y]"
FACTS: list[Record] = [
    {"x": "city " + "and France " * (index % 5), "y": ("yes", "no", "São Tomé")[index % 3]} for index in range(23)
]


def run_of(backbone: Backbone, template: str = WARM, **settings: Any) -> TrainingRun:
    config = TrainConfig.from_json({"epochs": 2, "batch_size": 4, **settings})
    spec = TrainSpec(template, FACTS[:15], dev=FACTS[15:], config=config)
    return TrainingRun(prepare(spec, backbone))


def tried(run: TrainingRun) -> Seen:
    return try_out(run, run.trainer(0), report=lambda _: None)


def test_the_places_are_spread_from_the_smallest_to_the_largest() -> None:
    assert spread([7.0], 5) == [0]
    assert spread([2.0, 1.0], 5) == [1, 0]
    weights = [float(index * 7 % 11) for index in range(11)]
    assert [weights[place] for place in spread(weights, 3)] == [0.0, 5.0, 10.0]


def test_seconds_are_read_off_between_those_timed() -> None:
    assert along([2.0, 4.0, 3.0, 1.0], {0: 2.0, 1: 6.0}).tolist() == [2.0, 6.0, 4.0, 1.0]
    assert along([2.0, 2.0], {0: 1.0, 1: 3.0}).tolist() == [2.0, 2.0]


def test_texts_are_padded_to_the_longest_that_runs_with_them() -> None:
    assert padded([(1,), (1, 2, 3), (4, 5)]) == 9
    assert padded([(1,) * 4000, (2,) * 10]) == 4010  # which is no pass together


def test_work_that_takes_long_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 100, 2))
    monkeypatch.setattr(trial, "clock", lambda: float(next(ticks)))
    calls: list[int] = []
    assert timed(lambda: calls.append(1)) == 2.0
    assert timed(lambda: calls.append(1), times=3, enough=99.0) == 2.0
    assert len(calls) == 4


@pytest.mark.parametrize("tune", ["frozen", "tuned", "lora"])
def test_nothing_is_learned_and_nothing_is_left(causal: Backbone, tmp_path: Path, tune: str) -> None:
    if tune == "lora":
        pytest.importorskip("peft")
    run = run_of(causal, tune=tune)
    trainer = run.trainer(0)
    before, weights = trainer.vectors(), {name: one.clone() for name, one in trainer.weights.items()}
    state = torch.random.get_rng_state()
    seen = try_out(run, trainer, report=lambda _: None)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(trainer.vectors(), before)
    assert all(torch.equal(one, weights[name]) for name, one in trainer.weights.items())
    assert all(weight.grad is None for weight in trainer.trained_parameters())
    assert not any(module.training for module in trainer.backbone.model.modules())
    trained = 4 * trainer.trainable_parameters
    assert seen.gradients == trained
    assert seen.optimizer >= 2 * trained
    assert not list(tmp_path.iterdir())


def test_the_longest_pass_of_all_epochs_is_taken(causal: Backbone) -> None:
    run = run_of(causal)
    seen = tried(run)
    longest = max(len(row.token_ids) for item in run.items["train"] for row in item.inputs)
    assert seen.longest_pass == (4, longest)
    assert seen.steps == 4


def test_what_is_kept_is_counted_for_all_rows(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 2)
    run = run_of(causal, LATE)
    seen = tried(run)
    trainer = run.trainer(0)
    rows = [row for items in run.items.values() for item in items for row in item.inputs]
    assert trainer.prefix_cache.prepare(rows)
    assert seen.kept_bytes == pytest.approx(trainer.prefix_cache.memory_bytes, rel=0.01)
    assert 0 < seen.trial_bytes <= seen.kept_bytes
    assert seen.kept_seconds > 0
    assert tried(run_of(causal, LATE, cache_memory=0.0)).kept_bytes == 0


def test_checkpointing_holds_less(causal: Backbone) -> None:
    plain, saving = (tried(run_of(causal, batch_size=8, checkpointing=on)) for on in (False, True))
    assert saving.activations < plain.activations


def test_progress_ends_where_it_was_to(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 2)
    found: list[Progress] = []
    run = run_of(causal, LATE)
    try_out(run, run.trainer(0), report=found.append)
    assert {one.stage for one in found} == {"estimate"}
    assert found[-1].done == found[-1].total == len(found)
