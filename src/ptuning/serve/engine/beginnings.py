"""Beginnings of rows that were read before: keys and values, found by what they hold, the least used dropped first."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import collate
from ptuning.engine.learned import Learned
from ptuning.engine.passes import run_batch
from ptuning.engine.prefix_cache import Past, cacheable_ids, free_bytes
from ptuning.template.example import Example

# Shorter beginnings are read again: to put their keys and values together takes as long.
MIN_TOKENS = 32
# So many beginnings that were read once are remembered by their names, to be kept when they come again.
SEEN = 4096

Name = bytes


@dataclass(frozen=True, eq=False)
class PassRow:
    """A row of one prompt: the filled template, and what the prompt has learned with the hash of its bytes.

    ``constant`` is the number of leading tokens and slots that most rows of the prompt have in common.
    """

    example: Example
    learned: Learned
    digest: bytes
    constant: int = 0

    def name(self, tokens: int) -> Name:
        """Return the name of the row's beginning by what it holds: its token ids, and slot vectors if there are any."""
        slots = [position for position in self.example.slot_positions if position < tokens]
        ids = np.array(self.example.token_ids[:tokens], dtype=np.int64)
        ids[slots] = -1 - np.arange(len(slots))
        is_own = slots or self.example.begun
        return hashlib.sha256(ids.tobytes() + (self.digest if is_own else b"")).digest()

    def behind(self, tokens: int) -> tuple[Example, Learned]:
        """Return what is left of the row behind its beginning, and what its prompt brings there."""
        slots = tuple(position - tokens for position in self.example.slot_positions if position >= tokens)
        scored = tuple(position - tokens for position in self.example.logit_positions)
        example = replace(
            self.example, token_ids=self.example.token_ids[tokens:], slot_positions=slots, logit_positions=scored
        )
        return example, self.learned.parts(len(self.learned.vectors) - len(slots))[1] if tokens else self.learned

    def beginning(self, tokens: int) -> tuple[Example, Learned]:
        """Return the beginning as a row of its own, of which nothing is scored."""
        slots = tuple(position for position in self.example.slot_positions if position < tokens)
        example = Example(self.example.token_ids[:tokens], slots, (), (), 0, begun=self.example.begun)
        return example, self.learned.parts(len(slots))[0]


class Beginnings:
    """Keys and values of beginnings of rows on one frozen backbone, within ``memory_share`` of the memory that is free
    at first; those that were not used for the longest time are dropped.

    A beginning is the text in front of a row's first slot, which rows of different prompts can share, or else what all
    rows of a prompt begin with. It is named by what it holds, never by a prompt's name: a prompt that is replaced finds
    nothing of the earlier one. One is kept when it comes for the second time: texts that come once cost nothing.
    """

    def __init__(self, backbone: Backbone, *, memory_share: float) -> None:
        self._backbone = backbone
        self._kept: OrderedDict[Name, Tensor] = OrderedDict()  # (L, 2, H, C, D) each
        self._seen: OrderedDict[Name, None] = OrderedDict()
        self.limit = int(memory_share * free_bytes(backbone.device))
        self.bytes = 0
        self.tokens_read = 0
        self.is_used = memory_share > 0 and backbone.shares_prefix

    def __len__(self) -> int:
        return len(self._kept)

    def lengths(self, rows: Sequence[PassRow]) -> list[int]:
        """Return for each row of a pass how many of its tokens and slots are read from kept keys and values, or once
        for several of these rows; 0 for none.
        """
        if not self.is_used:
            return [0] * len(rows)
        sizes = [self._candidate(row) for row in rows]
        names = [row.name(size) if size else b"" for row, size in zip(rows, sizes, strict=True)]
        counts = Counter(names)
        return [
            size if size and (name in self._kept or name in self._seen or counts[name] > 1) else self._note(name)
            for name, size in zip(names, sizes, strict=True)
        ]

    def to_read(self, row: PassRow, begun: set[Name]) -> int:
        """Return how many tokens of a row are read anew behind what is kept and what rows have ``begun`` in the same
        pass, to which the row's own beginning is added.
        """
        size = self._candidate(row) if self.is_used else 0
        if not size:
            return len(row.example.token_ids)
        name = row.name(size)
        is_there = name in self._kept or name in begun
        begun.add(name)
        return len(row.example.token_ids) - size * is_there

    def _candidate(self, row: PassRow) -> int:
        """Return the length of a row's beginning, 0 if it is not worth keeping."""
        example = row.example
        text = len(cacheable_ids(example))
        size = text if text >= MIN_TOKENS else min(row.constant, *example.logit_positions[:1])
        alike = self._backbone.side(size) == self._backbone.side(len(example.token_ids))
        return size if size >= MIN_TOKENS and alike else 0

    def _note(self, name: Name) -> int:
        if name:
            self._seen[name] = None
            if len(self._seen) > SEEN:
                self._seen.popitem(last=False)
        return 0

    def past(self, rows: Sequence[PassRow], lengths: Sequence[int]) -> Past:
        """Return the keys and values of each row's beginning, of these lengths (:meth:`lengths`; not all are 0), or of
        what its prompt brings in front of a row without.
        """
        names = [row.name(size) if size else b"" for row, size in zip(rows, lengths, strict=True)]
        parts: dict[Name, Tensor] = {}
        for at, (row, size) in enumerate(zip(rows, lengths, strict=True)):
            (block,) = row.learned.blocks(1) if not size else (None,)
            if block is not None:
                names[at] = b"block" + row.digest
                parts[names[at]] = block[1].to(self._backbone.dtype)
            elif size and names[at] not in parts:
                parts[names[at]] = self._find(names[at], row, size)
        return Past.of(parts, names)

    def _find(self, name: Name, row: PassRow, size: int) -> Tensor:
        part = self._kept.get(name)
        if part is not None:
            self._kept.move_to_end(name)
            return part
        part = self._read(row, size)
        if part.nbytes <= self.limit:
            self._kept[name] = part
            self.bytes += part.nbytes
            while self.bytes > self.limit:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes
        return part

    def _read(self, row: PassRow, size: int) -> Tensor:
        self.tokens_read += size
        example, learned = row.beginning(size)
        # A head may fail on no position at all.
        example = replace(example, logit_positions=(size - 1,))
        learned = learned.to(self._backbone.device)
        memory = run_batch(self._backbone, collate([example], learned), learned, keep=True).memory
        assert memory is not None
        return torch.stack([torch.stack(pair) for pair in memory.layers])[:, :, 0]  # (L, 2, H, C, D)


def constant_tokens(one: Example, other: Example) -> int:
    """Return the number of leading tokens and slots that two rows of one prompt have in common."""
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    same = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one.token_ids), len(other.token_ids)))
    ends = [*one.logit_positions[:1], *other.logit_positions[:1]]
    return min(same, *ends)
