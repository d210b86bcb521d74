"""Training a prompt: fit, evaluate, choose, stop early, checkpoint, resume exactly. Sees the training and development
parts only; knows no files but its checkpoint.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ptuning.backbone import Backbone
from ptuning.checkpoint import CHECKPOINT_FILE as CHECKPOINT_FILE
from ptuning.checkpoint import RunState, damaged, read_checkpoint, write_checkpoint
from ptuning.config import TrainConfig as TrainConfig
from ptuning.constants import ConstantParts
from ptuning.encoder import PromptEncoder, start_vectors
from ptuning.errors import TrainingError
from ptuning.files import Json
from ptuning.fill import BoundTemplate
from ptuning.measure import Evaluation, evaluate
from ptuning.measure import Progress as Progress
from ptuning.measure import Report as Report
from ptuning.objective import Item, loss, loss_count, score_choices
from ptuning.weights import KeptWeights

CHOICE_RULE = "highest dev score; of equal ones the lowest dev loss; of equal ones the earliest epoch"


class Interrupted(TrainingError):
    """Training was asked to stop before its end; a checkpoint was written if there is a folder for it."""


class Trainer:
    """Trains the slot vectors of one template, on a frozen backbone or with all of its weights.

    Args:
        backbone: A frozen backbone, of which nothing changes; with ``tune="tuned"`` a copy of one
            (:meth:`Backbone.copy`) in float32, whose weights are trained and are the chosen ones in the end.
        bound: The template, bound to the backbone.
        config: The settings.
        checkpoint: Folder of the checkpoint, or None to keep none.
        kept: Holds the best weights of a backbone that is tuned, which keeps no checkpoint.
        identity: What a checkpoint must agree on to be resumed: template, data, backbone, settings.

    Raises:
        TrainingError: If the backbone is not frozen, or is to be tuned in less than float32.
    """

    def __init__(
        self,
        backbone: Backbone,
        bound: BoundTemplate,
        *,
        config: TrainConfig,
        checkpoint: Path | None = None,
        kept: KeptWeights | None = None,
        identity: Mapping[str, Json] | None = None,
    ) -> None:
        if backbone.model.training or any(weight.requires_grad for weight in backbone.model.parameters()):
            raise TrainingError(f"the backbone '{backbone.name}' is not frozen; call its freeze() first")
        self.is_tuned = config.tune == "tuned"
        if self.is_tuned and (checkpoint is not None or backbone.dtype != torch.float32):
            raise TrainingError(
                "a tuned backbone keeps no checkpoint, and its weights must be float32 (--dtype float32)"
            )
        self.backbone = backbone
        self.bound = bound
        self.config = config
        self.checkpoint = checkpoint
        self.identity = dict(identity or {})
        self.accelerator = Accelerator()
        table = backbone.table()
        start = start_vectors(
            bound.slot_start_ids, table=table, how=config.start, generator=self.generator("slot starts")
        )
        with torch.random.fork_rng(devices=[]):  # torch's modules draw weights of their own before ours are written
            self.encoder = PromptEncoder(
                start,
                reach=float(table.norm(dim=-1).mean()),
                kind=config.encoder if bound.slots else "none",
                dropout=config.dropout,
                generator=self.generator("encoder weights"),
            ).to(backbone.device)
        groups: list[dict[str, list[nn.Parameter] | float]] = [
            {"params": list(self.encoder.parameters()), "lr": config.lr}
        ]
        if self.is_tuned:
            groups.append({"params": list(backbone.model.parameters()), "lr": config.backbone_lr})
        self._peaks = [config.lr, config.backbone_lr][: len(groups)]
        # Fused where it matters: other variants hold a second copy of all weights while they step.
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=self.is_tuned or None)
        self.state = RunState()
        self.best_vectors = self.vectors()
        self.constants = ConstantParts(backbone, memory_share=0 if self.is_tuned else config.cache_memory)
        self.constant_part = self.constants.to_json()
        self.kept = kept if self.is_tuned else None
        self._saved_at = time.monotonic()

    def generator(self, purpose: str, step: int = 0) -> torch.Generator:
        """Return the generator of one purpose, independent of all others and of what was drawn before."""
        return torch.Generator().manual_seed(derived_seed(self.config.seed, purpose, step))

    @property
    def trainable_parameters(self) -> int:
        """Number of weights of the prompt encoder, and of the backbone where it is tuned."""
        return sum(weight.numel() for weight in self._trained())

    def _trained(self) -> list[Tensor]:
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

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
        report: Report | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        """Train to the end, or from where a loaded checkpoint stands.

        The start is scored too and may be chosen, so that a learned prompt is never worse on the development part
        than what it started from.

        Args:
            train: Items to learn from.
            dev: Items to choose by.
            report: Called after every batch.
            should_stop: Asked after every step.

        Raises:
            Interrupted: If ``should_stop`` said so; a checkpoint was written.
            TrainingError: If the loss is no number any more.
        """
        tell = report or (lambda _: None)
        with self.constants:
            self.constants.prepare(
                (example for item in (*train, *dev) for example in item.inputs),
                report=lambda done, total: tell(Progress("cache", done, total, "what stands in front of the slots")),
            )
            self.constant_part = self.constants.to_json()
            self._fit(train, dev, tell, should_stop)
        if self.kept is not None:
            self.kept.restore(self.backbone)
            self.backbone.freeze()

    def _fit(
        self, train: Sequence[Item], dev: Sequence[Item], tell: Report, should_stop: Callable[[], bool] | None
    ) -> None:
        state = self.state
        if not state.start:
            found = self.evaluate(dev, report=tell, note="before training")
            state.start = {"dev_loss": found.loss, "dev_score": found.score}
            self._consider(found, epoch=0)
        while not state.done:
            if self.is_tuned:
                self.backbone.thaw()
            for _ in self._epoch(train, tell):
                if should_stop is not None and should_stop():
                    self.save()
                    raise Interrupted(
                        f"stopped in epoch {state.epoch} of {self.config.epochs}, after {state.step} steps"
                    )
                if time.monotonic() - self._saved_at > self.config.checkpoint_seconds:
                    self.save()
            self.optimizer.zero_grad(set_to_none=True)
            if self.is_tuned:
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

    def _epoch(self, train: Sequence[Item], tell: Report) -> Iterator[None]:
        """Take the epoch's remaining optimizer steps, yielding after each."""
        state, config = self.state, self.config
        order = torch.randperm(len(train), generator=self.generator("data order", state.epoch)).tolist()
        group_size = config.batch_size * config.accumulation_steps
        total_steps = math.ceil(len(train) / group_size) * config.epochs
        while state.position < len(train):
            began = time.monotonic()
            group = [train[index] for index in order[state.position : state.position + group_size]]
            factor = rate(state.step, total_steps, warmup_fraction=config.warmup_fraction)
            for parameters, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
                parameters["lr"] = peak * factor
            self._step(group)
            state.step += 1
            state.position += len(group)
            seconds = time.monotonic() - began
            state.epoch_seconds += seconds
            state.train_seconds += seconds
            mean = state.epoch_loss_sum / state.epoch_loss_count
            tell(
                Progress(
                    "train",
                    (state.epoch - 1) * len(train) + state.position,
                    config.epochs * len(train),
                    f"epoch {state.epoch}/{config.epochs}, loss {mean:.3f}",
                )
            )
            yield

    def _step(self, group: Sequence[Item]) -> None:
        """Take one optimizer step. Its loss is the sum over all tokens divided once by their number, however the group
        is cut into batches or spread over processes.
        """
        self.encoder.train()
        total = loss_count(group)
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=self.backbone.device)
        for at in range(0, len(group), self.config.batch_size):
            items = group[at : at + self.config.batch_size][rank::processes]
            if not items:
                continue
            examples = [example for item in items for example in item.inputs]
            self.state.train_tokens += sum(len(example.token_ids) for example in examples)
            with torch.random.fork_rng(devices=[self.backbone.device] if self.backbone.device.type == "cuda" else []):
                torch.manual_seed(derived_seed(self.config.seed, "dropout", self.state.step * 65_536 + at))
                logits = self.constants.logits(examples, self.encoder(), slots=self.bound.slots)
            batch_loss, _ = loss(items, score_choices(items, logits))
            (batch_loss / total).backward()
            loss_sum += batch_loss.detach()
        if processes > 1:
            loss_sum = self.accelerator.reduce(loss_sum, "sum")
            for weight in self._trained():
                gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
                weight.grad = self.accelerator.reduce(gradient, "sum")
        self._check_loss(float(loss_sum), "loss", self.state.epoch)
        torch.nn.utils.clip_grad_norm_(self._trained(), self.config.max_grad_norm)
        self.optimizer.step()
        self.state.epoch_loss_sum += float(loss_sum)
        self.state.epoch_loss_count += total

    def evaluate(self, items: Sequence[Item], *, report: Report | None = None, note: str = "") -> Evaluation:
        """Score items with the slot vectors as they are now."""
        return evaluate(
            self.backbone,
            items,
            vectors=self.vectors(),
            slots=self.bound.slots,
            constants=self.constants,
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
            if self.kept is not None:
                self.kept.keep(self.backbone)

    def _check_loss(self, value: float, name: str, epoch: int) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"the {name} became {value} in epoch {epoch}; use a lower learning rate than "
                f"{' and '.join(map(str, self._peaks))} (--lr), or float32 (--dtype)"
            )

    def save(self) -> None:
        """Write the checkpoint, if there is a folder for it and this is the main process."""
        self._saved_at = time.monotonic()
        if self.checkpoint is None or not self.accelerator.is_main_process:
            return
        tensors = {f"encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        tensors["best_vectors"] = self.best_vectors
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        write_checkpoint(self.checkpoint, self.state, tensors, identity=self.identity)

    def load(self) -> bool:
        """Go on from the checkpoint; return whether there is one.

        Raises:
            TrainingError: If it is damaged, or belongs to a run with other settings, data or backbone (says which).
        """
        found = read_checkpoint(self.checkpoint, identity=self.identity) if self.checkpoint else None
        if self.checkpoint is None or found is None:
            return False
        state, tensors = found
        try:
            self.encoder.load_state_dict(
                {name.removeprefix("encoder."): value for name, value in tensors.items() if name.startswith("encoder.")}
            )
            self._load_optimizer(tensors)
            self.best_vectors = tensors["best_vectors"]
        except (KeyError, ValueError, RuntimeError) as error:
            raise damaged(self.checkpoint, error) from error
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


def rate(step: int, total_steps: int, *, warmup_fraction: float) -> float:
    """Return the learning rate's factor at a step: linear warm-up, then linear decay to zero."""
    warmup = math.ceil(total_steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (total_steps - step) / max(1, total_steps - warmup)


def derived_seed(seed: int, purpose: str, step: int = 0) -> int:
    """Return a seed for one purpose; draws for other purposes do not move it."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
