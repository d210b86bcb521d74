"""Batch -> logits at the scored positions, with the slot vectors written in. Holds the one injection site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import Batch, shared_tokens
from ptuning.errors import PromptError
from ptuning.template.fill import Example

# Bounds of one forward pass without gradients: tokens read (a shared prefix once), (rows x vocabulary) of float32
# logits kept, and (rows x longest row) of keys and values kept behind a shared prefix, which each row has a copy of.
MAX_BATCH_TOKENS = 4096
MAX_BATCH_POSITIONS = 256
MAX_CACHED_TOKENS = 8192
# A prefix is shared if that saves at least so many tokens: its own forward pass reads every weight once more.
# Source: docs/decisions.md, decision 16 (with 56 saved tokens scoring is even, training 1.2 times faster with 60).
MIN_SAVED_TOKENS = 48


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
    return scored_logits(backbone, inject(backbone.embed(batch.token_ids), vectors, batch), batch)


def scored_logits(backbone: Backbone, embeddings: Tensor, batch: Batch) -> Tensor:
    """Run embeddings and return the logits at the batch's scored positions.

    What all rows begin with runs once, and the rest of every row behind its keys and values, if the backbone can and
    it pays: the same logits and gradients, since in a causal model nothing in a row changes what stands before it.

    Args:
        backbone: The language model.
        embeddings: (B, T, E), slots written in.
        batch: On the backbone's device; N scored positions.

    Returns:
        (N, V) float32, row by row.
    """
    rows, memory = len(batch.counts), None
    shared = batch.shared_tokens if runs_prefix_once(backbone, rows=rows, shared=batch.shared_tokens) else 0
    if shared:
        memory = backbone.run_prefix(embeddings[:1, :shared], positions=batch.positions[:1, :shared], rows=rows)
    logits, _ = backbone.run(
        embeddings[:, shared:],  # (B, T - shared, E)
        mask=batch.mask,
        positions=batch.positions[:, shared:],
        rows=batch.logit_rows,
        cols=batch.logit_cols - shared,
        encoder_tokens=batch.encoder_tokens,
        memory=memory,
    )
    return logits


def runs_prefix_once(backbone: Backbone, *, rows: int, shared: int) -> bool:
    """Whether the ``shared`` tokens that rows begin with are run in one row: if the backbone can, and it pays."""
    saves = (rows - 1) * shared >= MIN_SAVED_TOKENS
    return saves and not backbone.model.training and backbone.shares_prefix  # a tuned one draws dropout for every row


def prefix_tokens(backbone: Backbone, examples: Sequence[Example], *, offsets: Sequence[int] | None = None) -> int:
    """Count the leading tokens that every example shares and the backbone would run once (for :func:`batches`)."""
    shared = shared_tokens(examples, offsets=offsets)
    return shared if shared and backbone.shares_prefix else 0


def batches(inputs: Sequence[Sequence[Example]], *, prefix: int = 0) -> Iterator[list[int]]:
    """Yield indices of inputs to run together, of similar length and within the bounds of one forward pass.

    Args:
        inputs: For each index the rows that must be run together.
        prefix: How many leading tokens of all rows are run once for a batch (:func:`prefix_tokens`).
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
