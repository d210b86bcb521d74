"""Answers without candidates: beam search for models that write, filled masks for the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import Side, batches
from ptuning.engine.learned import Learned
from ptuning.engine.passes import run_pass, target_logits
from ptuning.errors import BackboneError, TemplateError
from ptuning.records import Record
from ptuning.template.fill import BoundTemplate, Example
from ptuning.template.segments import FILLS_MASKS


@dataclass(frozen=True)
class Written:
    """A written answer: text, natural log-probability (with the stop token, if there is one), number of own tokens."""

    text: str
    log_prob: float
    tokens: int


def write_answers(
    backbone: Backbone,
    bound: BoundTemplate,
    records: Sequence[Record],
    learned: Learned,
    *,
    width: int,
    max_tokens: int,
    pad_side: Side,
) -> list[list[Written]]:
    """Answer records with what the model writes, with one prompt and a beam search of ``width`` beams.
    Returns for each record up to ``width`` answers of at most ``max_tokens``, best first. Targets are ignored.
    """
    if backbone.kind in FILLS_MASKS:
        return _fill_masks(backbone, bound, records, learned, top_k=width, max_tokens=max_tokens, pad_side=pad_side)
    examples = _contexts(bound, records, room=max_tokens)
    found: list[list[Written]] = [[]] * len(records)
    width = min(width, backbone.vocabulary)
    for same in _paddable(backbone, examples):
        for part in batches([[examples[index]] * width for index in same]):
            chosen = [same[place] for place in part]
            group = [examples[index] for index in chosen]
            search = _BeamSearch(backbone, bound, group, learned, width=width)
            for _ in range(max_tokens - 1):
                if search.is_done():
                    break
                search.step()
            for index, beams in zip(chosen, search.answers(), strict=True):
                found[index] = beams
    return found


def _paddable(backbone: Backbone, examples: Sequence[Example]) -> Iterable[list[int]]:
    """Group examples that can be continued in one batch: all, or without pads on the left those of one length."""
    groups: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        own = 0 if backbone.pads_left else len(example.token_ids) - example.encoder_tokens
        groups.setdefault(own, []).append(index)
    return groups.values()


def _contexts(bound: BoundTemplate, records: Sequence[Record], *, room: int) -> list[Example]:
    """Fill the template with room for an answer; a record that may not be truncated gets as much room as is left."""
    try:
        return bound.contexts(records, target_tokens=room)
    except TemplateError:
        bound.contexts(records, target_tokens=1)  # raises again if a record does not fit at all
        if len(records) == 1:
            return _contexts(bound, records, room=room // 2)
    return [example for record in records for example in _contexts(bound, [record], room=room)]


class _BeamSearch:
    """Beam search over B rows, W beams each; all grow by one token a step. Width 1 is greedy decoding."""

    def __init__(
        self, backbone: Backbone, bound: BoundTemplate, examples: Sequence[Example], learned: Learned, *, width: int
    ) -> None:
        first = run_pass(backbone, examples, learned, pad_side="left", keep=True)
        batch = first.batch
        if first.memory is None and batch.encoder_tokens:
            raise BackboneError(
                "this model has no KV cache, so it cannot write answers; give candidates to choose from"
            )
        self._backbone, self._rows, self._width = backbone, len(examples), width
        self._ending = _Ending(backbone, bound)
        self._memory, self._embeddings, self._read = first.memory, first.embeddings, batch.positions
        self._best, self._tokens = torch.log_softmax(first.logits, dim=-1).topk(width, dim=-1)  # (B, W) each
        self._texts = [[[int(token)] for token in row] for row in self._tokens.tolist()]
        row_of_beam = torch.arange(self._rows, device=backbone.device).repeat_interleave(width)  # (B * W,)
        self._mask = batch.mask[:, batch.encoder_tokens :][row_of_beam]  # (B * W, T)
        self._positions = self._mask.sum(dim=1)  # (B * W,)
        self._follow(row_of_beam)
        self._ended = self._ending.reached(self._texts, self._tokens)  # (B, W)

    def is_done(self) -> bool:
        """Whether all beams have ended. A row whose context is full ends there; its neighbours may go on."""
        full = self._positions >= self._backbone.tokenizer.max_tokens  # (B * W,)
        self._ended = self._ended | full.view(self._rows, self._width)
        return bool(self._ended.all())

    def step(self) -> None:
        """Let every beam that has not ended grow by one token, and keep the best W of each row."""
        step = torch.log_softmax(self._next_logits(), dim=-1).view(self._rows, self._width, -1)  # (B, W, V)
        # An ended beam continues as itself: with one token, which is not read, at no cost.
        step = step.masked_fill(self._ended[..., None], -torch.inf)
        step[..., 0] = step[..., 0].masked_fill(self._ended, 0.0)
        self._best, flat = (self._best[..., None] + step).flatten(1).topk(self._width, dim=-1)  # (B, W)
        parents, self._tokens = flat // step.shape[-1], flat % step.shape[-1]  # (B, W)
        ended = self._ended.gather(1, parents)
        self._texts = [
            [
                self._texts[row][int(parent)] + ([] if over else [int(token)])
                for parent, token, over in zip(parents[row], self._tokens[row], ended[row], strict=True)
            ]
            for row in range(self._rows)
        ]
        self._ended = ended | self._ending.reached(self._texts, self._tokens)
        firsts = torch.arange(self._rows, device=parents.device)[:, None] * self._width  # (B, 1)
        self._follow((parents + firsts).flatten())

    def answers(self) -> list[list[Written]]:
        """Return for each row up to W different answers, best first."""
        return [
            _different(map(self._ending.answer, texts, values))
            for texts, values in zip(self._texts, self._best.tolist(), strict=True)
        ]

    def _next_logits(self) -> Tensor:
        """Read every beam's last token; return the logits of what follows it, (B * W, V)."""
        backbone, limit = self._backbone, self._backbone.tokenizer.max_tokens
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)  # (B * W, T + 1)
        every = torch.arange(len(self._mask), device=backbone.device)
        new, at = backbone.embed(self._tokens.reshape(-1, 1)), self._positions.clamp(max=limit - 1)[:, None]
        if self._memory is None:
            self._embeddings = new = torch.cat([self._embeddings, new], dim=1)  # (B * W, T + 1, E)
            self._read = at = torch.cat([self._read, at], dim=1)  # (B * W, T + 1)
        logits, self._memory = backbone.run(
            new,
            mask=self._mask,
            positions=at,
            rows=every,
            cols=torch.full_like(every, new.shape[1] - 1),
            memory=self._memory,
            keep=self._memory is not None,
        )
        self._positions = self._positions + 1
        return logits

    def _follow(self, beams: Tensor) -> None:
        """Let beam i go on from what beam ``beams[i]`` (at first: row) has read."""
        if self._memory is not None:
            self._memory.reorder(beams)
        else:
            self._embeddings, self._read = self._embeddings[beams], self._read[beams]


