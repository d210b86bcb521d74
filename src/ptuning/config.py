"""Settings of a training and of decoding, each with its one default. Loads no torch, since --help shows them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from typing_extensions import Self

from ptuning.errors import ConfigError, closest, shown
from ptuning.files import LARGEST, parse_json

EncoderKind = Literal["lstm", "mlp", "none"]
DeepEncoderKind = Literal["none", "mlp"]
DeepDtype = Literal["float32", "bfloat16"]
DeepStart = Literal["text", "random"]
RandomStart = Literal["random", "vocabulary"]
TrainBackbone = Literal["none", "head", "full", "lora"]
SaveWeights = Literal["difference", "whole"]
Setting = int | float | str | bool  # value of a setting

# Criteria that choose the best epoch, besides generation metrics.
BY_SCORE, BY_LOSS = "score", "loss"

# Names in transformers' TrainingArguments and peft's configurations -> names of settings.
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
    "early_stopping_patience": "patience",
    "gradient_checkpointing": "checkpointing",
    "encoder_dropout": "dropout",
    "lora_r": "lora_rank",
    "target_modules": "lora_targets",
}

# Setting -> why a comparison does not vary it.
NOT_VARIED: Mapping[str, str] = {
    "seed": "seeds=N repeats the methods with other seeds",
    "train_backbone": "methods names methods that train the backbone as well",
    "dev_fraction": "all methods choose on the same development part",
    "save_weights": "it changes no result",
}

# Bounds of a temperature and of a repetition penalty: logits multiplied or divided by them stay finite.
LEAST, MOST = 1e-6, 1e6

Count = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, StringConstraints(pattern=r"[^\s,]")]


class Settings(BaseModel):
    """Settings that are checked when they are made; any mistake is a ConfigError that names the setting."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _config_error(error, type(self)) from error

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Self:
        """Return settings from names and values; a ConfigError names an unknown one and the closest."""
        return cls(**values)

    def to_json(self) -> dict[str, Setting]:
        """Return all settings as names and values."""
        return self.model_dump()

    def with_settings(self, values: Mapping[str, object]) -> Self:
        """Return the settings with some changed, which count as given."""
        return self._changed(values, {*self.model_fields_set, *values})

    def adapted(self, **values: object) -> Self:
        """Return the settings with some changed; they count as given only if they did before."""
        return self._changed(values, self.model_fields_set)

    def as_defaults(self) -> Self:
        """Return the same settings, none of which counts as given."""
        return self._changed({}, set())

    def _changed(self, values: Mapping[str, object], given: Set[str]) -> Self:
        changed = type(self)(**{**self.to_json(), **values})
        changed.model_fields_set.intersection_update(given)
        return changed


def _config_error(error: ValidationError, settings: type[Settings]) -> ConfigError:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0]) if first["loc"] else str(first["input"])  # of a name that is no valid text
    known = list(settings.model_fields)
    if first["type"] == "extra_forbidden":
        ours = SETTING_ALIASES.get(name)
        hint = f" Here it is called '{ours}'." if ours in known else closest(name, known)
        return ConfigError(f"unknown setting '{name}'.{hint} Known: {', '.join(known)}")
    message = str(first["msg"]).replace("Input should", "it must").replace("String should", "it must")
    return ConfigError(f"setting '{name}' is {shown(first['input'])}; {message}")


