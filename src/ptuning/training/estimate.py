"""What a training run will take, said before it starts: bytes and seconds. Leaves no file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import Unpack

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.questions import Questions
from ptuning.files import Json
from ptuning.progress import OnProgress
from ptuning.records import Record
from ptuning.template.language import Template
from ptuning.training import trial
from ptuning.training.memory import peak_so_far, tensor_bytes
from ptuning.training.prepare import prepare
from ptuning.training.run import TrainingRun
from ptuning.training.spec import SpecOptions, TrainSpec
from ptuning.training.trainer import SAVING_PAUSE
from ptuning.training.trial import Seen, try_out


@dataclass(frozen=True)
class Bytes:
    """What is in memory at the peak of training, in bytes.

    Args:
        weights: The backbone, as it was loaded.
        trained: What is trained: the prompt encoder, and adapters or a float32 copy of the backbone.
        gradients: Of what is trained.
        optimizer: Its moments.
        activations: The most that one pass, forward and backward, holds besides, logits included.
        constant_part: Keys and values of what stands in front of the slots.
        other_starts: The best prompt of earlier starts, where there are several.
        rest: The process itself, its libraries, and what the allocator keeps; little on a GPU.
        before: The most that this process had taken before, as in loading the backbone.
        on_disk: Keys and values that do not fit into memory.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    constant_part: int
    other_starts: int
    rest: int
    before: int
    on_disk: int

    @property
    def training(self) -> int:
        """The most that training takes, the process included."""
        values: dict[str, int] = dataclasses.asdict(self)
        return sum(values.values()) - self.before - self.on_disk

    @property
    def peak(self) -> int:
        """The most that is taken from loading to the end."""
        return max(self.training, self.before)


@dataclass(frozen=True)
class Seconds:
    """How long the parts of a run take.

    Args:
        preparing: Filling the template with all records, and making encoder, optimizer and what is trained.
        constant_part: Running what stands in front of the slots, once.
        epoch: The steps of one epoch.
        dev: Scoring the development part once; that is done before training and after every epoch.
        saving: All checkpoints of a start.
        answers: Answering the development part with the chosen prompt in the end.
        total: The whole run with all its starts, where it does not stop early.
    """

    preparing: float
    constant_part: float
    epoch: float
    dev: float
    saving: float
    answers: float
    total: float


@dataclass(frozen=True)
class Forecast:
    """What a training run will take.

    Args:
        device, dtype, tune: Where it trains, in which type, and what.
        train_records, dev_records: Records of both parts.
        steps: Optimizer steps of an epoch.
        epochs, starts: How often.
        longest_pass: Rows and tokens of the longest pass, pads included.
        memory: In bytes.
        seconds: In seconds.
    """

    device: str
    dtype: str
    tune: str
    train_records: int
    dev_records: int
    steps: int
    epochs: int
    starts: int
    longest_pass: tuple[int, int]
    memory: Bytes
    seconds: Seconds

    def to_json(self) -> dict[str, Json]:
        """Return all of it by name; memory with its sums, ``training`` and ``peak``."""
        rows, tokens = self.longest_pass
        sums = {"training": self.memory.training, "peak": self.memory.peak}
        return {
            **{name: value for name, value in vars(self).items() if isinstance(value, (int, str))},
            "longest_pass": {"rows": rows, "tokens": tokens},
            "memory_bytes": {**dataclasses.asdict(self.memory), **sums},
            "seconds": dataclasses.asdict(self.seconds),
        }


def estimate(
    template: str | Template,
    data: Sequence[Record] | Questions,
    *,
    backbone: Backbone,
    report: OnProgress | None = None,
    **options: Unpack[SpecOptions],
) -> Forecast:
    """Say what :func:`ptuning.train` with the same arguments, and a folder for its files, will take.

    A few of the run's own steps are taken, the longest among them, and a few passes over its development part; nothing
    is learned from them. From there seconds grow with tokens, those of answers with records, those of checkpoints with
    bytes.

    Args:
        template: As of :func:`ptuning.train`.
        data: As of :func:`ptuning.train`.
        backbone: As of :func:`ptuning.train`.
        **options: As of :func:`ptuning.train`.
        report: Called with progress.

    Raises:
        PTuningError: As :func:`ptuning.train` does before it trains.

    Source: docs/decisions.md, decision 30.
    """
    return estimate_spec(TrainSpec(template, data, **options), backbone, report=report)


