"""Checkpoints: the states and tensors of trainings in one file, the best backbone weights so far, and identities."""

import contextlib
import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from ptuning.backbone.trained_weights import PREFIX, read_tensors, write_tensors
from ptuning.errors import FileError, PromptError, TrainingError
from ptuning.files import Json, make_folder, parse_json, sha256
from ptuning.names import BEST_FILE, CHECKPOINT_FILE, delete

# Settings that do not change the result, so that a training may be resumed with other values.
IRRELEVANT_SETTINGS = ("checkpoint_seconds", "cache_memory", "cache_disk", "checkpointing", "device")


def identity(
    settings: Mapping[str, Json], data: Mapping[str, Json], *, fingerprint: Json, task_file: str | None = None
) -> dict[str, Json]:
    """Return what must be equal for a training to be resumed, or for a finished result to be reused: settings, the
    SHA-256 of each part of the data, the ``fingerprint`` of the backbone, and that of the text of the task file.
    """
    values: dict[str, Json] = {name: value for name, value in settings.items() if name not in IRRELEVANT_SETTINGS}
    values |= {f"{part} data (sha256)": digest for part, digest in data.items()}
    if task_file is not None:
        values["task file (sha256)"] = sha256(task_file.encode("utf-8"))
    return {**values, "backbone fingerprint": fingerprint}


def check_identity(now: Mapping[str, Json], saved: Mapping[str, Json], *, where: str) -> None:
    """Raise a TrainingError that shows what differs, unless a saved result may be resumed or reused now."""
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if names:
        shown = "; ".join(f"{name} was {saved.get(name)} and is {now.get(name)}" for name in names)
        raise TrainingError(
            f"cannot resume from {where}: {shown}. Repeat the command as it was, or start again with overwrite or in "
            "another folder"
        )


@dataclass
class RunState:
    """Progress of a training. With the tensors this is the whole content of a checkpoint."""

    epoch: int = 1
    position: int = 0  # records of the current epoch that were used
    step: int = 0
    epoch_loss_sum: float = 0.0
    epoch_loss_count: float = 0.0
    epoch_seconds: float = 0.0
    train_seconds: float = 0.0
    train_tokens: int = 0
    chosen_epoch: int = 0
    best_score: float = -1.0
    best_loss: float = math.inf
    best_value: float = -1.0  # of the metric that chooses, where it is not the score
    start: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float | int]] = field(default_factory=list)
    diverged: list[list[dict[str, float | int]]] = field(default_factory=list)  # histories before each restart
    first_step: int = 0  # of the history
    done: bool = False

    @property
    def has_diverged(self) -> bool:
        """Whether no epoch improved on the initialization, neither in what chooses nor in any loss. With overfitting,
        the training loss falls.
        """
        losses = [epoch[name] for epoch in self.history for name in ("dev_loss", "train_loss")]
        return self.chosen_epoch == 0 and bool(losses) and min(losses) > self.start["dev_loss"]

    @property
    def rate_factor(self) -> float:
        """Factor of the peak learning rates; each restart halves it."""
        return float(0.5 ** len(self.diverged))

    def restart(self) -> None:
        """Go back to the first epoch, with half the learning rates."""
        self.diverged.append(self.history)
        self.history, self.first_step, self.epoch, self.done = [], self.step, 1, False


@dataclass(frozen=True)
class Snapshot:
    """One training in a checkpoint; it is resumed only by one with an equal identity."""

    state: RunState
    tensors: Mapping[str, Tensor]
    identity: Mapping[str, Json]


@dataclass(frozen=True)
class Checkpoint:
    """Trainings by name at one moment, and the names of those whose results are written."""

    trainings: Mapping[str, Snapshot] = field(default_factory=dict)
    finished: Iterable[str] = ()


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; it replaces an earlier one atomically. A FileError if it cannot be written."""
    tensors = {
        f"{number}.{name}": value.detach().cpu().contiguous()
        for number, training in enumerate(checkpoint.trainings.values())
        for name, value in training.tensors.items()
    }
    trainings = [
        {"name": name, "identity": training.identity, "state": asdict(training.state)}
        for name, training in checkpoint.trainings.items()
    ]
    text = json.dumps({"trainings": trainings, "finished": list(checkpoint.finished)}, ensure_ascii=False)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    try:
        write_tensors(folder / CHECKPOINT_FILE, tensors, texts={"state": text, "sha256": _digest(tensors, text)})
    except FileError:
        # A first checkpoint that does not fit on the disk must not leave a folder, which would stop the next attempt.
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """Read a checkpoint; None if there is none. A TrainingError if it is damaged."""
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        return None
    try:
        tensors = read_tensors(path)
        with safetensors.safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()
        text = metadata["state"]
        if metadata["sha256"] != _digest(tensors, text):
            raise ValueError("its sha256 is not the one it was written with")
        content = parse_json(text)
        trainings = {
            one["name"]: Snapshot(RunState(**one["state"]), with_prefix(f"{number}.", tensors), one["identity"])
            for number, one in enumerate(content["trainings"])
        }
        return Checkpoint(trainings, content["finished"])
    except (PromptError, LookupError, TypeError, ValueError) as error:
        raise damaged(folder, error) from error


def damaged(folder: Path, error: Exception) -> TrainingError:
    """Return the error of a checkpoint that cannot be used."""
    return TrainingError(f"the checkpoint {folder / CHECKPOINT_FILE} is damaged ({error}); start again with overwrite")


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names have a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class BestWeights:
    """Weights of the backbone at the best epoch so far, on disk: another copy in memory would limit the model's size.

    Args:
        folder: That of the checkpoint, which names the epoch; by default a temporary one.
        start: Number of the restart that they belong to.
    """

    def __init__(self, folder: Path | None = None, *, start: int = 0) -> None:
        self._folder, self._start = folder, start
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def keep(self, weights: Mapping[str, Tensor], *, epoch: int) -> None:
        """Write the weights of an epoch next to those of earlier ones."""
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix=PREFIX)
            self._folder = Path(self._temporary.name)
        make_folder(self._folder)
        plain = {name: weight.detach() for name, weight in weights.items()}
        write_tensors(self._file(epoch), plain, texts={"epoch": str(epoch)})

    def forget_others(self, *, epoch: int) -> None:
        """Remove the weights of all other epochs, once no checkpoint names them."""
        own = self._file(epoch)
        delete(path for path in own.parent.glob(BEST_FILE.format(start=self._start, epoch="*")) if path != own)

    def restore(self, weights: Mapping[str, Tensor], *, epoch: int) -> None:
        """Load the weights of an epoch; raise a PromptError if their file is damaged or of another backbone."""
        kept = read_tensors(self._file(epoch))
        if kept.keys() != weights.keys() or any(kept[name].shape != weights[name].shape for name in kept):
            raise PromptError(f"{self._file(epoch)} holds the weights of another backbone")
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])

    def close(self) -> None:
        """Remove the temporary folder, if there is one."""
        if self._temporary is not None:
            self._temporary.cleanup()
            self._folder = self._temporary = None

    def _file(self, epoch: int) -> Path:
        assert self._folder is not None, "no weights were kept"
        return self._folder / BEST_FILE.format(start=self._start, epoch=epoch)
