"""Rows -> one padded batch with an explicit attention mask and positions; and which rows share a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import PromptError
from ptuning.template.encode import Example
from ptuning.template.segments import Ids

Side = Literal["left", "right"]

# Bounds of one forward pass without gradients: tokens to read (a shared prefix counts once), scored positions (each
# has float32 logits over the vocabulary), and rows x longest row after a shared prefix (each row copies its KV cache).
MAX_BATCH_TOKENS = 4096
MAX_BATCH_POSITIONS = 256
MAX_CACHED_TOKENS = 8192


@dataclass(frozen=True)
class Batch:
    """B rows padded to T tokens, with S slot positions and N scored positions over all rows.

    Args:
        token_ids: (B, T) int64; zero at pads and slots, which only the mask and the slot positions tell apart.
        mask: (B, T) int64; 1 at tokens and slots, 0 at pads. Or (B, 1, T, T) bool; which column reads which.
        positions: (B, T) int64; 0, 1, 2, ... from each row's first token.
        slot_rows, slot_cols: (S,) int64; the positions of slots.
        slot_index: (S,) int64; for each of them, the row of the (P, E) slot vectors that goes there.
        logit_rows, logit_cols: (N,) int64; the scored positions, row by row; ``counts`` has their number in each row.
        shared_tokens: Number of leading columns that are the same in every row.
        encoder_tokens: Number of leading columns that the encoder reads; the decoder reads the others.
        unread: For each row, which columns of its learned prefix it does not read; empty if rows read all.
    """

    token_ids: Tensor
    mask: Tensor
    positions: Tensor
    slot_rows: Tensor
    slot_cols: Tensor
    slot_index: Tensor
    logit_rows: Tensor
    logit_cols: Tensor
    counts: tuple[int, ...]
    shared_tokens: int = 0
    encoder_tokens: int = 0
    unread: tuple[Ids, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens and slots, without pads."""
        return int(self.mask.sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on ``device``."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]  # only tensors are replaced


def collate(examples: Sequence[Example], learned: PromptBatch, *, pad_side: Side = "right") -> Batch:
    """Pad B examples to one batch, on one side of whole rows; encoder and decoder parts are each padded on the right.
    Raises PromptError if a row has another number of slot positions than its prompt has slots.
    """
    lengths = np.array([len(example.token_ids) for example in examples])
    encoder = np.array([example.encoder_tokens for example in examples])
    split = int(encoder.max())
    width = split + int((lengths - encoder).max())
    starts = width - lengths if pad_side == "left" and not split else np.zeros_like(lengths)
    every = np.arange(width)[None, :]
    in_side = np.where(every < split, every, every - split)  # (1, T): column within the encoder's or decoder's part
    columns = in_side - starts[:, None]  # (B, T): position within the side, negative at left pads
    own = np.where(every < split, encoder[:, None], (lengths - encoder)[:, None])  # (B, T): length of the side
    mask = (columns >= 0) & (columns < own)  # (B, T)
    token_ids = np.zeros((len(examples), width), dtype=np.int64)
    token_ids[mask] = np.fromiter((i for example in examples for i in example.token_ids), dtype=np.int64)
    slots, offsets = learned.layout(len(examples))
    for row, (example, expected) in enumerate(zip(examples, slots, strict=True)):
        if len(example.slot_positions) != expected:
            raise PromptError(
                f"row {row} has {len(example.slot_positions)} slots, and its prompt has {expected} vectors"
            )
    slot_rows, slot_cols, order = _flat([example.slot_positions for example in examples], starts, encoder)
    logit_rows, logit_cols, _ = _flat([example.logit_positions for example in examples], starts, encoder)
    hidden = any(example.unread for example in examples)
    for row, example in enumerate(examples) if hidden else ():
        own_columns = [at - example.prefix_length for at in example.unread if at >= example.prefix_length]
        mask[row, [at + starts[row] + (split - encoder[row] if at >= encoder[row] else 0) for at in own_columns]] = 0
    table = np.array(offsets, dtype=np.int64)
    begins_with_pads = bool(starts.any())
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        mask=torch.from_numpy(mask.astype(np.int64)),
        positions=torch.from_numpy(np.where(mask, columns, 0).astype(np.int64)),
        slot_rows=torch.from_numpy(slot_rows),
        slot_cols=torch.from_numpy(slot_cols),
        slot_index=torch.from_numpy(order + table[slot_rows]),
        logit_rows=torch.from_numpy(logit_rows),
        logit_cols=torch.from_numpy(logit_cols),
        counts=tuple(len(example.logit_positions) for example in examples),
        shared_tokens=0 if begins_with_pads or split else shared_tokens(examples, learned),
        encoder_tokens=split,
        unread=tuple(tuple(at for at in example.unread if at < example.prefix_length) for example in examples)
        if hidden
        else (),
    )


