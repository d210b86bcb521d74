"""Training a prompt: fit, evaluate, choose, stop early, checkpoint, resume exactly. Sees the training and development
parts only; knows no files but its checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor

from ptuning.backbone import Backbone
from ptuning.batch import Batch, collate
from ptuning.config import TrainConfig as TrainConfig
from ptuning.encoder import PromptEncoder, start_vectors
from ptuning.errors import TrainingError
from ptuning.files import Json, make_folder, read_bytes, write_bytes
from ptuning.fill import BoundTemplate
from ptuning.model import target_logits
from ptuning.objective import Item, hits, loss, loss_count, score_choices

logger = logging.getLogger(__name__)

CHECKPOINT_FILE = "state.safetensors"
CHOICE_RULE = "highest dev score; of equal ones the lowest dev loss; of equal ones the earliest epoch"
# Rows per forward pass where no gradients are kept.
EVALUATION_ROWS = 64


@dataclass(frozen=True)
class Progress:
    """What a run is doing, for whoever shows it.

    Args:
        stage: ``train``, ``dev``, or ``epoch`` at the end of one.
        done, total: Records read in this stage, or epochs.
        note: A few words, such as the epoch and the loss so far.
    """

    stage: str
    done: int
    total: int
    note: str


Report = Callable[[Progress], None]


@dataclass
class _State:
    """Where a run stands; together with the tensors all that a checkpoint holds."""

    epoch: int = 1
    position: int = 0  # records of the current epoch's order that were used
    step: int = 0
    epoch_loss_sum: float = 0.0
    epoch_loss_count: int = 0
    epoch_seconds: float = 0.0
    train_seconds: float = 0.0
    train_tokens: int = 0
    chosen_epoch: int = 0
    best_score: float = -1.0
    best_loss: float = math.inf
    start: dict[str, float] = dataclasses.field(default_factory=dict)
    history: list[dict[str, float | int]] = dataclasses.field(default_factory=list)
    done: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Loss per token (or per item with label words) and one hit or miss per record, in the records' order."""

    loss: float
    hits: tuple[float, ...]

    @property
    def score(self) -> float:
        """Share of hits, in [0, 1]."""
        return sum(self.hits) / len(self.hits)


class Interrupted(TrainingError):
    """Training was asked to stop before its end; a checkpoint was written if there is a folder for it."""


