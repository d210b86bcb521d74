"""Losses as (sum, count), and scores of targets, candidates and label words. Knows no training loop and no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ptuning.fill import BoundTemplate, Example, Ids
from ptuning.labels import LabelWords
from ptuning.labels import Normalise as Normalise
from ptuning.records import Records

# What a stop token counts in the loss beside a token of the target: it is learned easily, and with full weight it takes
# half of the loss from one-token targets and costs hits (docs/architecture.md, decision 13).
STOP_WEIGHT = 0.2


@dataclass(frozen=True)
class Choice:
    """A text to score: the ids it adds to one input. ``own_tokens`` of them are its own, the rest teaches to stop."""

    input: int
    target_ids: Ids
    own_tokens: int


@dataclass(frozen=True)
class Item:
    """One record ready to be scored.

    Args:
        inputs: The different rows the model has to read for it.
        choices: The texts scored from them: the target alone, or every candidate or label word.
        classes: Class of each choice, for label words.
        gold: Index of the right class or candidate; None if the only choice is the target.
    """

    inputs: tuple[Example, ...]
    choices: tuple[Choice, ...]
    classes: Ids = ()
    gold: int | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens the model reads for it."""
        return sum(len(example.token_ids) for example in self.inputs)


def share_inputs(examples: Sequence[Example]) -> tuple[tuple[Example, ...], tuple[Choice, ...]]:
    """Turn examples of one record into the different inputs behind them and a choice for each.

    Candidates that differ in their last token only (for a masked model: that have the same length) are scored from
    one input, so single-token candidates cost one forward pass together.
    """
    inputs: dict[tuple[Ids, Ids, Ids], int] = {}
    kept: list[Example] = []
    choices = []
    for example in examples:
        key = (example.token_ids, example.slot_positions, example.logit_positions)
        if key not in inputs:
            inputs[key] = len(kept)
            kept.append(example)
        choices.append(Choice(inputs[key], example.target_ids, example.own_tokens))
    return tuple(kept), tuple(choices)


def target_items(bound: BoundTemplate, records: Records, *, with_stop: bool) -> list[Item]:
    """Return one item per record, its own target the only choice."""
    examples = bound.examples(records, with_stop=with_stop, source=f"{records.name}, record")
    return [Item((example,), (Choice(0, example.target_ids, example.own_tokens),)) for example in examples]


def label_items(bound: BoundTemplate, records: Records, labels: LabelWords) -> list[Item]:
    """Return one item per record, with every label word a choice.

    Raises:
        RecordError: If a record's target is none of the labels.
    """
    flat = labels.flat
    repeated = [record for record in records for _ in flat]
    examples = bound.examples(repeated, targets=[word for _, word in flat] * len(records), source=records.name)
    items = []
    for number, record in enumerate(records):
        inputs, choices = share_inputs(examples[number * len(flat) : (number + 1) * len(flat)])
        gold = labels.label_of(record, where=f"{records.name}, record {number + 1}")
        items.append(Item(inputs, choices, tuple(label for label, _ in flat), gold))
    return items


