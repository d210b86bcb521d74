"""The processes that share a training, as a launcher such as torchrun or ``accelerate launch`` started them."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, distributed

from ptuning.backbone.backbone import Backbone
from ptuning.errors import TrainingError

# Environment variables of a launcher.
LAUNCHER = "ACCELERATE_"
RANKS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Variable that only torchrun sets.
TORCHRUN = "TORCHELASTIC_RUN_ID"
# accelerate makes its state on first use and is seen half made by another thread. Its Accelerator is no way round: each
# empties the environment of the process for a moment.
_ONE_AT_A_TIME = threading.Lock()

T = TypeVar("T")


def processes() -> PartialState:
    """Return accelerate's state: the number of processes, which one this is, and waiting for the others.

    Raises:
        TrainingError: If the environment's variables do not fit, such as those that an earlier launcher left there; or
            if they name several processes and this one would be alone, so that each would train everything.
    """
    with _ONE_AT_A_TIME:
        try:
            state = PartialState(cpu=_on_cpus())
            started = int(os.environ.get("WORLD_SIZE", "1"))
        except (ImportError, RuntimeError, ValueError) as error:
            PartialState._reset_state()  # so that it can be tried again
            names = sorted(name for name in os.environ if name.startswith(LAUNCHER) or name in RANKS)
            raise TrainingError(
                f"accelerate cannot start with the environment's {', '.join(names) or 'settings'}: {error}; unset what "
                "an earlier launcher left there, or start with: accelerate launch -m ptuning"
            ) from error
        seen = state.num_processes
        if started > seen:
            PartialState._reset_state()
            raise TrainingError(
                f"WORLD_SIZE says that {started} processes were started, and accelerate sees {seen}: each "
                "would train everything and write into one folder. Start with: torchrun --nproc-per-node N -m ptuning; "
                "on processors set ACCELERATE_USE_CPU=true; or unset WORLD_SIZE, if an earlier launcher left it there"
            )
        return state


def _on_cpus() -> bool:
    """Whether several processes run on CPUs: if requested, or if torchrun started them and there is no GPU, which
    accelerate would take for independent processes.
    """
    if "ACCELERATE_USE_CPU" in os.environ or TORCHRUN not in os.environ:
        return bool(parse_flag_from_env("ACCELERATE_USE_CPU"))
    return not (torch.cuda.is_available() or torch.xpu.is_available())


@dataclass(frozen=True)
class DataRanks:
    """The processes over which the rows of each step are spread, and which one of them this is.

    Args:
        rank: Which part of the rows this process runs, from 0.
        size: Number of parts. 1 if all processes see the same rows, since each holds a part of the model.
        writes: Whether this process writes files. One of all does, whatever the ranks are.
    """

    rank: int = 0
    size: int = 1
    writes: bool = True

    @classmethod
    def of(cls, backbone: Backbone) -> DataRanks:
        """Return those of the processes that a launcher started; errors as :func:`processes`. Processes over which the
        backbone is spread see the same rows.
        """
        state = processes()
        if backbone.shards is not None:
            return cls(writes=bool(state.is_main_process))
        return cls(int(state.process_index), int(state.num_processes), bool(state.is_main_process))

    def own(self, rows: Sequence[T]) -> Sequence[T]:
        """Return the rows that this process runs."""
        return rows[self.rank :: self.size]

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of float32 tensors over all ranks, by a single all-reduce; the same bits in all of them."""
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def this_writes() -> bool:
    """Whether this process writes files, of all that a launcher started."""
    return bool(processes().is_main_process)


def wait_for_all() -> None:
    """Wait until every process is here."""
    processes().wait_for_everyone()
