"""Estimates on paper: what follows from the constants."""

import pytest
from experiments.plan import CONSTANTS, Planner

SMALL, LARGE = Planner(1.35e8), Planner(7e10)


def test_a_step_is_bound_by_what_takes_longest() -> None:
    """Launching for short rows, products for long ones, reading for a model of few layers."""
    assert SMALL.step(8, 14) == pytest.approx(30 * 1e-3 + 2e-3 + 4e-3)
    products = 4 * 7e9 * 64 * 512 / (989e12 * 0.35)
    assert Planner(7e9).step(64, 512) == pytest.approx(products + 6e-3)
    assert Planner(7e9, layers=1).step(1, 1) == pytest.approx(2 * 14e9 / 3.35e12 + 6e-3)


def test_a_model_takes_as_many_gpus_as_its_weights_need() -> None:
    assert [Planner(weights).gpus_per_model for weights in (1.35e8, 7e9, 3.2e10, 7e10)] == [1, 1, 2, 4]
    assert Planner(7e10, weight_bytes=1).gpus_per_model == 2
    assert LARGE.on(1, 10, 1.0).seconds is None
    assert LARGE.on(1000, 10, 1.0).used == 40  # ten jobs on four GPUs each


@pytest.mark.parametrize("name", CONSTANTS)
def test_every_constant_counts(name: str) -> None:
    weights = 1.35e8 if name == "tuned_flops_per_weight" else 7e10  # 70B cannot be tuned
    layers = None if name in ("layer_seconds", "reduce_seconds") else 1
    factor = {"tuned_flops_per_weight": 100.0, "flops_per_weight": 2.0}.get(name, 0.5)
    plain = Planner(weights, layers).table((8, 1000))
    assert Planner(weights, layers, constants={name: factor * CONSTANTS[name][0]}).table((8, 1000)) != plain


def test_tuning_all_weights_needs_a_gpu_that_holds_them_and_fleets_cost_less() -> None:
    small, large = SMALL.table((1, 1000)), Planner(7e9).table((1,))
    assert large["LAMA, fine-tuning, 5 seeds"][0].seconds is None
    assert small["LAMA, fine-tuning, 5 seeds"][0].seconds is not None
    alone, fleets = small["10,000 prompts of 150 facts, alone"], small["the same in fleets of 16"]
    assert (fleets[0].dollars or 0) < (alone[0].dollars or 0) / 3
    assert fleets[1].used == 625
