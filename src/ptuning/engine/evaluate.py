"""Scoring items with one prompt: mean loss, and a hit or a miss for each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import batches
from ptuning.engine.learned import Learned
from ptuning.engine.objective import Item, class_scores, hits, inputs_of, loss, score_choices
from ptuning.engine.passes import prefix_tokens, target_logits
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.progress import OnProgress, Progress


@dataclass(frozen=True)
class Evaluation:
    """The mean loss per target token (or per record with classes), and 1.0 or 0.0 per record for a hit or a miss.
    With classes also the most likely class of each record, and the natural log-probabilities of its classes.
    ``known``: which records can be a hit at all (:attr:`~ptuning.engine.objective.Item.distinguishable`).
    ``count``: number of tokens (or records) of which the loss is the mean.
    """

    loss: float
    hits: tuple[float, ...]
    guesses: tuple[int, ...] = ()
    log_probs: tuple[tuple[float, ...], ...] = ()
    known: tuple[bool, ...] = ()
    count: float = 0.0

    @property
    def score(self) -> float:
        """Share of hits, in [0, 1]."""
        return sum(self.hits) / len(self.hits)


@torch.no_grad()
def evaluate(
    backbone: Backbone,
    items: Sequence[Item],
    learned: Learned,
    *,
    cache: PrefixCache | None = None,
    report: OnProgress | None = None,
    note: str = "",
) -> Evaluation:
    """Score items with one prompt, in batches of similar length; ``report`` is called with ``note`` after each.
    Targets that the tokenizer does not know are misses, and not part of the loss.
    """
    loss_sum, count = 0.0, 0.0
    known = [bool(item.distinguishable) for item in items]
    found = {index: 0.0 for index, item in enumerate(items) if not (item.answers or known[index])}
    asked = [index for index in range(len(items)) if index not in found]
    guesses: dict[int, int] = {}
    log_probs: dict[int, tuple[float, ...]] = {}
    prefix = prefix_tokens(backbone, inputs_of(items))
    for places in batches([items[index].inputs for index in asked], prefix=prefix):
        chosen = [asked[place] for place in places]
        group = [items[index] for index in chosen]
        scored = score_choices(group, target_logits(backbone, inputs_of(group), learned, cache=cache))
        batch_sum, batch_count = loss(group, scored)
        loss_sum, count = loss_sum + float(batch_sum), count + batch_count
        found |= dict(zip(chosen, hits(group, scored), strict=True))
        if group[0].answers:
            of_classes = torch.log_softmax(class_scores(group, scored), dim=-1)  # (I, K)
            guesses |= dict(zip(chosen, of_classes.argmax(dim=-1).tolist(), strict=True))
            log_probs |= dict(zip(chosen, map(tuple, of_classes.tolist()), strict=True))
        if report is not None:
            report(Progress("dev", len(found), len(items), note))
    return Evaluation(
        loss_sum / count if count else math.nan,
        tuple(found[index] for index in range(len(items))),
        tuple(guesses[at] for at in sorted(guesses)),
        tuple(log_probs[at] for at in sorted(log_probs)),
        tuple(known),
        count,
    )


def evaluate_parts(
    backbone: Backbone,
    parts: Iterable[Sequence[Item]],
    learned: Learned,
    *,
    total: int,
    report: OnProgress | None = None,
    note: str = "",
) -> Evaluation:
    """Score items as :func:`evaluate` does, part by part as they come, so that only a part is in memory at a time."""
    found: list[Evaluation] = []
    done = 0

    def tell(progress: Progress) -> None:
        if report is not None:
            report(replace(progress, done=done + progress.done, total=total))

    for items in parts:
        found.append(evaluate(backbone, items, learned, report=tell, note=note))
        done += len(items)
    count = sum(one.count for one in found)
    return Evaluation(
        sum(one.loss * one.count for one in found if one.count) / count if count else math.nan,
        tuple(hit for one in found for hit in one.hits),
        tuple(guess for one in found for guess in one.guesses),
        tuple(values for one in found for values in one.log_probs),
        tuple(known for one in found for known in one.known),
        count,
    )
