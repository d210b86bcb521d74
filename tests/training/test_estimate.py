"""The estimate of a run: every part of it adds up, follows the settings, and agrees with what training takes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

import ptuning
from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.errors import RecordError, TemplateError
from ptuning.training import estimate as module
from ptuning.training.estimate import Forecast, estimate
from ptuning.training.trial import Seen
from tests.conftest import RECORDS, WARM

SEEN = Seen(
    kept_seconds=3.0,
    kept_bytes=1000,
    epoch_seconds=10.0,
    dev_seconds=2.0,
    answer_seconds=4.0,
    written_seconds=1e-9,
    gradients=50,
    optimizer=100,
    activations=200,
    trial_bytes=300,
    peak=10**10,
    steps=5,
    longest_pass=(4, 20),
)


def estimated(backbone: Backbone, **settings: Any) -> Forecast:
    config = TrainConfig.from_json({"epochs": 2, "batch_size": 2, **settings})
    return estimate(WARM, RECORDS, backbone=backbone, dev=RECORDS, config=config)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "try_out", lambda run, trainer, report: SEEN)
    monkeypatch.setattr("ptuning.training.trial.clock", lambda: 0.0)


@pytest.mark.usefixtures("seen")
def test_seconds_add_up(causal: Backbone) -> None:
    found = estimated(causal).seconds
    assert found.saving < 0.1
    assert found.total == pytest.approx(3.0 + 2 * 10.0 + 3 * 2.0 + 4.0 + found.saving)
    several = estimated(causal, starts=3).seconds
    assert several.total == pytest.approx(3.0 + 3 * (26.0 + several.saving) + 4.0)


@pytest.mark.usefixtures("seen")
def test_bytes_add_up_to_what_was_seen_with_all_that_is_kept(causal: Backbone) -> None:
    found = estimated(causal).memory
    assert found.training == SEEN.peak - SEEN.trial_bytes + SEEN.kept_bytes
    assert found.peak == found.training
    assert replace(found, before=2 * found.training).peak == 2 * found.training
    assert found.constant_part == 1000
    assert found.weights == pytest.approx(4 * causal.parameters, rel=0.01)  # and what it keeps besides weights
    several = estimated(causal, starts=2).memory
    assert several.training - found.training == several.other_starts > 0


@pytest.mark.usefixtures("seen")
def test_what_does_not_fit_into_memory_is_on_the_disk(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptuning.engine.prefix_cache.free_bytes", lambda _: 800)
    found = estimated(causal, cache_memory=0.5).memory
    assert (found.constant_part, found.on_disk) == (400, 600)


def test_it_is_public_and_its_numbers_are_json(causal: Backbone) -> None:
    config = TrainConfig(epochs=2, batch_size=2)
    found = ptuning.estimate(WARM, RECORDS, backbone=causal, dev=RECORDS, config=config)
    values = json.loads(json.dumps(found.to_json()))
    assert values["steps"] == 3
    assert values["longest_pass"] == {"rows": 2, "tokens": found.longest_pass[1]}
    assert values["memory_bytes"]["peak"] == found.memory.peak
    assert values["seconds"]["total"] == found.seconds.total > 0
    assert (values["train_records"], values["dev_records"], values["tune"]) == (5, 5, "frozen")


def test_the_module_of_dry_runs_does_not_hide_it() -> None:
    import ptuning.experiment.dry_run

    assert callable(ptuning.estimate)


def test_arguments_are_checked_as_training_checks_them(causal: Backbone) -> None:
    with pytest.raises(TemplateError, match="has no slots, so there is nothing to learn"):
        estimate("[X] is [Y]", RECORDS, backbone=causal)
    with pytest.raises(RecordError):
        estimate(WARM, [{"x": "Kenya"}], backbone=causal)


def test_a_tuned_backbone_takes_a_copy_gradients_and_moments(causal: Backbone) -> None:
    frozen, tuned = estimated(causal).memory, estimated(causal, tune="tuned").memory
    size = 4 * causal.parameters
    assert tuned.trained - frozen.trained == size
    assert tuned.gradients - frozen.gradients == size
    assert tuned.optimizer - frozen.optimizer >= 2 * size
