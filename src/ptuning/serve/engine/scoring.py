"""Passes that score: labels and choices, candidates, and the tokens of a text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from ptuning.engine.batch import MAX_BATCH_POSITIONS
from ptuning.errors import BackboneError
from ptuning.prompt.predict import classes_of
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.serve.engine.beginnings import PassRow
from ptuning.serve.engine.filling import ClosedRow
from ptuning.serve.engine.job import Outcome, PromptRow, Token, Usage
from ptuning.serve.engine.passes import Passes

Given = TypeVar("Given")
Found = TypeVar("Found")


def classify(passes: Passes, rows: Sequence[tuple[PromptRow, ClosedRow]]) -> list[Outcome]:
    """Answer rows with the likeliest of their labels or choices, rows of all prompts in the same passes."""
    answers = []
    for start, end in _few(rows):
        part = rows[start:end]
        logits, cached = passes.logits([row for _, filled in part for row in filled.rows])
        ranked = classes_of([filled.item for _, filled in part], [filled.names for _, filled in part], logits)
        left = iter(cached)
        for (row, filled), found in zip(part, ranked, strict=True):
            how, usage = row.how, Usage(filled.tokens, 0, sum(itertools.islice(left, len(filled.rows))))
            prediction = Prediction.of_classes(checked(found), top_k=how.top_k, min_probability=how.min_probability)
            answers.append(Outcome(prediction, usage))
    return answers


def _few(rows: Sequence[tuple[PromptRow, ClosedRow]]) -> Iterator[tuple[int, int]]:
    """Cut rows into parts whose scored positions, with their logits over the vocabulary, fit into a pass."""
    start = positions = 0
    for at, (_, filled) in enumerate(rows):
        own = sum(len(row.example.logit_positions) for row in filled.rows)
        if at > start and positions + own > MAX_BATCH_POSITIONS:
            yield start, at
            start, positions = at, 0
        positions += own
    if rows:
        yield start, len(rows)


def checked(found: Sequence[Candidate]) -> Sequence[Candidate]:
    """Return candidates, all of which must have a number as their probability."""
    if any(math.isnan(one.log_prob) for one in found):
        raise BackboneError("the model gave no numbers (NaN) for this row; load it in another number format (--dtype)")
    return found


def echo(passes: Passes, row: PassRow, *, alternatives: int) -> Outcome:
    """Score each token of a text by those in front of it; one with nothing in front has no log-probability."""
    ids, tokenizer = row.example.target_ids, passes.backbone.tokenizer
    scored = ids[len(ids) - len(row.example.logit_positions) :]
    logits, (cached,) = passes.logits([row])
    log_probs = torch.log_softmax(logits, dim=-1)  # (N, V)
    own = log_probs.gather(1, torch.tensor(scored, device=log_probs.device)[:, None])[:, 0].tolist()
    best = log_probs.topk(min(alternatives, log_probs.shape[-1]), dim=-1)
    tokens = [Token(token, tokenizer.decode([token]), None) for token in ids[: len(ids) - len(scored)]]
    for token, value, places, values in zip(scored, own, best.indices.tolist(), best.values.tolist(), strict=True):
        others = tuple((tokenizer.decode([one]), other) for one, other in zip(places, values, strict=True))
        tokens.append(Token(token, tokenizer.decode([token]), value, others))
    if any(one.log_prob is not None and math.isnan(one.log_prob) for one in tokens):
        raise BackboneError("the model gave no numbers (NaN) for this row; load it in another number format (--dtype)")
    return Outcome(usage=Usage(len(row.example.token_ids), 0, cached), tokens=tuple(tokens))


def each_alone(work: Callable[[Sequence[Given]], Sequence[Found]], rows: Sequence[Given]) -> list[Found | Exception]:
    """Return what ``work`` makes of rows together; if that fails, of each alone, so that a failed row fails alone."""
    try:
        return list(work(rows))
    except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to a row
        if len(rows) == 1:
            return [error]
    return [found for row in rows for found in each_alone(work, [row])]
