"""Beam search: the best answers to each of B rows, as transformers' ``generate`` finds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ptuning.config import GenerationSettings
from ptuning.engine.writing.continuation import Continuation
from ptuning.engine.writing.ending import Draft, Ending
from ptuning.engine.writing.writer import NextToken


@dataclass
class _Search:
    """The search for one row. A score is a log-probability; that of an ended draft is divided by a power of its length.
    Both lists have at most W entries, best first.
    """

    width: int
    length_penalty: float
    ending: Ending
    running: list[tuple[float, Draft]] = field(default_factory=lambda: [(0.0, Draft())])
    ended: list[tuple[float, Draft]] = field(default_factory=list)

    def drafts(self, rows: int) -> list[Draft]:
        """Return the drafts of a search's rows; one with fewer than W drafts repeats its last one."""
        running = [draft for _, draft in self.running]
        return running + running[-1:] * (rows - len(running))

    def grow(self, found: Sequence[tuple[float, Draft, bool]]) -> list[int]:
        """Go on with the likeliest continuations (score, draft, whether it ends), sorted. Returns the places of those
        that run on; none if the search is over: nothing can become better than what has ended.
        """
        for score, draft, ends in found[: self.width]:
            if ends:
                self.ended.append((score / len(draft.ids) ** self.length_penalty, draft))
        self.ended = sorted(self.ended, key=lambda one: -one[0])[: self.width]
        places = [at for at, (_, _, ends) in enumerate(found) if not ends][: self.width]
        self.running = [found[at][:2] for at in places]
        if not places:
            return []
        score, draft = self.running[0]
        best = score / len(draft.ids) ** self.length_penalty
        return [] if len(self.ended) == self.width and best <= self.ended[-1][0] else places


def beam_search(
    rows: Continuation, endings: Sequence[Ending], settings: GenerationSettings, *, width: int
) -> list[list[Draft]]:
    """Return for each row up to W ended drafts, best first. Rows do not depend on each other; one that is done leaves.
    Source: ``_beam_search`` of transformers 5, with ``early_stopping=False``.
    """
    chooses = NextToken(settings)
    searches = [_Search(width, settings.length_penalty, ending) for ending in endings]
    active, beams, device = searches, 1, rows.logits.device
    while active:
        log_probs = torch.log_softmax(rows.logits, dim=-1)  # (B * W, V)
        vocabulary = log_probs.shape[-1]
        # A row with fewer than W drafts repeats its last one, which leads nowhere.
        scores = [[score for score, _ in one.running] + [-math.inf] * (beams - len(one.running)) for one in active]
        drafts = [draft for one in active for draft in one.drafts(beams)]
        totals = chooses.scores(log_probs, rows.before, drafts).reshape(len(active), -1) + torch.tensor(
            scores, device=device
        ).repeat_interleave(vocabulary, dim=1)  # (B, W * V)
        # So many that W go on even if all tokens that end a text are among them.
        kept = min(max(2, 1 + len(endings[0].ids)) * width, totals.shape[-1])
        best, places = totals.topk(kept, dim=-1)  # (B, K) each
        parents, tokens = places // vocabulary, places % vocabulary
        firsts = torch.arange(0, len(log_probs), beams, device=device)[:, None]  # (B, 1)
        own = log_probs[parents + firsts, tokens]  # (B, K)
        full, after, chosen, going = rows.full(), [], [], []
        table = zip(best.tolist(), parents.tolist(), tokens.tolist(), own.tolist(), strict=True)
        for row, (search, lists) in enumerate(zip(active, table, strict=True)):
            entries = [one for one in zip(*lists, strict=True) if one[0] > -math.inf]
            grown = [search.running[parent][1].grown(token, value) for _, parent, token, value in entries]
            ends = [full[row * beams] or search.ending.reached(draft.ids) for draft in grown]
            on = search.grow([(one[0], draft, end) for one, draft, end in zip(entries, grown, ends, strict=True)])
            if on:
                on += on[-1:] * (width - len(on))
                after += [row * beams + entries[at][1] for at in on]
                chosen += [entries[at][2] for at in on]
                going.append(search)
        active, beams = going, width
        if active:
            rows.read(torch.tensor(chosen, device=device), after=torch.tensor(after, device=device))
    return [[draft for _, draft in search.ended] for search in searches]
