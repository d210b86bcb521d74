"""Checkpoint of a training run: its state and tensors in one file, and the backbone's best weights beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from ptuning.backbone.trained_weights import PREFIX, read_tensors, write_tensors
from ptuning.errors import FileError, PromptError, TrainingError
from ptuning.files import Json, make_folder, parse_json
from ptuning.names import BEST_FILE, CHECKPOINT, CHECKPOINT_FILE, delete, scan_folder
from ptuning.training.identity import check_identity


@dataclass
class RunState:
    """Where a run is. With the tensors this is the whole content of a checkpoint."""

    epoch: int = 1
    position: int = 0  # records of the current epoch's order that were used
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
    start: dict[str, float] = dataclasses.field(default_factory=dict)
    history: list[dict[str, float | int]] = dataclasses.field(default_factory=list)
    lost: list[list[dict[str, float | int]]] = dataclasses.field(default_factory=list)  # histories before each restart
    first_step: int = 0  # of the history
    done: bool = False

    @property
    def is_lost(self) -> bool:
        """Whether the epochs so far made nothing better: not what they are chosen by, and neither on the development
        part nor on what they learned from was the loss ever below that of the start. Overfitting is something else.
        """
        losses = [epoch[name] for epoch in self.history for name in ("dev_loss", "train_loss")]
        return self.chosen_epoch == 0 and bool(losses) and min(losses) > self.start["dev_loss"]

    @property
    def share(self) -> float:
        """The share of the peak learning rates that restarts have left."""
        return float(0.5 ** len(self.lost))

    def start_anew(self) -> None:
        """Go back to the first epoch, with half the learning rates."""
        self.lost.append(self.history)
        self.history, self.first_step, self.epoch, self.done = [], self.step, 1, False


def write_checkpoint(
    folder: Path, state: RunState, tensors: Mapping[str, Tensor], *, identity: Mapping[str, Json]
) -> None:
    """Write a checkpoint; it replaces an earlier one atomically.

    ``tensors`` are weights, optimizer states and the best vectors. A run is resumed only if its ``identity`` is equal.

    Raises:
        FileError: If it cannot be written.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    texts = {"state": json.dumps(dataclasses.asdict(state)), "identity": json.dumps(identity, ensure_ascii=False)}
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    try:
        write_tensors(folder / CHECKPOINT_FILE, plain, texts={**texts, "sha256": _digest(plain, texts)})
    except FileError:
        # A first checkpoint that does not fit on the disk must not leave a folder, which would stop the next attempt.
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def read_checkpoint(folder: Path, *, identity: Mapping[str, Json]) -> tuple[RunState, dict[str, Tensor]] | None:
    """Read a checkpoint; None if there is none.

    Raises:
        FileError: If it cannot be read.
        TrainingError: If it is damaged, or belongs to a run with other settings, data or backbone (says which).
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        return None
    try:
        tensors = read_tensors(path)
        with safetensors.safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()
        texts = {name: metadata[name] for name in ("state", "identity")}
        state, saved = RunState(**parse_json(texts["state"])), parse_json(texts["identity"])
        if metadata["sha256"] != _digest(tensors, texts):
            raise ValueError("its sha256 is not the one it was written with")
    except (PromptError, KeyError, TypeError, ValueError) as error:
        raise damaged(folder, error) from error
    check_identity(identity, saved, where=str(folder))
    return state, tensors


def damaged(folder: Path, error: Exception) -> TrainingError:
    """Return the error of a checkpoint that cannot be used."""
    return TrainingError(f"the checkpoint {folder / CHECKPOINT_FILE} is damaged ({error}); start anew with --overwrite")


def _digest(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class KeptWeights:
    """The best weights of the backbone so far, on disk, since a further copy in memory would limit the backbone's size.

    Args:
        folder: Their folder, beside a checkpoint that names their epoch; by default a temporary one.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix=PREFIX) if folder is None else None
        self._folder = Path(self._temporary.name) if self._temporary is not None else folder or Path()

    def keep(self, weights: Mapping[str, Tensor], *, epoch: int) -> None:
        """Write the weights of an epoch beside those of earlier epochs."""
        make_folder(self._folder)
        plain = {name: weight.detach() for name, weight in weights.items()}
        write_tensors(self._file(epoch), plain, texts={"epoch": str(epoch)})

    def forget_others(self, *, epoch: int) -> None:
        """Remove the weights of all other epochs, once no checkpoint names them."""
        first = BEST_FILE.partition("{")[0]
        ours = (path for path in scan_folder(self._folder, CHECKPOINT).ours if path.parent == self._folder)
        delete(path for path in ours if path.name.startswith(first) and path != self._file(epoch))

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

    def _file(self, epoch: int) -> Path:
        return self._folder / BEST_FILE.format(epoch=epoch)
