"""Training loop of one prompt: epochs, choice of the best epoch, early stopping, checkpoints and exact resume."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.config import BY_LOSS, BY_SCORE, TrainConfig
from ptuning.engine.evaluate import Evaluation, evaluate
from ptuning.engine.objective import ScoringRequest
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.engine.processes import wait_for_all
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import PromptError, TrainingError, in_a_line
from ptuning.files import Json
from ptuning.progress import Interrupted, OnProgress, Progress
from ptuning.template.encode import TokenizedTemplate
from ptuning.training.checkpoint import KeptWeights, RunState, damaged, read_checkpoint, write_checkpoint
from ptuning.training.optimizer import learning_rates, linear_schedule
from ptuning.training.step import Learner, Step, Taken, take_steps

logger = logging.getLogger(__name__)

# A checkpoint with weights of the backbone is written within an epoch only after this many times what writing it takes.
SAVING_PAUSE = 20.0

# What an epoch is chosen by, in words; a metric stands in place of the name in braces.
CHOICE_RULES = {
    BY_SCORE: "highest dev score; of equal ones the lowest dev loss; of equal ones the earliest epoch",
    BY_LOSS: "lowest dev loss; of equal ones the highest dev score; of equal ones the earliest epoch",
}
METRIC_RULE = "highest dev {}; of equal ones the lowest dev loss; of equal ones the earliest epoch"
# What a metric makes of texts that are written with a backbone and what was learned.
Judge = Callable[[Backbone, PromptBatch], float]


class Trainer:
    """Trains the slot vectors of one template, alone or together with a copy of the backbone or adapters on it.

    Args:
        checkpoint: Folder of the checkpoint; None writes none.
        identity: What must be equal for a checkpoint to be resumed: template, data, backbone, settings.
        judge: Computes the generation metric that chooses the best epoch, if it is one (``metric_for_best_model``).
        prefix_cache: KV cache that several prompts share, which the caller clears; by default its own, cleared after
            :meth:`fit`.

    Attributes:
        learner: What is trained. Its backbone holds the chosen weights after :meth:`fit`.
        best_vectors: Slot vectors of the best epoch so far, (P, E) float32.
        best_deep: What the deep slots of that epoch bring, if there are any.
        numbers: Of the last step, as in :class:`~ptuning.progress.Progress`.
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
    ) -> None:
        self.learner = Learner(backbone, bound, config=config, prefix_cache=prefix_cache)
        self.config = config
        self.checkpoint = checkpoint
        self.identity = dict(identity or {})
        self._judge = judge
        self.state = RunState()
        self.best_vectors, self.best_deep = self.learner.vectors(), self.learner.deep()
        self.cached = self.learner.prefix_cache.to_json()
        self._shares_prefix_cache = prefix_cache is not None
        self.kept: KeptWeights | None = None
        self.numbers: Mapping[str, float] = {}
        self._saved_at, self._saving_seconds = time.monotonic(), 0.0

    def fit(
        self,
        train: Sequence[ScoringRequest],
        dev: Sequence[ScoringRequest],
        *,
        report: OnProgress | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        """Train to the end on ``train``, from the start or from a loaded checkpoint; ``dev`` decides on the best epoch.

        The start values are scored too and may be chosen. So a learned prompt is never worse on the development part
        than its start.

        Raises:
            Interrupted: If ``should_stop`` returned true after a step or a pass that fills the KV cache; a checkpoint
                was written.
            TrainingError: If the loss is NaN or infinite.
        """
        self.kept = KeptWeights(self.checkpoint) if self.learner.weights else None
        try:
            with contextlib.nullcontext() if self._shares_prefix_cache else self.learner.prefix_cache:
                for step in self.steps(train, dev, report=report, should_stop=should_stop):
                    (outcome,) = take_steps([step])
                    if isinstance(outcome, TrainingError):
                        raise outcome
                    self.count(step, outcome)
                    if report is not None:
                        report(self._progress(train))
                    if should_stop is not None and should_stop():
                        self._interrupt()
                    if time.monotonic() - self._saved_at > self._pause():
                        self.save()
            if self.kept is not None:
                self._take_best(self.kept)
        finally:
            if self.kept is not None:
                self.kept.close()

    def _interrupt(self) -> NoReturn:
        self.save()
        raise Interrupted(f"stopped in {self.place}")

    def _progress(self, train: Sequence[ScoringRequest]) -> Progress:
        state, epochs = self.state, self.config.epochs
        mean = state.epoch_loss_sum / state.epoch_loss_count
        done = (state.epoch - 1) * len(train) + state.position
        note = f"epoch {state.epoch}/{epochs}, loss {mean:.3f}"
        return Progress("train", done, epochs * len(train), note, numbers=self.numbers)

    @property
    def place(self) -> str:
        """Where training is, in words."""
        return f"epoch {self.state.epoch} of {self.config.epochs}, after {self.state.step} steps"

    def steps(
        self,
        train: Sequence[ScoringRequest],
        dev: Sequence[ScoringRequest],
        *,
        report: OnProgress | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[Step]:
        """Yield each optimizer step, from the start or from a loaded checkpoint, and score the development part between
        epochs. The caller must take the step (:func:`~ptuning.training.step.take_steps`) and :meth:`count` it before
        it asks for the next. Between steps the caller asks ``should_stop``.

        Raises:
            Interrupted: If ``should_stop`` returned true; a checkpoint was written.
            TrainingError: If the loss on the development part is NaN or infinite.
        """
        tell, learner, state = report or (lambda _: None), self.learner, self.state

        def passed(done: int, total: int) -> None:
            tell(Progress("cache", done, total, f"text in front of the slots, {learner.prefix_cache.size}"))
            if should_stop is not None and should_stop():
                self._interrupt()

        inputs = (example for item in (*train, *dev) for example in item.inputs)
        learner.uses_prefix_cache = learner.prefix_cache.prepare(inputs, report=passed)
        self.cached = learner.prefix_cache.to_json()
        if not state.start:
            found = self.evaluate(dev, report=tell, note="before training")
            judged = self._judged()
            state.start = {"dev_loss": found.loss, "dev_score": found.score, **judged, **_guessed(found)}
            self._consider(found, judged, epoch=0)
            tell(self._scored(state.start, "before training: "))
        while not state.done:
            if learner.weights:
                learner.backbone.thaw(learner.weights.values())
            yield from self._epoch(train)
            learner.optimizer.zero_grad(set_to_none=True)
            if learner.weights:
                learner.backbone.freeze()
            self._end_epoch(self.evaluate(dev, report=tell, note=f"epoch {state.epoch}"))
            last = state.history[-1]
            # Before the checkpoint, from which a killed run would go on without having told.
            tell(self._scored(last, f"train loss {last['train_loss']:.3f}, "))
            if state.done and state.is_lost and not learner.weights:
                self._end_lost()
            self.save()

    def _end_lost(self) -> None:
        """Start anew with half the learning rates after a training that was lost, or say that it was."""
        state = self.state
        losses = ", ".join(f"{epoch['dev_loss']:.3f}" for epoch in state.history)
        what = (
            f"training '{in_a_line(str(self.learner.bound.template))}' was lost: the development loss, "
            f"{state.start['dev_loss']:.3f} before training, was {losses} after each epoch"
        )
        if len(state.lost) == self.config.retries_on_divergence:
            logger.warning("%s; the prompt is its start. Try a lower learning rate (--lr) or another --seed", what)
            return
        state.start_anew()
        self.learner.start_anew()
        logger.warning("%s; it starts anew with %g of the learning rates", what, state.share)

    def _scored(self, found: Mapping[str, float], note: str) -> Progress:
        """Return the progress after the development part was scored, before training or at the end of an epoch."""
        epoch = len(self.state.history)
        numbers = {name: found[name] for name in ("train_loss", "dev_loss", "dev_score") if name in found}
        value = f", dev {self._metric} {found[f'dev_{self._metric}']:.3f}" if self._judge is not None else ""
        return Progress(
            "epoch",
            epoch,
            self.config.epochs,
            f"{note}dev loss {found['dev_loss']:.3f}, dev score {found['dev_score']:.3f}{value}",
            numbers={"step": self.state.step, "epoch": epoch, **numbers},
        )

    def _pause(self) -> float:
        """Return the seconds between two checkpoints; writing weights may take a twentieth of the time."""
        return max(self.config.checkpoint_seconds, SAVING_PAUSE * self._saving_seconds if self.learner.weights else 0.0)

    def _take_best(self, kept: KeptWeights) -> None:
        """Load the weights of the best epoch into the backbone, and drop the state of the optimizer."""
        wait_for_all()
        try:
            kept.restore(self.learner.weights, epoch=self.state.chosen_epoch)
        except PromptError as error:
            raise TrainingError(f"{error}; start anew with --overwrite") from error
        wait_for_all()  # no process removes the file while another reads it
        self.learner.backbone.__dict__.pop("fingerprint", None)  # it was that of the weights before
        self.learner.backbone.freeze()
        self.learner.optimizer.state.clear()

    def _epoch(self, train: Sequence[ScoringRequest]) -> Iterator[Step]:
        state, config = self.state, self.config
        order = self.order(len(train), epoch=state.epoch)
        group_size = config.batch_size * config.accumulation_steps
        total_steps = math.ceil(len(train) / group_size) * config.epochs
        while state.position < len(train):
            step = state.step - state.first_step
            factor = state.share * linear_schedule(step, total_steps, warmup_fraction=config.warmup_fraction)
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
        return evaluate(
            self.learner.backbone,
            items,
            self.learner.learned(),
            cache=self.learner.cache,
            report=report,
            note=note,
        )

    @property
    def _metric(self) -> str:
        """What epochs are chosen by; a metric for texts only where there is one who judges."""
        name = self.config.metric_for_best_model
        return name if name == BY_LOSS or self._judge is not None else BY_SCORE

    @property
    def choice_rule(self) -> str:
        """What epochs are chosen by, in words."""
        return CHOICE_RULES.get(self._metric) or METRIC_RULE.format(self._metric)

    def _judged(self) -> dict[str, float]:
        """Return the metric that chooses, by its name in ``run.json``, of what is written now; nothing without one."""
        if self._judge is None:
            return {}
        return {f"dev_{self._metric}": self._judge(self.learner.backbone, self.learner.learned())}

    @property
    def rank(self) -> tuple[float, float]:
        """How good the best epoch is: a larger one is better."""
        return self._rank(self.state.best_score, self.state.best_loss, self.state.best_value)

    def _rank(self, score: float, loss: float, value: float) -> tuple[float, float]:
        if self._judge is not None:
            return value, -loss
        return (-loss, score) if self._metric == BY_LOSS else (score, -loss)

    def _end_epoch(self, found: Evaluation) -> None:
        state, judged = self.state, self._judged()
        state.history.append(
            {
                "epoch": state.epoch,
                "train_loss": state.epoch_loss_sum / state.epoch_loss_count,
                "dev_loss": found.loss,
                "dev_score": found.score,
                **judged,
                **_guessed(found),
                "seconds": state.epoch_seconds,
            }
        )
        self._consider(found, judged, epoch=state.epoch)
        # Early stopping waits while the loss falls, too: scores of few records tie, and late epochs take small steps.
        losses = [state.start["dev_loss"], *(epoch["dev_loss"] for epoch in state.history)]
        waited = state.epoch - max(state.chosen_epoch, losses.index(min(losses)))
        state.done = state.epoch == self.config.epochs or waited >= self.config.patience
        state.epoch += 1
        state.position, state.epoch_loss_sum, state.epoch_loss_count, state.epoch_seconds = 0, 0.0, 0.0, 0.0

    def _consider(self, found: Evaluation, judged: Mapping[str, float], *, epoch: int) -> None:
        """Keep the vectors and weights if they are the best so far, by :attr:`choice_rule`."""
        self.learner.check_loss(found.loss, f"the development loss became {found.loss} in epoch {epoch}")
        value = next(iter(judged.values()), -1.0)
        if self._rank(found.score, found.loss, value) > self.rank:
            self.state.best_value = value
            self.state.best_score, self.state.best_loss, self.state.chosen_epoch = found.score, found.loss, epoch
            self.best_vectors, self.best_deep = self.learner.vectors(), self.learner.deep()
            if self.kept is not None and self._writes:
                self.kept.keep(self.learner.weights, epoch=epoch)
            if self.kept is not None and self.checkpoint is None:
                self.kept.forget_others(epoch=epoch)

    @property
    def _writes(self) -> bool:
        """Whether this process writes: the main process into a checkpoint's folder, each one into its own."""
        return self.checkpoint is None or self.learner.ranks.writes

    def save_to(self, folder: Path) -> None:
        """Write everything that is needed to resume into a folder."""
        write_checkpoint(folder, self.state, self._tensors(), identity=self.identity)

    def save(self) -> None:
        """Write the checkpoint, if there is a folder for it and this is the main process."""
        began = time.monotonic()
        if self.checkpoint is not None and self._writes:
            self.save_to(self.checkpoint)
            if self.kept is not None:
                self.kept.forget_others(epoch=self.state.chosen_epoch)
        self._saved_at = time.monotonic()
        self._saving_seconds = self._saved_at - began

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint. A finished run has its best weights in files of their own."""
        tensors = {f"encoder.{name}": value for name, value in self.learner.encoder.state_dict().items()}
        tensors["best_vectors"] = self.best_vectors
        if self.learner.deep_encoder is not None and self.best_deep is not None:
            tensors |= {f"deep_encoder.{name}": value for name, value in self.learner.deep_encoder.state_dict().items()}
            tensors |= {f"best_deep.{name}": value for name, value in self.best_deep.tensors.items()}
        if self.learner.weights and self.state.done:
            return tensors
        tensors |= {f"weights.{name}": weight for name, weight in self.learner.weights.items()}
        for index, values in self.learner.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        return tensors

    def load(self) -> bool:
        """Load the checkpoint, as :meth:`load_from`; return whether there is one."""
        return self.checkpoint is not None and self.load_from(self.checkpoint)

    def load_from(self, folder: Path) -> bool:
        """Load what :meth:`save_to` wrote; return whether there is anything.

        Raises:
            TrainingError: If it is damaged, or belongs to a run with other settings, data or backbone (says which).
        """
        found = read_checkpoint(folder, identity=self.identity)
        if found is None:
            return False
        state, tensors = found
        try:
            self.learner.encoder.load_state_dict(_of("encoder.", tensors))
            if self.learner.deep_encoder is not None and self.best_deep is not None:
                self.learner.deep_encoder.load_state_dict(_of("deep_encoder.", tensors))
                self.best_deep = replace(self.best_deep, **_of("best_deep.", tensors))  # type: ignore[arg-type]
            if not (self.learner.weights and state.done):
                with torch.no_grad():
                    for name, weight in self.learner.weights.items():
                        weight.copy_(tensors[f"weights.{name}"])
                self._load_optimizer(tensors)
            self.best_vectors = tensors["best_vectors"]
        except (KeyError, ValueError, RuntimeError) as error:
            raise damaged(folder, error) from error
        self.state = state
        return True

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        whole = self.learner.optimizer.state_dict()
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                states.setdefault(int(index), {})[key] = value
        self.learner.optimizer.load_state_dict({"state": states, "param_groups": whole["param_groups"]})


def _of(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _guessed(found: Evaluation) -> dict[str, int]:
    """Return the number of different classes that were guessed; a single one is a sign of a stuck model."""
    return {"guessed_classes": len(set(found.guesses))} if found.guesses else {}
