"""Training a prompt: fit, evaluate, choose, stop early, checkpoint, resume exactly. Sees the training and development
parts only; knows no files but its checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.trained_weights import TrainedWeights, trained_parameters, with_adapters
from ptuning.config import TrainConfig, derived_seed
from ptuning.engine.evaluate import Evaluation, evaluate
from ptuning.engine.learned import Learned
from ptuning.engine.objective import Item, loss_count
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.errors import PromptError, TrainingError
from ptuning.files import Json
from ptuning.progress import Interrupted, OnProgress, Progress
from ptuning.template.fill import BoundTemplate
from ptuning.training.checkpoint import KeptWeights, RunState, damaged, read_checkpoint, write_checkpoint
from ptuning.training.encoder import PromptEncoder, start_vectors
from ptuning.training.step import Chunk, take_step

# A checkpoint that holds weights of the backbone is written inside an epoch after so many times what writing it takes.
SAVING_PAUSE = 20.0

CHOICE_RULE = "highest dev score; of equal ones the lowest dev loss; of equal ones the earliest epoch"


class Trainer:
    """Trains the slot vectors of one template: alone, or with a copy of the backbone, all of it or adapters on it.

    Args:
        backbone: A frozen backbone, of which nothing changes. :attr:`backbone` is what is trained: this one, or a copy
            that holds the chosen weights in the end.
        bound: The template, bound to the backbone.
        config: The settings.
        checkpoint: Folder of the checkpoint, or None to keep none.
        identity: What a checkpoint must agree on to be resumed: template, data, backbone, settings.
        prefix_cache: KV cache that several prompts share, which the caller clears; by default its own, cleared after
            :meth:`fit`.

    Raises:
        TrainingError: If the backbone is not frozen.
    """

    def __init__(
        self,
        backbone: Backbone,
        bound: BoundTemplate,
        *,
        config: TrainConfig,
        checkpoint: Path | None = None,
        identity: Mapping[str, Json] | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        if backbone.model.training or any(weight.requires_grad for weight in backbone.model.parameters()):
            raise TrainingError(f"the backbone '{backbone.name}' is not frozen; call its freeze() first")
        self.frozen = backbone
        self.backbone = self._to_train(backbone, config)
        # Weights of the backbone that are trained, by name; none of a frozen one.
        self.weights = trained_parameters(self.backbone, config.tune)
        self.bound = bound
        self.config = config
        self.checkpoint = checkpoint
        self.identity = dict(identity or {})
        self.accelerator = Accelerator()
        known = backbone.table_statistics
        start = start_vectors(
            bound.slot_start_ids,
            table=backbone.table(),
            mean=known.mean,
            std=known.std,
            how=config.start,
            generator=self.generator("slot starts"),
        )
        with torch.random.fork_rng(devices=[]):  # torch's modules draw weights of their own before ours are written
            self.encoder = PromptEncoder(
                start,
                reach=known.norm,
                kind=config.encoder if bound.slots else "none",
                dropout=config.dropout,
                generator=self.generator("encoder weights"),
            ).to(backbone.device)
        self.optimizer = self._make_optimizer()
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.state = RunState()
        self.best_vectors = self.vectors()
        self._shares_prefix_cache = prefix_cache is not None
        self.prefix_cache = prefix_cache or PrefixCache(self.backbone, memory_share=config.prefix_cache_share)
        self.cached = self.prefix_cache.to_json()
        # Whether rows run from their first slot onwards.
        self.uses_prefix_cache = False
        self._losses: list[Tensor] = []
        self.kept: KeptWeights | None = None
        self._saved_at, self._saving_seconds = time.monotonic(), 0.0

    @staticmethod
    def _to_train(backbone: Backbone, config: TrainConfig) -> Backbone:
        if config.tune == "frozen":
            return backbone
        if config.tune == "tuned":
            return backbone.copy()
        return with_adapters(
            backbone,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            targets=config.lora_targets,
            seed=derived_seed(config.seed, "adapter weights"),
        )

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW over the encoder, and over the backbone with a learning rate and decay of its own."""
        config = self.config
        groups: list[dict[str, list[nn.Parameter] | float]] = [
            {"params": list(self.encoder.parameters()), "lr": config.lr}
        ]
        peak = config.lora_lr if config.tune == "lora" else config.backbone_lr
        decay = config.backbone_weight_decay if config.tune == "tuned" else 0.0
        for is_matrix in (True, False):
            weights = [weight for weight in self.weights.values() if (weight.ndim > 1) == is_matrix]
            if weights:
                groups.append({"params": weights, "lr": peak, "weight_decay": decay if is_matrix else 0.0})
        # Fused where it matters: other variants hold a second copy of all weights while they step.
        fused = True if config.tune == "tuned" else None
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=fused)

    def generator(self, purpose: str, step: int = 0) -> torch.Generator:
        """Return the generator of one purpose, independent of all others and of what was drawn before."""
        return torch.Generator().manual_seed(derived_seed(self.config.seed, purpose, step))

    @property
    def trainable_parameters(self) -> int:
        """Number of weights of the prompt encoder, and of those of the backbone that are trained."""
        return sum(weight.numel() for weight in self.trained_parameters())

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return what the optimizer moves."""
        return [*self.encoder.parameters(), *self.weights.values()]

    def trained_weights(self) -> TrainedWeights | None:
        """Return what became of the backbone's own weights once :meth:`fit` is done; None where it stayed frozen."""
        if self.config.tune == "frozen":
            return None
        found = TrainedWeights.of(self.backbone, self.frozen, tune=self.config.tune, keep=self.config.keep)
        self.backbone.trained = found.mark
        return found

    def vectors(self) -> Tensor:
        """Return the slot vectors as they would be saved: (P, E) float32 on the CPU, dropout off."""
        self.encoder.eval()
        with torch.no_grad():
            vectors: Tensor = self.encoder()  # (P, E)
        return vectors.detach().float().cpu().clone()

    def fit(
        self,
        train: Sequence[Item],
        dev: Sequence[Item],
        *,
        report: OnProgress | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        """Train to the end, or from where a loaded checkpoint stands.

        The start is scored too and may be chosen, so that a learned prompt is never worse on the development part
        than what it started from.

        Args:
            train: Items to learn from.
            dev: Items to choose by.
            report: Called after every batch.
            should_stop: Asked after every step, and after every pass over the text in front of the slots.

        Raises:
            Interrupted: If ``should_stop`` said so; a checkpoint was written.
            TrainingError: If the loss is no number any more.
        """
        self.kept = KeptWeights(self.checkpoint) if self.weights else None
        try:
            with contextlib.nullcontext() if self._shares_prefix_cache else self.prefix_cache:
                for group in self.course(train, dev, report=report, should_stop=should_stop):
                    if failed := take_step([(self, group)]):
                        raise failed[self]
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

    def _progress(self, train: Sequence[Item]) -> Progress:
        state, epochs = self.state, self.config.epochs
        mean = state.epoch_loss_sum / state.epoch_loss_count
        done = (state.epoch - 1) * len(train) + state.position
        return Progress("train", done, epochs * len(train), f"epoch {state.epoch}/{epochs}, loss {mean:.3f}")

    @property
    def place(self) -> str:
        """Where training stands, in words."""
        return f"epoch {self.state.epoch} of {self.config.epochs}, after {self.state.step} steps"

    def course(
        self,
        train: Sequence[Item],
        dev: Sequence[Item],
        *,
        report: OnProgress | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[Sequence[Item]]:
        """Go through training, or on from where a loaded checkpoint stands, and yield the records of each optimizer
        step, for :func:`take_step` to take it before the next ones are asked for.

        Args:
            train: Items to learn from.
            dev: Items to choose by.
            report: Called with progress.
            should_stop: Asked after every pass over the text in front of the slots; between steps it is the caller's
                to ask.

        Raises:
            Interrupted: If ``should_stop`` said so; a checkpoint was written.
            TrainingError: If the loss is no number any more.
        """
        tell = report or (lambda _: None)

        def passed(done: int, total: int) -> None:
            tell(Progress("cache", done, total, "text in front of the slots"))
            if should_stop is not None and should_stop():
                self._interrupt()

        inputs = (example for item in (*train, *dev) for example in item.inputs)
        self.uses_prefix_cache = self.prefix_cache.prepare(inputs, report=passed)
        self.cached = self.prefix_cache.to_json()
        state = self.state
        if not state.start:
            found = self.evaluate(dev, report=tell, note="before training")
            state.start = {"dev_loss": found.loss, "dev_score": found.score, **_guessed(found)}
            self._consider(found, epoch=0)
        while not state.done:
            if self.weights:
                self.backbone.thaw(self.weights.values())
            yield from self._epoch(train)
            self.optimizer.zero_grad(set_to_none=True)
            if self.weights:
                self.backbone.freeze()
            self._end_epoch(self.evaluate(dev, report=tell, note=f"epoch {state.epoch}"))
            self.save()
            last = state.history[-1]
            tell(
                Progress(
                    "epoch",
                    len(state.history),
                    self.config.epochs,
                    f"train loss {last['train_loss']:.3f}, dev loss {last['dev_loss']:.3f}, dev score "
                    f"{last['dev_score']:.3f}",
                )
            )

    def _pause(self) -> float:
        """Return the seconds between two checkpoints; writing weights may take a twentieth of the time."""
        return max(self.config.checkpoint_seconds, SAVING_PAUSE * self._saving_seconds if self.weights else 0.0)

    def _take_best(self, kept: KeptWeights) -> None:
        """Put the chosen weights into the backbone, and let go of what training needed besides."""
        self.accelerator.wait_for_everyone()
        try:
            kept.restore(self.weights, epoch=self.state.chosen_epoch)
        except PromptError as error:
            raise TrainingError(f"{error}; start anew with --overwrite") from error
        self.accelerator.wait_for_everyone()  # nobody removes the file while another one reads it
        self.backbone.__dict__.pop("fingerprint", None)  # of the weights as they were
        self.backbone.freeze()
        self.optimizer.state.clear()

    def _epoch(self, train: Sequence[Item]) -> Iterator[Sequence[Item]]:
        """Yield the groups of the epoch's remaining optimizer steps."""
        state, config = self.state, self.config
        order = self.order(len(train), epoch=state.epoch)
        group_size = config.batch_size * config.accumulation_steps
        total_steps = math.ceil(len(train) / group_size) * config.epochs
        while state.position < len(train):
            factor = rate(state.step, total_steps, warmup_fraction=config.warmup_fraction)
            for parameters, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
                parameters["lr"] = peak * factor
            yield [train[index] for index in order[state.position : state.position + group_size]]

    def order(self, records: int, *, epoch: int) -> list[int]:
        """Return the order in which an epoch, from 1, reads so many records."""
        order: list[int] = torch.randperm(records, generator=self.generator("data order", epoch)).tolist()
        return order

    def begin_step(self, group: Sequence[Item]) -> list[Chunk]:
        """Forget the last step's gradients, and return the passes of the next one that are this process's."""
        self.encoder.train()
        self.optimizer.zero_grad(set_to_none=True)
        self._losses.clear()
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        size, total = self.config.batch_size, loss_count(group)
        parts = {at: group[at : at + size][rank::processes] for at in range(0, len(group), size)}
        return [Chunk(self, items, at, total) for at, items in parts.items() if items]

    def dropout_seed(self, at: int) -> int:
        """Return the seed of what is drawn in a pass of the coming step."""
        return derived_seed(self.config.seed, "dropout", self.state.step * 65_536 + at)

    def note_loss(self, value: Tensor) -> None:
        """Take down the summed loss of a pass."""
        self._losses.append(value)

    def end_step(self, group: Sequence[Item], *, seconds: float) -> None:
        """Move the weights by the gradients that are there, and count the step.

        Raises:
            TrainingError: If the loss is no number any more, or the step overflows.
        """
        state = self.state
        summed = torch.stack(self._losses).sum() if self._losses else torch.zeros((), device=self.backbone.device)
        if self.accelerator.num_processes > 1:
            summed = self.accelerator.reduce(summed, "sum")
            for weight in self.trained_parameters():
                gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
                weight.grad = self.accelerator.reduce(gradient, "sum")
        loss_sum = float(summed)
        self._check_loss(loss_sum, "loss", state.epoch)
        torch.nn.utils.clip_grad_norm_(self.trained_parameters(), self.config.max_grad_norm)
        try:
            self.optimizer.step()
        except (RuntimeError, OverflowError) as error:
            if "overflow" not in str(error):
                raise
            raise TrainingError(f"step {state.step + 1} overflows ({error}); lower the learning rate") from error
        state.epoch_loss_sum += loss_sum
        state.epoch_loss_count += loss_count(group)
        state.step += 1
        state.position += len(group)
        state.epoch_seconds += seconds
        state.train_seconds += seconds

    def evaluate(self, items: Sequence[Item], *, report: OnProgress | None = None, note: str = "") -> Evaluation:
        """Score items with the slot vectors as they are now."""
        return evaluate(
            self.backbone,
            items,
            Learned(self.vectors()),
            cache=self.prefix_cache if self.uses_prefix_cache else None,
            report=report,
            note=note,
        )

    def _end_epoch(self, found: Evaluation) -> None:
        state = self.state
        state.history.append(
            {
                "epoch": state.epoch,
                "train_loss": state.epoch_loss_sum / state.epoch_loss_count,
                "dev_loss": found.loss,
                "dev_score": found.score,
                **_guessed(found),
                "seconds": state.epoch_seconds,
            }
        )
        self._consider(found, epoch=state.epoch)
        # A falling loss is better, too: scores of few records tie, and the last epochs take the smallest steps.
        losses = [state.start["dev_loss"], *(epoch["dev_loss"] for epoch in state.history)]
        waited = state.epoch - max(state.chosen_epoch, losses.index(min(losses)))
        state.done = state.epoch == self.config.epochs or waited >= self.config.patience
        state.epoch += 1
        state.position, state.epoch_loss_sum, state.epoch_loss_count, state.epoch_seconds = 0, 0.0, 0.0, 0.0

    def _consider(self, found: Evaluation, *, epoch: int) -> None:
        """Keep the vectors if they are the best so far, by :data:`CHOICE_RULE`."""
        self._check_loss(found.loss, "development loss", epoch)
        if (found.score, -found.loss) > (self.state.best_score, -self.state.best_loss):
            self.state.best_score, self.state.best_loss, self.state.chosen_epoch = found.score, found.loss, epoch
            self.best_vectors = self.vectors()
            if self.kept is not None and self._writes:
                self.kept.keep(self.weights, epoch=epoch)
            if self.kept is not None and self.checkpoint is None:
                self.kept.forget_others(epoch=epoch)

    def _check_loss(self, value: float, name: str, epoch: int) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"the {name} became {value} in epoch {epoch}; use a lower learning rate than "
                f"{' and '.join(map(str, self._peaks))} (--lr), or float32 (--dtype)"
            )

    @property
    def _writes(self) -> bool:
        """Whether this process writes into the checkpoint's folder, or into one of its own."""
        return self.checkpoint is None or bool(self.accelerator.is_main_process)

    def save_to(self, folder: Path) -> None:
        """Write all that is needed to go on into a folder."""
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
        """Return what a checkpoint holds besides the state. A finished run needs no backbone's weights but the best."""
        tensors = {f"encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        tensors["best_vectors"] = self.best_vectors
        if self.weights and self.state.done:
            return tensors
        tensors |= {f"weights.{name}": weight for name, weight in self.weights.items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        return tensors

    def load(self) -> bool:
        """Go on from the checkpoint; return whether there is one.

        Raises:
            TrainingError: As :meth:`load_from`.
        """
        return self.checkpoint is not None and self.load_from(self.checkpoint)

    def load_from(self, folder: Path) -> bool:
        """Go on from what :meth:`save_to` wrote; return whether there is anything.

        Raises:
            TrainingError: If it is damaged, or belongs to a run with other settings, data or backbone (says which).
        """
        found = read_checkpoint(folder, identity=self.identity)
        if found is None:
            return False
        state, tensors = found
        try:
            self.encoder.load_state_dict(
                {name.removeprefix("encoder."): value for name, value in tensors.items() if name.startswith("encoder.")}
            )
            if not (self.weights and state.done):
                with torch.no_grad():
                    for name, weight in self.weights.items():
                        weight.copy_(tensors[f"weights.{name}"])
                self._load_optimizer(tensors)
            self.best_vectors = tensors["best_vectors"]
        except (KeyError, ValueError, RuntimeError) as error:
            raise damaged(folder, error) from error
        self.state = state
        return True

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        whole = self.optimizer.state_dict()
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                states.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": states, "param_groups": whole["param_groups"]})


def _guessed(found: Evaluation) -> dict[str, int]:
    """Return how many different classes were guessed, where there are classes: one alone is a sign of a stuck model."""
    return {"guessed_classes": len(set(found.guesses))} if found.guesses else {}


def rate(step: int, total_steps: int, *, warmup_fraction: float) -> float:
    """Return the learning rate's factor at a step: linear warm-up, then linear decay to zero."""
    warmup = math.ceil(total_steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (total_steps - step) / max(1, total_steps - warmup)
