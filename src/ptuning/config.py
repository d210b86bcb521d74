"""The settings of a training run, each with its one default. Light to import: the command line shows them in --help."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ptuning.errors import ConfigError, closest

EncoderKind = Literal["lstm", "mlp", "none"]
RandomStart = Literal["random", "vocabulary"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; each has its one default here.

    Args:
        epochs: Passes over the training part.
        batch_size: Records per forward and backward pass.
        accumulation_steps: Passes per optimizer step; the loss is that of one batch of their product.
        lr: Peak learning rate of AdamW.
        weight_decay: Of AdamW.
        warmup_fraction: Share of the steps in which the learning rate rises; it then falls linearly to zero.
        max_grad_norm: Gradients are clipped to this norm.
        encoder: ``lstm`` (the paper's), ``mlp`` or ``none`` (free vectors).
        dropout: Of the prompt encoder.
        start: What ``[P]`` slots start at: ``random`` or ``vocabulary``.
        learn_to_stop: Whether a prompt for a causal model learns to end after the target.
        patience: Epochs without a better development result after which training stops.
        dev_fraction: Share of the training data set aside where no development data is given.
        seed: One seed; start values, data order, dropout and split each draw from their own generator made of it.
        checkpoint_seconds: Time between checkpoints inside an epoch; one is written after every epoch anyway.

    Raises:
        ConfigError: If a value is out of range; names the setting.
    """

    epochs: int = 6
    batch_size: int = 16
    accumulation_steps: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup_fraction: float = 0.1
    max_grad_norm: float = 1.0
    encoder: EncoderKind = "lstm"
    dropout: float = 0.0
    start: RandomStart = "random"
    learn_to_stop: bool = True
    patience: int = 3
    dev_fraction: float = 0.2
    seed: int = 0
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation_steps", "patience"):
            self._require(
                name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "a whole number from 1"
            )
        self._require("seed", isinstance(self.seed, int) and 0 <= self.seed < 2**63, "a whole number from 0 to 2^63")
        self._require("lr", math.isfinite(self.lr) and self.lr > 0, "above 0")
        self._require("max_grad_norm", self.max_grad_norm > 0, "above 0")
        self._require("weight_decay", math.isfinite(self.weight_decay) and self.weight_decay >= 0, "0 or more")
        self._require("checkpoint_seconds", self.checkpoint_seconds >= 0, "0 or more")
        self._require("warmup_fraction", 0 <= self.warmup_fraction < 1, "from 0 to below 1")
        self._require("dropout", 0 <= self.dropout < 1, "from 0 to below 1")
        self._require("dev_fraction", 0 < self.dev_fraction < 1, "between 0 and 1")
        self._require("encoder", self.encoder in get_args(EncoderKind), f"one of {', '.join(get_args(EncoderKind))}")
        self._require("start", self.start in get_args(RandomStart), f"one of {', '.join(get_args(RandomStart))}")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ConfigError(f"setting '{name}' is {getattr(self, name)!r}; it must be {allowed}")

    def to_json(self) -> dict[str, int | float | str | bool]:
        """Return the settings as they stand in ``run.json``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> TrainConfig:
        """Read settings back.

        Raises:
            ConfigError: If a setting is unknown (names the closest one) or its value has a wrong type.
        """
        known = {item.name: type(item.default) for item in dataclasses.fields(cls)}
        chosen: dict[str, object] = {}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(f"unknown setting '{name}'.{closest(name, known)} Known: {', '.join(known)}")
            wanted = known[name]
            if wanted is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if type(value) is not wanted:
                raise ConfigError(f"setting '{name}' is {value!r}; it must be of type {wanted.__name__}")
            chosen[name] = value
        return cls(**chosen)  # type: ignore[arg-type]  # types were checked above
