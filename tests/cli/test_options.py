"""Values that are read from options."""

import sys

import pytest

from ptuning.backbone.sources import LoadOptions
from ptuning.cli import options
from ptuning.config import TrainConfig
from ptuning.errors import ConfigError, PTuningError


def test_settings_of_options_and_of_set() -> None:
    assert options.config_of(None) == TrainConfig()
    config = options.config_of(["patience=2", "lr=0.01", "train-eos=false", "start=vocabulary"], epochs=3, seed=None)
    assert config == TrainConfig(patience=2, lr=0.01, train_eos=False, start="vocabulary", epochs=3)
    assert config.model_fields_set == {"patience", "lr", "train_eos", "start", "epochs"}


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        (["epochs=4"], "'epochs' is given twice"),
        (["patience=4", "patience=4"], "'patience' is given twice"),
        (["patience"], "'patience' is not --set NAME=VALUE"),
        (["patiance=2"], r"'patiance'\. Did you mean 'patience'"),
        (["learning_rate=2"], "'lr'"),
        (["patience=two"], "'patience' is 'two'"),
        (["patience=" + "[" * 100_000], "'patience'"),
    ],
)
def test_settings_that_are_none(pairs: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        options.config_of(pairs, epochs=3)


def test_loading_options() -> None:
    args = ["revision=1234", "trust-remote-code=true", "max_length=64", "quantize=int8"]
    choice = options.backbone_of("b", "bfloat16", "cpu", args)
    wanted = LoadOptions(
        dtype="bfloat16", device="cpu", revision="1234", trust_remote_code=True, max_length=64, quantize="int8"
    )
    assert choice == options.BackboneChoice("b", wanted)
    places = options.backbone_of(None, model_arg=['device_map={"lm_head": 0, "": "cpu"}']).options.device_map
    assert places == {"lm_head": 0, "": "cpu"}


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("quantise=int8", r"quantise.*Did you mean 'quantize'"),
        ("quantize=int3", "int3"),
        ("max_length=many", "max_length"),
        ("trust_remote_code=1", "trust_remote_code"),
        ("device_map={", "device_map"),
        ('device_map={"lm_head": true}', "lm_head"),
        ("revision", "--model-arg"),
    ],
)
def test_loading_options_that_are_none(pair: str, says: str) -> None:
    with pytest.raises(PTuningError, match=says):
        options.backbone_of(None, model_arg=[pair])
    with pytest.raises(ConfigError, match=r"max_length.*revision"):
        options.tokenizer_of(None, ["max_length=64"])


def test_the_command_line_can_be_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ptuning", "compare", "--manual", "[X] is [Y]", "--out", "out"])
    assert options.command_line() == "ptuning compare --manual '[X] is [Y]' --out out"
