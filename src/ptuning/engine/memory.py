"""How much memory work takes, and passes that are halved where a GPU has too little of it."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import TypeVar
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.errors import BackboneError

logger = logging.getLogger(__name__)

T = TypeVar("T")

OutOfMemory = torch.cuda.OutOfMemoryError

# Time between two looks at the process; one takes some microseconds.
LOOK_SECONDS = 0.005
# This process: to look it up takes longer than to read its memory.
_process = functools.cache(psutil.Process)
# Whether passes that do not fit are halved.
_halving: ContextVar[bool] = ContextVar("ptuning_halving", default=True)
# The most tokens of a pass without gradients, for backbones with which one did not fit.
_bounds: WeakKeyDictionary[Backbone, int] = WeakKeyDictionary()


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that tensors take, what they share counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class PeakMemory:
    """Watches the memory of a device while this context lasts: of a GPU what torch holds there, else the process.

    ``bytes`` is the most that was taken at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
            return
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, taken_bytes(self.device))


def taken_bytes(device: torch.device) -> int:
    """Return the bytes that are taken now: by tensors on a GPU, else by this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(_process().memory_info().rss)


def total_bytes(device: torch.device) -> int:
    """Return how much memory a device has, taken or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def peak_so_far(device: torch.device) -> int:
    """Return the most bytes that were taken on a device since this process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    # Kilobytes on Linux, bytes on a Mac.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def whole_passes() -> Iterator[None]:
    """Let a pass that does not fit be an error in this block, as an estimate of memory needs it."""
    token = _halving.set(False)
    try:
        yield
    finally:
        _halving.reset(token)


def half(tokens: int, *, can_be_cut: bool, device: torch.device) -> int:
    """Return the maximum number of tokens of passes after one with ``tokens`` ran out of memory, with a warning.

    Call it after the ``except`` block, since the error holds the tensors of the pass. Raises BackboneError if the pass
    cannot be cut, or must not be (:func:`whole_passes`).
    """
    if not (can_be_cut and _halving.get()):
        raise BackboneError(
            f"a pass of {tokens:,} tokens does not fit into the memory of {device}; use smaller batches, shorter rows, "
            "dtype=bfloat16, or in training checkpointing=true"
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    logger.warning(
        "%s has too little memory for a pass of %s tokens: from now on passes have at most %s, with the same result",
        device, f"{tokens:,}", f"{tokens // 2:,}",
    )  # fmt: skip
    return tokens // 2


def in_parts(run: Callable[[Sequence[int]], T], lengths: Sequence[int], *, backbone: Backbone) -> list[T]:
    """Run rows of these lengths, which ``run`` gets by index, without gradients: in one pass, or in halves that fit.
    Returns the results of the parts, in the order of the rows.
    """
    results: list[T] = []
    waiting = [range(len(lengths))]
    while waiting:
        part = waiting.pop()
        tokens = len(part) * max(lengths[part.start : part.stop])
        if len(part) == 1 or tokens <= _bounds.get(backbone, tokens):
            with contextlib.suppress(OutOfMemory):
                results.append(run(part))
                continue
            _bounds[backbone] = half(tokens, can_be_cut=len(part) > 1, device=backbone.device)
        middle = len(part) // 2
        waiting += [part[middle:], part[:middle]]
    return results