class Trainer:
    """Trains the slot vectors of one template on a frozen backbone.

    Args:
        backbone: A frozen backbone; nothing of it changes.
        bound: The template, bound to the backbone.
        config: The settings.
        checkpoint: Folder of the checkpoint, or None to keep none.
        identity: What a checkpoint must agree on to be resumed: template, data, backbone, settings.
    """

    def __init__(
        self,
        backbone: Backbone,
        bound: BoundTemplate,
        *,
        config: TrainConfig,
        checkpoint: Path | None = None,
        identity: Mapping[str, Json] | None = None,
    ) -> None:
        self.backbone = backbone
        self.bound = bound
        self.config = config
        self.checkpoint = checkpoint
        self.identity = dict(identity or {})
        self.accelerator = Accelerator()
        start = start_vectors(
            bound.slot_start_ids, table=backbone.table(), how=config.start, generator=self.generator("slot starts")
        )
        self.encoder = PromptEncoder(
            start, kind=config.encoder, dropout=config.dropout, generator=self.generator("encoder weights")
        ).to(backbone.device)
        self.optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.state = _State()
        self.best_vectors = self.vectors()
        self._saved_at = time.monotonic()

    def generator(self, purpose: str, step: int = 0) -> torch.Generator:
        """Return the generator of one purpose, independent of all others and of what was drawn before."""
        return torch.Generator().manual_seed(derived_seed(self.config.seed, purpose, step))

    @property
    def trainable_parameters(self) -> int:
        """Number of weights of the prompt encoder."""
        return sum(weight.numel() for weight in self.encoder.parameters() if weight.requires_grad)

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
        state, tell = self.state, report or (lambda _: None)
        if not state.start:
            found = self.evaluate(dev, report=tell, note="before training")
            state.start = {"dev_loss": found.loss, "dev_score": found.score}
            self._consider(found, epoch=0)
        while not state.done:
            for _ in self._epoch(train, tell):
                if should_stop is not None and should_stop():
                    self.save()
                    raise Interrupted(
                        f"stopped in epoch {state.epoch} of {self.config.epochs}, after {state.step} steps"
                    )
                if time.monotonic() - self._saved_at > self.config.checkpoint_seconds:
                    self.save()
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
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = config.lr * rate(state.step, total_steps, warmup_fraction=config.warmup_fraction)
            self._step(group)
            state.step += 1
            state.position += len(group)
            seconds = time.monotonic() - began
            state.epoch_seconds += seconds
            state.train_seconds += seconds
            mean = state.epoch_loss_sum / max(1, state.epoch_loss_count)
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
            with torch.random.fork_rng(devices=[self.backbone.device] if self.backbone.device.type == "cuda" else []):
                torch.manual_seed(derived_seed(self.config.seed, "dropout", self.state.step * 65_536 + at))
                vectors = self.encoder()
            batch = item_batch(items, slots=self.bound.slots)
            self.state.train_tokens += batch.tokens
            batch_loss, _ = loss(items, score_choices(items, target_logits(self.backbone, batch, vectors)))
            self.accelerator.backward(batch_loss / total)
            loss_sum += batch_loss.detach()
        if processes > 1:
            loss_sum = self.accelerator.reduce(loss_sum, "sum")
            for weight in self.encoder.parameters():
                gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
                weight.grad = self.accelerator.reduce(gradient, "sum")
        if not torch.isfinite(loss_sum):
            raise TrainingError(
                f"the loss became {float(loss_sum)} in epoch {self.state.epoch}; use a lower learning "
                f"rate than {self.config.lr} (--lr), or float32 (--dtype)"
            )
        torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.state.epoch_loss_sum += float(loss_sum)
        self.state.epoch_loss_count += total

    def evaluate(self, items: Sequence[Item], *, report: Report | None = None, note: str = "") -> Evaluation:
        """Score items with the slot vectors as they are now."""
        return evaluate(self.backbone, items, vectors=self.vectors(), slots=self.bound.slots, report=report, note=note)

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
        waited = state.epoch - state.chosen_epoch
        state.done = state.epoch == self.config.epochs or waited >= self.config.patience
        state.epoch += 1
        state.position, state.epoch_loss_sum, state.epoch_loss_count, state.epoch_seconds = 0, 0.0, 0, 0.0

    def _consider(self, found: Evaluation, *, epoch: int) -> None:
        """Keep the vectors if they are the best so far, by :data:`CHOICE_RULE`."""
        if (found.score, -found.loss) > (self.state.best_score, -self.state.best_loss):
            self.state.best_score, self.state.best_loss, self.state.chosen_epoch = found.score, found.loss, epoch
            self.best_vectors = self.vectors()

    def save(self) -> None:
        """Write the checkpoint, if there is a folder for it and this is the main process."""
        self._saved_at = time.monotonic()
        if self.checkpoint is None or not self.accelerator.is_main_process:
            return
        tensors = {f"encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        tensors["best_vectors"] = self.best_vectors
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        metadata = {
            "format": "pt",
            "state": json.dumps(dataclasses.asdict(self.state)),
            "identity": json.dumps(self.identity, ensure_ascii=False),
        }
        data = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)
        make_folder(self.checkpoint)
        write_bytes(self.checkpoint / CHECKPOINT_FILE, data)

    def load(self) -> bool:
        """Go on from the checkpoint; return whether there is one.

        Raises:
            TrainingError: If it is damaged, or belongs to a run with other settings, data or backbone (says which).
        """
        if self.checkpoint is None or not (self.checkpoint / CHECKPOINT_FILE).is_file():
            return False
        path = self.checkpoint / CHECKPOINT_FILE
        try:
            read_bytes(path)
            with safetensors.safe_open(path, framework="pt") as opened:
                metadata = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            state = _State(**json.loads(metadata["state"]))
            self._check_identity(json.loads(metadata["identity"]))
            self.encoder.load_state_dict(
                {name.removeprefix("encoder."): value for name, value in tensors.items() if name.startswith("encoder.")}
            )
            self._load_optimizer(tensors)
            self.best_vectors = tensors["best_vectors"]
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(f"the checkpoint {path} is damaged ({error}); start anew with --overwrite") from error
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

    def _check_identity(self, saved: Mapping[str, Json]) -> None:
        check_identity(self.identity, saved, where=str(self.checkpoint))