def estimate_spec(spec: TrainSpec, backbone: Backbone, *, report: OnProgress | None = None) -> Forecast:
    """Estimate a training; as :func:`estimate`."""
    before = peak_so_far(backbone.device)
    began = trial.clock()
    run = TrainingRun(prepare(spec, backbone))
    filled = trial.clock()
    trainer = run.trainer(0)
    made = trial.clock()
    encoder = tensor_bytes(trainer.encoder.parameters())
    weights = tensor_bytes(trainer.weights.values())
    budget = trainer.prefix_cache.budget()
    seen = try_out(run, trainer, report=report or (lambda _: None))
    return Forecast(
        device=str(backbone.device),
        dtype=str(backbone.dtype).removeprefix("torch."),
        tune=run.config.tune,
        train_records=len(run.items["train"]),
        dev_records=len(run.items["dev"]),
        steps=seen.steps,
        epochs=run.config.epochs,
        starts=run.config.starts,
        longest_pass=seen.longest_pass,
        memory=_bytes(seen, backbone, run.config, encoder=encoder, weights=weights, budget=budget, before=before),
        seconds=_seconds(
            seen, run.config, encoder=encoder, weights=weights, filling=filled - began, making=made - filled
        ),
    )


def _bytes(
    seen: Seen, backbone: Backbone, config: TrainConfig, *, encoder: int, weights: int, budget: int, before: int
) -> Bytes:
    """Put together what is in memory at once.

    Args:
        seen: What was seen.
        backbone: The backbone.
        config: The settings.
        encoder: Bytes of the prompt encoder.
        weights: Bytes of what is trained of the backbone.
        budget: Bytes that keys and values may take.
        before: The most that the process had taken before.
    """
    kept = min(seen.kept_bytes, budget)
    own = tensor_bytes([*backbone.model.parameters(), *backbone.model.buffers()])
    known = own + encoder + weights + seen.gradients + seen.optimizer + seen.activations + seen.trial_bytes
    return Bytes(
        weights=own,
        trained=encoder + weights,
        gradients=seen.gradients,
        optimizer=seen.optimizer,
        activations=seen.activations,
        constant_part=kept,
        # With the moments of its encoder; those of the backbone's weights are let go of.
        other_starts=3 * encoder + weights if config.starts > 1 else 0,
        rest=max(0, seen.peak - known),
        before=before,
        on_disk=seen.kept_bytes - kept,
    )


def _seconds(seen: Seen, config: TrainConfig, *, encoder: int, weights: int, filling: float, making: float) -> Seconds:
    """Put together how long a run takes.

    Args:
        seen: What was seen.
        config: The settings.
        encoder: Bytes of the prompt encoder.
        weights: Bytes of what is trained of the backbone.
        filling: Seconds of filling the template, once.
        making: Seconds of making a trainer, once per start.
    """
    checkpoint = seen.written_seconds * 3 * (encoder + weights)  # with both moments
    best = seen.written_seconds * weights
    pause = max(
        config.checkpoint_seconds, SAVING_PAUSE * checkpoint if weights else 0.0, seen.epoch_seconds / seen.steps
    )
    # One after every epoch and some within; the best weights at every epoch, in the worst case, and in the prompt.
    saving = (config.epochs + config.epochs * seen.epoch_seconds // pause) * checkpoint + (config.epochs + 1) * best
    start = making + config.epochs * seen.epoch_seconds + (config.epochs + 1) * seen.dev_seconds + saving
    return Seconds(
        preparing=filling + making,
        constant_part=seen.kept_seconds,
        epoch=seen.epoch_seconds,
        dev=seen.dev_seconds,
        saving=saving,
        answers=seen.answer_seconds,
        total=filling + seen.kept_seconds + config.starts * start + seen.answer_seconds + best,
    )
