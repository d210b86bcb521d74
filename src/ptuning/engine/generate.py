"""Writing answers without candidates: beam search for models that write, filling masks for others. Knows no files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import Side, batches
from ptuning.engine.learned import Learned
from ptuning.engine.passes import run_pass, target_logits
from ptuning.errors import BackboneError, TemplateError
from ptuning.records import Record
from ptuning.template.fill import BoundTemplate, Example
from ptuning.template.segments import FILLS_MASKS


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
    learned: Learned,
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
        learned: What the one prompt of all records brings.
        width: How many answers to keep, and the width of the beam search.
        max_tokens: Longest answer.
        pad_side: Where pads stand in a batch of a masked model.

    Returns:
        For each record up to ``width`` answers, best first.
    """
    if backbone.kind in FILLS_MASKS:
        return _fill_masks(backbone, bound, records, learned, top_k=width, max_tokens=max_tokens, pad_side=pad_side)
    examples = _contexts(bound, records, room=max_tokens)
    found: list[list[Written]] = [[]] * len(records)
    width = min(width, backbone.vocabulary)
    for same in _paddable(backbone, examples):
        for part in batches([[examples[index]] * width for index in same]):
            chosen = [same[place] for place in part]
            group = [examples[index] for index in chosen]
            written = _beams(backbone, bound, group, learned, width=width, max_tokens=max_tokens)
            for index, beams in zip(chosen, written, strict=True):
                found[index] = beams
    return found


def _paddable(backbone: Backbone, examples: Sequence[Example]) -> Iterable[list[int]]:
    """Return indices of examples that can be gone on with together: all, if pads may stand in front of them; else those
    of which the part that is gone on with (all of it, or the decoder's) has the same length, so that it needs no pads.
    """
    groups: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        own = 0 if backbone.pads_left else len(example.token_ids) - example.encoder_tokens
        groups.setdefault(own, []).append(index)
    return groups.values()


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
    backbone: Backbone,
    bound: BoundTemplate,
    examples: Sequence[Example],
    learned: Learned,
    *,
    width: int,
    max_tokens: int,
) -> list[list[Written]]:
    """Beam search over cached keys and values; the slots enter once, with the text (width 1 is greedy decoding). A
    model that keeps no cache reads whole rows again for every token.

    Returns:
        For each of B rows up to ``width`` different answers, best first.

    Raises:
        BackboneError: If a model with an encoder keeps no cache.
    """
    rows, limit = len(examples), backbone.tokenizer.max_tokens
    ending = _Ending(backbone, bound)
    first = run_pass(backbone, examples, learned, pad_side="left", keep=True)
    batch, embeddings, memory = first.batch, first.embeddings, first.memory
    # What is gone on with: the row, or the decoder's part of it.
    mask = batch.mask[:, batch.encoder_tokens :]  # (B, T)
    positions = mask.sum(dim=1)  # (B,)
    if memory is None and batch.encoder_tokens:
        raise BackboneError(
            "this model keeps no cache of keys and values, so it cannot write answers; give candidates to choose from"
        )
    scores = torch.log_softmax(first.logits, dim=-1)  # (B, V)
    best, tokens = scores.topk(width, dim=-1)  # (B, W)
    texts = [[[int(token)] for token in row] for row in tokens.tolist()]
    row_of_beam = torch.arange(rows, device=backbone.device).repeat_interleave(width)  # (B * W,)
    mask, positions = (value[row_of_beam] for value in (mask, positions))
    if memory is not None:
        memory.reorder(row_of_beam)
    else:
        embeddings, read = embeddings[row_of_beam], batch.positions[row_of_beam]  # (B * W, T, E), (B * W, T)
    ended = ending.reached(texts, tokens)  # (B, W)
    for _ in range(max_tokens - 1):
        # A row whose context is full ends where it stands; its neighbours may go on.
        ended = ended | (positions >= limit).view(rows, width)
        if bool(ended.all()):
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)  # (B * W, T + 1)
        every = torch.arange(len(mask), device=backbone.device)
        new, at = backbone.embed(tokens.reshape(-1, 1)), positions.clamp(max=limit - 1)[:, None]
        if memory is None:
            embeddings, read = torch.cat([embeddings, new], dim=1), torch.cat([read, at], dim=1)  # T + 1
            new, at = embeddings, read
        logits, memory = backbone.run(
            new,
            mask=mask,
            positions=at,
            rows=every,
            cols=torch.full_like(every, new.shape[1] - 1),
            memory=memory,
            keep=memory is not None,
        )
        positions = positions + 1
        step = torch.log_softmax(logits, dim=-1).view(rows, width, -1)  # (B, W, V)
        # An ended beam goes on as itself: one continuation, which nobody reads, at no cost.
        step = step.masked_fill(ended[..., None], -torch.inf)
        step[..., 0] = step[..., 0].masked_fill(ended, 0.0)
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
        ended = ended | ending.reached(texts, tokens)
        kept = (parents + torch.arange(rows, device=parents.device)[:, None] * width).flatten()  # (B * W,)
        if memory is not None:
            memory.reorder(kept)
        else:
            embeddings, read = embeddings[kept], read[kept]
    return [
        _different(ending.answer(ids, value) for ids, value in zip(texts[row], best[row].tolist(), strict=True))
        for row in range(rows)
    ]


class _Ending:
    """Where a written answer ends: at the end of the text, and of its first line unless targets have several."""

    def __init__(self, backbone: Backbone, bound: BoundTemplate) -> None:
        self.tokenizer = backbone.tokenizer
        self.multiline = bound.multiline
        # The end of the text, and the end of a gap's filling where the model learned to write one.
        self.stop_ids = {self.tokenizer.stop_id, self.tokenizer.gap.end_id} - {None}

    def reached(self, texts: Sequence[Sequence[Sequence[int]]], tokens: Tensor) -> Tensor:
        """Return which beams ended with their last token: (B, W) bool.

        Args:
            texts: Token ids of W beams for each of B rows.
            tokens: (B, W) int64; says where the result is needed.
        """
        ends = [[self._ends(ids) for ids in row] for row in texts]
        return torch.tensor(ends, dtype=torch.bool, device=tokens.device)

    def _ends(self, ids: Sequence[int]) -> bool:
        if ids[-1] in self.stop_ids:
            return True
        # A line break in front of the answer ends nothing.
        return not self.multiline and self.tokenizer.ends_line(ids[-1]) and bool(self.tokenizer.decode(ids).strip())

    def answer(self, ids: Sequence[int], log_prob: float) -> Written:
        """Return a beam as an answer; its log-probability covers what ended it, its tokens do not."""
        own = list(ids)
        if own[-1] in self.stop_ids or (self._ends(own) and not self.tokenizer.decode(own[-1:]).strip()):
            own.pop()
        text = self.tokenizer.decode(own).strip()
        return Written(text if self.multiline else text.split("\n")[0].strip(), log_prob, len(own))


def _different(written: Iterable[Written]) -> list[Written]:
    """Keep the best of answers with the same text (two beams may end the same text in different ways)."""
    kept: dict[str, Written] = {}
    for one in written:
        kept.setdefault(one.text, one)
    return list(kept.values())


def _fill_masks(
    backbone: Backbone,
    bound: BoundTemplate,
    records: Sequence[Record],
    learned: Learned,
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
            logits = target_logits(backbone, group, learned, pad_side=pad_side)  # (B * count, V)
            log_probs = torch.log_softmax(logits, dim=-1).view(len(chosen), count, -1)
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
