"""``ptuning plan``: what it prints, and what it refuses."""

from __future__ import annotations

import json

import pytest

from tests.cli.test_app import fails, works


def test_a_plan_names_what_it_rests_on() -> None:
    out = works("plan", "--backbone-params", "70e9", "--gpus", "1", "--set", "layer_seconds=0.0005")
    assert "7e+10 weights in 80 layers, 140 GB, each copy on 4 GPUs; on paper\n" in out
    assert "does not fit" in " ".join(out.split())
    assert "(given)" in out
    assert "(assumed)" in out
    assert "(measured:" not in out


def test_a_plan_as_json() -> None:
    found = json.loads(works("plan", "--gpus", "8", "--json"))
    assert found["gpus_per_model"] == 1
    assert [one["gpus"] for one in found["plan"][0]["on"]] == [8]
    assert found["constants"]["layer_seconds"]["origin"].startswith("measured: ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gpus", "many"), "--gpus: 'many' is not a number of GPUs"),
        (("--gpus", ","), "--gpus names no number of GPUs"),
        (("--backbone-params", "7B"), "--backbone-params: '7B' is not a number"),
        (("--set", "speed=2"), "there is no constant 'speed'"),
    ],
)
def test_bad_numbers_are_one_message(options: tuple[str, ...], said: str) -> None:
    fails("plan", *options, says=[said])
