"""Settings from options, and the command line as it was given."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ptuning.cli import options
from ptuning.config import TrainConfig
from ptuning.errors import ConfigError


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ptuning", "compare", "--manual", "[X] is [Y]", "--out", "out"])


def test_settings_of_options_and_of_set() -> None:
    assert options.config_of(None) == TrainConfig()
    found = options.config_of(["patience=2", "lr=0.01", "learn-to-stop=false", "start=vocabulary"], epochs=3, seed=7)
    assert found == TrainConfig(patience=2, lr=0.01, learn_to_stop=False, start="vocabulary", epochs=3, seed=7)
    assert options.config_of(["epochs=3"], epochs=3) == options.config_of(["epochs=3"], epochs=TrainConfig().epochs)


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        (["epochs=4"], "'epochs' is given twice: 3 by its option, and 4 by --set"),
        (["patience"], "'patience' is not --set NAME=VALUE, such as patience=2"),
        (["patiance=2"], r"unknown setting 'patiance'\. Did you mean 'patience'\?"),
        (["patience=two"], "setting 'patience' is 'two'; it must be a whole number"),
    ],
)
def test_settings_that_are_none(pairs: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        options.config_of(pairs, epochs=3)


def test_how_candidates_are_scored() -> None:
    assert options.normalise_of("mean", closed=True) == "mean"
    assert options.normalise_of("sum", closed=False) == "sum"
    with pytest.raises(ConfigError, match="--normalise is sum or mean, not 'max'"):
        options.normalise_of("max", closed=True)
    with pytest.raises(ConfigError, match="--normalise goes with a closed set of answers"):
        options.normalise_of("mean", closed=False)


def test_the_command_line_can_be_given_again() -> None:
    assert options.command_line() == "ptuning compare --manual '[X] is [Y]' --out out"
