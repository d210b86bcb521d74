"""The training loop, for one prompt or for several on one frozen backbone: epochs, model selection, early stopping,
checkpoints and exact resume. Read :class:`TrainingLoop` first.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.config import BY_LOSS, BY_SCORE, TrainConfig
from ptuning.engine.evaluate import Evaluation, evaluate
from ptuning.engine.memory import total_bytes
from ptuning.engine.objective import ScoringRequest
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.engine.processes import this_writes, wait_for_all
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import FileError, PromptError, TrainingError, in_a_line
from ptuning.files import Json
from ptuning.progress import Interrupted, OnProgress, Progress
from ptuning.template.encode import TokenizedTemplate
from ptuning.training.checkpoint import (
    BestWeights,
    Checkpoint,
    RunState,
    Snapshot,
    check_identity,
    damaged,
    read_checkpoint,
    with_prefix,
    write_checkpoint,
)
from ptuning.training.encoders import copied_bytes
from ptuning.training.optimizer import learning_rates, linear_schedule
from ptuning.training.step import Learner, Step, Taken, take_steps

logger = logging.getLogger(__name__)

# A checkpoint within an epoch is written only after this many times what writing one takes.
SAVING_PAUSE = 20.0
# Share of the device's memory for encoders and optimizer states, so that those of wide backbones do not fill it, and
# what a weight takes: itself, a gradient and two moments, all float32.
STATE_SHARE = 0.25
BYTES_PER_WEIGHT = 16

# Model selection in words; a metric stands in place of the name in braces.
CHOICE_RULES = {
    BY_SCORE: "highest dev score; of equal ones the lowest dev loss; of equal ones the earliest epoch",
    BY_LOSS: "lowest dev loss; of equal ones the highest dev score; of equal ones the earliest epoch",
}
METRIC_RULE = "highest dev {}; of equal ones the lowest dev loss; of equal ones the earliest epoch"
# Returns the metric of texts that are generated with a backbone and a prompt.
Judge = Callable[[Backbone, PromptBatch], float]


class Trainer:
    """Training of one prompt, alone or together with a copy of the backbone or adapters on it.

    Args:
        checkpoint: Folder of the checkpoint; None writes none.
        identity: What must be equal for a checkpoint to be resumed: template, data, backbone, settings.
        judge: Computes the generation metric that chooses the best epoch, if it is one (``metric_for_best_model``).
        prefix_cache: KV cache that several prompts share; by default its own.
        start: Number of the restart.

    Attributes:
        learner: The trained weights. Its backbone holds the chosen weights at the end.
        best_vectors: Slot vectors of the best epoch so far, (P, E) float32.
        best_deep: Deep slots of that epoch, if there are any.
        numbers: Of the last step, as in :class:`~ptuning.progress.Progress`.
        seconds_before: Training time before this process resumed it.
    """

    def __init__(
        self,
        backbone: Backbone,
        bound: TokenizedTemplate,
        *,
        config: TrainConfig,
        checkpoint: Path | None = None,
        identity: Mapping[str, Json] | None = None,
        judge: Judge | None = None,
        prefix_cache: PrefixCache | None = None,
        start: int = 0,
    ) -> None:
        self.learner = Learner(backbone, bound, config=config, prefix_cache=prefix_cache)
        self.config = config
        self.checkpoint = checkpoint
        self.identity = dict(identity or {})
        self._judge = judge
        self.state = RunState()
        self.best_vectors, self.best_deep = self.learner.vectors(), self.learner.deep()
        self.cached = self.learner.prefix_cache.to_json()
        self.best_weights = BestWeights(checkpoint, start=start) if self.learner.weights else None
        self.numbers: Mapping[str, float] = {}
        self.seconds_before = 0.0

    def fit(
        self,
        train: Sequence[ScoringRequest],
        dev: Sequence[ScoringRequest],
        *,
        report: OnProgress | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        """Train this prompt alone on ``train``, from the start or from a loaded checkpoint; ``dev`` chooses the epoch.

        Raises:
            Interrupted: If ``should_stop`` returned true; a checkpoint was written.
            TrainingError: If the loss is NaN or infinite.
        """
        member = Member("", lambda: self, train, dev, self.config.epochs)
        with self.learner.prefix_cache as cache:
            loop = TrainingLoop([member], prefix_cache=cache, at_once=1, checkpoint=self.checkpoint)
            for _, outcome in loop.run(report=report, should_stop=should_stop):
                if isinstance(outcome, TrainingError):
                    raise outcome

    def steps(
        self,
        train: Sequence[ScoringRequest],
        dev: Sequence[ScoringRequest],
        *,
        report: OnProgress,
        check_stop: Callable[[], None],
    ) -> Iterator[Step]:
        """Yield each optimizer step, from the start or from where a checkpoint was, and score the development part
        between epochs. The caller takes each step and counts it (:meth:`count`) before it asks for the next.

        The initialization is scored too and may be chosen. So a learned prompt is never worse on the development part
        than its initialization. A TrainingError if the loss there is NaN or infinite.
        """
        learner, state = self.learner, self.state

        def cached(done: int, total: int) -> None:
            report(Progress("cache", done, total, f"text in front of the slots, {learner.prefix_cache.size}"))
            check_stop()

        inputs = (example for item in (*train, *dev) for example in item.inputs)
        learner.uses_prefix_cache = learner.prefix_cache.prepare(inputs, report=cached)
        self.cached = learner.prefix_cache.to_json()
        if not state.start:
            state.start = self._evaluated(dev, report, note="before training", epoch=0)
            report(self._scored(state.start, "before training: "))
        while not state.done:
            if learner.weights:
                learner.backbone.thaw(learner.weights.values())
            yield from self._epoch(train)
            learner.optimizer.zero_grad(set_to_none=True)
            if learner.weights:
                learner.backbone.freeze()
            self._end_epoch(dev, report)
        if self.best_weights is not None:
            wait_for_all()
            try:
                self.best_weights.restore(learner.weights, epoch=state.chosen_epoch)
            except PromptError as error:
                raise TrainingError(f"{error}; start again with overwrite") from error
            wait_for_all()  # no process removes the file while another reads it
            learner.backbone.__dict__.pop("fingerprint", None)  # it was that of the weights before
            learner.backbone.freeze()
            learner.optimizer.state.clear()

    def _epoch(self, train: Sequence[ScoringRequest]) -> Iterator[Step]:
        state, config = self.state, self.config
        order = self.order(len(train), epoch=state.epoch)
        group_size = config.batch_size * config.accumulation_steps
        total_steps = math.ceil(len(train) / group_size) * config.epochs
        while state.position < len(train):
            step = state.step - state.first_step
            factor = state.rate_factor * linear_schedule(step, total_steps, warmup_fraction=config.warmup_fraction)
            items = [train[index] for index in order[state.position : state.position + group_size]]
            yield Step(self.learner, items, state.step, state.epoch, factor)

    def order(self, records: int, *, epoch: int) -> list[int]:
        """Return the shuffled order in which an epoch, from 1, reads this many records."""
        order: list[int] = torch.randperm(records, generator=self.learner.generator("data order", epoch)).tolist()
        return order

    def count(self, step: Step, taken: Taken) -> None:
        """Count a step that was taken."""
        state = self.state
        state.epoch_loss_sum += taken.loss_sum
        state.epoch_loss_count += taken.loss_count
        state.train_tokens += taken.tokens
        state.step += 1
        state.position += len(step.items)
        state.epoch_seconds += taken.seconds
        state.train_seconds += taken.seconds
        self.numbers = {
            "step": state.step,
            "epoch": step.epoch,
            "loss": taken.loss_sum / taken.loss_count,
            **learning_rates(self.learner.optimizer, step.rate, self.learner.peaks),
            "tokens_per_second": taken.tokens / taken.seconds if taken.seconds else 0.0,
        }

    def evaluate(
        self, items: Sequence[ScoringRequest], *, report: OnProgress | None = None, note: str = ""
    ) -> Evaluation:
        """Score items with the slot vectors as they are now."""
        learner = self.learner
        return evaluate(learner.backbone, [items], learner.learned(), cache=learner.cache, report=report, note=note)

    def _evaluated(
        self, dev: Sequence[ScoringRequest], report: OnProgress, *, note: str, epoch: int
    ) -> dict[str, float]:
        """Score the development part, keep the vectors and weights if they are the best so far, and return numbers."""
        evaluation = self.evaluate(dev, report=report, note=note)
        self.learner.check_loss(evaluation.loss, f"the development loss became {evaluation.loss} in epoch {epoch}")
        numbers = {"dev_loss": evaluation.loss, "dev_score": evaluation.score}
        value = -1.0
        if self._judge is not None:
            value = numbers[f"dev_{self._metric}"] = self._judge(self.learner.backbone, self.learner.learned())
        if evaluation.guesses:  # a single class is a sign of a stuck model
            numbers["guessed_classes"] = len(set(evaluation.guesses))
        state, learner = self.state, self.learner
        if self._rank(evaluation.score, evaluation.loss, value) > self.rank:
            state.best_score, state.best_loss, state.best_value = evaluation.score, evaluation.loss, value
            state.chosen_epoch = epoch
            self.best_vectors, self.best_deep = learner.vectors(), learner.deep()
            # The main process writes into a checkpoint's folder, each process into its own.
            if self.best_weights is not None and (self.checkpoint is None or learner.ranks.writes):
                self.best_weights.keep(learner.weights, epoch=epoch)
            if self.checkpoint is None:
                self.forget_others()
        return numbers

    def _end_epoch(self, dev: Sequence[ScoringRequest], report: OnProgress) -> None:
        state = self.state
        train_loss = state.epoch_loss_sum / state.epoch_loss_count
        numbers = self._evaluated(dev, report, note=f"epoch {state.epoch}", epoch=state.epoch)
        row = {"epoch": state.epoch, "train_loss": train_loss, **numbers, "seconds": state.epoch_seconds}
        state.history.append(row)
        # Early stopping waits while the loss falls, too: scores of few records tie, and late epochs take small steps.
        losses = [state.start["dev_loss"], *(epoch["dev_loss"] for epoch in state.history)]
        waited = state.epoch - max(state.chosen_epoch, losses.index(min(losses)))
        state.done = state.epoch == self.config.epochs or waited >= self.config.patience
        state.epoch += 1
        state.position, state.epoch_loss_sum, state.epoch_loss_count, state.epoch_seconds = 0, 0.0, 0.0, 0.0
        report(self._scored(row, f"train loss {train_loss:.3f}, "))
        if not (state.done and state.has_diverged) or self.learner.weights:
            return
        listed = ", ".join(f"{epoch['dev_loss']:.3f}" for epoch in state.history)
        message = (
            f"training '{in_a_line(str(self.learner.bound.template))}' did not improve on its initialization: "
            f"development loss {losses[0]:.3f} before training, {listed} after each epoch"
        )
        if len(state.diverged) == self.config.retries_on_divergence:
            logger.warning("%s; the initialization is kept. Lower the learning rate (lr), or change the seed", message)
            return
        state.restart()
        self.learner.start_anew()
        logger.warning("%s; restarting with %g of the learning rates", message, state.rate_factor)

    def _scored(self, numbers: Mapping[str, float], note: str) -> Progress:
        """Return the progress after the development part was scored, before training or at the end of an epoch."""
        epoch, metric = len(self.state.history), f"dev_{self._metric}"
        own = {name: numbers[name] for name in ("train_loss", "dev_loss", "dev_score") if name in numbers}
        value = f", dev {self._metric} {numbers[metric]:.3f}" if self._judge is not None else ""
        return Progress(
            "epoch",
            epoch,
            self.config.epochs,
            f"{note}dev loss {numbers['dev_loss']:.3f}, dev score {numbers['dev_score']:.3f}{value}",
            numbers={"step": self.state.step, "epoch": epoch, **own},
        )

    @property
    def _metric(self) -> str:
        """Criterion of model selection; a generation metric only if a judge is configured."""
        name = self.config.metric_for_best_model
        return name if name == BY_LOSS or self._judge is not None else BY_SCORE

    @property
    def choice_rule(self) -> str:
        """Model selection in words."""
        return CHOICE_RULES.get(self._metric) or METRIC_RULE.format(self._metric)

    @property
    def rank(self) -> tuple[float, float]:
        """Rank of the best epoch: a larger one is better."""
        return self._rank(self.state.best_score, self.state.best_loss, self.state.best_value)

    def _rank(self, score: float, loss: float, value: float) -> tuple[float, float]:
        if self._judge is not None:
            return value, -loss
        return (-loss, score) if self._metric == BY_LOSS else (score, -loss)

    def forget_others(self) -> None:
        """Remove the best weights of earlier epochs, once no checkpoint names them."""
        if self.best_weights is not None:
            self.best_weights.forget_others(epoch=self.state.chosen_epoch)

    def snapshot(self) -> Snapshot:
        """Return everything that is needed to resume. A finished training has its best results alone."""
        learner = self.learner
        tensors = {"best_vectors": self.best_vectors}
        if self.best_deep is not None:
            tensors |= {f"best_deep.{name}": value for name, value in self.best_deep.tensors.items()}
        if not self.state.done:
            tensors |= {f"encoder.{name}": value for name, value in learner.encoder.state_dict().items()}
            if learner.deep_encoder is not None:
                tensors |= {f"deep_encoder.{name}": value for name, value in learner.deep_encoder.state_dict().items()}
            tensors |= {f"weights.{name}": weight for name, weight in learner.weights.items()}
            for index, values in learner.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        return Snapshot(self.state, tensors, self.identity)

    def load(self) -> bool:
        """Load the checkpoint of a training alone; return whether there is one. Errors as of :meth:`restore`."""
        checkpoint = read_checkpoint(self.checkpoint) if self.checkpoint is not None else None
        if checkpoint is None or self.checkpoint is None:
            return False
        self.restore(next(iter(checkpoint.trainings.values())), self.checkpoint)
        return True

    def restore(self, saved: Snapshot, folder: Path) -> None:
        """Load what :meth:`snapshot` returned; ``folder`` is that of the checkpoint.

        Raises:
            TrainingError: If it is damaged, or belongs to a run with other settings, data or backbone (says which).
        """
        check_identity(self.identity, saved.identity, where=str(folder))
        learner, tensors = self.learner, saved.tensors
        try:
            if not saved.state.done:
                learner.encoder.load_state_dict(with_prefix("encoder.", tensors))
                if learner.deep_encoder is not None:
                    learner.deep_encoder.load_state_dict(with_prefix("deep_encoder.", tensors))
                with torch.no_grad():
                    for name, weight in learner.weights.items():
                        weight.copy_(tensors[f"weights.{name}"])
                states: dict[int, dict[str, Tensor]] = {}
                for name, value in with_prefix("optimizer.", tensors).items():
                    index, _, key = name.partition(".")
                    states.setdefault(int(index), {})[key] = value
                groups = learner.optimizer.state_dict()["param_groups"]
                learner.optimizer.load_state_dict({"state": states, "param_groups": groups})
            if self.best_deep is not None:
                deep = with_prefix("best_deep.", tensors)
                self.best_deep = replace(self.best_deep, **deep)  # type: ignore[arg-type]
            self.best_vectors = tensors["best_vectors"]
        except (KeyError, ValueError, RuntimeError) as error:
            raise damaged(folder, error) from error
        self.state, self.seconds_before = saved.state, saved.state.train_seconds


@dataclass(frozen=True)
class Member:
    """A prompt to be trained: at most ``epochs`` passes over ``train``; the best one on ``dev`` is chosen. ``make``
    returns its trainer.
    """

    name: str
    make: Callable[[], Trainer]
    train: Sequence[ScoringRequest]
    dev: Sequence[ScoringRequest]
    epochs: int


@dataclass(eq=False)
class _Live:
    """A prompt in training, and the step that it takes next."""

    member: Member
    trainer: Trainer
    steps: Iterator[Step]
    step: Step | None = None


class TrainingLoop:
    """Trains prompts together on one frozen backbone, or one after another. Rows of prompts that train together share
    passes; each prompt has its own encoder, optimizer, data order and development part. When one finishes, the next
    one starts.

    Which prompts train together decides how sums are rounded. So a checkpoint holds all of them at one moment, and a
    resumed loop continues with the same prompts. Those that finished after that moment finish again, with the same
    result.

    Args:
        at_once: Maximum number of prompts that train at the same time. With 1, the backbone may be trained as well,
            and several processes may share the rows of each step.
        prefix_cache: KV cache that the prompts share.
        checkpoint: Folder of the checkpoint; None writes none. The setting ``checkpoint_seconds`` says how often one is
            written, but for at most a twentieth of the time; with one prompt at a time, also after every epoch.
        resumed: The checkpoint to resume from.

    Attributes:
        finished: Names of the prompts whose results are written; :meth:`release` adds one.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        prefix_cache: PrefixCache,
        at_once: int,
        checkpoint: Path | None = None,
        resumed: Checkpoint | None = None,
    ) -> None:
        self.members = {member.name: member for member in members}
        self.at_once = at_once
        self.checkpoint = checkpoint
        self.finished = [name for name in resumed.finished if name in self.members] if resumed is not None else []
        self._resumed = dict(resumed.trainings) if resumed is not None else {}
        self._prefix_cache = prefix_cache
        self._saved_at, self._saving_seconds = time.monotonic(), 0.0
        self._live: list[_Live] = []
        self._ended: dict[str, Snapshot] = {}  # finished, but their results are not yet written

    def release(self, name: str) -> None:
        """Mark a prompt as finished: its result is written, and it is not trained again."""
        self._ended.pop(name, None)
        self.finished.append(name)

    def run(
        self, *, report: OnProgress | None = None, should_stop: Callable[[], bool] | None = None
    ) -> Iterator[tuple[str, Trainer | TrainingError]]:
        """Train, from the start or from the checkpoint, and yield each prompt that ends: its trainer, or its error.

        ``should_stop`` is called after every step, and after every pass that fills the KV cache.

        Raises:
            Interrupted: If ``should_stop`` returned true; a checkpoint was written.
            TrainingError: If several processes train prompts together, or the checkpoint is of other settings.
        """
        tell = report or (lambda _: None)

        def check_stop() -> None:
            if should_stop is not None and should_stop():
                raise Interrupted

        order = dict.fromkeys(name for name in (*self._resumed, *self.members) if name in self.members)
        waiting = deque(self.members[name] for name in order if name not in self.finished)
        total = sum(member.epochs * len(member.train) for member in waiting)
        if self.at_once > 1 and not self._resumed:
            self.save()
        try:
            while waiting or self._live:
                while waiting and self._has_room(waiting[0]):
                    self._begin(waiting.popleft(), tell, check_stop)
                    yield from self._advance(self._live[-1:])
                if not self._live:
                    continue
                before = len(self._live)
                failed = self._take_steps()
                self._report(tell, total, waiting)
                check_stop()
                ended = [*failed, *self._advance(list(self._live))]
                if self._is_due():
                    self.save()
                yield from ended
                rest = [live.member for live in self._live] + list(waiting)
                if self._prefix_cache.is_used and rest and len(self._live) < before:
                    requests = (item for member in rest for item in (*member.train, *member.dev))
                    self._prefix_cache.keep_only(row for item in requests for row in item.inputs)
        except Interrupted:
            self.save()
            raise Interrupted(f"stopped {self._place()}") from None
        finally:
            for live in self._live:
                if live.trainer.best_weights is not None:
                    live.trainer.best_weights.close()

    def _has_room(self, member: Member) -> bool:
        """Whether one more prompt may start. A prompt of the checkpoint always may, and the device's total memory
        counts, not the free one, so that a resumed loop decides in the same way.
        """
        if not self._live or member.name in self._resumed:
            return True
        learners = [live.trainer.learner for live in self._live]
        device = learners[0].backbone.device
        largest = max(
            learner.trainable_parameters * (BYTES_PER_WEIGHT + copied_bytes(learner.encoder, device))
            for learner in learners
        )
        fits = (len(learners) + 1) * largest <= STATE_SHARE * total_bytes(device)
        return fits and len(learners) < self.at_once

    def _begin(self, member: Member, report: OnProgress, check_stop: Callable[[], None]) -> None:
        trainer = member.make()
        if trainer.learner.ranks.size > 1 and self.at_once > 1:
            raise TrainingError("a fleet trains in one process; train its prompts one by one, or start one process")
        if member.name in self._resumed and self.checkpoint is not None:
            trainer.restore(self._resumed.pop(member.name), self.checkpoint)

        def tell(progress: Progress) -> None:
            prefix = f"{member.name}: " if member.name else ""
            report(replace(progress, note=prefix + progress.note, name=member.name))

        steps = trainer.steps(member.train, member.dev, report=tell, check_stop=check_stop)
        self._live.append(_Live(member, trainer, steps))

    def _take_steps(self) -> list[tuple[str, TrainingError]]:
        """Take the next step of every prompt in training; return the errors of those that failed."""
        steps = [live.step for live in self._live if live.step is not None]
        failed: list[tuple[str, TrainingError]] = []
        for live, step, outcome in zip(list(self._live), steps, take_steps(steps), strict=True):
            if isinstance(outcome, TrainingError):
                failed.append((live.member.name, outcome))
                self._end(live)
            else:
                live.trainer.count(step, outcome)
        return failed

    def _advance(self, lives: Iterable[_Live]) -> list[tuple[str, Trainer | TrainingError]]:
        """Get prompts to their next step, which may end an epoch; return those that have ended."""
        ended: list[tuple[str, Trainer | TrainingError]] = []
        for live in lives:
            name, trainer = live.member.name, live.trainer
            try:
                live.step = next(live.steps)
            except StopIteration:
                self._end(live)
                self._ended[name] = trainer.snapshot()
                ended.append((name, trainer))
            except TrainingError as error:
                self._end(live)
                ended.append((name, error))
        return ended

    def _end(self, live: _Live) -> None:
        self._live.remove(live)
        if live.trainer.best_weights is not None:
            live.trainer.best_weights.close()

    def _report(self, report: OnProgress, total: int, waiting: Iterable[Member]) -> None:
        """Report the progress, once with the numbers of each prompt that took a step."""
        left = sum(member.epochs * len(member.train) for member in waiting)
        note = f"{len(self.finished)} of {len(self.members)} prompts done, {len(self._live)} in training"
        for live in self._live:
            left += (live.trainer.config.epochs - live.trainer.state.epoch + 1) * len(live.member.train)
            left -= live.trainer.state.position
        for live in self._live:
            state = live.trainer.state
            if self.at_once == 1:
                loss = state.epoch_loss_sum / state.epoch_loss_count
                note = f"epoch {state.epoch}/{live.member.epochs}, loss {loss:.3f}"
            report(Progress("train", total - left, total, note, live.member.name, live.trainer.numbers))

    def _place(self) -> str:
        """Return where training is, in words."""
        if self.at_once > 1 or not self._live:
            done = f"{len(self.finished)} of {len(self.members)} prompts done"
            return f"with {done} and {len(self._live)} in training"
        trainer = self._live[0].trainer
        return f"in epoch {trainer.state.epoch} of {trainer.config.epochs}, after {trainer.state.step} steps"

    def _is_due(self) -> bool:
        """Whether it is time for a checkpoint; writing them may take a twentieth of the time."""
        if self.at_once == 1 and all(live.trainer.state.position == 0 for live in self._live):
            return True
        seconds = min((live.trainer.config.checkpoint_seconds for live in self._live), default=0.0)
        return time.monotonic() - self._saved_at > max(seconds, SAVING_PAUSE * self._saving_seconds)

    def save(self) -> None:
        """Write a checkpoint of all prompts, if there is a folder for it and this is the main process.

        If it cannot be written, training goes on, the checkpoint before stays, and the next one is tried when it is
        due. Trained in another way, the prompts would be rounded in another way.
        """
        began = time.monotonic()
        if self.checkpoint is not None and this_writes():
            going = {live.member.name: live.trainer.snapshot() for live in self._live}
            try:
                write_checkpoint(self.checkpoint, Checkpoint({**self._ended, **going}, self.finished))
                for live in self._live:
                    live.trainer.forget_others()
            except FileError as error:
                logger.warning("no checkpoint was written, and training goes on: %s", error)
        self._saved_at = time.monotonic()
        self._saving_seconds = self._saved_at - began
