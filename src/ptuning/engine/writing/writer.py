"""Rows that are written together, a token each a step: rows join between two steps, and leave when they have ended."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.forward import logits_processor
from ptuning.config import GenerationSettings
from ptuning.engine.writing.continuation import Continuation
from ptuning.engine.writing.ending import Draft, Ending


class NextToken:
    """What the settings make of the logits of the next token."""

    def __init__(self, settings: GenerationSettings) -> None:
        self._process = logits_processor(settings)
        self._looks_back = settings.repetition_penalty != 1.0

    def scores(self, logits: Tensor, before: Sequence[Sequence[int]], drafts: Sequence[Draft]) -> Tensor:
        """Return the logits (or log-probabilities), (B, V), to choose the next token of each row from. ``before`` are
        the tokens that count as written before the drafts.
        """
        if not self._looks_back:
            return self._process(logits.new_empty(len(logits), 0, dtype=torch.int64), logits)
        rows = [[*own, *draft.ids] for own, draft in zip(before, drafts, strict=True)]
        lengths = sorted(set(map(len, rows)))
        scores = logits if len(lengths) == 1 else logits.clone()
        for length in lengths:
            places = [place for place, row in enumerate(rows) if len(row) == length]
            ids = torch.tensor([rows[place] for place in places], dtype=torch.int64, device=logits.device)
            if len(lengths) == 1:
                return self._process(ids.reshape(len(rows), -1), logits)
            scores[places] = self._process(ids.reshape(len(places), -1), logits[places])
        return scores


@dataclass(eq=False)
class Line:
    """An answer that is being written: where it ends, how its tokens are chosen, and what there is of it.
    With ``alternatives`` it notes for each token its log-probability, and so many of the likeliest tokens there.
    """

    ending: Ending
    settings: GenerationSettings
    draft: Draft = field(default_factory=Draft)
    ended: bool = False
    alternatives: int | None = None
    log_probs: list[float] = field(default_factory=list)
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)

    def grow(self, token: int, log_probs: Tensor, value: float) -> None:
        """Write a token of this log-probability, out of those of all tokens, (V,)."""
        self.draft = self.draft.grown(token, value)
        if self.alternatives is not None:
            self.log_probs.append(value)
            best = log_probs.topk(min(self.alternatives, len(log_probs)))
            self.likeliest.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


class Writer:
    """Writes a line for each of B rows, by the likeliest tokens or by drawn ones.

    A line that draws has a generator of its own with its settings' seed, so that it is written as it would be alone.
    ``lines`` are those that have not ended, in the order of the rows.
    """

    def __init__(self, backbone: Backbone, rows: Continuation, lines: Sequence[Line]) -> None:
        self._backbone, self._rows = backbone, rows
        self.lines = list(lines)
        self._draws = {line: self._generator(line.settings) for line in lines if line.settings.do_sample}
        self._choices: dict[GenerationSettings, NextToken] = {}

    def steps(self) -> Iterator[list[Line]]:
        """Write until every line has ended; yield those that a step has lengthened."""
        while self.lines:
            yield self.step()

    def step(self) -> list[Line]:
        """Write one token of each line, and return the lines. Those that have ended leave."""
        lengthened, rows = self.lines, self._rows
        tokens = self._choose()
        log_probs = torch.log_softmax(rows.logits, dim=-1)  # (B, V)
        values = log_probs.gather(1, tokens[:, None])[:, 0].tolist()
        table = zip(lengthened, tokens.tolist(), log_probs, values, rows.full(), strict=True)
        for line, token, of_all, value, full in table:
            line.grow(token, of_all, value)
            line.ended = full or line.ending.reached(line.draft.ids)
        self._keep([place for place, line in enumerate(lengthened) if not line.ended], tokens)
        return lengthened

    def joins(self, other: Writer) -> bool:
        """Whether the lines of another writer can be written with these."""
        return self._rows.joins(other._rows)

    def join(self, other: Writer) -> None:
        """Take over the lines of another writer."""
        self._rows.join(other._rows)
        self.lines += other.lines
        self._draws |= other._draws

    def drop(self, lines: Collection[Line]) -> None:
        """Write some lines no further."""
        places = [place for place, line in enumerate(self.lines) if line not in lines]
        if len(places) < len(self.lines):
            self.lines = [self.lines[place] for place in places]
            self._rows.keep(places)

    def _keep(self, places: list[int], tokens: Tensor) -> None:
        """Go on behind the chosen tokens, (B,), with the rows at these places."""
        after = None if len(places) == len(self.lines) else torch.tensor(places, device=tokens.device)
        self.lines = [self.lines[place] for place in places]
        if places:
            self._rows.read(tokens if after is None else tokens[after], after=after)

    def _choose(self) -> Tensor:
        """Return the next token of each row, (B,)."""
        groups: dict[GenerationSettings, list[int]] = {}
        for place, line in enumerate(self.lines):
            groups.setdefault(line.settings, []).append(place)
        if len(groups) == 1:
            return self._choose_some(self._rows.logits, range(len(self.lines)), *groups)
        tokens = self._rows.logits.new_empty(len(self.lines), dtype=torch.int64)
        for settings, places in groups.items():
            tokens[places] = self._choose_some(self._rows.logits[places], places, settings)
        return tokens

    def _choose_some(self, logits: Tensor, places: Sequence[int], settings: GenerationSettings) -> Tensor:
        if settings not in self._choices:
            self._choices[settings] = NextToken(settings)
        lines = [self.lines[place] for place in places]
        before = [self._rows.before[place] for place in places]
        scores = self._choices[settings].scores(logits, before, [line.draft for line in lines])  # (B, V)
        if not settings.do_sample:
            return scores.argmax(dim=-1)
        return _draw(scores, [self._draws[line] for line in lines], width=self._backbone.embedding_rows)

    def _generator(self, settings: GenerationSettings) -> torch.Generator:
        return torch.Generator(self._rows.logits.device).manual_seed(settings.seed)


def _draw(scores: Tensor, generators: Sequence[torch.Generator], *, width: int) -> Tensor:
    """Draw a token for each row of (B, V) scores, (B,). Rows that pad the model's table are never drawn, but count as
    tokens (``width``), so that the draws are those of transformers' ``generate``.
    """
    padded = torch.nn.functional.pad(scores, (0, width - scores.shape[-1]), value=-torch.inf)
    chances = padded.softmax(dim=-1)
    drawn = [torch.multinomial(row, 1, generator=own) for row, own in zip(chances, generators, strict=True)]
    return torch.cat(drawn)
