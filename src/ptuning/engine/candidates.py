"""Log-probabilities of candidates (answers to choose from) of which many share a row after a record's context."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine import batch as bounds
from ptuning.engine.batch import Batch, batches, collate
from ptuning.engine.forward import forward_batch, keys_and_values
from ptuning.engine.memory import in_parts
from ptuning.engine.prefix_store import ModelRow, PreparedPrompt, rest_of
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

    row: ModelRow
    candidates: tuple[tuple[int, Ids, Ids], ...]
    parents: Ids


def tree_log_probs(
    backbone: Backbone, records: Sequence[tuple[Sequence[Example], PreparedPrompt]]
) -> list[list[float]]:
    """Return the total log-probability of each candidate's ``target_ids``, for N records with the filled templates of
    their candidates, for a backbone that :attr:`~ptuning.backbone.backbone.Backbone.branches`: the context of a record
    is computed once for all of its candidates, and so is a prefix of several of these.
    """
    totals = [[0.0] * len(examples) for examples, _ in records]
    together: list[tuple[int, TreeRow]] = []
    for owner, (examples, prompt) in enumerate(records):
        trees = tree_rows(examples, prompt)
        if len(trees) == 1:
            together.append((owner, trees[0]))
            continue
        # The context of a record that fills several passes runs once, without its last token, which is scored.
        shared = len(trees[0].row.example.token_ids) - len(trees[0].parents) - 1
        prefix = keys_and_values(backbone, *trees[0].row.prefix(shared)) if shared else None
        for tree in trees:
            _add(totals, [(owner, tree)], _logits(backbone, [tree], prefix, shared))
    for chosen in batches([[tree.row.example] for _, tree in together]):
        group = [together[index] for index in chosen]

        def run(places: Sequence[int], group: Sequence[tuple[int, TreeRow]] = group) -> Tensor:
            return _logits(backbone, [group[place][1] for place in places])

        lengths = [len(tree.row.example.token_ids) for _, tree in group]
        _add(totals, group, torch.cat(in_parts(run, lengths, backbone=backbone)))
    return totals


def _logits(backbone: Backbone, trees: Sequence[TreeRow], prefix: Tensor | None = None, shared: int = 0) -> Tensor:
    batch, learned = tree_batch(trees, shared)
    return forward_batch(backbone, batch, learned, prefixes=[prefix] * len(trees)).logits


def _add(totals: list[list[float]], trees: Sequence[tuple[int, TreeRow]], logits: Tensor) -> None:
    """Add the log-probabilities of the candidates of trees, from the (N, V) float32 logits of these rows."""
    at: list[int] = []
    ids: list[int] = []
    owner: list[int] = []
    places: list[tuple[int, int]] = []
    start = 0
    for record, tree in trees:
        for place, scored, own in tree.candidates:
            at += [start + index for index in scored]
            ids += own
            owner += [len(places)] * len(own)
            places.append((record, place))
        start += len(tree.row.example.logit_positions)
    rows, tokens, owners = (torch.tensor(values, device=logits.device) for values in (at, ids, owner))
    log_probs = logits[rows, tokens] - torch.logsumexp(logits, dim=-1)[rows]  # (M,)
    sums = log_probs.new_zeros(len(places)).index_add(0, owners, log_probs).tolist()
    for (record, place), value in zip(places, sums, strict=True):
        totals[record][place] = value


def tree_rows(examples: Sequence[Example], prompt: PreparedPrompt) -> list[TreeRow]:
    """Return rows of one record's context, each followed by the tree of as many candidates as a pass can hold."""
    ids = [example.token_ids for example in examples]
    context = min(shared_length(min(ids), max(ids)), 1 + min(example.logit_positions[0] for example in examples))
    order = sorted(range(len(examples)), key=lambda place: ids[place][context:])
    trees = [_Tree(examples[0], context)]
    for place in order:
        if trees[-1].candidates and trees[-1].is_full(examples[place]):
            trees.append(_Tree(examples[0], context))
        trees[-1].add(place, examples[place])
    return [tree.row(prompt) for tree in trees]


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

    def row(self, prompt: PreparedPrompt) -> TreeRow:
        scored = tuple(self.scored)
        example = replace(
            self.example, token_ids=tuple(self.tokens), logit_positions=scored, target_ids=(), own_tokens=0
        )
        return TreeRow(ModelRow(example, prompt), tuple(self.candidates), tuple(self.parents))


def tree_batch(trees: Sequence[TreeRow], shared: int = 0) -> tuple[Batch, PromptBatch]:
    """Pad trees, without the ``shared`` first tokens of their context, on the right to a batch in which a token reads
    what leads to it: the mask is (B, 1, T, T) bool. Also returns the learned parameters of the rows.
    """
    examples, learned = rest_of([tree.row for tree in trees], [shared] * len(trees))
    batch = collate(examples, learned)
    width = batch.token_ids.shape[1]
    mask = np.zeros((len(trees), width, width), dtype=np.bool_)
    mask[:] = np.eye(width, dtype=np.bool_)  # so that pads read something
    positions = batch.positions.numpy().copy()
    for example, tree, reads, at in zip(examples, trees, mask, positions, strict=True):
        context = len(example.token_ids) - len(tree.parents)
        reads[:context, :context] = np.tri(context, dtype=np.bool_)
        for column, parent in enumerate(tree.parents, start=context):
            reads[column] |= reads[parent - shared]
            at[column] = at[parent - shared] + 1
    return replace(batch, mask=torch.from_numpy(mask[:, None]), positions=torch.from_numpy(positions)), learned
