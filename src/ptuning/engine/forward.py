"""Forward passes: rows with the learned parameters of their prompts -> logits at the scored positions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.forward import Memory
from ptuning.backbone.layers import LayerOffsets
from ptuning.engine.batch import Batch, Side, collate, one_sided, shared_tokens
from ptuning.engine.memory import in_parts
from ptuning.engine.prefix_cache import PastKeyValues, PrefixCache, drop_prefix
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import PromptError
from ptuning.template.encode import Example
from ptuning.template.segments import Ids

# A prefix is shared if that saves at least this many tokens: its own forward pass reads every weight once more.
# Source: docs/decisions.md, decision 16 (with 56 saved tokens scoring is even, training 1.2 times faster with 60).
MIN_SAVED_TOKENS = 48


def embed_inputs(embeddings: Tensor, vectors: Tensor, batch: Batch) -> Tensor:
    """Write the (P, E) slot vectors into a copy of the (B, T, E) embeddings, in their dtype. Nothing else does that.
    Raises PromptError if the batch needs more vectors than there are.
    """
    if not len(batch.slot_rows):
        return embeddings
    if int(batch.slot_index.max()) >= len(vectors):
        raise PromptError(
            f"the batch asks for slot {int(batch.slot_index.max())}, and there are {len(vectors)} vectors"
        )
    chosen = vectors.to(embeddings.device)[batch.slot_index].to(embeddings.dtype)  # (S, E)
    return embeddings.index_put((batch.slot_rows, batch.slot_cols), chosen)


def layer_offsets(batch: Batch, learned: PromptBatch) -> LayerOffsets | None:
    """Return the offsets of the deep slots of a batch in each layer; None if there are none."""
    offsets = learned.offsets()
    if offsets is None:
        return None
    table, place = offsets
    numbers = place.to(batch.slot_index.device)[batch.slot_index]  # (S,)
    deep = numbers >= 0
    return LayerOffsets(batch.slot_rows[deep], batch.slot_cols[deep], table[numbers[deep].to(table.device)])


def past_key_values(
    backbone: Backbone, learned: PromptBatch, prefixes: Sequence[Tensor | None], unread: Sequence[Ids] = ()
) -> PastKeyValues | None:
    """Return the keys and values before rows, of which each does not read some: cached ones of its ``prefixes``,
    (L, 2, H, C, D), else those that its prompt has learned. None if there are none.
    """
    parts = list(prefixes)
    if learned.has_prefixes:
        blocks = learned.prefixes(len(parts))
        converted = {id(block): block.to(backbone.dtype) for block in blocks if block is not None}
        parts = [converted.get(id(block)) if part is None else part for part, block in zip(parts, blocks, strict=True)]
    return None if all(part is None for part in parts) else PastKeyValues.of(parts).hiding(unread)


@dataclass(frozen=True)
class ForwardOutput:
    """A forward pass: the rows as they were run, their embeddings (B, T, E) with slot vectors, and (N, V) logits.
    ``offsets`` is what their deep slots add to the inputs of layers.
    ``memory`` is the KV cache for the next call of the backbone, if asked for and if the model has one; ``mask`` says
    which of its columns are tokens, (B, C + T) int64 with C cached columns.
    """

    batch: Batch
    embeddings: Tensor
    logits: Tensor
    memory: Memory | None
    mask: Tensor
    offsets: LayerOffsets | None = None


def target_logits(
    backbone: Backbone,
    examples: Sequence[Example],
    learned: PromptBatch,
    *,
    cache: PrefixCache | None = None,
    pad_side: Side = "right",
) -> Tensor:
    """Run rows as :func:`forward` does; return the logits that score their targets, (N, V) float32, row by row.
    Rows that may not share a pass (:meth:`ptuning.backbone.backbone.Backbone.side`) run in several, and so do rows for
    which the memory of the device is too small, without gradients.
    """

    def run(part: Sequence[int]) -> Tensor:
        rows = [examples[index] for index in part]
        return forward(backbone, rows, learned.take(part), cache=cache, pad_side=pad_side).logits

    return logits_in_parts(backbone, examples, run)


def logits_in_parts(backbone: Backbone, examples: Sequence[Example], run: Callable[[Sequence[int]], Tensor]) -> Tensor:
    """Return the logits of rows, (N, V) row by row, from a ``run`` of the rows at some indices: one run for each side
    of the backbone, or several smaller ones where the memory does not suffice.
    """
    lengths = [len(example.token_ids) for example in examples]

    def run_side(side: Sequence[int]) -> Tensor:
        if torch.is_grad_enabled():
            return run(side)
        parts = in_parts(
            lambda part: run([side[at] for at in part]), [lengths[index] for index in side], backbone=backbone
        )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    sides = one_sided(lengths, backbone.side)
    if len(sides) == 1:
        return run_side(sides[0])
    parts: dict[int, Tensor] = {}
    for side in sides:
        counts = [len(examples[index].logit_positions) for index in side]
        parts |= dict(zip(side, run_side(side).split(counts), strict=True))
    return torch.cat([parts[index] for index in range(len(examples))])


def forward(
    backbone: Backbone,
    examples: Sequence[Example],
    learned: PromptBatch,
    *,
    cache: PrefixCache | None = None,
    pad_side: Side = "right",
    keep: bool = False,
) -> ForwardOutput:
    """Run rows of one side through the backbone with their learned parameters.

    Text before the first slot comes from the prefix cache if one is in use. Otherwise a prefix that all rows share runs
    once, unless all keys and values are to be kept (``keep``). Logits and gradients are the same but for rounding.
    """
    prefixes: Sequence[Tensor | None] = ()
    if cache is not None and cache.is_used and not backbone.model.training:
        texts = [cache.ids_of(example) for example in examples]
        parts = cache.find(dict.fromkeys(ids for ids in texts if ids))
        prefixes = [parts.get(ids) for ids in texts]
        examples = [drop_prefix(example, len(ids)) for example, ids in zip(examples, texts, strict=True)]
    batch = collate(examples, learned, pad_side=pad_side)
    return forward_batch(backbone, batch, learned, prefixes=prefixes, keep=keep)


def forward_batch(
    backbone: Backbone,
    batch: Batch,
    learned: PromptBatch,
    *,
    prefixes: Sequence[Tensor | None] = (),
    keep: bool = False,
) -> ForwardOutput:
    """Run rows that are padded already, after the cached keys and values of their ``prefixes``, if any; ``keep`` as for
    :func:`forward_embeddings`.
    """
    batch, learned = batch.to(backbone.device), learned.to(backbone.device)
    past = past_key_values(backbone, learned, prefixes or [None] * len(batch.counts), batch.unread)
    embeddings = embed_inputs(backbone.embed(batch.token_ids), learned.vectors, batch)
    offsets = layer_offsets(batch, learned)
    logits, memory = forward_embeddings(backbone, embeddings, batch, past=past, keep=keep, offsets=offsets)
    return ForwardOutput(batch, embeddings, logits, memory, _mask_with_past(past, batch.mask), offsets)


def _mask_with_past(past: PastKeyValues | None, mask: Tensor) -> Tensor:
    """Return the mask of rows, (B, T) or (B, 1, T, T), with cached columns first: (B, C + T) or (B, 1, T, C + T)."""
    if past is None:
        return mask
    if mask.ndim == 2:
        return torch.cat([past.mask, mask], dim=1)
    return torch.cat([past.mask[:, None, None].expand(-1, 1, mask.shape[2], -1).bool(), mask], dim=3)


def keys_and_values(backbone: Backbone, example: Example, learned: PromptBatch) -> Tensor:
    """Return the keys and values of a row and of what its prompt has learned before it, (L, 2, H, C, D)."""
    memory = forward_batch(backbone, collate([example], learned), learned, keep=True).memory
    assert memory is not None
    return torch.stack([torch.stack(pair) for pair in memory.layers])[:, :, 0]


def forward_embeddings(
    backbone: Backbone,
    embeddings: Tensor,
    batch: Batch,
    *,
    past: PastKeyValues | None = None,
    keep: bool = False,
    offsets: LayerOffsets | None = None,
) -> tuple[Tensor, Memory | None]:
    """Run the (B, T, E) embeddings of a batch after its ``past``, or a shared prefix once where that pays; ``offsets``
    are added to the inputs of layers. Returns (N, V) float32 logits, row by row; and the KV cache, if it is to be kept
    (``keep``; then no prefix is shared).
    """
    rows, shared, mask, positions, memory = len(batch.counts), 0, batch.mask, batch.positions, None
    if past is not None:
        memory = Memory.of(past.layers)
        mask, positions = _mask_with_past(past, mask), positions + past.tokens
    elif not keep and shares_prefix(backbone, rows=rows, shared=batch.shared_tokens, longest=embeddings.shape[1]):
        shared = batch.shared_tokens
        memory = backbone.run_prefix(
            embeddings[:1, :shared],
            positions=positions[:1, :shared],
            rows=rows,
            offsets=None if offsets is None else offsets.between(0, shared, rows=1),
        )
    return backbone.run(
        embeddings[:, shared:],  # (B, T - shared, E)
        mask=mask if mask.ndim == 2 else mask[:, :, shared:],
        positions=positions[:, shared:],
        rows=batch.logit_rows,
        cols=batch.logit_cols - shared,
        encoder_tokens=batch.encoder_tokens,
        memory=memory,
        keep=keep,
        offsets=offsets if offsets is None or not shared else offsets.between(shared),
    )


def shares_prefix(backbone: Backbone, *, rows: int, shared: int, longest: int) -> bool:
    """Whether the ``shared`` tokens that rows of up to ``longest`` begin with run in one row: if the backbone allows
    it, and it pays.
    """
    saves = (rows - 1) * shared >= MIN_SAVED_TOKENS and backbone.side(shared) == backbone.side(longest)
    # In training mode every row draws its own dropout.
    return saves and not backbone.model.training and backbone.shares_prefix


def shared_prefix_tokens(backbone: Backbone, examples: Sequence[Example], learned: PromptBatch | None = None) -> int:
    """Count the leading tokens that all rows share and a pass would run once (for ``batches``)."""
    shared = shared_tokens(examples, learned)
    keeps_side = all(backbone.side(shared) == backbone.side(len(example.token_ids)) for example in examples)
    return shared if shared and keeps_side and backbone.shares_prefix else 0


def forward_packed(backbone: Backbone, examples: Sequence[Example], learned: PromptBatch, prefix: Tensor) -> Tensor:
    """Run B rows after a prefix that they share in one sequence, without pads, for a backbone that
    :attr:`~ptuning.backbone.backbone.Backbone.branches`.

    ``prefix`` are its keys and values, (L, 2, H, C, D), which are not copied for each row. Returns the logits at the
    scored positions, (N, V) float32, row by row.
    """
    batch, learned = _packed(collate(examples, learned), prefix.shape[3]), learned.to(backbone.device)
    batch = batch.to(backbone.device)
    logits, _ = backbone.run(
        embed_inputs(backbone.embed(batch.token_ids), learned.vectors, batch),
        mask=batch.mask,
        positions=batch.positions,
        rows=batch.logit_rows,
        cols=batch.logit_cols,
        memory=Memory.of(PastKeyValues.of([prefix]).layers),
        offsets=layer_offsets(batch, learned),
    )
    return logits


def _packed(batch: Batch, begun: int) -> Batch:
    """Return a batch's rows as one row of T tokens after C others: each token reads these and those before it in its
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
