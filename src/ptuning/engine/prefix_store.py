"""Prefix KV cache of rows that any prompts answer: content-addressed, least recently used entries dropped first."""

import functools
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine.forward import MIN_SAVED_TOKENS, ForwardOutput, keys_and_values
from ptuning.engine.prefix_cache import cacheable_ids, drop_prefix, free_bytes
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import PTuningError
from ptuning.template.encode import Example, TokenizedTemplate

# Shorter texts come again less often, and are computed again. So are shorter constant prefixes of prompts: on a GPU
# joining their keys and values takes as long; on a CPU a few tokens take longer already.
MIN_TOKENS = 32
MIN_CONSTANT_TOKENS = 4
# Number of prefixes whose keys are remembered after they came once, to be stored when they come again.
SEEN = 4096
# Values that differ in their first letter, to see what all rows of a prompt begin with.
PROBES = ("a", "Zebra")

PrefixKey = bytes


@dataclass(frozen=True, eq=False)
class PreparedPrompt:
    """A prompt that is ready for rows: its learned parameters, and its template bound to a tokenizer; the bare backbone
    has neither.
    """

    learned: PromptBatch
    template: TokenizedTemplate | None = None

    @property
    def bound(self) -> TokenizedTemplate:
        """The template bound to a tokenizer."""
        assert self.template is not None
        return self.template

    @functools.cached_property
    def digest(self) -> bytes:
        """Hash of the learned parameters; empty if there are none."""
        data = b"".join(tensor.detach().cpu().numpy().tobytes() for tensor in self.learned.tensors)
        return hashlib.sha256(data).digest() if data else b""

    @functools.cached_property
    def constant(self) -> int:
        """Number of leading tokens and slots that rows have in common, whatever their record."""
        if self.template is None:
            return 0
        fields = self.template.template.fields
        try:
            first, second = (self.bound.contexts([dict.fromkeys(fields, text)])[0] for text in PROBES)
        except PTuningError:
            return 0
        pairs = zip(first.token_ids, second.token_ids, strict=False)
        shorter = min(len(first.token_ids), len(second.token_ids))
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), shorter)
        return min(same, *first.logit_positions[:1], *second.logit_positions[:1])


@dataclass(frozen=True, eq=False)
class ModelRow:
    """A row that the model reads: a filled template, and its prompt."""

    example: Example
    prompt: PreparedPrompt
    _keys: dict[int, PrefixKey] = field(default_factory=dict, init=False)

    def key(self, tokens: int) -> PrefixKey:
        """Return the key of the row's prefix by its content: its token ids, and slot vectors if there are any."""
        if tokens not in self._keys:
            slots = [position for position in self.example.slot_positions if position < tokens]
            ids = np.array(self.example.token_ids[:tokens], dtype=np.int64)
            ids[slots] = -1 - np.arange(len(slots))
            is_own = slots or self.example.prefix_length
            self._keys[tokens] = hashlib.sha256(ids.tobytes() + (self.prompt.digest if is_own else b"")).digest()
        return self._keys[tokens]

    def rest(self, tokens: int) -> tuple[Example, PromptBatch]:
        """Return the row after its prefix, and the learned parameters for it."""
        if not tokens:
            return self.example, self.prompt.learned
        example = drop_prefix(self.example, tokens)
        return example, self.prompt.learned.parts(len(self.prompt.learned.vectors) - len(example.slot_positions))[1]

    def prefix(self, tokens: int) -> tuple[Example, PromptBatch]:
        """Return the prefix as a row of its own, of which the last position is scored: a head may fail on none."""
        slots = tuple(position for position in self.example.slot_positions if position < tokens)
        example = Example(
            self.example.token_ids[:tokens], slots, (tokens - 1,), (), 0, prefix_length=self.example.prefix_length
        )
        return example, self.prompt.learned.parts(len(slots))[0]


def rest_of(rows: Sequence[ModelRow], lengths: Sequence[int]) -> tuple[list[Example], PromptBatch]:
    """Return rows after prefixes of these lengths, and the learned parameters for them."""
    number: dict[tuple[PreparedPrompt, int, bool], int] = {}
    parts: list[PromptBatch] = []
    owners = []
    examples = []
    for row, length in zip(rows, lengths, strict=True):
        example, part = row.rest(length)
        examples.append(example)
        key = (row.prompt, len(part.vectors), part.has_prefixes)
        if key not in number:
            number[key] = len(parts)
            parts.append(part)
        owners.append(number[key])
    return examples, PromptBatch.join(parts, rows=owners)


