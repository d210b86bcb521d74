"""Log-probabilities of candidates (answers to choose from), of which many share a row behind a record's context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine import batch as bounds
from ptuning.engine.batch import Batch, Side, batches, collate
from ptuning.engine.forward import forward_after_context, forward_batch, target_logits
from ptuning.engine.memory import in_parts
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.template.encode import Example
from ptuning.template.segments import Ids
from ptuning.template.shared_prefix import shared_length


@dataclass(frozen=True)
class CandidatePlace:
    """How a row scores one candidate: its ``place`` among all, its ids, and which of the row's logits score each."""

    place: int
    logits: Ids
    ids: Ids


@dataclass(frozen=True)
class CandidateRow:
    """A row that scores ``candidates`` of one record. The last tokens of a tree of candidates come behind ``parents``,
    the column that each continues; without any, a row is plain text.
    """

    example: Example
    candidates: tuple[CandidatePlace, ...]
    parents: Ids = ()


def candidate_log_probs(
    backbone: Backbone, examples: Sequence[Sequence[Example]], learned: PromptBatch, *, pad_side: Side
) -> list[list[float]]:
    """Return the total log-probability of each candidate's ``target_ids``, for N records with C candidates each.

    ``examples`` are the filled templates. A backbone that :attr:`~ptuning.backbone.backbone.Backbone.branches` reads
    the context of a record once for all of its candidates, and what several of these begin with once as well.
    """
    found = [[0.0] * len(own) for own in examples]
    lay = tree_rows if backbone.branches else plain_rows
    rows = [(owner, row) for owner, own in enumerate(examples) for row in lay(own)]
    for chosen, logits in _passes(backbone, rows, learned, pad_side=pad_side):
        group = [rows[index] for index in chosen]
        values = iter(_totals([row for _, row in group], logits))
        for owner, row in group:
            for one in row.candidates:
                found[owner][one.place] = next(values)
    return found


def plain_rows(examples: Sequence[Example]) -> list[CandidateRow]:
    """Return a row for each different input: texts that differ in their last token only share one, as do, for a model
    that fills masks, texts of one length.
    """
    rows: dict[tuple[Ids, Ids], list[int]] = {}
    for place, example in enumerate(examples):
        rows.setdefault((example.token_ids, example.logit_positions), []).append(place)
    return [
        CandidateRow(
            examples[places[0]],
            tuple(
                CandidatePlace(place, tuple(range(len(examples[place].target_ids))), examples[place].target_ids)
                for place in places
            ),
        )
        for places in rows.values()
    ]


def tree_rows(examples: Sequence[Example]) -> list[CandidateRow]:
    """Return rows of one record's context, each followed by the tree of as many candidates as a pass can hold."""
    some = examples[0]
    context = min(_common(examples), 1 + min(example.logit_positions[0] for example in examples))
    order = sorted(range(len(examples)), key=lambda place: examples[place].token_ids[context:])
    rows: list[CandidateRow] = []
    tree = _Tree(some, context)
    for place in order:
        if tree.candidates and tree.is_full(examples[place]):
            rows.append(tree.row())
            tree = _Tree(some, context)
        tree.add(place, examples[place])
    return [*rows, tree.row()]


class _Tree:
    """A row in the making: a context, and the tokens of candidates behind it, those that they share once."""

    def __init__(self, example: Example, context: int) -> None:
        self.example, self.context = example, context
        self.tokens = list(example.token_ids[:context])
        self.parents: list[int] = []
        self.nodes: dict[tuple[int, int], int] = {}  # (parent's column, token) -> column
        self.asked: dict[int, int] = {}  # column -> index of its logits
        self.candidates: list[CandidatePlace] = []

    def is_full(self, example: Example) -> bool:
        """Whether a further candidate may be too much for a pass."""
        tokens = len(self.tokens) + len(example.token_ids) - self.context
        positions = len(self.asked) + len(example.logit_positions)
        return tokens > bounds.MAX_BATCH_TOKENS or positions > bounds.MAX_BATCH_POSITIONS

    def add(self, place: int, example: Example) -> None:
        columns = [self.context - 1]  # of the tokens from the context's last one on
        for token in example.token_ids[self.context :]:
            step = columns[-1], token
            if step not in self.nodes:
                self.nodes[step] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(columns[-1])
            columns.append(self.nodes[step])
        logits = []
        for position in example.logit_positions:
            column = position if position < self.context else columns[position - self.context + 1]
            logits.append(self.asked.setdefault(column, len(self.asked)))
        self.candidates.append(CandidatePlace(place, tuple(logits), example.target_ids))

    def row(self) -> CandidateRow:
        asked = tuple(self.asked)
        example = replace(
            self.example, token_ids=tuple(self.tokens), logit_positions=asked, target_ids=(), own_tokens=0
        )
        return CandidateRow(example, tuple(self.candidates), tuple(self.parents))