def candidate_item(examples: Sequence[Example]) -> Item:
    """Return the item that scores each example's target as a candidate."""
    inputs, choices = share_inputs(examples)
    return Item(inputs, choices)


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of the choices of several items, C choices and M scored tokens in all.

    Args:
        log_probs: (C,) float32, differentiable; total log-probability of each choice's own tokens.
        all_log_probs: (C,) float32; the same with the stop token where one is scored.
        correct: (C,) bool; whether every own token is the likeliest one given those before it (exact match).
        lengths: (C,) float32; number of own tokens.
        token_count: Number of scored tokens, stop tokens counted by :data:`STOP_WEIGHT`.
        per_item: Number of choices of each item.
    """

    log_probs: Tensor
    all_log_probs: Tensor
    correct: Tensor
    lengths: Tensor
    token_count: float
    per_item: tuple[int, ...]


def score_choices(items: Sequence[Item], logits: Tensor) -> Scored:
    """Score the choices of items from the logits of their inputs.

    Args:
        items: Items whose inputs, one after the other, were the rows of a batch.
        logits: (N, V) float32; the scored positions of those rows, row by row.

    Returns:
        The choices' log-probabilities, item by item.
    """
    rows: list[int] = []
    ids: list[int] = []
    choice_of: list[int] = []
    own: list[bool] = []
    start = number = 0
    for item in items:
        starts = []
        for example in item.inputs:
            starts.append(start)
            start += len(example.logit_positions)
        for choice in item.choices:
            count = len(choice.target_ids)
            rows += range(starts[choice.input], starts[choice.input] + count)
            ids += choice.target_ids
            choice_of += [number] * count
            own += [index < choice.own_tokens for index in range(count)]
            number += 1
    device = logits.device
    at, token, owner = (torch.tensor(values, dtype=torch.int64, device=device) for values in (rows, ids, choice_of))
    is_own = torch.tensor(own, dtype=torch.bool, device=device)  # (M,)
    token_log_probs = logits[at, token] - torch.logsumexp(logits, dim=-1)[at]  # (M,)
    missed = (logits.argmax(dim=-1)[at] != token) & is_own  # (M,)
    zeros = torch.zeros(number, dtype=torch.float32, device=device)
    return Scored(
        log_probs=zeros.index_add(0, owner, token_log_probs * is_own),
        all_log_probs=zeros.index_add(0, owner, token_log_probs),
        correct=zeros.index_add(0, owner, missed.float()) == 0,
        lengths=zeros.index_add(0, owner, is_own.float()),
        token_count=sum(own) + STOP_WEIGHT * (len(own) - sum(own)),
        per_item=tuple(len(item.choices) for item in items),
    )


def class_scores(items: Sequence[Item], scored: Scored, *, normalise: Normalise = "sum") -> Tensor:
    """Return one score per item and class: the log of the mean probability of the class's words.

    Args:
        items: I items with the same K classes and C words each.
        scored: Their words' log-probabilities.
        normalise: ``sum`` takes a word's total log-probability, ``mean`` the mean over its tokens.

    Returns:
        (I, K) unnormalised log-probabilities.
    """
    scores = scored.log_probs / scored.lengths if normalise == "mean" else scored.log_probs
    scores = scores.view(len(items), 1, -1)  # (I, 1, C)
    classes = torch.tensor(items[0].classes, device=scores.device)  # (C,)
    members = torch.arange(int(classes.max()) + 1, device=scores.device)[:, None] == classes  # (K, C)
    masked = scores.masked_fill(~members, -torch.inf)  # (I, K, C)
    return torch.logsumexp(masked, dim=-1) - members.sum(dim=-1).log()  # (I, K)


def gold_classes(items: Sequence[Item]) -> list[int]:
    """Return the right class of each label-word item."""
    return [item.gold for item in items if item.gold is not None]


def loss(items: Sequence[Item], scored: Scored) -> tuple[Tensor, float]:
    """Return the loss of items as (sum, count), to be divided once over everything that makes one step.

    Without label words it is the negative log-likelihood of the target's tokens, counted in tokens, with the stop
    token weighing :data:`STOP_WEIGHT`; with label words the cross-entropy over the classes, counted in items.

    Source: Liu et al. (2021), section 3.1 (the downstream loss); Schick and Schuetze (2021), equation 1, for classes.
    """
    if items[0].gold is None:
        own, everything = scored.log_probs.sum(), scored.all_log_probs.sum()
        return -own - STOP_WEIGHT * (everything - own), scored.token_count
    gold = torch.tensor(gold_classes(items), device=scored.log_probs.device)
    return functional.cross_entropy(class_scores(items, scored), gold, reduction="sum"), len(items)


def loss_count(items: Sequence[Item]) -> float:
    """Return what :func:`loss` will count for items, before they are run."""
    if items[0].gold is None:
        choices = [choice for item in items for choice in item.choices]
        stops = sum(len(choice.target_ids) - choice.own_tokens for choice in choices)
        return sum(choice.own_tokens for choice in choices) + STOP_WEIGHT * stops
    return len(items)


def hits(items: Sequence[Item], scored: Scored) -> list[float]:
    """Return 1.0 for each item answered rightly: exact match of the target's own tokens, or the right class.

    A target counts if each of its tokens is the likeliest one given the tokens before it, which is what greedy
    decoding would write; what a model would write after the target is not looked at.
    """
    if items[0].gold is None:
        return [float(value) for value in scored.correct.tolist()]
    guesses = class_scores(items, scored).argmax(dim=-1).tolist()
    return [float(guess == gold) for guess, gold in zip(guesses, gold_classes(items), strict=True)]
