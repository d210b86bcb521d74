"""Batches of rows of any prompts, each run after the cached part of its prefix; and scoring rows with them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import MAX_BATCH_POSITIONS, Side, batches, collate, cut_by_length
from ptuning.engine.forward import MIN_SAVED_TOKENS, ForwardOutput, forward_batch, forward_packed, logits_in_parts
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import BackboneError
from ptuning.prompt.predict import classes_of
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.serve.engine.job import Outcome, PromptRow, Token, Usage
from ptuning.serve.engine.prefix_cache import ModelRow, PrefixCache
from ptuning.serve.engine.preprocess import ScoringRow
from ptuning.template.encode import Example

# Rows with one beginning run side by side from so many on, up to so many tokens; fewer go with others in one pass.
SIDE_BY_SIDE_ROWS, SIDE_BY_SIDE_TOKENS = 4, 2048


@dataclass(frozen=True)
class BatchPlan:
    """Rows of one pass, by their places, and how many tokens of each are not read again; ``side_by_side`` if all have
    one beginning, and are read one behind the other.
    """

    places: list[int]
    begun: list[int]
    side_by_side: bool = False


class BatchRunner:
    """Runs rows on one backbone, and counts the tokens that were read and those that were not since they were kept."""

    def __init__(self, backbone: Backbone, kept: PrefixCache) -> None:
        self.backbone = backbone
        self.kept = kept
        self.passes = 0
        self._behind = self._begun = 0  # tokens of rows behind their beginnings, and of all beginnings

    @property
    def tokens_read(self) -> int:
        """Number of tokens that the model has read."""
        return self._behind + self.kept.tokens_read

    @property
    def cached_tokens(self) -> int:
        """Number of tokens that were not read again, since they were kept or other rows had them."""
        return self._begun - self.kept.tokens_read

    def read_elsewhere(self, tokens: int) -> None:
        """Count tokens that the model has read in passes of others."""
        self._behind += tokens

    def logits(self, rows: Sequence[ModelRow]) -> tuple[Tensor, list[int]]:
        """Return the logits at the scored positions of rows, (N, V) float32, row by row; and how many tokens of each
        were not read again.
        """
        cached = [0] * len(rows)
        on_processor = self.backbone.device.type == "cpu"  # which takes as long for pads as for tokens

        def run(part: Sequence[int]) -> Tensor:
            own = [rows[at] for at in part]
            found: dict[int, Tensor] = {}
            for group in self.together(own, side_by_side=self.backbone.branches, cut=on_processor):
                some = [own[at] for at in group.places]
                for place, size in zip(group.places, group.begun, strict=True):
                    cached[part[place]] = size
                logits = self._side_by_side(some, group) if group.side_by_side else self.run(some, group).logits
                counts = [len(row.example.logit_positions) for row in some]
                found |= dict(zip(group.places, logits.split(counts), strict=True))
            return torch.cat([found[at] for at in range(len(own))])

        return logits_in_parts(self.backbone, [row.example for row in rows], run), cached

    def together(
        self, rows: Sequence[ModelRow], *, side_by_side: bool = False, cut: bool = False, whole: bool = False
    ) -> list[BatchPlan]:
        """Return which rows run in one pass each: some with one long beginning ``side_by_side``, others with different
        ones, and those with short ones or none, ``cut`` by length where that saves more pads than a pass costs.
        ``whole`` rows are read from their first token on.
        """
        begun = [0] * len(rows) if whole else self.kept.lengths(rows)
        names = [row.name(size) if self.kept.is_long(size) else b"" for row, size in zip(rows, begun, strict=True)]
        alike: dict[bytes, list[int]] = {}
        for at, name in enumerate(names):
            is_many = side_by_side and name and names.count(name) >= SIDE_BY_SIDE_ROWS
            alike.setdefault(name if is_many else b"kept" if name else b"", []).append(at)
        found = []
        for name, places in alike.items():
            is_one = name not in (b"", b"kept")
            parts = _packed_parts([len(rows[at].example.token_ids) - begun[at] for at in places]) if is_one else None
            if parts is None:
                parts = self._padded([rows[at] for at in places], [begun[at] for at in places], cut=cut)
            for part in parts:
                chosen = [places[at] for at in part]
                found.append(BatchPlan(chosen, [begun[at] for at in chosen], is_one))
        return found

    def _padded(self, rows: Sequence[ModelRow], begun: Sequence[int], *, cut: bool) -> list[list[int]]:
        """Return the rows of each pass whose rows are padded to one length, by their places."""
        groups = [list(range(len(rows)))]
        if cut:
            left = [len(row.example.token_ids) - size for row, size in zip(rows, begun, strict=True)]
            groups = cut_by_length(left, pass_tokens=MIN_SAVED_TOKENS)
        return [
            [group[at] for at in part]
            for group in groups
            for part in batches([[rows[at].example] for at in group], prefix=min(begun[at] for at in group))
        ]

    def run(
        self, rows: Sequence[ModelRow], group: BatchPlan, *, pad_side: Side = "right", keep: bool = False
    ) -> ForwardOutput:
        """Run rows of one side in one pass, each behind its beginning."""
        examples, learned = self._left(rows, group.begun)
        past = self.kept.past(rows, group.begun) if any(group.begun) else None
        batch = collate(examples, learned, pad_side=pad_side)
        self._count(batch.tokens, group)
        wants = self.kept.wants(rows)
        found = forward_batch(self.backbone, batch, learned, past=past, keep=keep or wants)
        if wants:
            self.kept.keep(rows, found)
        return found if keep else replace(found, memory=None)

    def _side_by_side(self, rows: Sequence[ModelRow], group: BatchPlan) -> Tensor:
        examples, learned = self._left(rows, group.begun)
        beginning = self.kept.past(rows[:1], group.begun[:1]).layers
        self._count(sum(len(example.token_ids) for example in examples), group)
        return forward_packed(self.backbone, examples, learned, beginning)

    def _left(self, rows: Sequence[ModelRow], begun: Sequence[int]) -> tuple[list[Example], PromptBatch]:
        """Return what is left of rows behind their beginnings, and what their prompts bring to it."""
        left = [row.behind(size) for row, size in zip(rows, begun, strict=True)]
        brought: dict[tuple[bytes, int, bool], PromptBatch] = {}
        owners = [(row.digest, len(own.vectors), own.has_blocks) for row, (_, own) in zip(rows, left, strict=True)]
        for owner, (_, own) in zip(owners, left, strict=True):
            brought.setdefault(owner, own)
        number = {owner: at for at, owner in enumerate(brought)}
        learned = PromptBatch.join(list(brought.values()), rows=[number[owner] for owner in owners])
        return [example for example, _ in left], learned.to(self.backbone.device)

    def _count(self, tokens: int, group: BatchPlan) -> None:
        self.passes += 1
        self._behind += tokens
        self._begun += sum(group.begun)


def _packed_parts(lengths: Sequence[int]) -> list[list[int]]:
    """Cut rows of these lengths into parts that run side by side."""
    parts: list[list[int]] = [[]]
    tokens = 0
    for at, length in enumerate(lengths):
        if parts[-1] and tokens + length > SIDE_BY_SIDE_TOKENS:
            parts.append([])
            tokens = 0
        parts[-1].append(at)
        tokens += length
    return parts


Given = TypeVar("Given")
Found = TypeVar("Found")


def classify_rows(passes: BatchRunner, rows: Sequence[tuple[PromptRow, ScoringRow]]) -> list[Outcome]:
    """Answer rows with the likeliest of their labels or choices, rows of all prompts in the same passes."""
    answers = []
    for start, end in _score_parts(rows):
        part = rows[start:end]
        logits, cached = passes.logits([row for _, filled in part for row in filled.rows])
        ranked = classes_of([filled.item for _, filled in part], [filled.names for _, filled in part], logits)
        left = iter(cached)
        for (row, filled), found in zip(part, ranked, strict=True):
            how, usage = row.how, Usage(filled.tokens, 0, sum(itertools.islice(left, len(filled.rows))))
            prediction = Prediction.of_classes(
                check_finite(found), top_k=how.top_k, min_probability=how.min_probability
            )
            answers.append(Outcome(prediction, usage))
    return answers


def _score_parts(rows: Sequence[tuple[PromptRow, ScoringRow]]) -> Iterator[tuple[int, int]]:
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


def check_finite(found: Sequence[Candidate]) -> Sequence[Candidate]:
    """Return candidates, all of which must have a number as their probability."""
    if any(math.isnan(one.log_prob) for one in found):
        raise BackboneError("the model gave no numbers (NaN) for this row; load it in another number format (--dtype)")
    return found


def score_text(passes: BatchRunner, row: ModelRow, *, alternatives: int) -> Outcome:
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