def tree_batch(rows: Sequence[CandidateRow], learned: PromptBatch) -> Batch:
    """Pad rows on the right to a batch in which a token reads what leads to it: the mask is (B, 1, T, T) bool."""
    batch = collate([row.example for row in rows], learned)
    width = batch.token_ids.shape[1]
    mask = np.zeros((len(rows), width, width), dtype=np.bool_)
    mask[:] = np.eye(width, dtype=np.bool_)  # so that pads read something
    positions = batch.positions.numpy().copy()
    for row, reads, at in zip(rows, mask, positions, strict=True):
        context = len(row.example.token_ids) - len(row.parents)
        reads[:context, :context] = np.tri(context, dtype=np.bool_)
        for column, parent in enumerate(row.parents, start=context):
            reads[column] |= reads[parent]
            at[column] = at[parent] + 1
    return replace(batch, mask=torch.from_numpy(mask[:, None]), positions=torch.from_numpy(positions))


def _passes(
    backbone: Backbone, rows: Sequence[tuple[int, CandidateRow]], learned: PromptBatch, *, pad_side: Side
) -> Iterator[tuple[list[int], Tensor]]:
    """Run rows, each with the index of its record, and yield those of a pass with their logits, (N, V).
    Of a record that fills several passes, the context runs once.
    """
    per_record: dict[int, list[int]] = {}
    for index, (owner, _) in enumerate(rows):
        per_record.setdefault(owner, []).append(index)
    alone = [own for own in per_record.values() if len(own) > 1 and rows[own[0]][1].parents]
    for own in alone:
        trees = [tree_batch([rows[index][1]], learned.take([rows[index][0]])) for index in own]
        for index, logits in zip(
            own, forward_after_context(backbone, trees, learned.take([rows[own[0]][0]])), strict=True
        ):
            yield [index], logits
    apart = {index for own in alone for index in own}
    rest = [index for index in range(len(rows)) if index not in apart]
    for part in batches([[rows[index][1].example] for index in rest]):
        chosen = [rest[at] for at in part]
        group, brought = [rows[index][1] for index in chosen], learned.take([rows[index][0] for index in chosen])
        yield chosen, _logits(backbone, group, brought, pad_side=pad_side)


def _logits(backbone: Backbone, rows: Sequence[CandidateRow], learned: PromptBatch, *, pad_side: Side) -> Tensor:
    examples = [row.example for row in rows]
    if not any(row.parents for row in rows):
        return target_logits(backbone, examples, learned, pad_side=pad_side)

    def run(part: Sequence[int]) -> Tensor:
        brought = learned.take(part)
        return forward_batch(backbone, tree_batch([rows[at] for at in part], brought), brought).logits

    return torch.cat(in_parts(run, [len(example.token_ids) for example in examples], backbone=backbone))


def _totals(rows: Sequence[CandidateRow], logits: Tensor) -> list[float]:
    """Return the log-probability of each candidate of rows, from the (N, V) float32 logits of these rows."""
    at: list[int] = []
    ids: list[int] = []
    owner: list[int] = []
    start = number = 0
    for row in rows:
        for one in row.candidates:
            at += [start + index for index in one.logits]
            ids += one.ids
            owner += [number] * len(one.ids)
            number += 1
        start += len(row.example.logit_positions)
    places, tokens, owners = (torch.tensor(values, device=logits.device) for values in (at, ids, owner))
    log_probs = logits[places, tokens] - torch.logsumexp(logits, dim=-1)[places]  # (M,)
    totals: list[float] = log_probs.new_zeros(number).index_add(0, owners, log_probs).tolist()
    return totals


def _common(examples: Sequence[Example]) -> int:
    """Return the number of leading tokens that rows share: those of the first and the last one in order."""
    return shared_length(min(one.token_ids for one in examples), max(one.token_ids for one in examples))