def check_identity(now: Mapping[str, Json], saved: Mapping[str, Json], *, where: str) -> None:
    """Check that a run may go on from what was saved.

    Raises:
        TrainingError: If anything differs; shows what was saved and what is asked for now.
    """
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if names:
        shown = "; ".join(f"{name} was {saved.get(name)} and is {now.get(name)}" for name in names)
        raise TrainingError(
            f"cannot resume from {where}: {shown}. Repeat the command as it was, or start anew with "
            "--overwrite or in another folder"
        )


def item_batch(items: Sequence[Item], *, slots: int) -> Batch:
    """Collate the inputs of items that share one prompt of ``slots`` slots."""
    examples = [example for item in items for example in item.inputs]
    return collate(examples, slots=[slots] * len(examples))


@torch.no_grad()
def evaluate(
    backbone: Backbone,
    items: Sequence[Item],
    *,
    vectors: Tensor,
    slots: int,
    report: Report | None = None,
    note: str = "",
) -> Evaluation:
    """Score items with given slot vectors, longest first so that a batch needs little padding.

    Args:
        backbone: The language model.
        items: What to score.
        vectors: (P, E) float32; an empty table for a manual prompt.
        slots: Number of slots P.
        report: Called after every batch.
        note: Shown with the progress.

    Returns:
        Mean loss, and a hit or a miss per item, in order.
    """
    order = sorted(range(len(items)), key=lambda index: -items[index].tokens)
    loss_sum, count, done = 0.0, 0, 0
    found: dict[int, float] = {}
    while done < len(items):
        chosen: list[int] = []
        rows = 0
        while done + len(chosen) < len(items) and (not chosen or rows < EVALUATION_ROWS):
            chosen.append(order[done + len(chosen)])
            rows += len(items[chosen[-1]].inputs)
        group = [items[index] for index in chosen]
        scored = score_choices(group, target_logits(backbone, item_batch(group, slots=slots), vectors))
        batch_sum, batch_count = loss(group, scored)
        loss_sum, count = loss_sum + float(batch_sum), count + batch_count
        found |= dict(zip(chosen, hits(group, scored), strict=True))
        done += len(chosen)
        if report is not None:
            report(Progress("dev", done, len(items), note))
    return Evaluation(loss_sum / count, tuple(found[index] for index in range(len(items))))


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


def measure_ceiling(
    backbone: Backbone, items: Sequence[Item], *, batch_size: int, slots: int, seconds: float = 10.0
) -> float:
    """Return the tokens per second of a bare forward and backward pass of the backbone over training batches.

    The embeddings are the leaves: no encoder, no slots written in, no optimizer. Logits are computed where training
    computes them, so the ceiling is not lowered by work that training skips.
    """
    tokens, spent, began = 0, 0.0, time.monotonic()
    for at in range(0, len(items), batch_size):
        batch = item_batch(items[at : at + batch_size], slots=slots).to(backbone.device)
        embeddings = backbone.embed(batch.token_ids).detach().requires_grad_(True)  # (B, T, E)
        start = time.monotonic()
        logits, _ = backbone.run(
            embeddings, mask=batch.mask, positions=batch.positions, rows=batch.logit_rows, cols=batch.logit_cols
        )
        torch.logsumexp(logits, dim=-1).sum().backward()
        if backbone.device.type == "cuda":
            torch.cuda.synchronize(backbone.device)
        if at:  # the first batch warms the machine up
            tokens, spent = tokens + batch.tokens, spent + time.monotonic() - start
        if time.monotonic() - began > seconds:
            break
    return tokens / spent if spent else math.nan
