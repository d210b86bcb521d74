"""Running items without learning from them: scores and speed of slot vectors as they are. Knows no optimizer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import Batch, collate
from ptuning.engine.objective import Item, class_scores, hits, loss, score_choices
from ptuning.engine.passes import batches, prefix_tokens, scored_logits
from ptuning.engine.prefix_cache import ConstantParts
from ptuning.progress import OnProgress, Progress


@dataclass(frozen=True)
class Evaluation:
    """Loss per token (or per item with classes), and one hit or miss per record, in the records' order.

    Args:
        loss: The mean loss.
        hits: 1.0 or 0.0 per record.
        guesses: The likeliest class of each record; empty where there are none to choose from.
        log_probs: And its natural log-probability among the classes.
    """

    loss: float
    hits: tuple[float, ...]
    guesses: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()

    @property
    def score(self) -> float:
        """Share of hits, in [0, 1]."""
        return sum(self.hits) / len(self.hits)


def item_batch(items: Sequence[Item], *, slots: int) -> Batch:
    """Collate the inputs of items that share one prompt of ``slots`` slots."""
    examples = [example for item in items for example in item.inputs]
    return collate(examples, slots=[slots] * len(examples))


@torch.no_grad()
def evaluate(
    backbone: Backbone,
    items: Sequence[Item],
    *,
    vectors: Tensor,
    slots: int,
    constants: ConstantParts | None = None,
    report: OnProgress | None = None,
    note: str = "",
) -> Evaluation:
    """Score items with given slot vectors, items of similar length together so that a batch needs little padding.

    Args:
        backbone: The language model.
        items: What to score.
        vectors: (P, E) float32; an empty table for a manual prompt.
        slots: Number of slots P.
        constants: What is kept of the rows, if anything is.
        report: Called after every batch.
        note: Shown with the progress.

    Returns:
        Mean loss, a hit or a miss per item, and its likeliest class with its log-probability, in order.
    """
    loss_sum, count, done = 0.0, 0.0, 0
    found: dict[int, float] = {}
    constants = constants or ConstantParts(backbone, memory_share=0)
    guesses: dict[int, int] = {}
    log_probs: dict[int, float] = {}
    prefix = prefix_tokens(backbone, [example for item in items for example in item.inputs])
    for chosen in batches([item.inputs for item in items], prefix=prefix):
        group = [items[index] for index in chosen]
        examples = [example for item in group for example in item.inputs]
        scored = score_choices(group, constants.logits(examples, vectors, slots=[slots] * len(examples)))
        batch_sum, batch_count = loss(group, scored)
        loss_sum, count, done = loss_sum + float(batch_sum), count + batch_count, done + len(chosen)
        found |= dict(zip(chosen, hits(group, scored), strict=True))
        if group[0].answers:
            likeliest = torch.log_softmax(class_scores(group, scored), dim=-1).max(dim=-1)  # (I,)
            guesses |= dict(zip(chosen, likeliest.indices.tolist(), strict=True))
            log_probs |= dict(zip(chosen, likeliest.values.tolist(), strict=True))
        if report is not None:
            report(Progress("dev", done, len(items), note))
    return Evaluation(
        loss_sum / count,
        tuple(found[index] for index in range(len(items))),
        tuple(guesses[at] for at in sorted(guesses)),
        tuple(log_probs[at] for at in sorted(log_probs)),
    )


def measure_ceiling(
    backbone: Backbone, items: Sequence[Item], *, batch_size: int, slots: int, seconds: float = 10.0
) -> float:
    """Return the tokens per second of a bare forward and backward pass of the backbone over training batches.

    The embeddings are the leaves: no encoder, no slots written in, no optimizer. Logits are computed where training
    computes them, and a shared prefix runs once, so the ceiling is not lowered by work that training skips. Rows run
    whole, so training from the first slot onwards may be faster than this.
    """
    tokens, spent, began = 0, 0.0, time.monotonic()
    for number, at in enumerate((0, *range(0, len(items), batch_size))):
        batch = item_batch(items[at : at + batch_size], slots=slots).to(backbone.device)
        embeddings = backbone.embed(batch.token_ids).detach().requires_grad_(True)  # (B, T, E)
        start = time.monotonic()
        logits = scored_logits(backbone, embeddings, batch)
        torch.logsumexp(logits, dim=-1).sum().backward()
        if backbone.device.type == "cuda":
            torch.cuda.synchronize(backbone.device)
        if number:  # the first time, the first batch warms the machine up
            tokens, spent = tokens + batch.tokens, spent + time.monotonic() - start
        if number and time.monotonic() - began > seconds:
            break
    return tokens / spent
