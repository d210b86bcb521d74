"""The processes that share a training, as a launcher such as torchrun or ``accelerate launch`` started them."""

from __future__ import annotations

import os
import threading

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ptuning.errors import TrainingError

# Variables of the environment that tell accelerate how it was launched.
LAUNCHER = "ACCELERATE_"
RANKS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# accelerate makes its state on first use and is seen half made by another thread. Its Accelerator is no way round: each
# empties the environment of the process for a moment.
_ONE_AT_A_TIME = threading.Lock()


def processes() -> PartialState:
    """Return accelerate's state: the number of processes, which one this is, and waiting for the others.

    Raises:
        TrainingError: If the environment's variables do not fit, such as those that an earlier launcher left there.
    """
    with _ONE_AT_A_TIME:
        try:
            return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        except (ImportError, RuntimeError, ValueError) as error:
            PartialState._reset_state()  # so that it can be tried again
            found = sorted(name for name in os.environ if name.startswith(LAUNCHER) or name in RANKS)
            raise TrainingError(
                f"accelerate cannot start with the environment's {', '.join(found) or 'settings'}: {error}; unset what "
                "an earlier launcher left there, or start with: accelerate launch -m ptuning"
            ) from error