def shared_tokens(examples: Sequence[Example], learned: PromptBatch | None = None) -> int:
    """Count the leading tokens and slots that are the same in all rows; without ``learned`` they have the same prompt.

    They end before the first scored position, so that each row has at least one position of its own after them. None
    are shared after learned prefixes, or where rows do not read all of them.

    Example:
        >>> rows = [Example((5, 0, 7, 9), (1,), (3,), (2,), 1), Example((5, 0, 8, 9), (1,), (3,), (2,), 1)]
        >>> two_prompts = PromptBatch(torch.zeros(2, 4), slots=(1, 1), rows=(0, 1))
        >>> shared_tokens(rows), shared_tokens(rows, two_prompts)
        (2, 1)
    """
    if any(example.prefix_length or example.unread for example in examples):
        return 0
    first: list[int] = []
    shared: int | None = None
    offsets = [0] * len(examples) if learned is None else learned.layout(len(examples))[1]
    for example, offset in zip(examples, offsets, strict=True):
        row = list(example.token_ids[: min(example.logit_positions, default=0)])
        for index, position in enumerate(example.slot_positions, start=offset):
            if position < len(row):
                row[position] = -1 - index  # no token id is negative
        if shared is None:
            first, shared = row, len(row)
        shared = min(shared, len(row))
        if row[:shared] != first[:shared]:
            shared = next(at for at in range(shared) if row[at] != first[at])
        if not shared:
            break
    return shared or 0


def batches(inputs: Sequence[Sequence[Example]], *, prefix: int = 0) -> Iterator[list[int]]:
    """Yield indices of inputs that share a forward pass: of similar length, and within its bounds.
    ``inputs`` holds for each index the rows that must share a pass. The first ``prefix`` tokens of all rows run once.
    """
    longest = [max((len(example.token_ids) for example in row), default=0) for row in inputs]
    chosen: list[int] = []
    rows = positions = width = 0
    for index in sorted(range(len(inputs)), key=lambda i: longest[i]):
        add = sum(len(example.logit_positions) for example in inputs[index])
        wide = max(width, longest[index])
        size = rows + len(inputs[index])
        full = (
            prefix + size * (wide - prefix) > MAX_BATCH_TOKENS
            or positions + add > MAX_BATCH_POSITIONS
            or (prefix and size * wide > MAX_CACHED_TOKENS)
        )
        if chosen and full:
            yield chosen
            chosen, rows, positions, wide = [], 0, 0, longest[index]
        chosen.append(index)
        rows, positions, width = rows + len(inputs[index]), positions + add, wide
    if chosen:
        yield chosen


def cut_by_length(lengths: Sequence[int], *, pass_tokens: int) -> list[list[int]]:
    """Cut rows of these lengths into passes so that their pads, and ``pass_tokens`` for each pass, are fewest: one
    more pass reads all weights once more. Returns the indices of the rows, the shortest first.

    Example:
        >>> cut_by_length([9, 2, 10, 2], pass_tokens=8), cut_by_length([9, 2, 10, 2], pass_tokens=20)
        ([[1, 3], [0, 2]], [[1, 3, 0, 2]])
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    # Number of rows -> the lowest cost of the first ones, and where the last of their passes begins.
    costs, begins = {0: 0}, {}
    for end in range(1, len(order) + 1):
        if end < len(order) and lengths[order[end]] == lengths[order[end - 1]]:
            continue
        width = lengths[order[end - 1]]
        costs[end], begins[end] = min((cost + (end - at) * width + pass_tokens, at) for at, cost in costs.items())
    cut: list[list[int]] = []
    end = len(order)
    while end:
        cut.insert(0, order[begins[end] : end])
        end = begins[end]
    return cut


def one_sided(lengths: Sequence[int], side: Callable[[int], bool]) -> list[list[int]]:
    """Group rows, given by their lengths, that may share a pass: those of one ``side``, as
    :meth:`ptuning.backbone.backbone.Backbone.side` says. Returns their indices.
    """
    groups: dict[bool, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(side(length), []).append(index)
    return list(groups.values())


def _flat(
    positions: Sequence[Sequence[int]], starts: np.ndarray, encoder: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all positions, row by row: their rows, their columns, and their index within the row."""
    counts = np.array([len(row) for row in positions], dtype=np.int64)
    rows = np.repeat(np.arange(len(positions), dtype=np.int64), counts)
    columns = np.fromiter((p for row in positions for p in row), dtype=np.int64, count=int(counts.sum()))
    order = np.arange(len(rows), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    pads = np.where(columns < encoder[rows], 0, encoder.max() - encoder[rows])  # between the two sides
    return rows, columns + starts[rows] + pads, order
