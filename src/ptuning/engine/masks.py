"""Answers of masked and permuted models: masks in the target's place, filled all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import Side, batches
from ptuning.engine.ending import Written
from ptuning.engine.learned import Learned
from ptuning.engine.passes import target_logits
from ptuning.errors import TemplateError
from ptuning.records import Record
from ptuning.template.fill import BoundTemplate, Example


def fill_masks(
    backbone: Backbone,
    bound: BoundTemplate,
    records: Sequence[Record],
    learned: Learned,
    *,
    top_k: int,
    max_tokens: int,
    pad_side: Side,
) -> list[list[Written]]:
    """Fill 1 to ``max_tokens`` masks with their most likely tokens; the best mean log-probability wins."""
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
    try:
        return dict(zip(records, bound.contexts(list(records.values()), target_tokens=count), strict=True))
    except TemplateError:
        if len(records) == 1:
            return {}
    return {
        at: example for index, one in records.items() for at, example in _with_masks(bound, {index: one}, count).items()
    }
