"""What prompts bring to a pass of the backbone: the vectors of their slots (a soft prompt, made of virtual tokens)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Learned:
    """What one prompt, or the several prompts of a batch, bring to a pass: all that is learned outside of the backbone.

    Args:
        vectors: (P, E) float32; the slot vectors of all prompts, one prompt below the other.
        slots: Number of slots of each prompt, adding up to P; read only if there are ``rows``.
        rows: For each row of a batch, which prompt it uses; None if all P vectors are the one prompt of every row.

    Example:
        >>> one, two = Learned(torch.zeros(2, 8)), Learned(torch.ones(3, 8))
        >>> both = Learned.join([one, two], rows=[1, 0, 1])
        >>> both.layout(3), both.take([0, 2]).rows
        (([3, 2, 3], [2, 0, 2]), (1, 1))
    """

    vectors: Tensor
    slots: tuple[int, ...] = ()
    rows: tuple[int, ...] | None = None

    @classmethod
    def none(cls, width: int) -> Learned:
        """Return what a manual prompt brings to a backbone of width E: no vectors, (0, E)."""
        return cls(torch.zeros(0, width))

    @classmethod
    def join(cls, prompts: Sequence[Learned], *, rows: Sequence[int]) -> Learned:
        """Return what several prompts bring to one batch, of whose rows each names its prompt by index."""
        if len(prompts) == 1:
            return prompts[0]
        vectors = torch.cat([one.vectors for one in prompts])  # (P, E)
        return cls(vectors, tuple(len(one.vectors) for one in prompts), tuple(rows))

    def to(self, device: torch.device) -> Learned:
        """Return the same on a device."""
        return replace(self, vectors=self.vectors.to(device))

    def take(self, rows: Sequence[int]) -> Learned:
        """Return the same for a batch of other rows, each given by the index of a row of this one."""
        return self if self.rows is None else replace(self, rows=tuple(self.rows[row] for row in rows))

    def layout(self, rows: int) -> tuple[list[int], list[int]]:
        """Return for each of B rows the number of its prompt's slots, and where they begin in ``vectors``."""
        if self.rows is None:
            return [len(self.vectors)] * rows, [0] * rows
        starts = [0, *accumulate(self.slots)]
        return [self.slots[prompt] for prompt in self.rows], [starts[prompt] for prompt in self.rows]
