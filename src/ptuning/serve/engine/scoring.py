"""Passes that score: labels and choices, candidates, and the tokens of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from ptuning.errors import BackboneError
from ptuning.prompt.predict import rank_classes
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.serve.engine.beginnings import PassRow
from ptuning.serve.engine.filling import ClosedRow, pass_row
from ptuning.serve.engine.job import Outcome, PromptRow, Token, Usage
from ptuning.serve.engine.passes import Passes

Given = TypeVar("Given")
Found = TypeVar("Found")


def classify(passes: Passes, rows: Sequence[tuple[PromptRow, ClosedRow]]) -> list[Outcome]:
    """Answer rows with the likeliest of their labels or choices, rows of all prompts in the same passes."""
    items = [filled.item for _, filled in rows]
    inputs = [[pass_row(example, filled.ready) for example in filled.item.inputs] for _, filled in rows]

    cached = [0] * len(items)

    def run(at: Sequence[int]) -> torch.Tensor:
        logits, kept = passes.logits([row for index in at for row in inputs[index]])
        owners = [index for index in at for _ in inputs[index]]
        for owner, size in zip(owners, kept, strict=True):
            cached[owner] += size
        return logits

    shared = passes.kept.shared([row for own in inputs for row in own])
    ranked = rank_classes(items, [filled.names for _, filled in rows], run, prefix=shared)
    return [
        Outcome(
            Prediction.of_classes(checked(found), top_k=row.how.top_k, min_probability=row.how.min_probability),
            Usage(filled.tokens, 0, kept),
        )
        for (row, filled), found, kept in zip(rows, ranked, cached, strict=True)
    ]


def checked(found: Sequence[Candidate]) -> Sequence[Candidate]:
    """Return candidates, all of which must have a number as their probability."""
    if any(math.isnan(one.log_prob) for one in found):
        raise BackboneError("the model gave no numbers (NaN) for this row; load it in another number format (--dtype)")
    return found


def echo(passes: Passes, row: PassRow, *, alternatives: int) -> Outcome:
    """Score each token of a text by those in front of it. The first one has no log-probability."""
    ids, tokenizer = row.example.token_ids, passes.backbone.tokenizer
    # The last position scores what would come next.
    row = replace(row, example=replace(row.example, logit_positions=tuple(range(len(ids) - 1))))
    logits, (cached,) = passes.logits([row])
    log_probs = torch.log_softmax(logits, dim=-1)  # (T - 1, V)
    own = log_probs.gather(1, torch.tensor(ids[1:], device=log_probs.device)[:, None])[:, 0].tolist()
    best = log_probs.topk(min(alternatives, log_probs.shape[-1]), dim=-1)
    tokens = [Token(ids[0], tokenizer.decode(ids[:1]), None)]
    for token, value, places, values in zip(ids[1:], own, best.indices.tolist(), best.values.tolist(), strict=True):
        others = tuple((tokenizer.decode([one]), other) for one, other in zip(places, values, strict=True))
        tokens.append(Token(token, tokenizer.decode([token]), value, others))
    if any(one.log_prob is not None and math.isnan(one.log_prob) for one in tokens):
        raise BackboneError("the model gave no numbers (NaN) for this row; load it in another number format (--dtype)")
    return Outcome(usage=Usage(len(ids), 0, cached), tokens=tuple(tokens))


def each_alone(work: Callable[[Sequence[Given]], Sequence[Found]], rows: Sequence[Given]) -> list[Found | Exception]:
    """Return what ``work`` makes of rows together; if that fails, of each alone, so that a failed row fails alone."""
    try:
        return list(work(rows))
    except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to a row
        if len(rows) == 1:
            return [error]
    return [found for row in rows for found in each_alone(work, [row])]
