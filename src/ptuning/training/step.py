"""An optimizer step of one prompt, or of many at once: the rows of all run in one pass. Knows no data, no epochs and no
files.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.checkpointing import recomputing
from ptuning.config import TrainConfig
from ptuning.engine.batch import collate, shared_tokens
from ptuning.engine.learned import Learned
from ptuning.engine.objective import Item, inputs_of, loss, score_choices
from ptuning.engine.passes import run_embeddings, runs_prefix_once, target_logits
from ptuning.engine.prefix_cache import PrefixCache, cacheable_ids
from ptuning.errors import TrainingError
from ptuning.template.fill import BoundTemplate, Example
from ptuning.training.checkpoint import RunState
from ptuning.training.encoder import PromptEncoder

T = TypeVar("T", bound="InTraining")

# Tokens of one pass with gradients over the rows of several prompts. More brings nothing on a processor and costs
# memory; a GPU is not full with them. Source: docs/decisions.md, decision 28.
JOINT_TOKENS = {"cpu": 1024}
JOINT_TOKENS_ELSEWHERE = 16_384
# Rows of different prompts run together if that takes at most so many times the tokens, pads included, that each
# prompt's rows take alone.
JOINT_PADDING = 1.25


class InTraining(Protocol):
    """A prompt in training, as far as its optimizer steps go (:class:`~ptuning.training.trainer.Trainer`)."""

    backbone: Backbone
    bound: BoundTemplate
    config: TrainConfig
    encoder: PromptEncoder
    prefix_cache: PrefixCache
    uses_prefix_cache: bool
    state: RunState

    def begin_step(self, group: Sequence[Item]) -> list[Chunk]:
        """Return the passes of the next step."""
        ...

    def dropout_seed(self, at: int) -> int:
        """Return the seed of what is drawn in a pass of the coming step."""
        ...

    def note_loss(self, value: Tensor) -> None:
        """Take down the summed loss of a pass."""
        ...

    def end_step(self, group: Sequence[Item], *, seconds: float) -> None:
        """Move the weights by the gradients that are there, and count the step."""
        ...


@dataclass(frozen=True)
class Chunk:
    """What one prompt has run in one pass.

    Args:
        trainer: Whose rows they are.
        items: The records.
        at: Index of the first one among those of the step, which seeds the pass's dropout.
        total: What the losses of all passes of the step are divided by.
    """

    trainer: InTraining
    items: Sequence[Item]
    at: int
    total: float

    @property
    def examples(self) -> list[Example]:
        """The rows."""
        return inputs_of(self.items)

    @property
    def width(self) -> int:
        """Tokens of the longest row, as far as it is run."""
        cached = self.trainer.uses_prefix_cache
        return max(len(row.token_ids) - (len(cacheable_ids(row)) if cached else 0) for row in self.examples)

    @property
    def runs_prefix_once(self) -> bool:
        """Whether what its rows begin with is run in one row, which rows of another prompt do not begin with."""
        rows = self.examples
        if self.trainer.uses_prefix_cache:
            return False
        return runs_prefix_once(self.trainer.backbone, rows=len(rows), shared=shared_tokens(rows))


def take_step(groups: Sequence[tuple[T, Sequence[Item]]]) -> dict[T, TrainingError]:
    """Take one optimizer step of every trainer, each with its own records.

    The loss of each is the sum over all of its tokens divided once by their number, however its records are cut into
    passes, spread over processes, or put together with those of others. Prompts that are trained together have one
    frozen backbone, and one :class:`~ptuning.engine.prefix_cache.PrefixCache`.

    Returns:
        InTrainings whose loss is no number any more, each with what is to be said of it.
    """
    began = time.monotonic()
    chunks = [chunk for trainer, group in groups for chunk in trainer.begin_step(group)]
    run_passes(chunks)
    tokens = {trainer: sum(item.tokens for item in group) for trainer, group in groups}
    for trainer in tokens:
        trainer.state.train_tokens += sum(
            len(row.token_ids) for chunk in chunks if chunk.trainer is trainer for row in chunk.examples
        )
    failed: dict[T, TrainingError] = {}
    everything = sum(tokens.values())
    for trainer, group in groups:
        seconds = (time.monotonic() - began) * tokens[trainer] / everything
        try:
            trainer.end_step(group, seconds=seconds)
        except TrainingError as error:
            failed[trainer] = error
    return failed


def run_passes(chunks: Sequence[Chunk]) -> None:
    """Run chunks, forward and backward, those together that may be: the gradients of a step."""
    for together in joined(chunks):
        _run(together)


def joined(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Yield the chunks that run together: those of a prompt one after another, those of several prompts in one pass, as
    long as little is padded, and nothing is lost that one prompt's rows have in common.
    """
    if len({id(chunk.trainer) for chunk in chunks}) == 1:
        yield from ([chunk] for chunk in chunks)
        return
    waiting: dict[bool, list[Chunk]] = {True: [], False: []}
    for chunk in chunks:
        if chunk.runs_prefix_once:
            yield [chunk]
        else:
            waiting[chunk.trainer.uses_prefix_cache].append(chunk)
    for found in waiting.values():
        yield from _bounded(sorted(found, key=lambda chunk: chunk.width))


