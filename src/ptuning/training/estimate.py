"""Memory and time that a training will take: a few of its own steps are timed and scaled up. Leaves no file."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.number_format import short_name
from ptuning.backbone.weights import stored_tensors
from ptuning.config import TrainConfig
from ptuning.data.checks import Labels, Merge
from ptuning.data.questions import Questions
from ptuning.data.sources import Source
from ptuning.data.task_files import TaskFile
from ptuning.engine.evaluate import evaluate
from ptuning.engine.memory import PeakMemory, peak_so_far, taken_bytes, tensor_bytes, whole_passes
from ptuning.engine.objective import ScoringRequest, inputs_of
from ptuning.engine.processes import processes
from ptuning.errors import TrainingError
from ptuning.files import Json
from ptuning.progress import OnProgress, Progress
from ptuning.prompt.predict import PromptModel
from ptuning.template.language import Template
from ptuning.training.checkpoint import Checkpoint, RunState, Snapshot, write_checkpoint
from ptuning.training.optimizer import with_gradients
from ptuning.training.prepare import prepare
from ptuning.training.run import TrainingRun
from ptuning.training.spec import TrainSpec
from ptuning.training.step import Learner, Step, take_steps
from ptuning.training.trainer import SAVING_PAUSE

T = TypeVar("T")

# How much is tried: steps, how often each until it took long enough, records scored and answered, bytes written.
TIMED_STEPS = 6
ROUNDS = 3
ENOUGH_SECONDS = 6.0
SCORED = 64
ANSWERED = 32
WRITTEN_BYTES = 32_000_000
STAGES = 4  # besides the timed steps

# Processor time instead, where other work on the machine would disturb a comparison.
clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Forecast:
    """Memory and time of a training; ``longest_pass`` is in rows and tokens, and ``deep_in_front`` the number of deep
    slots before rows, which are no tokens of a pass.

    Args:
        memory: Bytes by part: ``weights`` of the backbone as it was loaded; ``trained`` weights (prompt encoder, and
            adapters or a float32 copy of the backbone), their ``gradients`` and ``optimizer`` states; ``activations``,
            the most that one pass takes besides, logits included; ``constant_part``, the KV cache of the text before
            the slots, and the part of it that is ``on_disk``; ``other_starts``, the best prompt of earlier restarts;
            ``rest``, the process itself and its libraries. Sums: ``training``, the process included; ``before``, the
            most that this process had taken before, as in loading the backbone; ``peak``, the larger of the two.
        seconds: Seconds by part: ``preparing`` records and weights; ``constant_part``, computing the KV cache once; the
            steps of one ``epoch``; scoring the ``dev`` part once, as before training and after every epoch; ``saving``
            all checkpoints of a restart; ``answers`` to the development part in the end; ``total``, with all restarts
            and without early stopping.
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
    memory: Mapping[str, int]
    seconds: Mapping[str, float]

    def to_json(self) -> dict[str, Json]:
        """Return all of it by name."""
        rows, tokens = self.longest_pass
        parts: dict[str, Json] = {"memory_bytes": dict(self.memory), "seconds": dict(self.seconds)}
        values = {name: value for name, value in vars(self).items() if isinstance(value, int | str)}
        return {**values, "longest_pass": {"rows": rows, "tokens": tokens}, **parts}


def estimate(
    template: str | Template | None,
    data: Source,
    *,
    backbone: Backbone,
    manual: str | None = None,
    method: str | None = None,
    task: TaskFile | str | None = None,
    pattern: int | None = None,
    about: str | None = None,
    chat: bool = False,
    system: str | None = None,
    dev: Source | None = None,
    config: TrainConfig | None = None,
    labels: Labels | None = None,
    alias_label: Merge | None = None,
    strict: bool = False,
    calibrate: bool | None = None,
    fields: Mapping[str, str] | None = None,
    report: OnProgress | None = None,
) -> Forecast:
    """Return the memory and time that :func:`ptuning.train` with the same arguments, and a folder, will take.

    Raises:
        PTuningError: As :func:`ptuning.train` does before it trains.

    Source: docs/decisions.md, decision 30.
    """
    spec = TrainSpec(
        template, data, dev, config, labels, alias_label, strict, task, calibrate, method, manual, about, pattern, chat,
        system, fields,
    )  # fmt: skip
    return estimate_spec(spec, backbone, report=report)


