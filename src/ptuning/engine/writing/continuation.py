"""Rows that a model goes on reading, token by token: the next logits, from the KV cache or from whole rows anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine.learned import Learned
from ptuning.engine.passes import Pass, run_pass
from ptuning.errors import BackboneError
from ptuning.template.encode import Example

# Pads in front of all rows are dropped by so many at a time, since that copies all keys and values.
DROPPED_PADS = 16


class Continuation:
    """B rows with what the model has read of each. ``logits`` are those of the next token, (B, V) float32.

    ``before`` has for each row the tokens that count as written before the answer: those of a decoder's side, which
    rows of one batch have equally many of. Without ``keep`` no keys and values are kept. Raises a BackboneError if an
    encoder-decoder model keeps none.
    """

    def __init__(self, backbone: Backbone, examples: Sequence[Example], learned: Learned, *, keep: bool = True) -> None:
        self._begin(backbone, examples, run_pass(backbone, examples, learned, pad_side="left", keep=keep))

    @classmethod
    def behind(cls, backbone: Backbone, examples: Sequence[Example], first: Pass) -> Continuation:
        """Return the rows behind a pass that has read them, with pads on the left."""
        rows = cls.__new__(cls)
        rows._begin(backbone, examples, first)
        return rows

    def _begin(self, backbone: Backbone, examples: Sequence[Example], first: Pass) -> None:
        batch = first.batch
        if first.memory is None and batch.encoder_tokens:
            raise BackboneError(
                "this model has no KV cache, so it cannot write answers; give candidates to choose from"
            )
        self._backbone = backbone
        self._memory, self._embeddings, self._positions = first.memory, first.embeddings, batch.positions
        self._mask = first.mask[:, batch.encoder_tokens :]  # (B, T)
        self._offsets = first.offsets if first.memory is None else None  # deep slots are read anew with whole rows
        self.logits = first.logits
        self.before = [_decoder_ids(one) for one in examples]

    def __len__(self) -> int:
        return len(self.logits)

    def joins(self, other: Continuation) -> bool:
        """Whether rows of both can be read in one batch from now on: if both keep keys and values, and nothing else."""
        return all(one._memory is not None and one._memory.is_plain for one in (self, other))

    def join(self, other: Continuation) -> None:
        """Take in the rows of another continuation below one's own, with pads on the left of the shorter ones."""
        assert self._memory is not None
        assert other._memory is not None
        width = max(self._mask.shape[1], other._mask.shape[1])
        self._memory = self._memory.join(other._memory, width=width)
        self._mask = torch.cat([_padded(one._mask, width) for one in (self, other)])
        self.before = [*self.before, *other.before]
        self.logits = torch.cat([self.logits, other.logits])

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the rows at these places only."""
        rows = torch.tensor(places, dtype=torch.int64, device=self.logits.device)
        self._follow(rows)
        self.logits = self.logits[rows]

    def full(self) -> list[bool]:
        """Return for each row whether the model can read no token more."""
        full: list[bool] = (self._mask.sum(dim=1) >= self._backbone.tokenizer.max_tokens).tolist()
        return full

    def read(self, tokens: Tensor, *, after: Tensor | None = None) -> None:
        """Read one token more, (B,) int64: in each row, or (``after``, (B,) int64) behind what row ``after[i]`` has."""
        if after is not None:
            self._follow(after)
        at = self._mask.sum(dim=1, keepdim=True)  # (B, 1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)  # (B, T + 1)
        new = self._backbone.embed(tokens[:, None])  # (B, 1, E)
        if self._memory is None:
            self._embeddings = new = torch.cat([self._embeddings, new], dim=1)  # (B, T + 1, E)
            self._positions = at = torch.cat([self._positions, at], dim=1)  # (B, T + 1)
        every = torch.arange(len(tokens), device=tokens.device)
        self.logits, self._memory = self._backbone.run(
            new,
            mask=self._mask,
            positions=at,
            rows=every,
            cols=torch.full_like(every, new.shape[1] - 1),
            memory=self._memory,
            keep=self._memory is not None,
            offsets=self._offsets,
        )

    def _follow(self, rows: Tensor) -> None:
        self.before, self._mask = [self.before[row] for row in rows.tolist()], self._mask[rows]
        if self._memory is not None:
            self._memory.reorder(rows)
            self._drop_pads()
        else:
            self._embeddings, self._positions = self._embeddings[rows], self._positions[rows]
            self._offsets = self._offsets if self._offsets is None else self._offsets.take(rows)

    def _drop_pads(self) -> None:
        """Forget the first positions once they are pads in every row that is left, and enough of them to pay."""
        assert self._memory is not None
        pads = int(self._mask.any(dim=0).int().argmax())
        if pads >= DROPPED_PADS and self._memory.is_plain:
            self._memory, self._mask = self._memory.drop_first(pads), self._mask[:, pads:]


def _padded(mask: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask, (width - mask.shape[1], 0))


def _decoder_ids(example: Example) -> list[int]:
    """Return the tokens of a row's decoder side without slots; nothing if the model has only one side."""
    if not example.encoder_tokens:
        return []
    slots = set(example.slot_positions)
    return [token for at, token in enumerate(example.token_ids) if at >= example.encoder_tokens and at not in slots]
