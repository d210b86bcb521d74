"""The checkpoint of a training run: where it stands and its tensors, in one file. Knows no training."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from ptuning.backbone.trained_weights import read_tensors, write_tensors
from ptuning.errors import FileError, PromptError, TrainingError
from ptuning.files import Json, make_folder
from ptuning.training.identity import check_identity

CHECKPOINT_FILE = "state.safetensors"


@dataclass
class RunState:
    """Where a run stands; together with the tensors all that a checkpoint holds."""

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
    start: dict[str, float] = dataclasses.field(default_factory=dict)
    history: list[dict[str, float | int]] = dataclasses.field(default_factory=list)
    done: bool = False


def write_checkpoint(
    folder: Path, state: RunState, tensors: Mapping[str, Tensor], *, identity: Mapping[str, Json]
) -> None:
    """Write a checkpoint, replacing an earlier one in the same moment.

    Args:
        folder: Where it goes; created if need be.
        state: Where the run stands.
        tensors: Whatever else is needed to go on.
        identity: What must be equal for the run to be resumed.

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
        # A first checkpoint that does not fit on the disk must not leave a folder in the way of the next attempt.
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def read_identity(folder: Path) -> dict[str, Json] | None:
    """Return what must be equal for a checkpoint to be gone on from; None if there is none.

    Raises:
        TrainingError: If it is damaged.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            return dict(json.loads(opened.metadata()["identity"]))
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise damaged(folder, error) from error


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
        state, saved = RunState(**json.loads(texts["state"])), json.loads(texts["identity"])
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
