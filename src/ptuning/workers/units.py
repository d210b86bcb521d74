"""Units of work: what one worker does alone, which of them a part (K/N) of a command has, and who holds them."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ptuning.errors import ConfigError
from ptuning.files import make_folder
from ptuning.names import locked

T = TypeVar("T")
# Most prompts of a unit that trains several at once. Which prompts train together decides how sums are rounded, so this
# depends on nothing that a machine or a command brings along.
UNIT_PROMPTS = 16
MOST_PARTS = 1_000_000


@dataclass(frozen=True)
class Unit:
    """What one worker does alone: the results in ``folders``, relative to the output folder.

    If they are of prompts that train together, ``checkpoint`` is the folder of their checkpoint.
    """

    name: str
    folders: tuple[str, ...]
    checkpoint: str | None = None


@dataclass(frozen=True)
class WorkPart:
    """One of ``of`` equal parts of a command's units, by its ``number`` from 1.

    >>> WorkPart.parse("3/16")
    WorkPart(number=3, of=16)
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.of <= MOST_PARTS:
            raise ConfigError(f"part {self}: the number of parts must be from 1 to {MOST_PARTS:,}")
        if not 1 <= self.number <= self.of:
            raise ConfigError(f"part {self}: parts are counted from 1 to {self.of}, so there is no part {self.number}")

    @classmethod
    def parse(cls, text: str) -> WorkPart:
        """Read ``K/N``; a ConfigError if the text is something else."""
        found = re.fullmatch(r"\s*([0-9]{1,9})\s*/\s*([0-9]{1,9})\s*", text)
        if found is None:
            raise ConfigError(f"part {text!r} is not K/N with whole numbers, such as 3/16 for the third of 16 parts")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def share(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the units of this part; a ConfigError if there are more parts than units."""
        if self.of > len(units):
            unit = f"a unit is a cell, or at most {UNIT_PROMPTS} prompts that train together"
            if len(units) == 1:
                raise ConfigError(f"part {self}: there is only one unit to share ({unit}), so leave out the part")
            raise ConfigError(
                f"part {self}: there are only {len(units)} units to share ({unit}), so give {len(units)} parts or fewer"
            )
        return list(units[self.number - 1 :: self.of])


def cut(items: Sequence[T], weights: Sequence[int], most: int) -> list[list[T]]:
    """Cut items in their order into as few runs as needed, whose weights add up to ``most`` or less; a heavier item is
    a run of its own. Runs of equal items are about equally long.

    >>> cut("abcdefg", [1] * 7, 3)
    [['a', 'b', 'c'], ['d', 'e'], ['f', 'g']]
    """
    if len(set(weights)) == 1:
        count = max(1, most // weights[0])
        runs = -(-len(items) // count)
        size, longer = divmod(len(items), runs)
        ends = [0, *(size * number + min(number, longer) for number in range(1, runs + 1))]
        return [list(items[start:end]) for start, end in itertools.pairwise(ends)]
    found: list[list[T]] = []
    weight = most + 1
    for item, own in zip(items, weights, strict=True):
        if weight + own > most:
            found.append([])
            weight = 0
        found[-1].append(item)
        weight += own
    return found


@contextlib.contextmanager
def held(out: Path, unit: Unit, waiting: Callable[[], None]) -> Iterator[None]:
    """Keep the folders of a unit from other processes, such as another part of the command. ``waiting`` is called while
    another one has them; it may raise.
    """
    from ptuning.engine.processes import this_writes  # takes seconds, and to read a part must not

    with contextlib.ExitStack() as locks:
        # Processes that share a training do a unit together: one of them keeps others away.
        for folder in sorted(unit.folders) if this_writes() else ():
            make_folder(out / folder)
            locks.enter_context(locked(out / folder, waiting=waiting))
        yield
