"""Settings from options, and the command line as it was given."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ptuning.cli import options
from ptuning.config import SETTING_ALIASES, TrainConfig
from ptuning.errors import ConfigError
from ptuning.prompt.prompt import Prompt
from ptuning.template.labels import LabelWords

WORDS = LabelWords({"a": ("yes",), "b": ("no",)})


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ptuning", "compare", "--manual", "[X] is [Y]", "--out", "out"])


def test_settings_of_options_and_of_set() -> None:
    assert options.config_of(None) == TrainConfig()
    found = options.config_of(["patience=2", "lr=0.01", "train-eos=false", "start=vocabulary"], epochs=3, seed=7)
    assert found == TrainConfig(patience=2, lr=0.01, train_eos=False, start="vocabulary", epochs=3, seed=7)
    assert options.config_of(["epochs=3"], epochs=3) == options.config_of(["epochs=3"], epochs=TrainConfig().epochs)


def test_values_to_vary_settings_by() -> None:
    pairs = ["encoder=mlp,none", "learning_rate=0.1, 1", "train-eos=false", "encoder=lstm"]
    found = options.varied_by(pairs, TrainConfig())
    assert found == {"encoder": ["mlp", "none", "lstm"], "lr": [0.1, 1], "train_eos": [False]}
    for wrong, says in {
        "encoder": "'encoder' is not --vary NAME=VALUE,VALUE, such as encoder=mlp,none",
        "encoder=gru": "'encoder' is 'gru'",
        "epochs=two": "setting 'epochs' is 'two'",
        "epochs=" + "[" * 100_000: r"setting 'epochs' is '\[\[\[",
    }.items():
        with pytest.raises(ConfigError, match=says):
            options.varied_by([wrong], TrainConfig())


def test_other_libraries_words_for_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """As transformers' TrainingArguments and peft call them; what they are called here is said once."""
    words = ["learning-rate=0.01", "per_device_train_batch_size=4", "weight_decay=0.1", "warmup_ratio=0.2", "lora_r=4"]
    wanted = TrainConfig(lr=0.01, batch_size=4, weight_decay=0.1, warmup_fraction=0.2, lora_rank=4)
    assert options.config_of(words) == wanted
    said = capsys.readouterr().err
    assert said.splitlines()[0] == "learning_rate is called lr here"
    assert "weight_decay" not in said
    assert set(SETTING_ALIASES.values()) <= set(TrainConfig.model_fields)
    with pytest.raises(ConfigError, match="'lr' is given twice by --set"):
        options.config_of(["lr=1", "learning_rate=2"])
    with pytest.raises(ConfigError, match="'epochs' is given twice: 3 by its option, and 4 by --set"):
        options.config_of(["num_train_epochs=4"], epochs=3)
    with pytest.raises(ConfigError, match=r"unknown setting 'learning_rate'\. Here it is called 'lr'\."):
        TrainConfig.from_json({"learning_rate": 1.0})


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        (["epochs=4"], "'epochs' is given twice: 3 by its option, and 4 by --set"),
        (["patience"], "'patience' is not --set NAME=VALUE, such as patience=2"),
        (["patiance=2"], r"unknown setting 'patiance'\. Did you mean 'patience'\?"),
        (["patience=two"], "setting 'patience' is 'two'"),
    ],
)
def test_settings_that_are_none(pairs: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        options.config_of(pairs, epochs=3)


def test_how_answers_are_scored() -> None:
    """What cannot be scored as asked is refused before anything is loaded."""
    prompt = Prompt.manual("[X] is [Y]")
    closed, stops = replace(prompt, label_words=WORDS), replace(prompt, learned_to_stop=True)
    plain: dict[str, Any] = {"normalise": None, "calibrate": None, "count_stop": False}
    for one, asked, candidates in (
        (closed, {"normalise": "mean"}, False),
        (prompt, {"normalise": "mean"}, True),
        (prompt, {"normalise": "sum", "calibrate": False}, False),
        (closed, {"calibrate": True}, False),
        (stops, {"count_stop": True}, True),
    ):
        assert options.scoring_of(one, **{**plain, **asked}, candidates=candidates) == {**plain, **asked}
    for one, asked, candidates, message in (
        (closed, {"normalise": "max"}, False, "is sum or mean, not 'max'"),
        (prompt, {"normalise": "mean"}, False, "goes with a closed set of answers"),
        (prompt, {"calibrate": True}, False, "is for label words and a task's choices"),
        (closed, {"calibrate": True}, True, "is for label words and a task's choices"),
        (stops, {"count_stop": True}, False, r"count_stop \(--count-stop\) goes with candidates"),
        (prompt, {"count_stop": True}, True, "trained to stop after the target"),
    ):
        with pytest.raises(ConfigError, match=message):
            options.scoring_of(one, **{**plain, **asked}, candidates=candidates)


def test_the_command_line_can_be_given_again() -> None:
    assert options.command_line() == "ptuning compare --manual '[X] is [Y]' --out out"
