"""Scoring requests with one prompt: mean loss, hits and misses; and the speed of a bare forward and backward pass."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import batches, collate
from ptuning.engine.forward import forward_embeddings, shared_prefix_tokens, target_logits
from ptuning.engine.objective import ScoringRequest, class_scores, hits, inputs_of, loss, score_continuations
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.progress import OnProgress, Progress


@dataclass(frozen=True)
class Evaluation:
    """The mean loss per target token (or per record with classes), and 1.0 or 0.0 per record for a hit or a miss.
    With classes also the most likely class of each record, and the natural log-probabilities of its classes.
    ``known``: which records can be a hit at all (:attr:`~ptuning.engine.objective.ScoringRequest.distinguishable`).
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
    parts: Iterable[Sequence[ScoringRequest]],
    learned: PromptBatch,
    *,
    cache: PrefixCache | None = None,
    report: OnProgress | None = None,
    note: str = "",
    total: int = 0,
) -> Evaluation:
    """Score requests with one prompt, in batches of similar length, part by part as they come, so that only a part is
    in memory at a time. ``report`` is called with ``note`` after each batch; ``total`` is their number, by default that
    of the first part. Targets that the tokenizer does not know are misses, and not part of the loss.
    """
    loss_sum, count = 0.0, 0.0
    every_hit: list[float] = []
    every_known: list[bool] = []
    guesses: list[int] = []
    log_probs: list[tuple[float, ...]] = []
    for items in parts:
        known = [bool(item.distinguishable) for item in items]
        is_hit = {index: 0.0 for index, item in enumerate(items) if not (item.answers or known[index])}
        left = [index for index in range(len(items)) if index not in is_hit]
        classes: dict[int, tuple[float, ...]] = {}
        prefix = shared_prefix_tokens(backbone, inputs_of(items))
        for places in batches([items[index].inputs for index in left], prefix=prefix):
            chosen = [left[place] for place in places]
            group = [items[index] for index in chosen]
            scored = score_continuations(group, target_logits(backbone, inputs_of(group), learned, cache=cache))
            batch_sum, batch_count = loss(group, scored)
            loss_sum, count = loss_sum + float(batch_sum), count + batch_count
            is_hit |= dict(zip(chosen, hits(group, scored), strict=True))
            if group[0].answers:
                of_classes = torch.log_softmax(class_scores(group, scored), dim=-1)  # (I, K)
                classes |= dict(zip(chosen, map(tuple, of_classes.tolist()), strict=True))
            if report is not None:
                report(Progress("dev", len(every_hit) + len(is_hit), total or len(items), note))
        every_hit += [is_hit[index] for index in range(len(items))]
        every_known += known
        log_probs += [classes[index] for index in sorted(classes)]
        guesses += [max(range(len(row)), key=row.__getitem__) for row in log_probs[len(guesses) :]]
    mean = loss_sum / count if count else math.nan
    return Evaluation(mean, tuple(every_hit), tuple(guesses), tuple(log_probs), tuple(every_known), count)


def measure_ceiling(
    backbone: Backbone, items: Sequence[ScoringRequest], *, batch_size: int, slots: int, seconds: float = 10.0
) -> float:
    """Return the tokens per second of a bare forward and backward pass of the backbone over training batches.

    The embeddings are the leaves: no encoder, no slots, no optimizer. Logits are computed where training computes them,
    and a shared prefix runs once. Rows run whole, so training from the first slot onwards may be faster than this.
    """
    learned = PromptBatch(torch.zeros(slots, backbone.width))  # says where slots are; its values are not used
    tokens, spent, began = 0, 0.0, time.monotonic()
    for number, at in enumerate((0, *range(0, len(items), batch_size))):
        batch = collate(inputs_of(items[at : at + batch_size]), learned).to(backbone.device)
        embeddings = backbone.embed(batch.token_ids).detach().requires_grad_(True)  # (B, T, E)
        start = time.monotonic()
        logits, _ = forward_embeddings(backbone, embeddings, batch)
        torch.logsumexp(logits, dim=-1).sum().backward()
        if backbone.device.type == "cuda":
            torch.cuda.synchronize(backbone.device)
        if number:  # the first time, the first batch warms the machine up
            tokens, spent = tokens + batch.tokens, spent + time.monotonic() - start
        if number and time.monotonic() - began > seconds:
            break
    return tokens / spent
