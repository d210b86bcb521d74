"""A plan on paper: what follows from the constants, and where more GPUs stop helping."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptuning.cli import terminal
from ptuning.errors import ConfigError
from ptuning.experiment.forecast import CONSTANTS, Paper

SMALL, LARGE = Paper(1.35e8), Paper(7e10)


def test_a_step_is_bound_by_what_takes_longest() -> None:
    """Launching for short rows, products for long ones, reading for a model of few layers."""
    assert SMALL.step(8, 14) == pytest.approx(30 * 1e-3 + 2e-3 + 4e-3)
    products = 4 * 7e9 * 64 * 512 / (989e12 * 0.35)
    assert Paper(7e9).step(64, 512) == pytest.approx(products + 6e-3)
    assert Paper(7e9, layers=1).step(1, 1) == pytest.approx(2 * 14e9 / 3.35e12 + 6e-3)


def test_a_model_takes_as_many_gpus_as_its_weights_need() -> None:
    assert [Paper(weights).replica for weights in (1.35e8, 7e9, 3.2e10, 7e10)] == [1, 1, 2, 4]
    assert Paper(7e10, weight_bytes=1).replica == 2
    assert Paper(7e10, split=8).replica == 8
    assert LARGE.on(1, 10, 1.0).seconds is None
    assert LARGE.on(8, 10, 1.0).used == 8
    assert LARGE.on(1000, 10, 1.0).used == 40  # ten units on four GPUs each, and the others have nothing to do


@given(st.integers(1, 2000), st.integers(1, 5000), st.floats(0.1, 1e4))
def test_more_gpus_are_never_slower_and_no_more_are_used_than_there_are(gpus: int, units: int, seconds: float) -> None:
    fewer, more = SMALL.on(gpus, units, seconds), SMALL.on(gpus + 1, units, seconds)
    assert fewer.seconds is not None
    assert more.seconds is not None
    assert more.seconds <= fewer.seconds
    assert fewer.used == min(gpus, units)
    assert fewer.dollars == pytest.approx(fewer.used * fewer.seconds / 3600 * 2.5)


@pytest.mark.parametrize("name", CONSTANTS)
def test_every_constant_counts_and_may_be_given(name: str) -> None:
    """One that nothing reads would say nothing, and each says whether it is measured or assumed."""
    weights = 1.35e8 if name == "tuned_flops_per_weight" else 7e10  # 70B cannot be tuned
    layers = None if name in ("layer_seconds", "reduce_seconds") else 1  # of many layers, launching takes longest
    factor = {"tuned_flops_per_weight": 100.0, "flops_per_weight": 2.0}.get(name, 0.5)
    plain, other = (Paper(weights, layers, constants=given) for given in (None, {name: factor * CONSTANTS[name].value}))
    assert [line.on for line in plain.lines()] != [line.on for line in other.lines()]
    assert CONSTANTS[name].origin.startswith(("measured: ", "assumed"))
    constants = other.to_json()["constants"]
    assert isinstance(constants, dict)
    assert constants[name]["origin"] == "given"


SHOWN = (
    "LAMA, p-tuning in fleets, 5 seeds", "LAMA, p-tuning alone, 5 seeds", "LAMA, fine-tuning, 5 seeds",
    "10,000 prompts of 150 facts, alone", "the same in fleets of 16", "one prompt, 1,000 facts",
)  # fmt: skip


def test_the_page_has_the_plan_of_the_constants() -> None:
    """The table of docs/scale.md, line by line."""
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    for name, weights in {"135M": 1.35e8, "7B": 7e9, "70B": 7e10}.items():
        for line in Paper(weights).lines():
            if line.what in SHOWN:
                cells = [
                    "does not fit"
                    if one.seconds is None
                    else f"{terminal.duration(one.seconds)}, ${one.dollars:,.1f} ({one.used:,})"
                    for one in line.on
                ]
                assert f"| {' | '.join([line.what, name, *cells])} |\n" in page


def test_tuning_all_weights_needs_a_gpu_that_holds_them() -> None:
    assert [line.on[0].seconds for line in Paper(7e9).lines() if "fine-tuning" in line.what] == [None]
    assert [line.on[0].seconds is None for line in SMALL.lines() if "fine-tuning" in line.what] == [False]


def test_fleets_take_fewer_gpu_hours_than_prompts_alone() -> None:
    """And on very many GPUs they are done later: there are fewer units than GPUs."""
    lines = {line.what: line for line in SMALL.lines((1, 1000))}
    alone, fleets = lines["10,000 prompts of 150 facts, alone"], lines["the same in fleets of 16"]
    assert fleets.on[0].dollars is not None
    assert alone.on[0].dollars is not None
    assert fleets.on[0].dollars < alone.on[0].dollars / 3
    assert fleets.on[1].used == 625


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": 0.0}, "weights is 0; it must be a number above 0"),
        ({"weights": float("nan")}, "weights is nan"),
        ({"weights": 1e9, "layers": 0}, "layers is 0"),
        (
            {"weights": 1e9, "constants": {"layer_second": 1.0}},
            "'layer_second'. Did you mean 'layer_seconds'?",
        ),
        ({"weights": 1e9, "constants": {"layer_seconds": -1.0}}, "layer_seconds is -1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError) as failure:
        Paper(**options)  # type: ignore[arg-type]
    assert said in str(failure.value)
    with pytest.raises(ConfigError, match="gpus is 0"):
        SMALL.lines((0,))
