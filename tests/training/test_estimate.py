"""The estimate of a run: its parts add up, it follows the settings, and nothing is learned or left."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ptuning
from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.engine import prefix_cache
from ptuning.errors import RecordError, TemplateError, TrainingError
from ptuning.progress import Progress
from ptuning.records import Record
from ptuning.training import estimate as module
from ptuning.training.estimate import Forecast, estimate, sampled
from ptuning.training.prepare import prepare
from ptuning.training.run import TrainingRun
from ptuning.training.spec import TrainSpec
from tests.conftest import RECORDS, WARM, small_memory

LATE = "{x} and {x} [P:is] [P*2] [Y]"
FACTS: list[Record] = [
    {"x": "city " + "and France " * (index % 5), "y": ("yes", "no", "São Tomé")[index % 3]} for index in range(23)
]


def estimated(backbone: Backbone, template: str = WARM, **settings: Any) -> Forecast:
    config = TrainConfig.from_json({"epochs": 2, "batch_size": 2, **settings})
    return estimate(template, RECORDS, backbone=backbone, dev=RECORDS, config=config)


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all that is timed take a second."""
    monkeypatch.setattr(module, "clock", lambda: 0.0)
    monkeypatch.setattr(module, "timed", lambda work: (work(), 1.0)[1])


@pytest.mark.usefixtures("ticking")
def test_seconds_add_up(causal: Backbone) -> None:
    one = estimated(causal)
    found = one.seconds
    assert found["epoch"] == pytest.approx(3.0, rel=0.2)  # a second for each of 3 steps
    assert found["dev"] == 1.0
    assert found["answers"] == 2.0  # scored once more, and written
    assert found["total"] == pytest.approx(2 * found["epoch"] + 3 * 1.0 + found["saving"] + 2.0)
    several = estimated(causal, num_restarts=3).seconds
    assert several["total"] == pytest.approx(3 * (2 * several["epoch"] + 3.0 + several["saving"]) + 2.0)


def test_bytes_add_up(causal: Backbone) -> None:
    found = estimated(causal).memory
    sums = ("training", "before", "peak", "on_disk")
    assert found["training"] == sum(value for name, value in found.items() if name not in sums)
    assert found["peak"] == max(found["training"], found["before"])
    assert found["weights"] == pytest.approx(4 * causal.parameters, rel=0.01)  # and what it keeps besides weights
    assert (found["constant_part"], found["on_disk"], found["other_starts"]) == (0, 0, 0)
    assert estimated(causal, num_restarts=2).memory["other_starts"] > 0


def test_the_kv_cache_is_counted_for_all_rows(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 2)
    monkeypatch.setattr(module, "TIMED_STEPS", 1)
    monkeypatch.setattr(module, "SCORED", 1)
    spec = TrainSpec(LATE, FACTS[:15], dev=FACTS[15:], config=TrainConfig(epochs=2, batch_size=2))
    run = TrainingRun(prepare(spec, causal))
    cache = run.trainer(0).learner.prefix_cache
    assert cache.prepare([row for items in run.items.values() for item in items for row in item.inputs])
    found = module.estimate_spec(spec, causal)
    assert found.memory["constant_part"] == pytest.approx(cache.memory_bytes, rel=0.01)
    assert found.seconds["constant_part"] > 0
    monkeypatch.setattr("ptuning.engine.prefix_cache.free_bytes", lambda _: 800)
    for disk in (0.0, 4e-6, 1.0):
        config = TrainConfig(epochs=2, batch_size=2, cache_memory=0.5, cache_disk=disk)
        small = module.estimate_spec(replace(spec, config=config), causal)
        assert small.memory["constant_part"] == 400
        assert small.memory["on_disk"] == pytest.approx(min(disk * 1e9, cache.memory_bytes - 400), rel=0.01)


