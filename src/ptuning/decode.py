"""Writing answers without candidates: beam search for causal models, filling masks for masked ones. Knows no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptuning.backbone import Backbone
from ptuning.batch import Side, collate
from ptuning.errors import TemplateError
from ptuning.fill import BoundTemplate, Example
from ptuning.model import batches, inject, target_logits
from ptuning.records import Record


@dataclass(frozen=True)
class Written:
    """A written answer, its total natural log-probability (with the stop token, if it ended) and its own tokens."""

    text: str
    log_prob: float
    tokens: int


def write_answers(
    backbone: Backbone,
    bound: BoundTemplate,
    records: Sequence[Record],
    vectors: Tensor,
    *,
    width: int,
    max_tokens: int,
    pad_side: Side,
) -> list[list[Written]]:
    """Answer records with what the model itself would write.

    Args:
        backbone: The language model.
        bound: The template, bound to it.
        records: N records; targets are not looked at.
        vectors: (P, E) float32 slot vectors of the template.
        width: How many answers to keep, and the width of the beam search.
        max_tokens: Longest answer.
        pad_side: Where pads stand in a batch of a masked model.

    Returns:
        For each record up to ``width`` answers, best first.
    """
    if backbone.kind == "masked":
        return _fill_masks(backbone, bound, records, vectors, top_k=width, max_tokens=max_tokens, pad_side=pad_side)
    examples = _contexts(bound, records, room=max_tokens)
    found: list[list[Written]] = [[]] * len(records)
    width = min(width, backbone.vocabulary)
    for chosen in batches([[example] * width for example in examples]):
        group = [examples[index] for index in chosen]
        written = _beams(backbone, group, vectors, slots=bound.slots, width=width, max_tokens=max_tokens)
        for index, beams in zip(chosen, written, strict=True):
            found[index] = beams
    return found


def _contexts(bound: BoundTemplate, records: Sequence[Record], *, room: int) -> list[Example]:
    """Fill the template with room for an answer, for less of one where a record that may not be cut leaves less."""
    try:
        return bound.contexts(records, target_tokens=room)
    except TemplateError:
        bound.contexts(records, target_tokens=1)  # raises again if a record cannot be used at all
        if len(records) == 1:
            return _contexts(bound, records, room=room // 2)
    return [example for record in records for example in _contexts(bound, [record], room=room)]


def _beams(
    backbone: Backbone, examples: Sequence[Example], vectors: Tensor, *, slots: int, width: int, max_tokens: int
) -> list[list[Written]]:
    """Beam search over cached keys and values; the slots enter once, with the text (width 1 is greedy decoding).

    Returns:
        For each of B rows ``width`` answers, best first.
    """
    rows, limit, stop = len(examples), backbone.tokenizer.max_tokens, backbone.tokenizer.stop_id
    batch = collate(examples, slots=[slots] * rows, pad_side="left").to(backbone.device)
    embeddings = inject(backbone.embed(batch.token_ids), vectors, batch)
    mask, positions = batch.mask, batch.mask.sum(dim=1)  # (B, T), (B,)
    logits, cache = backbone.run(
        embeddings,
        mask=mask,
        positions=batch.positions,
        rows=batch.logit_rows,
        cols=batch.logit_cols,
        keep_cache=True,
    )
    scores = torch.log_softmax(logits, dim=-1)[:, : backbone.vocabulary]  # (B, V)
    best, tokens = scores.topk(width, dim=-1)  # (B, W)
    texts = [[[int(token)] for token in row] for row in tokens.tolist()]
    backbone.reorder(cache, torch.arange(rows, device=backbone.device).repeat_interleave(width))
    mask, positions = (value.repeat_interleave(width, dim=0) for value in (mask, positions))
    ended = tokens == stop if stop is not None else torch.zeros_like(tokens, dtype=torch.bool)  # (B, W)
    for _ in range(max_tokens - 1):
        # A row whose context is full ends where it stands; its neighbours may go on.
        ended = ended | (positions >= limit).view(rows, width)
        if bool(ended.all()):
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)  # (B * W, T + 1)
        every = torch.arange(len(mask), device=backbone.device)
        logits, cache = backbone.run(
            backbone.embed(tokens.reshape(-1, 1)),
            mask=mask,
            positions=positions.clamp(max=limit - 1)[:, None],
            rows=every,
            cols=torch.zeros_like(every),
            cache=cache,
            keep_cache=True,
        )
        positions = positions + 1
        step = torch.log_softmax(logits, dim=-1)[:, : backbone.vocabulary].view(rows, width, -1)  # (B, W, V)
        # An ended beam goes on as itself: one continuation, which nobody reads, at no cost.
        step = step.masked_fill(ended[..., None], -torch.inf)
        filler = stop if stop is not None else 0
        step[..., filler] = step[..., filler].masked_fill(ended, 0.0)
        best, flat = (best[..., None] + step).flatten(1).topk(width, dim=-1)  # (B, W)
        parents, tokens = flat // step.shape[-1], flat % step.shape[-1]  # (B, W)
        ended = ended.gather(1, parents)
        texts = [
            [
                texts[row][int(parent)] + ([] if over else [int(token)])
                for parent, token, over in zip(parents[row], tokens[row], ended[row], strict=True)
            ]
            for row in range(rows)
        ]
        if stop is not None:
            ended = ended | (tokens == stop)
        backbone.reorder(cache, (parents + torch.arange(rows, device=parents.device)[:, None] * width).flatten())
    return [
        [_finished(backbone, ids, value) for ids, value in zip(texts[row], best[row].tolist(), strict=True)]
        for row in range(rows)
    ]


def _finished(backbone: Backbone, ids: Sequence[int], log_prob: float) -> Written:
    own = [token for token in ids if token != backbone.tokenizer.stop_id]
    return Written(backbone.tokenizer.decode(own).strip(), log_prob, len(own))


def _fill_masks(
    backbone: Backbone,
    bound: BoundTemplate,
    records: Sequence[Record],
    vectors: Tensor,
    *,
    top_k: int,
    max_tokens: int,
    pad_side: Side,
) -> list[list[Written]]:
    """Fill 1 to ``max_tokens`` masks, each with its likeliest token, and keep the likeliest length on average."""
    every: list[list[tuple[float, Written]]] = [[] for _ in records]
    examples = dict(enumerate(bound.contexts(records)))
    for count in range(1, max_tokens + 1):
        if count > 1:
            examples = _with_masks(bound, {index: records[index] for index in examples}, count)
        rows = list(examples)
        for part in batches([[examples[index]] for index in rows]):
            chosen = [rows[place] for place in part]
            group = [examples[index] for index in chosen]
            batch = collate(group, slots=[bound.slots] * len(group), pad_side=pad_side)
            logits = target_logits(backbone, batch, vectors)  # (B * count, V)
            log_probs = torch.log_softmax(logits, dim=-1)[:, : backbone.vocabulary].view(len(chosen), count, -1)
            values, tokens = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1)  # (B, count, K)
            for row, index in enumerate(chosen):
                for answer in range(values.shape[-1]) if count == 1 else (0,):
                    text = backbone.tokenizer.decode(tokens[row, :, answer].tolist()).strip()
                    total = float(values[row, :, answer].sum())
                    every[index].append((total / count, Written(text, total, count)))
    return [[written for _, written in sorted(found, key=lambda entry: -entry[0])[:top_k]] for found in every]


def _with_masks(bound: BoundTemplate, records: Mapping[int, Record], count: int) -> dict[int, Example]:
    """Fill the template with ``count`` masks, for the records that leave room for so many."""
    try:
        return dict(zip(records, bound.contexts(list(records.values()), target_tokens=count), strict=True))
    except TemplateError:
        if len(records) == 1:
            return {}
    return {
        at: example for index, one in records.items() for at, example in _with_masks(bound, {index: one}, count).items()
    }