def _bounded(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Yield runs of chunks, shortest rows first, within the bounds of one pass."""
    together: list[Chunk] = []
    rows = alone = 0
    for chunk in chunks:
        own, width = len(chunk.examples), chunk.width
        limit = JOINT_TOKENS.get(chunk.trainer.backbone.device.type, JOINT_TOKENS_ELSEWHERE)
        padded = (rows + own) * width
        if together and (padded > limit or padded > JOINT_PADDING * (alone + own * width)):
            yield together
            together, rows, alone = [], 0, 0
        together.append(chunk)
        rows, alone = rows + own, alone + own * width
    if together:
        yield together


def _run(chunks: Sequence[Chunk]) -> None:
    """Run chunks in one pass, forward and backward."""
    first = chunks[0].trainer
    backbone, rows = first.backbone, [chunk.examples for chunk in chunks]
    with torch.random.fork_rng(devices=[backbone.device] if backbone.device.type == "cuda" else []):
        prompts = []
        for chunk in chunks:
            torch.manual_seed(chunk.trainer.dropout_seed(chunk.at))
            prompts.append(Learned(chunk.trainer.encoder()))
        learned = Learned.join(prompts, rows=[number for number, part in enumerate(rows) for _ in part])
        saves = any(chunk.trainer.config.checkpointing for chunk in chunks)
        with recomputing(backbone.model, name=backbone.name) if saves else contextlib.nullcontext():
            cache = first.prefix_cache if first.uses_prefix_cache else None
            logits = target_logits(backbone, [row for part in rows for row in part], learned, cache=cache)
    sizes = [sum(len(example.logit_positions) for example in part) for part in rows]
    losses = []
    for chunk, own in zip(chunks, logits.split(sizes), strict=True):
        value, _ = loss(chunk.items, score_choices(chunk.items, own))
        chunk.trainer.note_loss(value.detach())
        losses.append(value / chunk.total)
    torch.stack(losses).sum().backward()


def measure_ceiling(
    backbone: Backbone, items: Sequence[Item], *, batch_size: int, slots: int, seconds: float = 10.0
) -> float:
    """Return the tokens per second of a bare forward and backward pass of the backbone over training batches.

    The embeddings are the leaves: no encoder, no slots written in, no optimizer. Logits are computed where training
    computes them, and a shared prefix runs once, so the ceiling is not lowered by work that training skips. Rows run
    whole, so training from the first slot onwards may be faster than this.
    """
    learned = Learned(torch.zeros(slots, backbone.width))  # says where slots are; its values are not used
    tokens, spent, began = 0, 0.0, time.monotonic()
    for number, at in enumerate((0, *range(0, len(items), batch_size))):
        batch = collate(inputs_of(items[at : at + batch_size]), learned).to(backbone.device)
        embeddings = backbone.embed(batch.token_ids).detach().requires_grad_(True)  # (B, T, E)
        start = time.monotonic()
        logits, _ = run_embeddings(backbone, embeddings, batch)
        torch.logsumexp(logits, dim=-1).sum().backward()
        if backbone.device.type == "cuda":
            torch.cuda.synchronize(backbone.device)
        if number:  # the first time, the first batch warms the machine up
            tokens, spent = tokens + batch.tokens, spent + time.monotonic() - start
        if number and time.monotonic() - began > seconds:
            break
    return tokens / spent