class TrainConfig(Settings):
    """Settings of a training run; each has its one default here. ``model_fields_set`` names those that were given.

    Args:
        epochs: Passes over the training part.
        batch_size: Records per forward and backward pass.
        max_length: Maximum tokens of a row (or what the model reads, if less); fields of longer rows are truncated.
        accumulation_steps: Passes per optimizer step (gradient accumulation), with the loss of one larger batch.
        lr: Peak learning rate (AdamW) of slots of the input.
        weight_decay: Weight decay (AdamW) of slots.
        warmup_fraction: Share of the steps in which the learning rate rises; after that it falls linearly to zero.
        max_grad_norm: Gradients are clipped to this norm.
        encoder: Prompt encoder: ``lstm`` (the paper's), ``mlp`` or ``none`` (free vectors).
        dropout: Dropout of the prompt encoder.
        start: Initial values of ``[P]`` slots without words: ``random``, or ``vocabulary`` for random tokens.
        deep_lr: Peak learning rate of deep slots, relative to the RMS of each layer's activations.
        deep_encoder: Encoder of deep slots: ``none`` (free vectors) or ``mlp`` (prefix tuning's).
        deep_start: Initial values of deep slots in the layers: ``text``, the activations of their words or tokens, or
            ``random``, normal numbers (the usual start of prefix tuning and P-tuning v2; a control, it learns slowly).
        column_dropout: Share of the deep slots that a training row does not attend to, drawn anew for each row and
            step; never the first one. Causal models only.
        examples: Number of examples in ``[D:examples]``; fewer where they do not fit.
        leave_one_out: Whether a training record that is among the examples does not attend to itself there.
        values_only: Whether the keys of deep slots keep their initial values. Causal models only.
        deep_dtype: Number format of deep slots in the prompt's file: ``bfloat16`` halves it. They are rounded once,
            when the prompt is made.
        num_restarts: Number of prompts trained from different random states; the best on the development part is kept.
        retries_on_divergence: How often a prompt restarts with half the learning rates if no epoch improved on its
            initialization. Frozen backbone only.
        train_backbone: Weights trained besides the slots: ``none``, ``head`` (a classification head for labels),
            ``full`` (every weight of a copy of the backbone) or ``lora`` (adapters on its linear layers).
        head_lr: Peak learning rate of a classification head.
        backbone_lr: Peak learning rate of the backbone's weights, for ``full``.
        backbone_weight_decay: Weight decay of the backbone's matrices, for ``full``; biases and norms do not decay.
        lora_lr: Peak learning rate of adapters.
        lora_rank: Rank of each adapter.
        lora_alpha: The output of an adapter is multiplied by this and divided by the rank.
        lora_targets: Layers with an adapter: ``all-linear``, ``default`` (peft's choice), or names with commas.
        save_weights: Format of fully trained weights: ``difference`` holds the changed ones and needs the frozen
            backbone; ``whole`` is a model's folder that works alone.
        train_eos: Whether a prompt for a causal model learns to end after the target.
        max_target_tokens: Maximum tokens of a target that are learned, longer ones are truncated; 0 is the 99th
            percentile of the targets' lengths, and at least 64. Nothing is truncated where answers are scored.
        metric_for_best_model: Criterion for the best epoch on the development part: ``score`` (then loss), ``loss``, or
            a generation metric such as ``bleu``, of answers generated for at most 64 of its records.
        patience: Epochs without a better development score or loss after which training stops (early stopping).
        dev_fraction: Share of the training data that is split off if no development data is given.
        seed: Random seed; initial values, data order, dropout and split each have a generator of their own.
        checkpoint_seconds: Time between checkpoints within an epoch; one is always written after an epoch.
        cache_memory: Share of the free memory for the KV cache of the text before the slots; 0 turns it off.
        cache_disk: Gigabytes (10^9 bytes) that this cache may use on disk beyond its memory.
        checkpointing: Activation checkpointing (recomputing them): less memory, more time, the same result.

    Raises:
        ConfigError: If a value has a wrong type or is out of range; names the setting.
    """

    epochs: Count = 6
    batch_size: Count = 8
    max_length: Count = 2048
    accumulation_steps: Count = 1
    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.0
    warmup_fraction: Share = 0.1
    max_grad_norm: Positive = 1.0
    encoder: EncoderKind = "lstm"
    dropout: Share = 0.0
    start: RandomStart = "random"
    deep_lr: Positive = 1e-2
    deep_encoder: DeepEncoderKind = "none"
    deep_start: DeepStart = "text"
    column_dropout: Share = 0.1
    examples: Count = 16
    leave_one_out: bool = True
    values_only: bool = False
    deep_dtype: DeepDtype = "float32"
    num_restarts: Count = 1
    retries_on_divergence: Natural = 1
    train_backbone: TrainBackbone = "none"
    head_lr: Positive = 1e-3
    backbone_lr: Positive = 3e-5
    backbone_weight_decay: NotNegative = 0.0
    lora_lr: Positive = 5e-4
    lora_rank: Count = 8
    lora_alpha: Positive = 16.0
    lora_targets: Name = "all-linear"
    save_weights: SaveWeights = "difference"
    train_eos: bool = True
    max_target_tokens: Natural = 0
    metric_for_best_model: Name = BY_SCORE
    patience: Count = 3
    dev_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: Natural = 0
    checkpoint_seconds: NotNegative = 30.0
    cache_memory: Share = 0.25
    cache_disk: NotNegative = 0.0
    checkpointing: bool = False

    @property
    def prefix_cache_share(self) -> float:
        """Share of the free memory for the prefix cache; 0 where the backbone is trained, since its keys change."""
        return self.cache_memory if self.train_backbone == "none" else 0.0

    @property
    def prefix_cache_bytes(self) -> int:
        """Bytes on the disk for the prefix cache."""
        return int(min(self.cache_disk * 1e9, sys.maxsize))


