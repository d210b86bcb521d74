"""What a training run will take: a few of its own steps are timed and scaled up. Leaves no file."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from typing_extensions import Unpack

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.number_format import short_name
from ptuning.backbone.weights import stored_tensors
from ptuning.data.questions import Questions
from ptuning.engine.evaluate import evaluate
from ptuning.engine.memory import PeakMemory, peak_so_far, taken_bytes, tensor_bytes, whole_passes
from ptuning.engine.objective import ScoringRequest, inputs_of
from ptuning.engine.processes import processes
from ptuning.errors import TrainingError
from ptuning.files import Json
from ptuning.progress import OnProgress, Progress
from ptuning.prompt.predict import PromptModel
from ptuning.records import Rows
from ptuning.template.language import Template
from ptuning.training.checkpoint import Checkpoint, RunState, Snapshot, write_checkpoint
from ptuning.training.optimizer import with_gradients
from ptuning.training.prepare import prepare
from ptuning.training.run import TrainingRun
from ptuning.training.spec import SpecOptions, TrainSpec
from ptuning.training.step import Step, take_steps
from ptuning.training.trainer import SAVING_PAUSE

T = TypeVar("T")

# How much is tried: steps, how often each until it took long enough, records scored and answered, bytes written.
TIMED_STEPS = 6
ROUNDS = 3
ENOUGH_SECONDS = 6.0
SCORED = 64
ANSWERED = 32
WRITTEN_BYTES = 32_000_000

# Processor time instead, where other work on the machine would disturb a comparison.
clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Bytes:
    """What is in memory at the peak of training, in bytes.

    Args:
        weights: The backbone, as it was loaded.
        trained: What is trained: the prompt encoder, and adapters or a float32 copy of the backbone.
        gradients: Of what is trained.
        optimizer: Both moments of AdamW.
        activations: The most that one pass, forward and backward, holds besides, logits included.
        constant_part: KV cache of the text before the slots.
        other_starts: The best prompt of earlier starts, if there are several.
        rest: The process itself and its libraries; little on a GPU.
        before: The most that this process had taken before, as in loading the backbone.
        on_disk: The part of the KV cache that does not fit into memory.
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
        return int(sum(vars(self).values())) - self.before - self.on_disk

    @property
    def peak(self) -> int:
        """The most that is taken from loading to the end."""
        return max(self.training, self.before)