class PrefixStore:
    """Keys and values of prefixes of rows on one frozen backbone, within ``memory_share`` of the memory that is free
    at first; the least recently used are dropped.

    A prefix is the text before a row's first slot, which rows of different prompts can share, or the constant one of
    all rows of a prompt. Its key is its content, never a prompt's name: a prompt that replaces another finds nothing of
    it. One is stored when it comes for the second time, from the pass that computes it with its row: texts that come
    once cost nothing.
    """

    def __init__(self, backbone: Backbone, *, memory_share: float) -> None:
        self._backbone = backbone
        self._kept: OrderedDict[PrefixKey, Tensor] = OrderedDict()  # (L, 2, H, C, D) each
        self._seen: OrderedDict[PrefixKey, bool] = OrderedDict()  # whether more than once, so that it is to be stored
        self._least_constant = MIN_CONSTANT_TOKENS if backbone.device.type == "cpu" else MIN_TOKENS
        self.limit = int(memory_share * free_bytes(backbone.device)) if memory_share else 0
        self.bytes = 0
        self.tokens_read = 0
        self.is_used = memory_share > 0 and backbone.shares_prefix

    def __len__(self) -> int:
        return len(self._kept)

    def lengths(self, rows: Sequence[ModelRow]) -> list[int]:
        """Return for each row of a pass the length of its stored prefix, or of one that several of these rows share
        where computing it once saves more than a pass costs; 0 for none.
        """
        if not self.is_used:
            return [0] * len(rows)
        keys = [self._prefixes(row) for row in rows]
        counts = Counter(key for own in keys for _, key in own)
        return [self._length(own, counts) for own in keys]

    def _length(self, prefixes: Sequence[tuple[int, PrefixKey]], counts: Counter[PrefixKey]) -> int:
        kept = next((size for size, key in prefixes if key in self._kept), 0)
        longer = [(size, key) for size, key in prefixes if size > kept]
        for size, key in longer:
            if (counts[key] - 1) * (size - kept) >= MIN_SAVED_TOKENS:
                return size
        for _, key in longer:
            self._seen[key] = counts[key] > 1 or key in self._seen
            self._seen.move_to_end(key)
        while len(self._seen) > SEEN:
            self._seen.popitem(last=False)
        return kept

    def to_read(self, row: ModelRow, begun: set[PrefixKey]) -> int:
        """Return the number of a row's tokens after a stored prefix or one of ``begun``, those of rows in the same
        pass, to which the row's own prefixes are added.
        """
        prefixes = self._prefixes(row) if self.is_used else []
        there = next((size for size, key in prefixes if key in self._kept or key in begun), 0)
        begun.update(key for _, key in prefixes)
        return len(row.example.token_ids) - there

    def _prefixes(self, row: ModelRow) -> list[tuple[int, PrefixKey]]:
        """Return the lengths and keys of a row's prefixes that are worth storing, the longest first."""
        example, side = row.example, self._backbone.side
        text, constant = len(cacheable_ids(example)), min((row.prompt.constant, *example.logit_positions[:1]))
        sizes = {text} if text >= MIN_TOKENS else set()
        if constant >= self._least_constant:
            sizes.add(constant)
        whole = side(len(example.token_ids))
        return [(size, row.key(size)) for size in sorted(sizes, reverse=True) if side(size) == whole]

    def wants(self, rows: Sequence[ModelRow]) -> bool:
        """Whether a prefix of one of these rows is to be stored from the pass that is about to compute it."""
        return self.is_used and any(self._seen.get(key) for row in rows for _, key in self._prefixes(row))

    def store(self, rows: Sequence[ModelRow], output: ForwardOutput) -> None:
        """Store what is wanted of a pass that has computed these rows, with its keys and values. A row with NaN after
        its prefix may have some in it, too: a hidden column still counts, by 0 * NaN.
        """
        assert output.memory is not None
        for at, row in enumerate(rows):
            for size, key in self._prefixes(row):
                if self._seen.get(key):
                    columns = output.mask[at].nonzero()[: row.example.prefix_length + size, 0]
                    layers = output.memory.layers
                    part = torch.stack([torch.stack([keys[at], values[at]])[:, :, columns] for keys, values in layers])
                    if part.isfinite().all():
                        self._put(key, part)

    def _put(self, key: PrefixKey, part: Tensor) -> None:
        self._seen.pop(key, None)
        if part.nbytes <= self.limit:
            self._kept[key] = part
            self.bytes += part.nbytes
            while self.bytes > self.limit:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes

    def prefixes(self, rows: Sequence[ModelRow], lengths: Sequence[int]) -> list[Tensor | None]:
        """Return the keys and values of each row's prefix of these lengths (:meth:`lengths`); None for 0."""
        parts: dict[PrefixKey, Tensor] = {}
        for row, size in zip(rows, lengths, strict=True):
            if size and row.key(size) not in parts:
                parts[row.key(size)] = self._get(row.key(size), row, size)
        return [parts[row.key(size)] if size else None for row, size in zip(rows, lengths, strict=True)]

    def _get(self, key: PrefixKey, row: ModelRow, size: int) -> Tensor:
        part = self._kept.get(key)
        if part is not None:
            self._kept.move_to_end(key)
            return part
        self.tokens_read += size
        example, learned = row.prefix(size)
        part = keys_and_values(self._backbone, example, learned)
        self._put(key, part)
        return part