@dataclass(frozen=True)
class TrainingFacts:
    """Facts of a training that decide which settings act on it; a comparison method knows only some of them.

    Args:
        train_backbone: As in :class:`TrainConfig`.
        has_slots: Whether the template has slots of the input, such as ``[P]``.
        has_deep: Whether it has deep slots (``[D]``).
        has_block: Whether deep slots are keys and values before the input (of causal models), not layer offsets.
        has_examples: Whether it has ``[D:examples]``.
        has_dev: Whether development data was given.
        uses_cache: Whether prefixes are cached (``cache_memory`` is not 0).
    """

    train_backbone: TrainBackbone | None = "none"
    has_slots: bool = True
    has_deep: bool = True
    has_block: bool = True
    has_examples: bool = True
    has_dev: bool = False
    uses_cache: bool = True


_SLOTS = ("slots of the input, such as [P]", lambda facts: facts.has_slots)
_ANY_SLOTS = ("slots", lambda facts: facts.has_slots or facts.has_deep)
_DEEP = ("deep slots, such as [D*20]", lambda facts: facts.has_deep)
_BLOCK = ("deep slots of a causal model", lambda facts: facts.has_deep and facts.has_block)
_EXAMPLES = ("[D:examples] in the template", lambda facts: facts.has_examples)
_NONE, _HEAD, _FULL, _LORA = (
    (f"train_backbone={kind}", lambda facts, kind=kind: facts.train_backbone == kind)
    for kind in ("none", "head", "full", "lora")
)
# Setting -> what it needs to act, in words and as a rule; all other settings act on every training.
NEEDS: Mapping[str, tuple[str, Callable[[TrainingFacts], bool]]] = {
    "lr": _SLOTS,
    "encoder": _SLOTS,
    "dropout": _SLOTS,
    "start": _SLOTS,
    "weight_decay": _ANY_SLOTS,
    "num_restarts": _ANY_SLOTS,
    "retries_on_divergence": _NONE,
    "deep_lr": _DEEP,
    "deep_encoder": _DEEP,
    "deep_start": _DEEP,
    "deep_dtype": _DEEP,
    "column_dropout": _BLOCK,
    "values_only": _BLOCK,
    "examples": _EXAMPLES,
    "leave_one_out": _EXAMPLES,
    "head_lr": _HEAD,
    "backbone_lr": _FULL,
    "backbone_weight_decay": _FULL,
    "save_weights": _FULL,
    "lora_lr": _LORA,
    "lora_rank": _LORA,
    "lora_alpha": _LORA,
    "lora_targets": _LORA,
    "cache_memory": _NONE,
    "cache_disk": ("train_backbone=none and a cache_memory above 0", lambda f: _NONE[1](f) and f.uses_cache),
    "dev_fraction": ("no development data to be given", lambda facts: not facts.has_dev),
}


