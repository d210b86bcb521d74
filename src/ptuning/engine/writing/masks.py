"""Answers of masked and permuted models: masks in the target's place, filled all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import Side, batches
from ptuning.engine.learned import Learned
from ptuning.engine.passes import target_logits
from ptuning.engine.writing.ending import OpenRow, Written, alike
from ptuning.errors import TemplateError
from ptuning.records import Record
from ptuning.template.encode import Example, TokenizedTemplate


def fill_masks(
    backbone: Backbone, rows: Sequence[OpenRow], learned: Learned, *, top_k: int, pad_side: Side
) -> list[list[Written]]:
    """Fill 1, 2, ... masks with their most likely tokens; the best mean log-probability wins."""
    every: list[list[tuple[float, Written]]] = [[] for _ in rows]
    fit: Sequence[int] = range(len(rows))
    for count in range(1, max((row.max_tokens for row in rows), default=0) + 1):
        examples: dict[int, Example] = {}
        for (bound, most), places in alike([rows[index] for index in fit]):
            if count <= most:
                records = {fit[place]: rows[fit[place]].record for place in places}
                # A row without room for one mask is an error; without room for more it has no answer of that length.
                examples |= _with_masks(bound, records, count) if count > 1 else _contexts(bound, records, count)
        fit = sorted(examples)
        for part in batches([[examples[index]] for index in fit]):
            chosen = [fit[place] for place in part]
            group = [examples[index] for index in chosen]
            logits = target_logits(backbone, group, learned.take(chosen), pad_side=pad_side)  # (B * count, V)
            log_probs = torch.log_softmax(logits, dim=-1).view(len(chosen), count, -1)
            values, tokens = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1)  # (B, count, K)
            for row, index in enumerate(chosen):
                for answer in range(values.shape[-1]) if count == 1 else (0,):
                    text = backbone.tokenizer.decode(tokens[row, :, answer].tolist()).strip()
                    total = float(values[row, :, answer].sum())
                    every[index].append((total / count, Written(text, total, count)))
    return [[written for _, written in sorted(found, key=lambda entry: -entry[0])[:top_k]] for found in every]


def _contexts(bound: TokenizedTemplate, records: Mapping[int, Record], count: int) -> dict[int, Example]:
    return dict(zip(records, bound.contexts(list(records.values()), target_tokens=count), strict=True))


def _with_masks(bound: TokenizedTemplate, records: Mapping[int, Record], count: int) -> dict[int, Example]:
    try:
        return _contexts(bound, records, count)
    except TemplateError:
        if len(records) == 1:
            return {}
    return {
        at: example for index, one in records.items() for at, example in _with_masks(bound, {index: one}, count).items()
    }