@dataclass(frozen=True)
class Seconds:
    """How long the parts of a run take.

    Args:
        preparing: Filling the template with all records, and making encoder, optimizer and what is trained.
        constant_part: Computing the KV cache, once.
        epoch: The steps of one epoch.
        dev: Scoring the development part once, which is done before training and after every epoch.
        saving: All checkpoints of a start.
        answers: Answering the development part with the chosen prompt in the end.
        total: The whole run with all its starts, without early stopping.
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
    """What a training run will take; ``longest_pass`` is in rows and tokens, and ``deep_in_front`` the number of deep
    slots in front of rows, which are no tokens of a pass.
    """

    device: str
    dtype: str
    train_backbone: str
    train_records: int
    dev_records: int
    steps: int
    epochs: int
    starts: int
    longest_pass: tuple[int, int]
    deep_in_front: int
    memory: Bytes
    seconds: Seconds

    def to_json(self) -> dict[str, Json]:
        """Return all of it by name; memory with its sums, ``training`` and ``peak``."""
        values: dict[str, Json] = {name: value for name, value in vars(self).items() if isinstance(value, (int, str))}
        sums = {"training": self.memory.training, "peak": self.memory.peak}
        values["longest_pass"] = dict(zip(("rows", "tokens"), self.longest_pass, strict=True))
        return {**values, "memory_bytes": {**vars(self.memory), **sums}, "seconds": dict(vars(self.seconds))}


def estimate(
    template: str | Template,
    data: Rows | Questions,
    *,
    backbone: Backbone,
    report: OnProgress | None = None,
    **options: Unpack[SpecOptions],
) -> Forecast:
    """Say what :func:`ptuning.train` with the same arguments, and a folder for its files, will take.

    Raises:
        PTuningError: As :func:`ptuning.train` does before it trains.

    Source: docs/decisions.md, decision 30.
    """
    return estimate_spec(TrainSpec(template, data, **options), backbone, report=report)


@with_gradients
def estimate_spec(spec: TrainSpec, backbone: Backbone, *, report: OnProgress | None = None) -> Forecast:
    """Say what a training will take; as :func:`estimate`."""
    if processes().num_processes > 1:
        raise TrainingError("an estimate times the steps of one process; start it without a launcher such as torchrun")
    before, began = peak_so_far(backbone.device), clock()
    run = TrainingRun(prepare(spec, backbone))
    filled = clock()
    trial = _Trial(run, report or (lambda _: None))
    made = clock()
    with whole_passes(), PeakMemory(backbone.device) as watched:
        kept = trial.keep()
        epoch, dev = trial.time_steps(), trial.time_scoring()
        answers = dev + trial.time_answers()
    memory, config = trial.bytes(watched.bytes, before), run.config
    checkpoint, best = trial.time_saving()
    pause = max(config.checkpoint_seconds, SAVING_PAUSE * checkpoint if best else 0.0, epoch / trial.steps_of_epoch)
    # A checkpoint after every epoch and some within; the best weights after every epoch, at worst, and in the prompt.
    saving = (config.epochs + config.epochs * epoch // pause) * checkpoint + (config.epochs + 1) * best
    start = made - filled + config.epochs * epoch + (config.epochs + 1) * dev + saving
    total = filled - began + kept + config.num_restarts * start + answers + best
    return Forecast(
        device=str(backbone.device),
        dtype=short_name(backbone.dtype),
        train_backbone=config.train_backbone,
        train_records=len(run.items["train"]),
        dev_records=len(run.items["dev"]),
        steps=trial.steps_of_epoch,
        epochs=config.epochs,
        starts=config.num_restarts,
        longest_pass=trial.longest_pass,
        deep_in_front=run.prepared.bound.layout.in_front,
        memory=memory,
        seconds=Seconds(made - began, kept, epoch, dev, saving, answers, total),
    )


class _Trial:
    """Some steps of a run and some records of its development part, run to see what they take."""

    def __init__(self, run: TrainingRun, report: OnProgress) -> None:
        self.run, self.report, self.done = run, report, 0
        trainer, config, train = run.trainer(0), run.config, run.items["train"]
        self.trainer, self.learner = trainer, trainer.learner
        size = config.batch_size * config.accumulation_steps
        orders = [trainer.order(len(train), epoch=epoch) for epoch in range(1, config.epochs + 1)]
        steps = [[train[i] for i in order[at : at + size]] for order in orders for at in range(0, len(train), size)]
        self.steps_of_epoch = len(steps) // config.epochs
        # The pass that takes the most memory is in the step that is taken first.
        self.longest_step = max(steps, key=lambda items: max(rows * tokens for rows, tokens in self._passes(items)))
        self.longest_pass = max(self._passes(self.longest_step), key=lambda shape: shape[0] * shape[1])
        self.steps = sampled(steps, _tokens, TIMED_STEPS)
        self.scored = sampled([[item] for item in run.items["dev"]], _tokens, SCORED)
        self.every = inputs_of([*train, *run.items["dev"]])
        self.in_memory = self.on_disk = self.trial_bytes = 0
        self.anew_seconds = 0.0  # for each token in front of slots, in every epoch
        self.resident = taken_bytes(run.prepared.backbone.device)
        self.planned = 1 + len(self.steps) + 3

    def _passes(self, items: Sequence[ScoringRequest]) -> list[tuple[int, int]]:
        size = self.run.config.batch_size
        passes = [inputs_of(items[at : at + size]) for at in range(0, len(items), size)]
        return [(len(rows), max(len(row.token_ids) for row in rows)) for rows in passes]

    def _tell(self, note: str) -> None:
        self.done += 1
        self.report(Progress("estimate", self.done, self.planned, note))

    def keep(self) -> float:
        """Fill the KV cache for the rows to be tried; return the seconds that it takes for all rows."""
        cache, learner = self.learner.prefix_cache, self.learner
        learner.uses_prefix_cache = cache.pays([cache.ids_of(row) for row in self.every])
        if not learner.uses_prefix_cache:
            return 0.0
        tried = inputs_of([item for items in (self.longest_step, *self.steps, *self.scored) for item in items])
        every, texts = ({ids for ids in map(cache.ids_of, rows) if ids} for rows in (self.every, tried))
        cache.keep([max(texts, key=len)])  # warms the machine up
        began = clock()
        cache.keep(texts)
        token_seconds = (clock() - began) / max(1, sum(map(len, texts)) - max(map(len, texts)))
        tokens = sum(map(len, every))
        self.trial_bytes = cache.memory_bytes
        needed = cache.token_bytes * tokens
        self.in_memory = min(needed, cache.budget())
        self.on_disk = min(needed - self.in_memory, cache.disk_limit)
        if cache.tokens == sum(map(len, texts)):  # else what is computed anew is part of the steps that are timed
            self.anew_seconds = token_seconds * (needed - self.in_memory - self.on_disk) / needed
        return token_seconds * tokens

    def time_steps(self) -> float:
        """Return the seconds of an epoch's steps; with learning rates of 0, nothing is learned."""
        learner = self.learner
        if learner.weights:
            learner.backbone.thaw(learner.weights.values())

        def take(items: Sequence[ScoringRequest]) -> float:
            return timed(lambda: self._take(items))

        take(self.longest_step)
        self._tell("the longest step")
        spent, tokens = 0.0, 0
        for turn in range(ROUNDS):
            for items in self.steps if spent < ENOUGH_SECONDS else ():
                spent, tokens = spent + take(items), tokens + _tokens(items)
                if not turn:
                    self._tell("steps of different lengths")
        learner.optimizer.zero_grad(set_to_none=True)
        if learner.weights:
            learner.backbone.freeze()
        return spent * _tokens(self.run.items["train"]) / tokens + self._anew("train")

    def _take(self, items: Sequence[ScoringRequest]) -> None:
        (outcome,) = take_steps([Step(self.learner, items, number=0, epoch=1, rate=0.0)])
        if isinstance(outcome, TrainingError):
            raise outcome

    def time_scoring(self) -> float:
        """Return the seconds of scoring the development part."""
        items, learned = [item for one in self.scored for item in one], self.learner.learned()
        spent = timed(lambda: evaluate(self.learner.backbone, items, learned, cache=self.learner.cache))
        self._tell("development part")
        return spent * _tokens(self.run.items["dev"]) / _tokens(items) + self._anew("dev")

    def _anew(self, part: str) -> float:
        """Return the seconds of computing, once for each row of a part, texts for which the KV cache has no room."""
        ids_of = self.learner.prefix_cache.ids_of
        return self.anew_seconds * sum(len(ids_of(row)) for row in inputs_of(self.run.items[part]))

    def time_answers(self) -> float:
        """Return the seconds of writing answers to the development part; labels and choices are not written."""
        run, items, spent = self.run, self.run.items["dev"], 0.0
        if not items[0].answers:
            model, prompt = PromptModel(self.learner.backbone), run.prompt(self.trainer)
            some = sampled(range(len(items)), lambda at: items[at].tokens, ANSWERED)
            asked = Questions([run.prepared.parts["dev"][at] for at in some])
            spent = timed(lambda: model.predict(asked, prompt)) * len(items) / len(some)
        self._tell("answers")
        return spent

    def time_saving(self) -> tuple[float, float]:
        """Return the seconds of writing a checkpoint, with both moments, and the backbone's best weights."""
        trial = Checkpoint({"": Snapshot(RunState(), {"zeros": torch.zeros(WRITTEN_BYTES // 4)}, {})})
        with tempfile.TemporaryDirectory(prefix="ptuning-estimate-") as folder:
            byte = timed(lambda: write_checkpoint(Path(folder), trial)) / WRITTEN_BYTES
        self._tell("disk")
        return byte * 3 * tensor_bytes(self.learner.parameters()), byte * tensor_bytes(self.learner.weights.values())

    def bytes(self, peak: int, before: int) -> Bytes:
        """Return what is in memory; ``peak`` was taken while steps were tried, ``before`` earlier in this process."""
        learner, backbone = self.learner, self.run.prepared.backbone
        weights = tensor_bytes(stored_tensors(backbone.model))
        trained = tensor_bytes(learner.parameters())
        encoder = tensor_bytes(learner.encoder.parameters())
        activations = max(0, peak - self.resident - 3 * trained - self.trial_bytes)
        learner.prefix_cache.clear()
        return Bytes(
            weights=weights,
            trained=trained,
            gradients=trained,
            optimizer=2 * trained,
            activations=activations,
            constant_part=self.in_memory,
            # With the moments of its encoder; those of the backbone's weights are dropped.
            other_starts=2 * encoder + trained if self.run.config.num_restarts > 1 else 0,
            rest=max(0, peak - weights - 4 * trained - activations - self.trial_bytes),
            before=before,
            on_disk=self.on_disk,
        )


def sampled(work: Sequence[T], cost: Callable[[T], float], count: int) -> list[T]:
    """Return the middle of so many equal parts of some work, in order of its cost.

    Example:
        >>> sampled([5, 1, 3, 2, 4, 6], cost=float, count=3)
        [2, 4, 6]
    """
    ordered, count = sorted(work, key=cost), min(count, len(work))
    return [ordered[(2 * part + 1) * len(ordered) // (2 * count)] for part in range(count)]


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of some work."""
    began = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - began


def _tokens(items: Sequence[ScoringRequest]) -> int:
    return sum(len(row.token_ids) for row in inputs_of(items))
