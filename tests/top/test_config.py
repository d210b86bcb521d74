"""Settings: read back as written, and every wrong one is an error that names it."""

import json
import math

import pytest
from pydantic import ValidationError

from ptuning.config import TrainConfig
from ptuning.errors import ConfigError

CHANGED = TrainConfig(
    epochs=3,
    batch_size=2,
    max_length=99,
    accumulation_steps=4,
    lr=0.25,
    weight_decay=0.5,
    warmup_fraction=0.0,
    max_grad_norm=2.5,
    encoder="none",
    dropout=0.125,
    start="vocabulary",
    deep_lr=0.5,
    deep_encoder="mlp",
    deep_start="random",
    column_dropout=0.25,
    examples=3,
    leave_one_out=False,
    values_only=True,
    deep_dtype="bfloat16",
    head_lr=0.5,
    train_eos=False,
    max_target_tokens=7,
    metric_for_best_model="loss",
    num_restarts=2,
    retries_on_divergence=0,
    train_backbone="full",
    backbone_lr=1e-5,
    backbone_weight_decay=0.25,
    lora_lr=1e-4,
    lora_rank=4,
    lora_alpha=2.5,
    lora_targets="default",
    save_weights="whole",
    patience=9,
    dev_fraction=0.375,
    seed=2**63 - 1,
    checkpoint_seconds=0.0,
    cache_memory=0.0,
    cache_disk=1.5,
    checkpointing=True,
)


@pytest.mark.parametrize("config", [TrainConfig(), CHANGED])
def test_settings_are_read_back_as_written(config: TrainConfig) -> None:
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_the_changed_settings_differ_in_every_field() -> None:
    # Otherwise the test above would not see a field that is lost on the way.
    default = TrainConfig()
    same = [name for name in TrainConfig.model_fields if getattr(CHANGED, name) == getattr(default, name)]
    assert same == []


def test_settings_that_are_not_given_keep_their_default() -> None:
    assert TrainConfig.from_json({"epochs": 2}) == TrainConfig(epochs=2)


def test_a_whole_number_will_do_for_a_number() -> None:
    assert TrainConfig.from_json({"lr": 1}).lr == 1.0


@pytest.mark.parametrize(
    ("unknown", "meant"), [("epoch", "epochs"), ("train_eoss", "train_eos"), ("batchsize", "batch_size")]
)
def test_an_unknown_setting_names_the_closest(unknown: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown setting '{unknown}'\. Did you mean '{meant}'\? Known: epochs, "):
        TrainConfig.from_json({unknown: 1})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("epochs", "3", "a whole number"),
        ("epochs", 3.0, "a whole number"),
        ("epochs", True, "a whole number"),
        ("seed", None, "a whole number"),
        ("lr", "fast", "a number"),
        ("lr", False, "a number"),
        ("lr", [1e-3], "a number"),
        ("train_eos", 1, "true or false"),
        ("train_eos", "false", "true or false"),
        ("encoder", 2, "text"),
    ],
)
def test_a_wrong_type_is_an_error(name: str, value: object, allowed: str) -> None:
    with pytest.raises(ConfigError, match=f"setting '{name}' is .*; it must "):
        TrainConfig.from_json({name: value})
    with pytest.raises(ConfigError, match=f"setting '{name}' is .*; it must "):
        TrainConfig(**{name: value})  # type: ignore[arg-type]  # the point of the test


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("epochs", (0, -1, 2**63, 10**5000), (1, 1000, 2**63 - 1)),
        ("batch_size", (0,), (1,)),
        ("max_length", (0, -5), (1, 10**6)),
        ("accumulation_steps", (0,), (1,)),
        ("patience", (0,), (1,)),
        ("seed", (-1, 2**63), (0, 2**63 - 1)),
        ("lr", (0.0, -1e-3, math.nan, math.inf, 10**5000), (1e-9, 5.0)),
        ("max_grad_norm", (0.0, math.nan, math.inf), (1e-3,)),
        ("weight_decay", (-0.1, math.nan, math.inf), (0.0, 1.0)),
        ("checkpoint_seconds", (-1.0, math.nan, math.inf), (0.0,)),
        ("warmup_fraction", (-0.1, 1.0, math.nan), (0.0, 0.99)),
        ("dropout", (-0.1, 1.0, math.nan), (0.0, 0.99)),
        ("cache_disk", (-0.1, math.inf, math.nan), (0.0, 2.5)),
        ("cache_memory", (-0.1, 1.0, math.nan), (0.0, 0.99)),
        ("dev_fraction", (0.0, 1.0, math.nan), (0.01, 0.99)),
        ("encoder", ("gru", ""), ("lstm", "mlp", "none")),
        ("start", ("zeros",), ("random", "vocabulary")),
    ],
)
def test_ranges(name: str, wrong: tuple[object, ...], right: tuple[object, ...]) -> None:
    for value in wrong:
        with pytest.raises(ConfigError, match=f"setting '{name}' is .*; "):
            TrainConfig.from_json({name: value})
    for value in right:
        assert getattr(TrainConfig.from_json({name: value}), name) == value


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        TrainConfig().epochs = 3  # the point of the test


def test_settings_are_valid_json() -> None:
    # No NaN and no Infinity, which other programs cannot read.
    json.dumps(CHANGED.to_json(), allow_nan=False)
