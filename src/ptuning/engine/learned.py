"""What prompts bring to a pass of the backbone: the vectors of their slots (a soft prompt, made of virtual tokens)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from ptuning.files import Json


@dataclass(frozen=True, eq=False)
class Deep:
    """What deep slots bring to the layers of a backbone.

    Args:
        block: (L, 2, K, C, D) float32; the keys and values of a block in front of rows, in L layers with K heads: of
            the ``lead`` tokens that open a text, which are not learned, and of C - ``lead`` deep slots.
        lead: Number of these tokens.
        offsets: (N, L - 1, H) float32; what is added in every layer but the first in the columns of N deep slots.
        slots: Which of the prompt's slots with a vector these N are.
        dtype: Number format of a file that holds them: the numbers are among those that it has.
    """

    block: Tensor | None = None
    lead: int = 0
    offsets: Tensor | None = None
    slots: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    def rounded(self, dtype: torch.dtype) -> Deep:
        """Return the same with the nearest numbers of a number format."""
        return replace(self.map(lambda one: one.to(dtype).float()), dtype=dtype)

    def parts(self, slots: int) -> tuple[Deep, Deep]:
        """Return what belongs to the block and the first slots with a vector, and what belongs to the others."""
        first = [at for at, slot in enumerate(self.slots) if slot < slots]
        rest = [at for at, slot in enumerate(self.slots) if slot >= slots]
        own = [None if self.offsets is None or not at else self.offsets[at] for at in (first, rest)]
        return (
            Deep(self.block, self.lead, own[0], tuple(self.slots[at] for at in first)),
            Deep(None, 0, own[1], tuple(self.slots[at] - slots for at in rest)),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Deep:
        """Return the same with its tensors changed."""
        return replace(self, **{name: change(one) for name, one in self.tensors.items()})  # type: ignore[arg-type]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by their names."""
        found = {"block": self.block, "offsets": self.offsets}
        return {name: one for name, one in found.items() if one is not None}

    @property
    def in_front(self) -> int:
        """Number of deep slots of the block."""
        return 0 if self.block is None else self.block.shape[3] - self.lead

    @property
    def count(self) -> int:
        """Number of deep slots."""
        return len(self.slots) + self.in_front

    def to_json(self) -> dict[str, Json]:
        """Return what it is without its numbers, for manifests and records."""
        layers = len(self.block) if self.block is not None else 0
        if self.offsets is not None:
            layers = max(layers, self.offsets.shape[1] + 1)
        return {
            "slots": self.count,
            "block": self.in_front,
            "lead": self.lead,
            "of": list(self.slots),
            "layers": layers,
            **({} if self.dtype == torch.float32 else {"dtype": str(self.dtype).removeprefix("torch.")}),
        }


@dataclass(frozen=True, eq=False)
class Learned:
    """What one prompt, or the several prompts of a batch, bring to a pass: all that is learned outside of the backbone.

    Args:
        vectors: (P, E) float32; the slot vectors of all prompts, one prompt below the other.
        slots: Number of slots of each prompt, adding up to P; read only if there are ``rows``.
        rows: For each row of a batch, which prompt it uses; None if all P vectors are the one prompt of every row.
        deep: What each prompt's deep slots bring, None without any; empty if no prompt has any.

    Example:
        >>> one, two = Learned(torch.zeros(2, 8)), Learned(torch.ones(3, 8))
        >>> both = Learned.join([one, two], rows=[1, 0, 1])
        >>> both.layout(3), both.take([0, 2]).rows
        (([3, 2, 3], [2, 0, 2]), (1, 1))
    """

    vectors: Tensor
    slots: tuple[int, ...] = ()
    rows: tuple[int, ...] | None = None
    deep: tuple[Deep | None, ...] = ()

    @classmethod
    def of(cls, vectors: Tensor, deep: Deep | None) -> Learned:
        """Return what one prompt brings: (P, E) slot vectors, and its deep slots' part, if it has any."""
        return cls(vectors, deep=() if deep is None else (deep,))

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
        deep = tuple(one.deep[0] if one.deep else None for one in prompts)
        counts = tuple(len(one.vectors) for one in prompts)
        return cls(vectors, counts, tuple(rows), deep if any(deep) else ())

    def apart(self) -> Learned:
        """Return the same as leaves: gradients end there, instead of going on to what made them."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(True)

        deep = tuple(None if one is None else one.map(leaf) for one in self.deep)
        return replace(self, vectors=leaf(self.vectors), deep=deep)

    def to(self, device: torch.device) -> Learned:
        """Return the same on a device."""
        deep = tuple(None if one is None else one.map(lambda tensor: tensor.to(device)) for one in self.deep)
        return replace(self, vectors=self.vectors.to(device), deep=deep)

    def parts(self, slots: int) -> tuple[Learned, Learned]:
        """Return what one prompt brings to its first slots with a vector and in front of them, and what to the rest."""
        first, rest = self.deep[0].parts(slots) if self.deep and self.deep[0] is not None else (None, None)
        return Learned.of(self.vectors[:slots], first), Learned.of(self.vectors[slots:], rest)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is learned."""
        return [self.vectors, *(tensor for one in self.deep if one is not None for tensor in one.tensors.values())]

    @property
    def has_blocks(self) -> bool:
        """Whether rows of a prompt stand behind keys and values that it brings."""
        return any(one is not None and one.block is not None for one in self.deep)

    def blocks(self, rows: int) -> list[tuple[int, Tensor] | None]:
        """Return for each of B rows the number of its prompt and the block that it brings, (L, 2, K, C, D)."""
        owners = [0] * rows if self.rows is None else self.rows
        found = [one.block if one is not None else None for one in self.deep] or [None] * (max(owners, default=0) + 1)
        own = [(owner, found[owner]) for owner in owners]
        return [None if block is None else (owner, block) for owner, block in own]

    def offsets(self) -> tuple[Tensor, Tensor] | None:
        """Return what deep slots add, (N, L - 1, H), and for each of the P slots its row there, (P,) int64, -1 for one
        that is not deep; None if no prompt has such slots.
        """
        tables = [one.offsets for one in self.deep if one is not None and one.offsets is not None]
        if not tables:
            return None
        place = torch.full((len(self.vectors),), -1, dtype=torch.int64)
        start = number = 0
        for one, slots in zip(self.deep, self.slots or (len(self.vectors),), strict=True):
            if one is not None and one.offsets is not None:
                place[[start + slot for slot in one.slots]] = torch.arange(number, number + len(one.slots))
                number += len(one.slots)
            start += slots
        return torch.cat(tables), place.to(tables[0].device)

    def take(self, rows: Sequence[int]) -> Learned:
        """Return the same for a batch of other rows, each given by the index of a row of this one."""
        return self if self.rows is None else replace(self, rows=tuple(self.rows[row] for row in rows))

    def layout(self, rows: int) -> tuple[list[int], list[int]]:
        """Return for each of B rows the number of its prompt's slots, and where they begin in ``vectors``."""
        if self.rows is None:
            return [len(self.vectors)] * rows, [0] * rows
        starts = [0, *accumulate(self.slots)]
        return [self.slots[prompt] for prompt in self.rows], [starts[prompt] for prompt in self.rows]
