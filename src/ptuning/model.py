"""Batch -> logits at the scored positions, with the slot vectors written in. Holds the one injection site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ptuning.backbone import Backbone
from ptuning.batch import Batch
from ptuning.errors import PromptError
from ptuning.fill import Example

# Bounds of one forward pass without gradients: tokens read, and (rows x vocabulary) of float32 logits kept.
MAX_BATCH_TOKENS = 4096
MAX_BATCH_POSITIONS = 256


def inject(embeddings: Tensor, vectors: Tensor, batch: Batch) -> Tensor:
    """Write slot vectors into the embeddings of a batch: the only place where that is done.

    Args:
        embeddings: (B, T, E) in the backbone's dtype.
        vectors: (P, E) float32; the slot vectors of all prompts in the batch, one below the other.
        batch: Says which vector goes where.

    Returns:
        (B, T, E), a new tensor; the vectors are cast where they are written.

    Raises:
        PromptError: If the batch asks for a vector that is not there.
    """
    if not len(batch.slot_rows):
        return embeddings
    if int(batch.slot_index.max()) >= len(vectors):
        raise PromptError(
            f"the batch asks for slot {int(batch.slot_index.max())}, and there are {len(vectors)} vectors"
        )
    chosen = vectors.to(embeddings.device)[batch.slot_index].to(embeddings.dtype)  # (S, E)
    return embeddings.index_put((batch.slot_rows, batch.slot_cols), chosen)


def target_logits(backbone: Backbone, batch: Batch, vectors: Tensor) -> Tensor:
    """Run a batch and return the logits that score its targets.

    Args:
        backbone: The language model.
        batch: B rows with N scored positions.
        vectors: (P, E) float32 slot vectors.

    Returns:
        (N, V) float32, row by row.
    """
    batch = batch.to(backbone.device)
    embeddings = inject(backbone.embed(batch.token_ids), vectors, batch)
    logits, _ = backbone.run(
        embeddings, mask=batch.mask, positions=batch.positions, rows=batch.logit_rows, cols=batch.logit_cols
    )
    return logits


def batches(inputs: Sequence[Sequence[Example]]) -> Iterator[list[int]]:
    """Yield indices of inputs to run together, of similar length and within the bounds of one forward pass.

    Args:
        inputs: For each index the rows that must be run together.
    """
    longest = [max((len(example.token_ids) for example in row), default=0) for row in inputs]
    chosen: list[int] = []
    rows = positions = width = 0
    for index in sorted(range(len(inputs)), key=lambda i: longest[i]):
        add = sum(len(example.logit_positions) for example in inputs[index])
        wide = max(width, longest[index])
        full = (rows + len(inputs[index])) * wide > MAX_BATCH_TOKENS or positions + add > MAX_BATCH_POSITIONS
        if chosen and full:
            yield chosen
            chosen, rows, positions, wide = [], 0, 0, longest[index]
        chosen.append(index)
        rows, positions, width = rows + len(inputs[index]), positions + add, wide
    if chosen:
        yield chosen
