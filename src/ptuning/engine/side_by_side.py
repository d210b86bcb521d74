"""Rows behind one beginning that was read before: one behind the other in a single row, which no pads fill up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.forward import Memory
from ptuning.engine.batch import Batch, collate
from ptuning.engine.learned import Learned
from ptuning.engine.passes import inject, layer_offsets
from ptuning.template.encode import Example


def run_side_by_side(
    backbone: Backbone, examples: Sequence[Example], learned: Learned, beginning: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Run what is left of B rows behind a beginning that they share, for a backbone that
    :attr:`~ptuning.backbone.backbone.Backbone.branches`.

    ``beginning`` has the keys and values of its C tokens, (1, H, C, D) each for every layer, which are not copied for
    each row. Returns the logits at the scored positions, (N, V) float32, row by row.
    """
    begun = beginning[0][0].shape[2]
    batch = _in_one_row(collate(examples, learned), begun).to(backbone.device)
    logits, _ = backbone.run(
        inject(backbone.embed(batch.token_ids), learned.vectors, batch),
        mask=batch.mask,
        positions=batch.positions,
        rows=batch.logit_rows,
        cols=batch.logit_cols,
        memory=Memory.of(beginning),
        offsets=layer_offsets(batch, learned),
    )
    return logits


def _in_one_row(batch: Batch, begun: int) -> Batch:
    """Return a batch's rows as one row of T tokens behind C others: each token reads these and those before it in its
    own row; the mask is (1, 1, T, C + T) bool.
    """
    is_token = batch.mask.bool()  # (B, T of the longest)
    lengths = is_token.sum(dim=1)
    starts = lengths.cumsum(0) - lengths  # (B,)
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)  # (T,)
    own = (owner[:, None] == owner[None]).tril()  # (T, T)
    mask = torch.cat([torch.ones(len(owner), begun, dtype=torch.bool), own], dim=1)
    return Batch(
        token_ids=batch.token_ids[is_token][None],
        mask=mask[None, None],
        positions=(batch.positions[is_token] + begun)[None],
        slot_rows=torch.zeros_like(batch.slot_rows),
        slot_cols=batch.slot_cols + starts[batch.slot_rows],
        slot_index=batch.slot_index,
        logit_rows=torch.zeros_like(batch.logit_rows),
        logit_cols=batch.logit_cols + starts[batch.logit_rows],
        counts=(sum(batch.counts),),
    )
