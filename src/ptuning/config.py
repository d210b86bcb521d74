"""Settings of a training run and of writing, each with its one default. Loads no torch, since --help shows them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ptuning.errors import ConfigError, closest, shown
from ptuning.files import LARGEST, parse_json

EncoderKind = Literal["lstm", "mlp", "none"]
DeepEncoderKind = Literal["none", "mlp"]
DeepDtype = Literal["float32", "bfloat16"]
DeepStart = Literal["text", "random"]
RandomStart = Literal["random", "vocabulary"]
Tune = Literal["frozen", "head", "tuned", "lora"]
Keep = Literal["difference", "whole"]
Setting = int | float | str | bool  # the value of one

# Version of the training code. Raise it when the same settings give another result, so that older results and
# checkpoints are neither reused nor resumed.
RECIPE = 4
# What is added to it where slots are deep, or free vectors of the input: they get further in a step since.
STEPS_RECIPE = 2

# Settings of long targets. They did not exist when some results were made, which have their defaults.
TEXT_SETTINGS = ("max_target_tokens", "choose_by")
# What an epoch is chosen by, besides metrics for texts.
BY_SCORE, BY_LOSS = "score", "loss"

# What transformers' TrainingArguments and peft's configurations call our settings.
SETTING_ALIASES: Mapping[str, str] = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation_steps",
    "warmup_ratio": "warmup_fraction",
    "max_seq_length": "max_length",
    "max_target_length": "max_target_tokens",
    "metric_for_best_model": "choose_by",
    "early_stopping_patience": "patience",
    "gradient_checkpointing": "checkpointing",
    "encoder_dropout": "dropout",
    "lora_r": "lora_rank",
    "target_modules": "lora_targets",
}

# Settings of a part that only some methods train; all others act on every training.
SLOT_SETTINGS = ("lr", "weight_decay", "encoder", "dropout", "start", "starts", "restarts")
# Settings of deep slots. They say nothing where there are none, nor did they exist when some results were made.
DEEP_SETTINGS = (
    "deep_lr",
    "deep_encoder",
    "deep_start",
    "column_dropout",
    "examples",
    "leave_one_out",
    "values_only",
    "deep_dtype",
)
# Settings of a classification head, and of trainings that are lost, which did not exist either.
HEAD_SETTINGS = ("head_lr",)
LOST_SETTINGS = ("restarts",)
BACKBONE_SETTINGS: Mapping[str, Sequence[str]] = {
    "head": HEAD_SETTINGS,
    "tuned": ("backbone_lr", "backbone_weight_decay"),
    "lora": ("lora_lr", "lora_rank", "lora_alpha", "lora_targets"),
}
# Settings that a comparison does not vary -> what is there instead.
NOT_VARIED: Mapping[str, str] = {
    "seed": "--seeds N repeats the methods with other seeds",
    "tune": "--methods names methods that train the backbone as well",
    "dev_fraction": "all methods choose on the same development part",
    "keep": "it changes no result",
}

# Bounds of a temperature and of a repetition penalty: logits multiplied or divided by them stay finite.
LEAST, MOST = 1e-6, 1e6

TYPE_NAMES: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; each has its one default here.

    Args:
        epochs: Passes over the training part.
        batch_size: Records per forward and backward pass.
        max_length: Most tokens of a row, or what the model reads, if that is less; fields of longer rows are truncated.
        accumulation_steps: Passes per optimizer step (gradient accumulation), with the loss of one larger batch.
        lr: Peak learning rate of AdamW.
        weight_decay: Of AdamW.
        warmup_fraction: Share of the steps in which the learning rate rises; after that it falls linearly to zero.
        max_grad_norm: Gradients are clipped to this norm.
        encoder: ``lstm`` (the paper's), ``mlp`` or ``none`` (free vectors).
        dropout: Of the prompt encoder.
        start: Start values of ``[P]`` slots: ``random``, or ``vocabulary`` for random tokens.
        deep_lr: Peak learning rate of deep slots, in shares of what tokens measure in each layer.
        deep_encoder: ``none`` (free vectors) or ``mlp`` (prefix tuning's) for what deep slots learn in the layers.
        deep_start: What deep slots start at in the layers: ``text``, the words or tokens that they stand for, or
            ``random``, normal numbers (the usual start of prefix tuning and P-tuning v2; a control, it learns slowly).
        column_dropout: Share of a block of deep slots in front that a row of training does not read, drawn anew for
            each row and step; never its first column.
        examples: Number of examples in ``[D:examples]``; fewer where they do not fit.
        leave_one_out: Whether a training record that is among the examples does not read itself there.
        values_only: Whether the keys of a block of deep slots stay as they start.
        deep_dtype: Number format of the vectors that deep slots have in the layers, in the prompt's file: ``bfloat16``
            halves it. They are rounded once, when the prompt is made.
        starts: Number of prompts that are trained from different draws; the best one on the development part is kept.
        restarts: How often slots over a frozen backbone start anew with half the learning rates where training is lost:
            when it ends, no epoch had a better score, or a lower loss in training or development, than the start.
        tune: ``frozen`` trains the slots alone, ``head`` also a classification head for labels, ``tuned`` also every
            weight of the backbone, ``lora`` also small adapters on its linear layers.
        head_lr: Peak learning rate of a classification head.
        backbone_lr: Peak learning rate of the backbone's weights, for ``tuned``.
        backbone_weight_decay: Of AdamW for the backbone's matrices, for ``tuned``; biases and norms do not decay.
        lora_lr: Peak learning rate of adapters.
        lora_rank: Rank of each adapter.
        lora_alpha: The output of an adapter is multiplied by this and divided by the rank.
        lora_targets: Which layers get an adapter: ``all-linear``, ``default`` (peft's choice), or names with commas.
        keep: How tuned weights are saved: ``difference`` holds the changed ones and needs the frozen backbone;
            ``whole`` is a model's folder that works alone.
        learn_to_stop: Whether a prompt for a causal model learns to end after the target.
        max_target_tokens: Most tokens of a target that are learned, longer ones are cut; 0 is as many as 99 in 100
            targets have, and at least 64. Nothing is cut where answers are scored.
        choose_by: What the best epoch is chosen by on the development part: ``score`` (then loss), ``loss``, or a
            metric for texts such as ``bleu``, of what is written for at most 64 of its records.
        patience: Epochs without a better development score or loss after which training stops (early stopping).
        dev_fraction: Share of the training data that is split off if no development data is given.
        seed: One seed for everything random; start values, data order, dropout and split each have their own generator.
        checkpoint_seconds: Time between checkpoints within an epoch; one is always written after an epoch.
        cache_memory: Share of the free memory for the KV cache of the text before the slots; 0 turns it off.
        cache_disk: Gigabytes (10^9 bytes) that this cache may take on the disk beyond its memory.
        checkpointing: Activation checkpointing (recomputing them): less memory, more time, the same result.

    Raises:
        ConfigError: If a value has a wrong type or is out of range; names the setting.
    """

    epochs: int = 6
    batch_size: int = 8
    max_length: int = 2048
    accumulation_steps: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup_fraction: float = 0.1
    max_grad_norm: float = 1.0
    encoder: EncoderKind = "lstm"
    dropout: float = 0.0
    start: RandomStart = "random"
    deep_lr: float = 1e-2
    deep_encoder: DeepEncoderKind = "none"
    deep_start: DeepStart = "text"
    column_dropout: float = 0.1
    examples: int = 16
    leave_one_out: bool = True
    values_only: bool = False
    deep_dtype: DeepDtype = "float32"
    starts: int = 1
    restarts: int = 1
    tune: Tune = "frozen"
    head_lr: float = 1e-3
    backbone_lr: float = 3e-5
    backbone_weight_decay: float = 0.0
    lora_lr: float = 5e-4
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: str = "all-linear"
    keep: Keep = "difference"
    learn_to_stop: bool = True
    max_target_tokens: int = 0
    choose_by: str = BY_SCORE
    patience: int = 3
    dev_fraction: float = 0.2
    seed: int = 0
    checkpoint_seconds: float = 30.0
    cache_memory: float = 0.25
    cache_disk: float = 0.0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check_type(item.name, getattr(self, item.name), type(item.default))
        for name in (
            "epochs",
            "batch_size",
            "max_length",
            "accumulation_steps",
            "starts",
            "patience",
            "lora_rank",
            "examples",
        ):
            self._require(name, getattr(self, name) >= 1, "a whole number from 1")
        for name in ("max_target_tokens", "restarts"):
            self._require(name, getattr(self, name) >= 0, "a whole number from 0")
        self._require("choose_by", bool(self.choose_by.strip()), "score, loss or a metric for texts")
        self._require("seed", self.seed >= 0, "a whole number from 0 to below 2^63")
        for name in ("lr", "deep_lr", "head_lr", "backbone_lr", "lora_lr", "lora_alpha", "max_grad_norm"):
            self._require(name, 0 < getattr(self, name) <= sys.float_info.max, "a number above 0")
        for name in ("weight_decay", "backbone_weight_decay", "checkpoint_seconds", "cache_disk"):
            self._require(name, 0 <= getattr(self, name) <= sys.float_info.max, "a number from 0")
        for name in ("warmup_fraction", "dropout", "column_dropout", "cache_memory"):
            self._require(name, 0 <= getattr(self, name) < 1, "a number from 0 to below 1")
        self._require("dev_fraction", 0 < self.dev_fraction < 1, "a number between 0 and 1")
        for name, choices in (
            ("encoder", get_args(EncoderKind)),
            ("deep_encoder", get_args(DeepEncoderKind)),
            ("deep_start", get_args(DeepStart)),
            ("deep_dtype", get_args(DeepDtype)),
            ("start", get_args(RandomStart)),
            ("tune", get_args(Tune)),
            ("keep", get_args(Keep)),
        ):
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        self._require("keep", self.keep == "difference" or self.tune == "tuned", "difference where tune is not tuned")
        self._require("lora_targets", bool(listed_names(self.lora_targets)), "all-linear, default or names of modules")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        _require(name, getattr(self, name), holds, allowed)

    @property
    def prefix_cache_share(self) -> float:
        """Share of the free memory for the prefix cache; 0 where the backbone is trained, since its keys change."""
        return self.cache_memory if self.tune == "frozen" else 0.0

    @property
    def prefix_cache_bytes(self) -> int:
        """Bytes on the disk for the prefix cache."""
        return int(min(self.cache_disk * 1e9, sys.maxsize))

    def to_json(self) -> dict[str, Setting]:
        """Return the settings as in ``run.json``."""
        return dataclasses.asdict(self)

    def with_settings(self, values: Mapping[str, object]) -> TrainConfig:
        """Return the settings with some changed; a ConfigError as of :meth:`from_json`."""
        return TrainConfig.from_json({**self.to_json(), **values})

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> TrainConfig:
        """Read settings back; a ConfigError names an unknown one (and the closest), or a value of a wrong type."""
        _check_known(cls, values)
        return cls(**values)  # type: ignore[arg-type]  # the constructor checks the types


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are written, in the words and with the defaults of transformers' ``GenerationConfig``.

    Nothing else of a model's own ``generation_config.json`` is read than the tokens that end a text.

    Args:
        max_new_tokens: Longest answer; by default 2 tokens more than the longest training target.
        num_beams: Width of the beam search; 1 is greedy decoding (or sampling).
        length_penalty: Beams are compared by their log-probability divided by their length to this power.
        do_sample: Draw each token instead of taking the likeliest.
        temperature: Logits are divided by it before a draw; below 1 likely tokens become likelier.
        top_k: Draw among so many of the likeliest tokens; 0 is all.
        top_p: Draw among the likeliest tokens whose probabilities add up to this (nucleus sampling).
        repetition_penalty: Above 1 makes tokens that were written before less likely. The prompt does not count.
        stop_strings: Texts that end an answer, and that are left out of it.
        seed: Of the draws.

    Raises:
        ConfigError: If a value has a wrong type, is out of range or has no effect; names the setting.
    """

    max_new_tokens: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop_strings: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        given = self.stop_strings
        texts = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else given
        object.__setattr__(self, "stop_strings", texts)
        _require("stop_strings", texts, _are_texts(texts), "texts that are not empty")
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name != "stop_strings" and (item.name, value) != ("max_new_tokens", None):
                _check_type(item.name, value, int if item.default is None else type(item.default))
        longest = self.max_new_tokens
        _require("max_new_tokens", longest, longest is None or longest >= 1, "a whole number from 1")
        _require("num_beams", self.num_beams, self.num_beams >= 1, "a whole number from 1")
        _require("top_k", self.top_k, self.top_k >= 0, "a whole number from 0")
        _require("seed", self.seed, self.seed >= 0, "a whole number from 0 to below 2^63")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0 up to 1")
        _require("length_penalty", self.length_penalty, abs(self.length_penalty) <= 100, "a number from -100 to 100")
        for name in ("temperature", "repetition_penalty"):
            _require(name, getattr(self, name), LEAST <= getattr(self, name) <= MOST, f"from {LEAST:g} to {MOST:g}")
        self._refuse_unused()

    def _refuse_unused(self) -> None:
        """Refuse settings without effect: of draws where nothing is drawn, and of beams where there is one."""
        if self.do_sample and self.num_beams > 1:
            raise ConfigError(
                f"num_beams is {self.num_beams}, and do_sample draws one token at a time; use one of them"
            )
        for names, is_used, needed in (
            (("temperature", "top_k", "top_p", "seed"), self.do_sample, "do_sample"),
            (("length_penalty",), self.num_beams > 1, "num_beams of 2 or more"),
        ):
            for name in names if not is_used else ():
                if name in self.changed:
                    raise ConfigError(f"{name} is {getattr(self, name)}, which has no effect without {needed}")

    @property
    def changed(self) -> list[str]:
        """Names of the settings that do not have their default."""
        return [item.name for item in dataclasses.fields(self) if getattr(self, item.name) != item.default]

    @classmethod
    def of(cls, given: GenerationSettings | Mapping[str, object] | None) -> GenerationSettings:
        """Return settings as they are, or from names and values; a ConfigError names an unknown one."""
        if isinstance(given, GenerationSettings):
            return given
        _check_known(cls, given or {})
        return cls(**(given or {}))  # type: ignore[arg-type]  # the constructor checks the types


def _check_known(settings: type[TrainConfig | GenerationSettings], values: Mapping[str, object]) -> None:
    known = [item.name for item in dataclasses.fields(settings)]
    for name in values:
        if name not in known:
            ours = SETTING_ALIASES.get(name)
            hint = f" Here it is called '{ours}'." if ours in known else closest(name, known)
            raise ConfigError(f"unknown setting '{name}'.{hint} Known: {', '.join(known)}")


def _are_texts(values: object) -> bool:
    return isinstance(values, tuple) and all(isinstance(one, str) and one for one in values)


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"setting '{name}' is {shown(value)}; it must be {allowed}")


def _check_type(name: str, value: object, wanted: type) -> None:
    """Check that a setting has its type. A whole number is a number too, unless no tensor holds it; true is not."""
    fits = isinstance(value, (int, float)) if wanted is float else isinstance(value, wanted)
    too_large = isinstance(value, int) and abs(value) > LARGEST
    if not fits or too_large or (isinstance(value, bool) and wanted is not bool):
        below = " below 2^63" if too_large else ""
        raise ConfigError(f"setting '{name}' is {shown(value)}; it must be {TYPE_NAMES[wanted]}{below}")


def listed_names(names: Sequence[str] | str) -> list[str]:
    """Return names given as a list, or as one text with commas."""
    given = names.split(",") if isinstance(names, str) else names
    return [name.strip() for name in given if name.strip()]


def setting_of(text: str) -> tuple[str, Setting]:
    """Read ``NAME=VALUE``; the value is JSON, or else the text as it is."""
    name, _, value = text.partition("=")
    try:
        found = parse_json(value)
    except ValueError:
        found = value
    return name, found if isinstance(found, int | float | str) else value


def as_setting(name: str, value: Setting) -> str:
    """Write a setting as :func:`setting_of` reads it."""
    return f"{name}={value if isinstance(value, str) else json.dumps(value)}"


def acts_on(setting: str, *, tune: Tune | None, learns_slots: bool) -> bool:
    """Whether a setting changes anything for a training of this kind."""
    others = [name for kind, names in BACKBONE_SETTINGS.items() if kind != tune for name in names]
    return setting not in others and (learns_slots or setting not in (*SLOT_SETTINGS, *DEEP_SETTINGS))


def derived_seed(seed: int, purpose: str, step: int = 0) -> int:
    """Return the seed of one purpose. It does not depend on draws for other purposes."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def start_seed(seed: int, number: int) -> int:
    """Return the seed of one of several starts; the first start has the seed of a single one."""
    return derived_seed(seed, "start", number) if number else seed
