"""Beginnings of rows that were read before: keys and values, found by what they hold, the least used dropped first."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import collate
from ptuning.engine.forward import MIN_SAVED_TOKENS, ForwardOutput, forward_batch
from ptuning.engine.prefix_cache import PastKeyValues, cacheable_ids, free_bytes
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.template.encode import Example

# Shorter texts come again less often, and are read again. So are shorter constant beginnings of prompts: on an
# accelerator, to put their keys and values together takes as long; on a processor a few tokens take longer already.
MIN_TOKENS = 32
MIN_CONSTANT_TOKENS = 4
# So many beginnings that were read once are remembered by their names, to be kept when they come again.
SEEN = 4096

PrefixKey = bytes


@dataclass(frozen=True, eq=False)
class ModelRow:
    """A row of one prompt: the filled template, and what the prompt has learned with the hash of its bytes.

    ``constant`` is the number of leading tokens and slots that most rows of the prompt have in common.
    """

    example: Example
    learned: PromptBatch
    digest: bytes
    constant: int = 0
    _names: dict[int, PrefixKey] = field(default_factory=dict, init=False)

    def name(self, tokens: int) -> PrefixKey:
        """Return the name of the row's beginning by what it holds: its token ids, and slot vectors if there are any."""
        if tokens not in self._names:
            slots = [position for position in self.example.slot_positions if position < tokens]
            ids = np.array(self.example.token_ids[:tokens], dtype=np.int64)
            ids[slots] = -1 - np.arange(len(slots))
            is_own = slots or self.example.begun
            self._names[tokens] = hashlib.sha256(ids.tobytes() + (self.digest if is_own else b"")).digest()
        return self._names[tokens]

    def behind(self, tokens: int) -> tuple[Example, PromptBatch]:
        """Return what is left of the row behind its beginning, and what its prompt brings there."""
        slots = tuple(position - tokens for position in self.example.slot_positions if position >= tokens)
        scored = tuple(position - tokens for position in self.example.logit_positions)
        example = replace(
            self.example, token_ids=self.example.token_ids[tokens:], slot_positions=slots, logit_positions=scored
        )
        return example, self.learned.parts(len(self.learned.vectors) - len(slots))[1] if tokens else self.learned

    def beginning(self, tokens: int) -> tuple[Example, PromptBatch]:
        """Return the beginning as a row of its own, of which nothing is scored."""
        slots = tuple(position for position in self.example.slot_positions if position < tokens)
        example = Example(self.example.token_ids[:tokens], slots, (), (), 0, begun=self.example.begun)
        return example, self.learned.parts(len(slots))[0]


