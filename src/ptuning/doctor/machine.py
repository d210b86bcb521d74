"""The machine: processors and threads, memory, disk, number formats and their speed, GPUs, the port of a server."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from ptuning.backbone import sources
from ptuning.backbone.number_format import short_name, units
from ptuning.doctor.checks import Check, Group

MACHINE, PORT = Group("machine"), Group("port")
# Where Linux mounts the limits of control groups, which containers have.
CONTROL_GROUPS = Path("/sys/fs/cgroup")
LOCALHOST = "127.0.0.1"
# Less memory or disk is a warning: the default backbone takes half of it.
LITTLE_BYTES = 10**9
# A product of a batch of rows with a matrix of weights, as a model of about a billion weights has them; how often it is
# measured at most, and for how long.
PRODUCT = (256, 1024, 1024)
MOST_PRODUCTS, LONGEST_SECONDS = 7, 0.5


def check_machine() -> list[Check]:
    """Look at this machine. Measuring takes one or two seconds."""
    usable = usable_cores()
    return [_cores(usable), _threads(usable), _memory(), _disk(sources.cache_root()), *_formats(), *_gpus()]


def check_port(port: int, *, is_served: bool = False) -> Check:
    """Look whether a server could listen on a port of this machine; if one is known to be there, that is no fault."""
    what = f"{LOCALHOST}:{port}"
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
        if os.name == "posix":  # as servers do, so that connections which just ended are not in the way
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((LOCALHOST, port))
        except OSError as error:
            is_taken = error.errno == errno.EADDRINUSE
            if is_taken and is_served:
                return PORT.ok(what, "taken: a server listens")
            found = "taken by another program" if is_taken else f"cannot be listened on: {error.strerror}"
            return PORT.warning(what, found, "stop that program, or serve on another port: --port N")
    return PORT.ok(what, "free")


def usable_cores() -> float:
    """Return how many processors this process may use, by its affinity and by the quota of its control group."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone
    here = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return min([float(here), *_quotas()])


def _quotas() -> Iterator[float]:
    for limit in _limits("cpu.max"):
        quota, _, period = limit.partition(" ")
        with contextlib.suppress(ValueError, ZeroDivisionError):
            yield float(quota) / float(period)
    with contextlib.suppress(OSError, ValueError):  # version 1 of control groups
        folder = CONTROL_GROUPS / "cpu"
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if float(quota) > 0:
            yield float(quota) / float(period)


def _limits(name: str) -> Iterator[str]:
    """Yield the limits of this name of the process's control group and of those above it."""
    own = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for folder in (CONTROL_GROUPS / own, *(CONTROL_GROUPS / own).parents):
        if folder.is_relative_to(CONTROL_GROUPS):
            with contextlib.suppress(OSError, ValueError):
                yield (folder / name).read_text(encoding="utf-8").strip()


def _cores(usable: float) -> Check:
    there = os.cpu_count() or 1
    return MACHINE.ok("cores", f"{there}" + (f", of which this process may use {usable:g}" if usable < there else ""))


def _threads(usable: float) -> Check:
    threads, asked = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    found = f"{threads} ({'OMP_NUM_THREADS is not set' if asked is None else f'OMP_NUM_THREADS={asked}'})"
    if threads > math.ceil(usable):
        best = max(1, int(usable))
        told = f"torch uses {found}, and this process may use {usable:g} cores, so that they wait for each other"
        return MACHINE.warning("threads", told, f"export OMP_NUM_THREADS={best}")
    return MACHINE.ok("threads", f"torch uses {found}")


def free_memory() -> int:
    """Return the bytes of memory that this process can still take, within the limit of its control group."""
    free = int(psutil.virtual_memory().available)
    taken = [int(one) for one in _limits("memory.current") if one.isdigit()]
    for limit, current in zip(_limits("memory.max"), taken, strict=False):
        if limit.isdigit():
            free = min(free, max(0, int(limit) - current))
    return free


def _memory() -> Check:
    free, total = free_memory(), int(psutil.virtual_memory().total)
    found = f"{_size(free)} free of {_size(total)}"
    if free < LITTLE_BYTES:
        return MACHINE.warning("memory", found, "end other programs, or take a smaller backbone or --dtype bfloat16")
    return MACHINE.ok("memory", found)


def _disk(folder: Path) -> Check:
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    elsewhere = "name another folder for the cache: export XDG_CACHE_HOME=DIR"
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return MACHINE.warning("disk", f"{folder} cannot be looked at: {error.strerror}", elsewhere)
    found = f"{_size(free)} free for the cache, {folder}"
    if not os.access(there, os.W_OK):
        return MACHINE.warning("disk", f"{found}, which cannot be written", elsewhere)
    if free < LITTLE_BYTES:
        return MACHINE.warning("disk", found, f"free some space, or {elsewhere}")
    return MACHINE.ok("disk", found)


def _formats() -> Iterator[Check]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    has_units = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else bool(units())
    if device.type == "cpu":
        vectors = torch.backends.cpu.get_cpu_capability()
        yield MACHINE.ok("units", f"{vectors}; for products in bfloat16: {', '.join(units()) or 'none'}")
    rows, inner, columns = PRODUCT
    plain = product_ms(torch.float32, device)
    shape = f"{rows} x {inner} by {inner} x {columns} on {device.type}"
    yield MACHINE.ok("float32", f"{plain:.3g} ms for a product, {shape}")
    other = product_ms(torch.bfloat16, device)
    times = f"{plain / other:.1f} times as fast" if other < plain else f"{other / plain:.1f} times as long"
    why = "" if has_units else "; there are no units for it, so leave --dtype out"
    yield MACHINE.ok(short_name(torch.bfloat16), f"{other:.3g} ms, {times}{why}")


@torch.no_grad()
def product_ms(dtype: torch.dtype, device: torch.device) -> float:
    """Return the median time of a product of two matrices, in milliseconds."""
    rows, inner, columns = PRODUCT
    left = torch.ones(rows, inner, dtype=dtype, device=device)
    right = torch.ones(inner, columns, dtype=dtype, device=device)
    taken: list[float] = []
    end = time.perf_counter() + LONGEST_SECONDS
    while len(taken) < MOST_PRODUCTS + 1 and (len(taken) < 2 or time.perf_counter() < end):
        began = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(1000 * (time.perf_counter() - began))
    return statistics.median(taken[1:])  # the first one prepares


def _gpus() -> Iterator[Check]:
    if torch.backends.mps.is_available():
        yield MACHINE.ok("gpu", "Apple's (mps)")
    elif not torch.cuda.is_available():
        yield MACHINE.ok("gpu", "none")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield MACHINE.ok(f"cuda:{index}", f"{name}, {_size(free)} free of {_size(total)}")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