@pytest.mark.usefixtures("ticking")
def test_texts_without_room_take_time_in_every_epoch(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that are tried find room, and not all rows will."""
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 2)
    monkeypatch.setattr(module, "TIMED_STEPS", 1)
    monkeypatch.setattr(module, "SCORED", 1)
    seconds = itertools.count()
    monkeypatch.setattr(module, "clock", lambda: float(next(seconds)))
    found = []
    for free in (1 << 40, 20_000):
        monkeypatch.setattr("ptuning.engine.prefix_cache.free_bytes", lambda _, free=free: free)
        spec = TrainSpec(LATE, FACTS[:15], dev=FACTS[15:], config=TrainConfig(epochs=2, batch_size=2, cache_memory=0.5))
        found.append(module.estimate_spec(spec, causal))
    roomy, tight = found
    assert tight.memory["constant_part"] < roomy.memory["constant_part"]
    assert tight.seconds["epoch"] > roomy.seconds["epoch"]
    assert tight.seconds["dev"] > roomy.seconds["dev"]


def test_it_is_public_and_its_numbers_are_json(causal: Backbone) -> None:
    config = TrainConfig(epochs=2, batch_size=2)
    found = ptuning.estimate(WARM, RECORDS, backbone=causal, dev=RECORDS, config=config)
    values = json.loads(json.dumps(found.to_json()))
    assert values["steps"] == 3
    assert values["longest_pass"] == {"rows": 2, "tokens": found.longest_pass[1]}
    assert values["memory_bytes"]["peak"] == found.memory["peak"]
    assert values["seconds"]["total"] == found.seconds["total"] > 0
    assert (values["train_records"], values["dev_records"], values["train_backbone"]) == (5, 5, "none")


def test_arguments_are_checked_as_training_checks_them(causal: Backbone) -> None:
    with pytest.raises(TemplateError, match="has no slots, so there is nothing to learn"):
        estimate("[X] is [Y]", RECORDS, backbone=causal)
    with pytest.raises(RecordError):
        estimate(WARM, [{"x": "Kenya"}], backbone=causal)


def test_a_tuned_backbone_takes_a_copy_gradients_and_moments(causal: Backbone) -> None:
    frozen, tuned = estimated(causal).memory, estimated(causal, train_backbone="full").memory
    size = 4 * causal.parameters
    assert tuned["trained"] - frozen["trained"] == size
    assert tuned["gradients"] - frozen["gradients"] == size
    assert tuned["optimizer"] - frozen["optimizer"] == 2 * size


@pytest.mark.parametrize("train_backbone", ["none", "full", "lora"])
def test_nothing_is_learned_and_nothing_is_left(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_backbone: str
) -> None:
    if train_backbone == "lora":
        pytest.importorskip("peft")
    made = []
    real = TrainingRun.trainer

    def watch(self: TrainingRun, number: int, **named: Any) -> Any:
        trainer = real(self, number, **named)
        weights = {name: one.clone() for name, one in trainer.learner.weights.items()}
        made.append((trainer.learner, trainer.learner.vectors(), weights))
        return trainer

    monkeypatch.setattr(TrainingRun, "trainer", watch)
    monkeypatch.chdir(tmp_path)
    state = torch.random.get_rng_state()
    estimated(causal, train_backbone=train_backbone)
    ((learner, vectors, weights),) = made
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(learner.vectors(), vectors)
    assert all(torch.equal(one, weights[name]) for name, one in learner.weights.items())
    assert all(weight.grad is None for weight in learner.parameters())
    assert not any(module.training for module in learner.backbone.model.modules())
    assert not learner.prefix_cache.tokens
    assert not list(tmp_path.iterdir())


def test_an_estimate_halves_no_pass(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what a run takes, so a pass that does not fit is its answer."""
    small_memory(monkeypatch, 20)
    with pytest.raises(TrainingError, match=r"a pass of \d+ tokens does not fit into the memory of cpu"):
        estimated(causal)


def test_the_longest_pass_of_all_epochs_is_taken(causal: Backbone) -> None:
    spec = TrainSpec(WARM, FACTS[:15], dev=FACTS[15:], config=TrainConfig(epochs=2, batch_size=4))
    found = module.estimate_spec(spec, causal)
    items = prepare(spec, causal).items["train"]
    assert found.longest_pass == (4, max(len(row.token_ids) for item in items for row in item.inputs))
    assert found.steps == 4


def test_a_sample_is_spread_over_the_costs() -> None:
    assert sampled([7.0], float, 5) == [7.0]
    assert sampled([2.0, 1.0], float, 5) == [1.0, 2.0]
    assert sampled([float(index * 7 % 10) for index in range(10)], float, 5) == [1.0, 3.0, 5.0, 7.0, 9.0]


def test_progress_ends_where_it_was_to(causal: Backbone) -> None:
    found: list[Progress] = []
    estimate(WARM, RECORDS, backbone=causal, report=found.append)
    assert {one.stage for one in found} == {"estimate"}
    assert found[-1].done == found[-1].total == len(found)


def test_deep_slots_in_front_cost_no_token_and_nothing_is_kept_behind_them(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 2)
    config = TrainConfig(epochs=1, batch_size=2)
    plain = module.estimate_spec(TrainSpec("[X] is [P] [Y]", FACTS[:15], dev=FACTS[15:], config=config), causal)
    deep = module.estimate_spec(TrainSpec("[D*9] [X] is [P] [Y]", FACTS[:15], dev=FACTS[15:], config=config), causal)
    assert (plain.deep_in_front, deep.deep_in_front) == (0, 9)
    assert plain.memory["constant_part"] > 0
    assert deep.memory["constant_part"] == 0
    assert deep.longest_pass[1] <= plain.longest_pass[1]
    assert deep.to_json()["deep_in_front"] == 9