class _Ending:
    """Where a written answer ends: at the stop token, and after its first line unless targets have several lines."""

    def __init__(self, backbone: Backbone, bound: BoundTemplate) -> None:
        self.tokenizer = backbone.tokenizer
        self.multiline = bound.multiline
        # The end of the text; and the end of a filled gap, for a model that learned to write one.
        self.stop_ids = {self.tokenizer.stop_id, self.tokenizer.gap.end_id} - {None}

    def reached(self, texts: Sequence[Sequence[Sequence[int]]], tokens: Tensor) -> Tensor:
        """Return which of the W beams for each of B rows ended with their last token, (B, W) bool."""
        ends = [[self._ends(ids) for ids in row] for row in texts]
        return torch.tensor(ends, dtype=torch.bool, device=tokens.device)

    def _ends(self, ids: Sequence[int]) -> bool:
        if ids[-1] in self.stop_ids:
            return True
        # A line break before the answer does not end it.
        return not self.multiline and self.tokenizer.ends_line(ids[-1]) and bool(self.tokenizer.decode(ids).strip())

    def answer(self, ids: Sequence[int], log_prob: float) -> Written:
        """Return a beam as an answer; its log-probability includes the token that ended it, its tokens do not."""
        own = list(ids)
        if own[-1] in self.stop_ids or (self._ends(own) and not self.tokenizer.decode(own[-1:]).strip()):
            own.pop()
        text = self.tokenizer.decode(own).strip()
        return Written(text if self.multiline else text.split("\n")[0].strip(), log_prob, len(own))


def _different(written: Iterable[Written]) -> list[Written]:
    """Keep the best of the answers with the same text, which two beams may end in different ways."""
    kept: dict[str, Written] = {}
    for one in written:
        kept.setdefault(one.text, one)
    return list(kept.values())


def _fill_masks(
    backbone: Backbone,
    bound: BoundTemplate,
    records: Sequence[Record],
    learned: Learned,
    *,
    top_k: int,
    max_tokens: int,
    pad_side: Side,
) -> list[list[Written]]:
    """Fill 1 to ``max_tokens`` masks with their most likely tokens; the best mean log-probability wins."""
    every: list[list[tuple[float, Written]]] = [[] for _ in records]
    examples = dict(enumerate(bound.contexts(records)))
    for count in range(1, max_tokens + 1):
        if count > 1:
            examples = _with_masks(bound, {index: records[index] for index in examples}, count)
        rows = list(examples)
        for part in batches([[examples[index]] for index in rows]):
            chosen = [rows[place] for place in part]
            group = [examples[index] for index in chosen]
            logits = target_logits(backbone, group, learned, pad_side=pad_side)  # (B * count, V)
            log_probs = torch.log_softmax(logits, dim=-1).view(len(chosen), count, -1)
            values, tokens = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1)  # (B, count, K)
            for row, index in enumerate(chosen):
                for answer in range(values.shape[-1]) if count == 1 else (0,):
                    text = backbone.tokenizer.decode(tokens[row, :, answer].tolist()).strip()
                    total = float(values[row, :, answer].sum())
                    every[index].append((total / count, Written(text, total, count)))
    return [[written for _, written in sorted(found, key=lambda entry: -entry[0])[:top_k]] for found in every]


def _with_masks(bound: BoundTemplate, records: Mapping[int, Record], count: int) -> dict[int, Example]:
    try:
        return dict(zip(records, bound.contexts(list(records.values()), target_tokens=count), strict=True))
    except TemplateError:
        if len(records) == 1:
            return {}
    return {
        at: example for index, one in records.items() for at, example in _with_masks(bound, {index: one}, count).items()
    }