class PrefixCache:
    """Keys and values of beginnings of rows on one frozen backbone, within ``memory_share`` of the memory that is free
    at first; those that were not used for the longest time are dropped.

    A beginning is the text in front of a row's first slot, which rows of different prompts can share, or what all rows
    of a prompt begin with. It is named by what it holds, never by a prompt's name: a prompt that is replaced finds
    nothing of the earlier one. One is kept when it comes for the second time, from the pass that reads it with its row:
    texts that come once cost nothing.
    """

    def __init__(self, backbone: Backbone, *, memory_share: float) -> None:
        self._backbone = backbone
        self._kept: OrderedDict[PrefixKey, Tensor] = OrderedDict()  # (L, 2, H, C, D) each
        self._seen: OrderedDict[PrefixKey, bool] = OrderedDict()  # whether more than once, so that it shall be kept
        self._least_constant = MIN_CONSTANT_TOKENS if backbone.device.type == "cpu" else MIN_TOKENS
        self.limit = int(memory_share * free_bytes(backbone.device))
        self.bytes = 0
        self.tokens_read = 0
        self.is_used = memory_share > 0 and backbone.shares_prefix

    def __len__(self) -> int:
        return len(self._kept)

    def lengths(self, rows: Sequence[ModelRow]) -> list[int]:
        """Return for each row of a pass how many of its tokens and slots are read from kept keys and values, or once
        for several of these rows where that saves more than a pass costs; 0 for none.
        """
        if not self.is_used:
            return [0] * len(rows)
        named = [self._named(row) for row in rows]
        counts = Counter(name for own in named for _, name in own)
        return [self._length(own, counts) for own in named]

    def _length(self, named: Sequence[tuple[int, PrefixKey]], counts: Counter[PrefixKey]) -> int:
        kept = next((size for size, name in named if name in self._kept), 0)
        longer = [(size, name) for size, name in named if size > kept]
        for size, name in longer:
            if (counts[name] - 1) * (size - kept) >= MIN_SAVED_TOKENS:
                return size
        for _, name in longer:
            self._seen[name] = counts[name] > 1 or name in self._seen
            self._seen.move_to_end(name)
        while len(self._seen) > SEEN:
            self._seen.popitem(last=False)
        return kept

    @staticmethod
    def is_long(size: int) -> bool:
        """Whether so many keys and values are too many to be filled up with pads for rows that have fewer."""
        return size >= MIN_TOKENS

    def to_read(self, row: ModelRow, begun: set[PrefixKey]) -> int:
        """Return how many tokens of a row are read anew behind what is kept and what rows have ``begun`` in the same
        pass, to which the row's own beginnings are added.
        """
        named = self._named(row) if self.is_used else []
        there = next((size for size, name in named if name in self._kept or name in begun), 0)
        begun.update(name for _, name in named)
        return len(row.example.token_ids) - there

    def _named(self, row: ModelRow) -> list[tuple[int, PrefixKey]]:
        """Return the lengths and names of a row's beginnings that are worth keeping, the longest first."""
        example, side = row.example, self._backbone.side
        text, constant = len(cacheable_ids(example)), min((row.constant, *example.logit_positions[:1]))
        sizes = {text} if text >= MIN_TOKENS else set()
        if constant >= self._least_constant:
            sizes.add(constant)
        whole = side(len(example.token_ids))
        return [(size, row.name(size)) for size in sorted(sizes, reverse=True) if side(size) == whole]

    def wants(self, rows: Sequence[ModelRow]) -> bool:
        """Whether a beginning of one of these rows, which a pass is about to read, shall be kept."""
        return self.is_used and any(self._seen.get(name) for row in rows for _, name in self._named(row))

    def keep(self, rows: Sequence[ModelRow], found: ForwardOutput) -> None:
        """Keep what is wanted of a pass that has read these rows, and has its keys and values. A row without numbers
        (NaN) behind its beginning may have none in it, either: a hidden column still counts, by 0 * NaN.
        """
        assert found.memory is not None
        for at, row in enumerate(rows):
            for size, name in self._named(row):
                if self._seen.get(name):
                    columns = found.mask[at].nonzero()[: row.example.begun + size, 0]
                    own = [torch.stack([pair[0][at], pair[1][at]])[:, :, columns] for pair in found.memory.layers]
                    part = torch.stack(own)
                    if part.isfinite().all():
                        self._put(name, part)

    def _put(self, name: PrefixKey, part: Tensor) -> None:
        self._seen.pop(name, None)
        if part.nbytes <= self.limit:
            self._kept[name] = part
            self.bytes += part.nbytes
            while self.bytes > self.limit:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes

    def past(self, rows: Sequence[ModelRow], lengths: Sequence[int]) -> PastKeyValues:
        """Return the keys and values of each row's beginning, of these lengths (:meth:`lengths`; not all are 0), or of
        what its prompt brings in front of a row without.
        """
        names = [row.name(size) if size else b"" for row, size in zip(rows, lengths, strict=True)]
        parts: dict[PrefixKey, Tensor] = {}
        for at, (row, size) in enumerate(zip(rows, lengths, strict=True)):
            (block,) = row.learned.blocks(1) if not size else (None,)
            if block is not None:
                names[at] = b"block" + row.digest
                parts[names[at]] = block[1].to(self._backbone.dtype)
            elif size and names[at] not in parts:
                parts[names[at]] = self._find(names[at], row, size)
        return PastKeyValues.of(parts, names)

    def _find(self, name: PrefixKey, row: ModelRow, size: int) -> Tensor:
        part = self._kept.get(name)
        if part is not None:
            self._kept.move_to_end(name)
            return part
        part = self._read(row, size)
        self._put(name, part)
        return part

    def _read(self, row: ModelRow, size: int) -> Tensor:
        self.tokens_read += size
        example, learned = row.beginning(size)
        # A head may fail on no position at all.
        example = replace(example, logit_positions=(size - 1,))
        learned = learned.to(self._backbone.device)
        memory = forward_batch(self._backbone, collate([example], learned), learned, keep=True).memory
        assert memory is not None
        return torch.stack([torch.stack(pair) for pair in memory.layers])[:, :, 0]  # (L, 2, H, C, D)


def constant_prefix_tokens(one: Example, other: Example) -> int:
    """Return the number of leading tokens and slots that two rows of one prompt have in common."""
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    same = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one.token_ids), len(other.token_ids)))
    ends = [*one.logit_positions[:1], *other.logit_positions[:1]]
    return min(same, *ends)
