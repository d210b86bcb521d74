"""How much memory work takes: bytes of tensors, and the peak of a process or a GPU."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterable

import psutil
import torch
from torch import Tensor

# Time between two looks at the process; one takes some microseconds.
LOOK_SECONDS = 0.005
# This process: to look it up takes longer than to read its memory.
_process = functools.cache(psutil.Process)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that tensors take, what they share counted once."""
    found = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(found.values())


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
