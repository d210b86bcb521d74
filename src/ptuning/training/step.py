"""An optimizer step of one prompt, or of many at once: the rows of all run in one pass. Knows no data, no epochs and no
files.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.checkpointing import recomputing
from ptuning.config import TrainConfig
from ptuning.engine.batch import collate, shared_tokens
from ptuning.engine.objective import Item, loss, score_choices
from ptuning.engine.passes import runs_prefix_once, target_logits
from ptuning.engine.prefix_cache import ConstantParts, constant_ids
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
    constants: ConstantParts
    skips_constants: bool
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
        return [example for item in self.items for example in item.inputs]

    @property
    def width(self) -> int:
        """Tokens of the longest row, as far as it is run."""
        kept = self.trainer.skips_constants
        return max(len(row.token_ids) - (len(constant_ids(row)) if kept else 0) for row in self.examples)

    @property
    def runs_prefix_once(self) -> bool:
        """Whether what its rows begin with is run in one row, which rows of another prompt do not begin with."""
        rows = self.examples
        if self.trainer.skips_constants:
            return False
        return runs_prefix_once(self.trainer.backbone, rows=len(rows), shared=shared_tokens(rows))


def take_step(groups: Sequence[tuple[T, Sequence[Item]]]) -> dict[T, TrainingError]:
    """Take one optimizer step of every trainer, each with its own records.

    The loss of each is the sum over all of its tokens divided once by their number, however its records are cut into
    passes, spread over processes, or put together with those of others. Prompts that are trained together have one
    frozen backbone, and one :class:`~ptuning.engine.prefix_cache.ConstantParts`.

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
            waiting[chunk.trainer.skips_constants].append(chunk)
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
    examples = [example for part in rows for example in part]
    counts = [chunk.trainer.bound.slots for chunk in chunks]
    starts = [0, *accumulate(counts)]
    slots = [count for count, part in zip(counts, rows, strict=True) for _ in part]
    offsets = [start for start, part in zip(starts, rows, strict=False) for _ in part] if len(chunks) > 1 else None
    with torch.random.fork_rng(devices=[backbone.device] if backbone.device.type == "cuda" else []):
        tables = []
        for chunk in chunks:
            torch.manual_seed(chunk.trainer.dropout_seed(chunk.at))
            tables.append(chunk.trainer.encoder())
        vectors = torch.cat(tables) if len(tables) > 1 else tables[0]  # (P, E)
        saves = any(chunk.trainer.config.checkpointing for chunk in chunks)
        with recomputing(backbone.model, name=backbone.name) if saves else contextlib.nullcontext():
            if first.skips_constants:
                logits = first.constants.logits(examples, vectors, slots=slots, offsets=offsets)
            else:
                logits = target_logits(backbone, collate(examples, slots=slots, offsets=offsets), vectors)
    sizes = [sum(len(example.logit_positions) for example in part) for part in rows]
    losses = []
    for chunk, own in zip(chunks, logits.split(sizes), strict=True):
        value, _ = loss(chunk.items, score_choices(chunk.items, own))
        chunk.trainer.note_loss(value.detach())
        losses.append(value / chunk.total)
    torch.stack(losses).sum().backward()
