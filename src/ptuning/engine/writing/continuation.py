"""Rows that a model goes on reading, token by token: the next logits, from the KV cache or from whole rows anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine.learned import Learned
from ptuning.engine.passes import run_pass
from ptuning.errors import BackboneError
from ptuning.template.fill import Example


class Continuation:
    """B rows with what the model has read of each. ``logits`` are those of the next token, (B, V) float32.

    ``ids`` are the tokens that count as written before, (B, T): those read since the start and, in front of them, the
    tokens of a decoder's side, which rows of one batch have equally many of. Without ``keep`` no keys and values are
    kept. Raises a BackboneError if an encoder-decoder model keeps none.
    """

    def __init__(self, backbone: Backbone, examples: Sequence[Example], learned: Learned, *, keep: bool = True) -> None:
        first = run_pass(backbone, examples, learned, pad_side="left", keep=keep)
        batch = first.batch
        if first.memory is None and batch.encoder_tokens:
            raise BackboneError(
                "this model has no KV cache, so it cannot write answers; give candidates to choose from"
            )
        self._backbone = backbone
        self._memory, self._embeddings, self._positions = first.memory, first.embeddings, batch.positions
        self._mask = batch.mask[:, batch.encoder_tokens :]  # (B, T)
        self.logits = first.logits
        self.ids = torch.tensor([_decoder_ids(one) for one in examples], dtype=torch.int64, device=backbone.device)

    def full(self) -> list[bool]:
        """Return for each row whether the model can read no token more."""
        full: list[bool] = (self._mask.sum(dim=1) >= self._backbone.tokenizer.max_tokens).tolist()
        return full

    def read(self, tokens: Tensor, *, after: Tensor | None = None) -> None:
        """Read one token more, (B,) int64: in each row, or (``after``, (B,) int64) behind what row ``after[i]`` has."""
        if after is not None:
            self._follow(after)
        at = self._mask.sum(dim=1, keepdim=True)  # (B, 1)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)  # (B, T + 1)
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
        )

    def _follow(self, rows: Tensor) -> None:
        self.ids, self._mask = self.ids[rows], self._mask[rows]
        if self._memory is not None:
            self._memory.reorder(rows)
        else:
            self._embeddings, self._positions = self._embeddings[rows], self._positions[rows]


def _decoder_ids(example: Example) -> list[int]:
    """Return the tokens of a row's decoder side without slots; nothing if the model has only one side."""
    if not example.encoder_tokens:
        return []
    slots = set(example.slot_positions)
    return [token for at, token in enumerate(example.token_ids) if at >= example.encoder_tokens and at not in slots]