def acts_on(setting: str, facts: TrainingFacts) -> bool:
    """Whether a setting changes anything in a training with these facts."""
    return setting not in NEEDS or NEEDS[setting][1](facts)


def refuse_unused(config: TrainConfig, *facts: TrainingFacts, common: Collection[str] = ()) -> None:
    """Raise a ConfigError that names the settings that were given and act on no training with one of these facts, but
    for ``common`` ones of several trainings.
    """
    given = [name for name in type(config).model_fields if name in config.model_fields_set and name not in common]
    unused = [name for name in given if not any(acts_on(name, one) for one in facts)]
    if unused:
        needs = "; ".join(f"{name} needs {NEEDS[name][0]}" for name in unused)
        raise ConfigError(f"settings without effect in this training: {needs}. Leave them out")


def _as_texts(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class GenerationSettings(Settings):
    """Settings of decoding, with the names and defaults of transformers' ``GenerationConfig``.

    Of a model's own ``generation_config.json`` only the end-of-sequence tokens are used.

    Args:
        max_new_tokens: Maximum length of an answer; by default 2 tokens more than the longest training target.
        num_beams: Width of the beam search; 1 is greedy decoding (or sampling).
        length_penalty: Beams are compared by their log-probability divided by their length to this power.
        do_sample: Sample each token instead of taking the likeliest.
        temperature: Logits are divided by it before sampling; below 1 likely tokens become likelier.
        top_k: Sample among this many of the likeliest tokens; 0 is all.
        top_p: Sample among the likeliest tokens whose probabilities add up to this (nucleus sampling).
        repetition_penalty: Above 1 makes tokens that were generated before less likely. The prompt does not count.
        stop_strings: Texts that end an answer, and that are left out of it.
        seed: Random seed of sampling.

    Raises:
        ConfigError: If a value has a wrong type, is out of range or has no effect; names the setting.
    """

    max_new_tokens: Count | None = None
    num_beams: Count = 1
    length_penalty: Annotated[float, Field(ge=-100, le=100)] = 1.0
    do_sample: bool = False
    temperature: Annotated[float, Field(ge=LEAST, le=MOST)] = 1.0
    top_k: Natural = 50
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    repetition_penalty: Annotated[float, Field(ge=LEAST, le=MOST)] = 1.0
    stop_strings: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_texts)] = ()
    seed: Natural = 0

    def model_post_init(self, _: object) -> None:
        """Refuse settings without effect: of sampling without it, and of beams where there is one."""
        if self.do_sample and self.num_beams > 1:
            raise ConfigError(
                f"num_beams is {self.num_beams}, and do_sample samples one token at a time; use one of them"
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
        return [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]

    @classmethod
    def of(cls, settings: GenerationSettings | Mapping[str, object] | None) -> GenerationSettings:
        """Return settings as they are, or from names and values."""
        return settings if isinstance(settings, GenerationSettings) else cls.from_json(settings or {})


def listed_names(names: Sequence[str] | str) -> list[str]:
    """Return names given as a list, or as one text with commas."""
    parts = names.split(",") if isinstance(names, str) else names
    return [name.strip() for name in parts if name.strip()]


def setting_of(text: str) -> tuple[str, Setting]:
    """Read ``NAME=VALUE``; the value is JSON, or else the text as it is."""
    name, _, value = text.partition("=")
    try:
        parsed = parse_json(value)
    except ValueError:
        parsed = value
    return name, parsed if isinstance(parsed, int | float | str) else value


def as_setting(name: str, value: Setting) -> str:
    """Write a setting as :func:`setting_of` reads it."""
    return f"{name}={value if isinstance(value, str) else json.dumps(value)}"


def derived_seed(seed: int, purpose: str, step: int = 0) -> int:
    """Return the seed of one purpose. It does not depend on draws for other purposes."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def start_seed(seed: int, number: int) -> int:
    """Return the seed of one of several restarts, from 0; the first has the seed itself."""
    return derived_seed(seed, "start", number) if number else seed
