"""What of items the model does not see, as their rows are longer than it reads; and saying so, once for each data."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ptuning.engine.objective import Item

logger = logging.getLogger(__name__)


class Shortened(NamedTuple):
    """Whether a field of an item was cut, and how many turns of its conversation are left out."""

    cut: bool
    turns: int


def shortened(item: Item) -> Shortened:
    """Return what of an item the model does not see."""
    cut = any(one.shortened and not one.turns_left_out for one in item.inputs)
    return Shortened(cut, max(one.turns_left_out for one in item.inputs))


def say_shortened(found: Sequence[Shortened], name: str, most: int) -> None:
    """Warn about text of items that the model, which reads ``most`` tokens, does not see; once for each data."""
    left_out = [one.turns for one in found if one.turns]
    _say_shortened(sum(one.cut for one in found), len(found), len(left_out), sum(left_out), name, most)


@functools.lru_cache(maxsize=1024)
def _say_shortened(cut: int, rows: int, answers: int, turns: int, name: str, most: int) -> None:
    if cut:
        text = "%d of %d rows of %s are longer than %d tokens (max_length, or what the model reads); fields were cut"
        logger.warning(text, cut, rows, name, most)
    if turns:
        text = "too much is said in front of %d answers of %s: the oldest turns are left out, %d in all"
        logger.warning(text, answers, name, turns)


def noticed(parts: Iterable[list[Item]], name: str, most: int) -> Iterator[list[Item]]:
    """Yield parts of items, and say at the end what of them was shortened (:func:`say_shortened`)."""
    found: list[Shortened] = []
    for part in parts:
        found += map(shortened, part)
        yield part
        del part  # while the next one is made
    say_shortened(found, name, most)
