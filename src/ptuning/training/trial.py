"""A few steps and passes of a training run, taken to see what they take: seconds and bytes. Nothing is learned from
them, and nothing is left but the numbers.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ptuning.data.questions import Questions
from ptuning.engine.batch import batches
from ptuning.engine.evaluate import evaluate
from ptuning.engine.learned import Learned
from ptuning.engine.objective import Item
from ptuning.engine.passes import prefix_tokens
from ptuning.engine.prefix_cache import cacheable_ids, text_groups
from ptuning.progress import OnProgress, Progress
from ptuning.prompt.predict import PromptModel
from ptuning.template.segments import Ids
from ptuning.training.checkpoint import RunState, write_checkpoint
from ptuning.training.memory import LiveTensors, PeakMemory, tensor_bytes
from ptuning.training.run import TrainingRun
from ptuning.training.step import run_passes, take_step
from ptuning.training.trainer import Trainer

# Steps of so many lengths are timed, over and over for about so long.
TIMED_STEPS = 7
TIMED_SECONDS = 6.0
MOST_ROUNDS = 7
# A token whose keys and values are kept costs about this share of one that is run.
KEPT_TOKEN = 1 / 16
# Texts in front of the slots that are run before the others are timed, records answered, and bytes written.
WARMING_TEXTS = 8
ANSWERED = 32
WRITTEN_BYTES = 64_000_000

# Processor time instead, where other work on the machine would be in the way of a comparison.
clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Seen:
    """What was seen of a run.

    Args:
        kept_seconds, kept_bytes: Of everything that stands in front of the slots.
        epoch_seconds: The steps of one epoch, the mean of all of them.
        dev_seconds: One pass over the development part.
        answer_seconds: The chosen prompt's answers to it.
        written_seconds: Writing a byte to a checkpoint.
        gradients, optimizer: Bytes.
        activations: Bytes that the largest pass of a step holds besides gradients.
        trial_bytes: Bytes of the keys and values that were kept meanwhile.
        peak: The most bytes that were taken, of the process or on the GPU.
        steps: Optimizer steps of an epoch.
        longest_pass: Rows and tokens of the longest pass of a step.
    """

    kept_seconds: float
    kept_bytes: int
    epoch_seconds: float
    dev_seconds: float
    answer_seconds: float
    written_seconds: float
    gradients: int
    optimizer: int
    activations: int
    trial_bytes: int
    peak: int
    steps: int
    longest_pass: tuple[int, int]


def try_out(run: TrainingRun, trainer: Trainer, *, report: OnProgress) -> Seen:
    """Take some steps and passes of a run.

    Args:
        run: The run.
        trainer: A trainer of its first start, which is of no use afterwards.
        report: Called with progress.
    """
    return _Trial(run, trainer, report).result()


class _Part:
    """The rows of a part of the data, as far as they are run."""

    def __init__(self, items: Sequence[Item], *, skips: bool) -> None:
        self.items = items
        self.constant = [[cacheable_ids(row) if skips else () for row in item.inputs] for item in items]

    def texts(self, indices: Sequence[int]) -> list[Ids]:
        """Return what stands in front of the slots of some records, where that is kept."""
        return [ids for index in indices for ids in self.constant[index]]

    def weight(self, indices: Sequence[int]) -> float:
        """Return the tokens of one pass over some records, pads included, by what they cost."""
        rows = [len(row.token_ids) for index in indices for row in self.items[index].inputs]
        kept = [len(ids) for ids in self.texts(indices)]
        own = max(tokens - before for tokens, before in zip(rows, kept, strict=True))
        return len(rows) * (own + KEPT_TOKEN * max(kept))

    def shape(self, indices: Sequence[int]) -> tuple[int, int]:
        """Return rows and tokens of one pass over some records."""
        rows = [len(row.token_ids) for index in indices for row in self.items[index].inputs]
        return len(rows), max(rows)


class _Trial:
    def __init__(self, run: TrainingRun, trainer: Trainer, report: OnProgress) -> None:
        self.run, self.trainer, self.report = run, trainer, report
        self.done = self.planned = 0
        cache, config = trainer.prefix_cache, run.config
        every = [row for items in run.items.values() for item in items for row in item.inputs]
        trainer.uses_prefix_cache = cache.pays([cacheable_ids(row) for row in every])
        self.train, self.dev = (_Part(run.items[part], skips=trainer.uses_prefix_cache) for part in ("train", "dev"))
        # The records of each step of a start, and of each pass over the development part.
        size, records = config.batch_size * config.accumulation_steps, len(self.train.items)
        orders = [trainer.order(records, epoch=epoch) for epoch in range(1, config.epochs + 1)]
        self.steps = [order[at : at + size] for order in orders for at in range(0, records, size)]
        inputs = [item.inputs for item in self.dev.items]
        prefix = prefix_tokens(run.prepared.backbone, [row for rows in inputs for row in rows])
        self.scored = list(batches(inputs, prefix=prefix))
        self.step_weights = [sum(map(self.train.weight, self._passes(step))) for step in self.steps]
        self.scored_weights = list(map(self.dev.weight, self.scored))

    def result(self) -> Seen:
        """Run all there is to see, the largest first."""
        trainer = self.trainer
        steps, scored = spread(self.step_weights, TIMED_STEPS), spread(self.scored_weights, 3)[-2:]
        self.planned = len(steps) + len(scored) + 3 + trainer.uses_prefix_cache
        for group in trainer.optimizer.param_groups:
            group["lr"] = 0.0  # each step does its work, and nothing moves
        with torch.random.fork_rng(), PeakMemory(self.run.prepared.backbone.device) as watched:
            kept_seconds, kept_bytes = self._keep(steps, scored)
            with self._learning():
                activations, gradients = self._largest_pass(steps[-1])
                times = self._time_steps(steps)
                optimizer = tensor_bytes(
                    one
                    for state in trainer.optimizer.state.values()
                    for one in state.values()
                    if isinstance(one, Tensor)
                )
            timed_passes = {index: self._time_scored(self.scored[index]) for index in scored}
            dev = float(along(self.scored_weights, timed_passes).sum())
            answers = dev + self._time_written()
            self._tell("answers")
            trial_bytes = trainer.prefix_cache.memory_bytes
            trainer.prefix_cache.clear()
        return Seen(
            kept_seconds=kept_seconds,
            kept_bytes=kept_bytes,
            epoch_seconds=float(along(self.step_weights, times).sum()) / self.run.config.epochs,
            dev_seconds=dev,
            answer_seconds=answers,
            written_seconds=self._time_writing(),
            gradients=gradients,
            optimizer=optimizer,
            activations=activations,
            trial_bytes=trial_bytes,
            peak=watched.bytes,
            steps=len(self.steps) // self.run.config.epochs,
            longest_pass=self.train.shape(max(self._passes(self.steps[steps[-1]]), key=self.train.weight)),
        )

    def _passes(self, step: Sequence[int]) -> Iterator[Sequence[int]]:
        size = self.run.config.batch_size
        yield from (step[at : at + size] for at in range(0, len(step), size))

    def _tell(self, note: str) -> None:
        self.done += 1
        self.report(Progress("estimate", self.done, self.planned, note))

    @contextmanager
    def _learning(self) -> Iterator[None]:
        """Let what is trained take gradients, as during an epoch."""
        weights, backbone = self.trainer.weights, self.trainer.backbone
        if weights:
            backbone.thaw(weights.values())
        yield
        self.trainer.optimizer.zero_grad(set_to_none=True)
        if weights:
            backbone.freeze()

    def _keep(self, steps: Sequence[int], scored: Sequence[int]) -> tuple[float, int]:
        """Run what stands in front of the slots of rows to be tried; return seconds and bytes of it for all rows."""
        cache = self.trainer.prefix_cache
        every = {ids for part in (self.train, self.dev) for ids in part.texts(range(len(part.items))) if ids}
        if not every:
            return 0.0, 0
        wanted = [ids for index in steps for ids in self.train.texts(self.steps[index])]
        wanted += [ids for index in scored for ids in self.dev.texts(self.scored[index])]
        wanted = [ids for ids in dict.fromkeys(wanted) if ids]
        warming = WARMING_TEXTS if len(wanted) > WARMING_TEXTS else 0
        cache.keep(wanted[:warming])
        rest = wanted[warming:]
        spent = timed(lambda: cache.keep(rest), times=1)
        made = cache.memory_bytes + cache.disk_bytes
        self._tell("text in front of the slots")
        return spent * padded(every) / padded(rest), made * sum(map(len, every)) // cache.tokens

    def _items(self, step: int) -> list[Item]:
        return [self.train.items[index] for index in self.steps[step]]

    def _largest_pass(self, step: int) -> tuple[int, int]:
        """Return the bytes that the passes of a step hold at most, besides gradients, and those of the gradients."""
        group, trainer = self._items(step), self.trainer
        with LiveTensors() as live:
            run_passes(trainer.begin_step(group))
        found = [weight.grad for weight in trainer.trained_parameters() if weight.grad is not None]
        gradients = tensor_bytes(found)
        trainer.end_step(group, seconds=0.0)
        self._tell("the longest step")
        return max(0, live.peak - gradients), gradients

    def _time_steps(self, steps: Sequence[int]) -> dict[int, float]:
        """Return the median seconds of some steps, which take turns."""
        found: dict[int, list[float]] = {step: [] for step in steps}
        began = clock()
        for turn in range(MOST_ROUNDS):
            for step in steps:
                group = self._items(step)
                found[step].append(timed(lambda group=group: take_step([(self.trainer, group)]), times=1))  # type: ignore[misc]
                if not turn:
                    self._tell("steps of different lengths")
            if clock() - began > TIMED_SECONDS / 2:
                break
        return {step: statistics.median(times) for step, times in found.items()}

    def _time_scored(self, indices: Sequence[int]) -> float:
        trainer = self.trainer

        def score() -> None:
            evaluate(
                trainer.backbone,
                [self.dev.items[index] for index in indices],
                Learned(trainer.vectors()),
                cache=trainer.prefix_cache if trainer.uses_prefix_cache else None,
            )

        spent = timed(score)
        self._tell("development part")
        return spent

    def _time_written(self) -> float:
        """Return the seconds of writing answers to the development part: some of middling length, scaled up. Labels and
        choices are chosen among as they are scored.
        """
        if self.dev.items[0].answers:
            return 0.0
        tokens = [item.tokens for item in self.dev.items]
        order = sorted(range(len(tokens)), key=tokens.__getitem__)
        mean = sum(tokens) / len(tokens)
        at = int(np.searchsorted([tokens[index] for index in order], mean)) - ANSWERED // 2
        at = max(0, min(at, len(order) - ANSWERED))
        some = order[at : at + ANSWERED]
        prompt = self.run.prompt(self.trainer)
        model = PromptModel(self.trainer.backbone)
        asked = Questions([self.run.prepared.parts["dev"][index] for index in some])
        return timed(lambda: model.predict(asked, prompt)) * len(order) / len(some)

    def _time_writing(self) -> float:
        """Return the seconds of a byte in a checkpoint, as the folder for temporary files takes it."""
        size, chosen = 0, dict[str, Tensor]()
        for index, weight in enumerate(self.trainer.trained_parameters()):
            if not chosen or size + weight.nbytes <= WRITTEN_BYTES:
                chosen[str(index)], size = weight, size + weight.nbytes
        with tempfile.TemporaryDirectory(prefix="ptuning-estimate-") as folder:
            spent = timed(lambda: write_checkpoint(Path(folder), RunState(), chosen, identity={}))
        self._tell("disk")
        return spent / size


def padded(texts: Iterable[Ids]) -> int:
    """Return the tokens that are run for texts in front of slots, pads included."""
    return sum(len(group) * len(group[-1]) for group in text_groups(sorted(texts, key=len)))


def spread(weights: Sequence[float], count: int) -> list[int]:
    """Return the places of some weights, evenly apart in their order from the smallest to the largest, which is last.

    Example:
        >>> spread([5.0, 1.0, 3.0, 2.0, 4.0], 3)
        [1, 2, 0]
    """
    order = sorted(range(len(weights)), key=weights.__getitem__)
    places = np.linspace(0, len(order) - 1, count).round().astype(int).tolist()
    return [order[place] for place in dict.fromkeys(places)]


def along(weights: Sequence[float], seconds: dict[int, float]) -> np.ndarray:
    """Return the seconds of everything, between those of what was timed by weight; below, in proportion to it.

    Args:
        weights: Of everything, N values above 0.
        seconds: By place among the weights.

    Example:
        >>> along([1.0, 2.0, 3.0], {1: 4.0, 2: 5.0}).tolist()
        [2.0, 4.0, 5.0]
    """
    by_weight: dict[float, list[float]] = {0.0: [0.0]}
    for place, value in seconds.items():
        by_weight.setdefault(weights[place], []).append(value)
    known = sorted(by_weight)
    return np.interp(weights, known, [statistics.mean(by_weight[weight]) for weight in known])


def timed(work: Callable[[], object], *, times: int = 5, enough: float = 0.5) -> float:
    """Return the median seconds of work that is done a few times, or once if that takes long."""
    found: list[float] = []
    while len(found) < times and sum(found) < enough:
        began = clock()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(clock() - began)
    return statistics.median(found)
