"""A backbone's weights set aside on disk while it is tuned. Knows no training."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import safetensors
import safetensors.torch
import torch

from ptuning.backbone import Backbone

PREFIX = ".weights-"


class KeptWeights:
    """A copy of weights on disk: a third copy of them in memory (beside gradients and the two moments of the optimizer)
    would bound the size of a backbone that can be tuned.

    Args:
        folder: Where the copy lies while the context is open; the system's place for temporary files by default.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder)
        self._file = Path(self._folder.name) / "weights.safetensors"

    def __enter__(self) -> KeptWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def keep(self, backbone: Backbone) -> None:
        """Write the weights as they are now."""
        weights = {name: weight.detach() for name, weight in backbone.model.named_parameters()}
        safetensors.torch.save_file(weights, self._file)

    def restore(self, backbone: Backbone) -> None:
        """Put the kept weights into a backbone of the same architecture."""
        with torch.no_grad(), safetensors.safe_open(self._file, framework="pt") as kept:
            for name, weight in backbone.model.named_parameters():
                weight.copy_(kept.get_tensor(name))

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove what a killed process left in a folder."""
        for left in folder.glob(f"{PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