@with_gradients
def estimate_spec(spec: TrainSpec, backbone: Backbone, *, report: OnProgress | None = None) -> Forecast:
    """Return the memory and time that a training will take; as :func:`estimate`."""
    if processes().num_processes > 1:
        raise TrainingError("an estimate times the steps of one process; start it without a launcher such as torchrun")
    before, began = peak_so_far(backbone.device), clock()
    run = TrainingRun(prepare(spec, backbone))
    prepared = clock()
    trainer, config, train, dev = run.trainer(0), run.config, run.items["train"], run.items["dev"]
    learner, cache = trainer.learner, trainer.learner.prefix_cache
    size = config.batch_size * config.accumulation_steps
    orders = [trainer.order(len(train), epoch=epoch) for epoch in range(1, config.epochs + 1)]
    steps = [[train[i] for i in order[at : at + size]] for order in orders for at in range(0, len(train), size)]
    steps_of_epoch = len(steps) // config.epochs

    def passes(items: Sequence[ScoringRequest]) -> list[tuple[int, int]]:
        parts = [inputs_of(items[at : at + config.batch_size]) for at in range(0, len(items), config.batch_size)]
        return [(len(rows), max(len(row.token_ids) for row in rows)) for rows in parts]

    # The pass that takes the most memory is in the step that is taken first.
    longest_step = max(steps, key=lambda items: max(rows * tokens for rows, tokens in passes(items)))
    steps = sampled(steps, _tokens, TIMED_STEPS)
    scored = [item for items in sampled([[item] for item in dev], _tokens, SCORED) for item in items]
    resident, made, done = taken_bytes(backbone.device), clock(), 0

    def tell(note: str) -> None:
        nonlocal done
        done += 1
        if report is not None:
            report(Progress("estimate", done, len(steps) + STAGES, note))

    with whole_passes(), PeakMemory(backbone.device) as watched:
        tried = [item for items in (longest_step, *steps, scored) for item in items]
        cached = _fill_cache(learner, tried, [*train, *dev])
        epoch = _time_steps(learner, longest_step, steps, tell) * _tokens(train)
        dev_seconds = timed(lambda: evaluate(learner.backbone, [scored], learner.learned(), cache=learner.cache))
        dev_seconds *= _tokens(dev) / _tokens(scored)
        tell("development part")
        # Texts for which the cache has no room are computed once for each row.
        epoch, dev_seconds = (
            seconds + cached.anew_seconds * sum(len(cache.ids_of(row)) for row in inputs_of(items))
            for seconds, items in ((epoch, train), (dev_seconds, dev))
        )
        answers = dev_seconds
        if not dev[0].answers:  # labels and choices are not generated
            some = sampled(range(len(dev)), lambda at: dev[at].tokens, ANSWERED)
            rows = Questions([run.prepared.parts["dev"][at] for at in some])
            prompt, model = run.prompt(trainer), PromptModel(learner.backbone)
            answers += timed(lambda: model.predict(rows, prompt)) * len(dev) / len(some)
        tell("answers")
    trial = Checkpoint({"": Snapshot(RunState(), {"zeros": torch.zeros(WRITTEN_BYTES // 4)}, {})})
    with tempfile.TemporaryDirectory(prefix="ptuning-estimate-") as folder:
        byte_seconds = timed(lambda: write_checkpoint(Path(folder), trial)) / WRITTEN_BYTES
    tell("disk")
    trained = tensor_bytes(learner.parameters())
    checkpoint, best = byte_seconds * 3 * trained, byte_seconds * tensor_bytes(learner.weights.values())
    pause = max(config.checkpoint_seconds, SAVING_PAUSE * checkpoint, epoch / steps_of_epoch)
    # A checkpoint after every epoch and some within; the best weights after every epoch, at worst, and in the prompt.
    saving = (config.epochs + config.epochs * epoch // pause) * checkpoint + (config.epochs + 1) * best
    start = made - prepared + config.epochs * epoch + (config.epochs + 1) * dev_seconds + saving
    weights = tensor_bytes(stored_tensors(run.prepared.backbone.model))
    peak = watched.bytes
    activations = max(0, peak - resident - 3 * trained - cached.trial_bytes)
    memory = {
        "weights": weights,
        "trained": trained,
        "gradients": trained,
        "optimizer": 2 * trained,
        "activations": activations,
        "constant_part": cached.in_memory,
        # With the moments of its encoder; those of the backbone's weights are dropped.
        "other_starts": 2 * tensor_bytes(learner.encoder.parameters()) + trained if config.num_restarts > 1 else 0,
        "rest": max(0, peak - weights - 4 * trained - activations - cached.trial_bytes),
    }
    training = sum(memory.values())
    sums = {"on_disk": cached.on_disk, "before": before, "training": training, "peak": max(training, before)}
    learner.prefix_cache.clear()
    return Forecast(
        device=str(backbone.device),
        dtype=short_name(backbone.dtype),
        train_backbone=config.train_backbone,
        train_records=len(train),
        dev_records=len(dev),
        steps=steps_of_epoch,
        epochs=config.epochs,
        starts=config.num_restarts,
        longest_pass=max(passes(longest_step), key=lambda shape: shape[0] * shape[1]),
        deep_in_front=run.prepared.bound.layout.prefix.slots,
        memory={**memory, **sums},
        seconds={
            "preparing": made - began,
            "constant_part": cached.seconds,
            "epoch": epoch,
            "dev": dev_seconds,
            "saving": saving,
            "answers": answers,
            "total": prepared - began + cached.seconds + config.num_restarts * start + answers + best,
        },
    )


@dataclass(frozen=True)
class _Cached:
    """The KV cache of all rows, scaled up from that of those tried: ``anew_seconds`` are for each token in every epoch,
    as its text has no room.
    """

    seconds: float = 0.0
    in_memory: int = 0
    on_disk: int = 0
    trial_bytes: int = 0
    anew_seconds: float = 0.0


def _fill_cache(learner: Learner, tried: Sequence[ScoringRequest], every: Sequence[ScoringRequest]) -> _Cached:
    cache, rows = learner.prefix_cache, inputs_of(every)
    learner.uses_prefix_cache = cache.pays([cache.ids_of(row) for row in rows])
    if not learner.uses_prefix_cache:
        return _Cached()
    all_texts, texts = ({ids for ids in map(cache.ids_of, part) if ids} for part in (rows, inputs_of(tried)))
    cache.keep([max(texts, key=len)])  # warms the machine up
    began = clock()
    cache.keep(texts)
    token_seconds = (clock() - began) / max(1, sum(map(len, texts)) - max(map(len, texts)))
    tokens = sum(map(len, all_texts))
    needed = cache.token_bytes * tokens
    in_memory = min(needed, cache.budget())
    on_disk = min(needed - in_memory, cache.disk_limit)
    is_whole = cache.tokens == sum(map(len, texts))  # else what is computed anew is part of the steps that are timed
    anew = token_seconds * (needed - in_memory - on_disk) / needed if is_whole else 0.0
    return _Cached(token_seconds * tokens, in_memory, on_disk, cache.memory_bytes, anew)


def _time_steps(
    learner: Learner,
    longest: Sequence[ScoringRequest],
    steps: Sequence[Sequence[ScoringRequest]],
    tell: Callable[[str], None],
) -> float:
    """Return the seconds of steps for each token; with learning rates of 0, nothing is learned."""

    def take(items: Sequence[ScoringRequest]) -> None:
        (outcome,) = take_steps([Step(learner, items, number=0, epoch=1, rate=0.0)])
        if isinstance(outcome, TrainingError):
            raise outcome

    if learner.weights:
        learner.backbone.thaw(learner.weights.values())
    take(longest)
    tell("the longest step")
    spent, tokens = 0.0, 0
    for turn in range(ROUNDS):
        for items in steps if spent < ENOUGH_SECONDS else ():
            spent, tokens = spent + timed(lambda: take(items)), tokens + _tokens(items)  # noqa: B023 - at once
            if not turn:
                tell("steps of different lengths")
    learner.optimizer.zero_grad(set_to_none=True)
    if learner.weights:
        learner.backbone.freeze()
    return spent / tokens


def sampled(work: Sequence[T], cost: Callable[[T], float], count: int) -> list[T]:
    """Return the middle of ``count`` equal parts of some work, in order of its cost.

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
