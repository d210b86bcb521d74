"""Log-probabilities of candidates (answers to choose from) of which many share a row after a record's context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine import batch as bounds
from ptuning.engine.batch import Batch, batches, collate
from ptuning.engine.forward import forward_after_context, forward_batch
from ptuning.engine.memory import in_parts
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.template.encode import Example
from ptuning.template.segments import Ids
from ptuning.template.shared_prefix import shared_length


@dataclass(frozen=True)
class TreeRow:
    """A row with a tree of candidates of one record: the last tokens come after ``parents``, the column that each
    continues. ``candidates`` has for each of its candidates the index among all, and the row's logits and the ids that
    score it.
    """

    example: Example
    candidates: tuple[tuple[int, Ids, Ids], ...]
    parents: Ids


def tree_log_probs(
    backbone: Backbone, examples: Sequence[Sequence[Example]], learned: PromptBatch
) -> list[list[float]]:
    """Return the total log-probability of each candidate's ``target_ids``, for N records with C candidates each, for a
    backbone that :attr:`~ptuning.backbone.backbone.Backbone.branches`: the context of a record is computed once for all
    of its candidates, and so is a prefix of several of these.

    ``examples`` are the filled templates of each record, ``learned`` the parameters for N rows.
    """
    totals = [[0.0] * len(own) for own in examples]
    rows = [(owner, row) for owner, own in enumerate(examples) for row in tree_rows(own)]
    for chosen, logits in _passes(backbone, rows, learned):
        group = [rows[index] for index in chosen]
        values = iter(_totals([row for _, row in group], logits))
        for owner, row in group:
            for place, _, _ in row.candidates:
                totals[owner][place] = next(values)
    return totals


def tree_rows(examples: Sequence[Example]) -> list[TreeRow]:
    """Return rows of one record's context, each followed by the tree of as many candidates as a pass can hold."""
    ids = [example.token_ids for example in examples]
    context = min(shared_length(min(ids), max(ids)), 1 + min(example.logit_positions[0] for example in examples))
    order = sorted(range(len(examples)), key=lambda place: ids[place][context:])
    trees = [_Tree(examples[0], context)]
    for place in order:
        if trees[-1].candidates and trees[-1].is_full(examples[place]):
            trees.append(_Tree(examples[0], context))
        trees[-1].add(place, examples[place])
    return [tree.row() for tree in trees]


class _Tree:
    """A row in the making: a context, and the tokens of candidates after it, those that they share once."""

    def __init__(self, example: Example, context: int) -> None:
        self.example, self.context = example, context
        self.tokens = list(example.token_ids[:context])
        self.parents: list[int] = []
        self.nodes: dict[tuple[int, int], int] = {}  # (parent's column, token) -> column
        self.scored: dict[int, int] = {}  # column -> index of its logits
        self.candidates: list[tuple[int, Ids, Ids]] = []

    def is_full(self, example: Example) -> bool:
        """Whether a further candidate may be too much for a pass."""
        tokens = len(self.tokens) + len(example.token_ids) - self.context
        positions = len(self.scored) + len(example.logit_positions)
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
            logits.append(self.scored.setdefault(column, len(self.scored)))
        self.candidates.append((place, tuple(logits), example.target_ids))

    def row(self) -> TreeRow:
        scored = tuple(self.scored)
        example = replace(
            self.example, token_ids=tuple(self.tokens), logit_positions=scored, target_ids=(), own_tokens=0
        )
        return TreeRow(example, tuple(self.candidates), tuple(self.parents))


def tree_batch(rows: Sequence[TreeRow], learned: PromptBatch) -> Batch:
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
    backbone: Backbone, rows: Sequence[tuple[int, TreeRow]], learned: PromptBatch
) -> Iterator[tuple[list[int], Tensor]]:
    """Run rows, each with the index of its record, and yield those of a pass with their logits, (N, V). The context of
    a record that fills several passes runs once.
    """
    per_record: dict[int, list[int]] = {}
    for index, (owner, _) in enumerate(rows):
        per_record.setdefault(owner, []).append(index)
    together: list[int] = []
    for owner, own in per_record.items():
        if len(own) == 1:
            together += own
            continue
        brought = learned.take([owner])
        trees = [tree_batch([rows[index][1]], brought) for index in own]
        for index, logits in zip(own, forward_after_context(backbone, trees, brought), strict=True):
            yield [index], logits

    for part in batches([[rows[index][1].example] for index in together]):
        chosen = [together[at] for at in part]

        def run(places: Sequence[int], chosen: Sequence[int] = chosen) -> Tensor:
            group = [rows[chosen[place]] for place in places]
            brought = learned.take([owner for owner, _ in group])
            return forward_batch(backbone, tree_batch([row for _, row in group], brought), brought).logits

        lengths = [len(rows[index][1].example.token_ids) for index in chosen]
        yield chosen, torch.cat(in_parts(run, lengths, backbone=backbone))


def _totals(rows: Sequence[TreeRow], logits: Tensor) -> list[float]:
    """Return the log-probability of each candidate of rows, from the (N, V) float32 logits of these rows."""
    at: list[int] = []
    ids: list[int] = []
    owner: list[int] = []
    start = number = 0
    for row in rows:
        for _, scored, own in row.candidates:
            at += [start + index for index in scored]
            ids += own
            owner += [number] * len(own)
            number += 1
        start += len(row.example.logit_positions)
    places, tokens, owners = (torch.tensor(values, device=logits.device) for values in (at, ids, owner))
    log_probs = logits[places, tokens] - torch.logsumexp(logits, dim=-1)[places]  # (M,)
    totals: list[float] = log_probs.new_zeros(number).index_add(0, owners, log_probs).tolist()
    return totals
