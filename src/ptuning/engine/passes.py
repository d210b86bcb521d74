"""One forward pass: rows, and what their prompts learned -> logits at the scored positions. The one injection site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.forward import Memory
from ptuning.engine.batch import Batch, Side, collate, shared_tokens
from ptuning.engine.learned import Learned
from ptuning.engine.prefix_cache import Past, PrefixCache, cacheable_ids, row_behind
from ptuning.errors import PromptError
from ptuning.template.fill import Example

# A prefix is shared if that saves at least this many tokens: its own forward pass reads every weight once more.
# Source: docs/decisions.md, decision 16 (with 56 saved tokens scoring is even, training 1.2 times faster with 60).
MIN_SAVED_TOKENS = 48


def inject(embeddings: Tensor, vectors: Tensor, batch: Batch) -> Tensor:
    """Write slot vectors into the embeddings of a batch. No other function does that.

    Args:
        embeddings: (B, T, E) in the backbone's dtype.
        vectors: (P, E) float32; the slot vectors of all prompts in the batch, one below the other.
        batch: Which vector goes where.

    Returns:
        (B, T, E), a new tensor; the vectors are cast to its dtype.

    Raises:
        PromptError: If the batch needs more vectors than there are.
    """
    if not len(batch.slot_rows):
        return embeddings
    if int(batch.slot_index.max()) >= len(vectors):
        raise PromptError(
            f"the batch asks for slot {int(batch.slot_index.max())}, and there are {len(vectors)} vectors"
        )
    chosen = vectors.to(embeddings.device)[batch.slot_index].to(embeddings.dtype)  # (S, E)
    return embeddings.index_put((batch.slot_rows, batch.slot_cols), chosen)


@dataclass(frozen=True)
class Pass:
    """A forward pass over B rows with N scored positions.

    Args:
        batch: The rows as they were run, on the backbone's device.
        embeddings: (B, T, E), slot vectors written in.
        logits: (N, V) float32 at the scored positions, row by row.
        memory: Keys and values for the next call of :meth:`~ptuning.backbone.backbone.Backbone.run`, if asked for and
            if the model has a KV cache.
    """

    batch: Batch
    embeddings: Tensor
    logits: Tensor
    memory: Memory | None


def target_logits(
    backbone: Backbone,
    examples: Sequence[Example],
    learned: Learned,
    *,
    cache: PrefixCache | None = None,
    pad_side: Side = "right",
) -> Tensor:
    """Run rows and return the logits that score their targets, (N, V) float32, row by row.

    Args:
        backbone: The language model.
        examples: B rows with N scored positions.
        learned: What the rows' prompts bring.
        cache: KV cache of the text before the first slots, where there is one.
        pad_side: The side of the pads.
    """
    return run_pass(backbone, examples, learned, cache=cache, pad_side=pad_side).logits


def run_pass(
    backbone: Backbone,
    examples: Sequence[Example],
    learned: Learned,
    *,
    cache: PrefixCache | None = None,
    pad_side: Side = "right",
    keep: bool = False,
) -> Pass:
    """Run rows through the backbone with what their prompts bring: every pass of this package is made here.

    It also decides what need not be computed for each row: text before the first slot comes from the prefix cache if
    there is one in use; otherwise a prefix that all rows share is computed once. The logits and gradients are the same
    (but for rounding), since in a causal model no token changes those before it.

    Args:
        backbone: The language model.
        examples: B rows with N scored positions.
        learned: What the rows' prompts bring.
        cache: KV cache of the text before the first slots, where there is one.
        pad_side: The side of the pads.
        keep: Whether to keep all keys and values to go on from; then no prefix is shared.
    """
    past = None
    if cache is not None and cache.is_used and not backbone.model.training:
        texts = [cacheable_ids(example) for example in examples]
        if any(texts):
            past = cache.past(texts)
            examples = [row_behind(example, len(ids)) for example, ids in zip(examples, texts, strict=True)]
    batch = collate(examples, learned, pad_side=pad_side).to(backbone.device)
    embeddings = inject(backbone.embed(batch.token_ids), learned.vectors, batch)
    logits, memory = run_embeddings(backbone, embeddings, batch, past=past, keep=keep)
    return Pass(batch, embeddings, logits, memory)


def run_embeddings(
    backbone: Backbone, embeddings: Tensor, batch: Batch, *, past: Past | None = None, keep: bool = False
) -> tuple[Tensor, Memory | None]:
    """Run the embeddings of a batch, behind what is cached of its rows, or a shared prefix once where that pays.

    Args:
        backbone: The language model.
        embeddings: (B, T, E), slots written in.
        batch: On the backbone's device; N scored positions.
        past: Keys and values of the tokens before each row.
        keep: Whether to keep all keys and values to go on from; then no prefix is shared.

    Returns:
        (N, V) float32 logits, row by row; and the keys and values, if they are kept.
    """
    rows, shared, memory, mask, positions = len(batch.counts), 0, None, batch.mask, batch.positions
    if past is not None:
        memory = Memory.of(past.layers)
        mask = torch.cat([past.mask, mask], dim=1)  # (B, C + T)
        positions = positions + past.mask.sum(dim=1, keepdim=True)
    elif not keep and runs_prefix_once(backbone, rows=rows, shared=batch.shared_tokens):
        shared = batch.shared_tokens
        memory = backbone.run_prefix(embeddings[:1, :shared], positions=positions[:1, :shared], rows=rows)
    return backbone.run(
        embeddings[:, shared:],  # (B, T - shared, E)
        mask=mask,
        positions=positions[:, shared:],
        rows=batch.logit_rows,
        cols=batch.logit_cols - shared,
        encoder_tokens=batch.encoder_tokens,
        memory=memory,
        keep=keep,
    )


def runs_prefix_once(backbone: Backbone, *, rows: int, shared: int) -> bool:
    """Whether the ``shared`` tokens that rows begin with run in one row: if the backbone allows it, and it pays."""
    saves = (rows - 1) * shared >= MIN_SAVED_TOKENS
    # In training mode every row draws its own dropout.
    return saves and not backbone.model.training and backbone.shares_prefix


def prefix_tokens(backbone: Backbone, examples: Sequence[Example], learned: Learned | None = None) -> int:
    """Count the leading tokens that all rows share and a pass would run once (for ``batches``).

    Args:
        backbone: The language model.
        examples: Rows.
        learned: What the rows' prompts bring; without it all rows have the same prompt.
    """
    shared = shared_tokens(examples, learned)
    return shared if shared and backbone.shares_prefix else 0
