"""Settings from options, and the command line as it was given."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ptuning.cli import options
from ptuning.config import TrainConfig
from ptuning.errors import ConfigError
from ptuning.prompt.prompt import Prompt
from ptuning.template.labels import LabelWords


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


def test_how_answers_are_scored() -> None:
    """What cannot be scored as asked is refused before anything is loaded."""
    prompt = Prompt.manual("[X] is [Y]")
    closed = replace(prompt, label_words=LabelWords({"a": ("yes",), "b": ("no",)}))
    for one, candidates in ((closed, False), (prompt, True)):
        assert options.scoring_of(one, normalise="mean", calibrate=None, candidates=candidates) == "mean"
    assert options.scoring_of(prompt, normalise="sum", calibrate=False, candidates=False) == "sum"
    assert options.scoring_of(closed, normalise=None, calibrate=True, candidates=False) is None
    for one, asked, message in (
        (closed, {"normalise": "max", "calibrate": None, "candidates": False}, "is sum or mean, not 'max'"),
        (prompt, {"normalise": "mean", "calibrate": None, "candidates": False}, "goes with a closed set of answers"),
        (
            prompt,
            {"normalise": None, "calibrate": True, "candidates": False},
            "is for label words and a task's choices",
        ),
        (closed, {"normalise": None, "calibrate": True, "candidates": True}, "is for label words and a task's choices"),
    ):
        with pytest.raises(ConfigError, match=message):
            options.scoring_of(one, **asked)


def test_the_command_line_can_be_given_again() -> None:
    assert options.command_line() == "ptuning compare --manual '[X] is [Y]' --out out"
