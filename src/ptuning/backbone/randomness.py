"""torch's global random generators, which modules draw from: dropout, and start values of new layers."""

import contextlib
import threading
from collections.abc import Iterator

import torch

# All threads of a process share these generators.
_lock = threading.RLock()


@contextlib.contextmanager
def own_draws(device: torch.device | None = None, *, seed: int | None = None) -> Iterator[None]:
    """Let modules draw in this block, on the CPU and a ``device``, without moving the generators for anybody else.
    Only one thread at a time is in such a block; else threads would draw from each other's seeds.
    """
    with _lock, torch.random.fork_rng(devices=[device] if _is_gpu(device) else []):
        if seed is not None:
            seed_draws(seed, device)
        yield


def seed_draws(seed: int, device: torch.device | None = None) -> None:
    """Seed the generators of the CPU and a device; inside of :func:`own_draws`."""
    # Not torch.manual_seed, which moves the generators of all other devices as well.
    torch.default_generator.manual_seed(seed)
    if device is not None and _is_gpu(device):
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device is not None and device.type == "mps":
        torch.mps.manual_seed(seed)


def _is_gpu(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"
