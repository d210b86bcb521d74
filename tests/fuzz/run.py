"""Try many inputs: ``python -m tests.fuzz.run --inputs 1000000 --seed 0`` (``make fuzz N=1000000 SEED=0``).

Says how far it is, and of each kind's first faults the input, the error and how to see it again. Ends with 1 if there
were any.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.kinds import KINDS

BATCH = 500  # inputs of one seed
LIMIT_SECONDS = 20  # of the processor for one input
WAIT_SECONDS = 600  # for one input, on a machine that may be busy
SHOWN_FRAMES, SHOWN_CHARACTERS = 4, 2000  # of a fault
MOST_FAULTS = 5  # of a kind, until it is left alone


class TooLong(BaseException):
    """An input took longer than :data:`LIMIT_SECONDS` or :data:`WAIT_SECONDS`."""


def batch(kind: str, number: int, inputs: int) -> str | None:
    """Try some inputs of a kind; return what went wrong with the simplest one that hypothesis finds, if anything."""

    @seed(number)
    @settings(
        max_examples=inputs, database=None, deadline=None, derandomize=False, print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(st.data())
    def check(data: st.DataObject) -> None:
        signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)
        signal.alarm(WAIT_SECONDS)
        try:
            KINDS[kind](data.draw)
        except TooLong as error:  # hypothesis would try it again and again
            slow.append(described(error))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)

    slow: list[str] = []
    try:
        check()
    except Exception as error:  # faults are what is looked for
        return described(error)
    return slow[0] if slow else None


def described(error: BaseException) -> str:
    """Return where an error was raised, the error, and the input as far as hypothesis notes it."""
    where = "".join(traceback.format_tb(error.__traceback__)[-SHOWN_FRAMES:])
    notes = "\n".join(getattr(error, "__notes__", ()))
    return f"{where}{type(error).__name__}: {str(error)[:SHOWN_CHARACTERS]}\n{notes[:SHOWN_CHARACTERS]}"


def main() -> int:
    """Try inputs until there are enough, a batch of each kind in turn."""
    given_options = argparse.ArgumentParser(description=__doc__)
    given_options.add_argument("--inputs", type=int, default=10_000)
    given_options.add_argument("--seed", type=int, default=0)
    given_options.add_argument("--kinds", default=",".join(KINDS))
    options = given_options.parse_args()
    for one in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(one, _too_long)
    logging.disable(logging.CRITICAL)  # notices about inputs
    kinds = dict.fromkeys(options.kinds.split(","), 0)
    size = max(1, min(BATCH, options.inputs // len(kinds)))
    done, number, began = 0, options.seed, time.monotonic()
    while done < options.inputs and (left := [kind for kind, faults in kinds.items() if faults < MOST_FAULTS]):
        for kind in left:
            found = batch(kind, number, size)
            done += size
            if found is not None:
                kinds[kind] += 1
                print(f"FAULT in {kind}; again: make fuzz KINDS={kind} SEED={number} N={size}\n{found}\n", flush=True)
        faults, seconds = sum(kinds.values()), time.monotonic() - began
        print(f"{done:,} of {options.inputs:,} inputs, seed {number}, {faults} faults, {seconds:.0f} s", flush=True)
        number += 1
    return int(any(kinds.values()))


def _too_long(*_: Any) -> NoReturn:
    raise TooLong(f"more than {LIMIT_SECONDS} seconds of the processor, or {WAIT_SECONDS} in all")


if __name__ == "__main__":
    sys.exit(main())
