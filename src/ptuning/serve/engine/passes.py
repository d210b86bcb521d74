"""A pass over rows of any prompts, each behind what is kept of its beginning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import Side, collate
from ptuning.engine.learned import Learned
from ptuning.engine.passes import Pass, logits_in_parts, run_batch
from ptuning.serve.engine.beginnings import Beginnings, PassRow


class Passes:
    """Runs rows on one backbone, and counts the tokens that were read and those that were not since they were kept."""

    def __init__(self, backbone: Backbone, kept: Beginnings) -> None:
        self.backbone = backbone
        self.kept = kept
        self.passes = self.tokens_read = self.cached_tokens = 0

    def logits(self, rows: Sequence[PassRow]) -> tuple[Tensor, list[int]]:
        """Return the logits at the scored positions of rows, (N, V) float32, row by row; and how many tokens of each
        were not read again.
        """
        cached = [0] * len(rows)

        def run(part: Sequence[int]) -> Tensor:
            own = [rows[at] for at in part]
            found: dict[int, Tensor] = {}
            for places, lengths in self.apart(own):
                for place, size in zip(places, lengths, strict=True):
                    cached[part[place]] = size
                logits = self.run([own[at] for at in places], lengths).logits
                found |= dict(zip(places, logits.split([len(own[at].example.logit_positions) for at in places])))
            return torch.cat([found[at] for at in range(len(own))])

        return logits_in_parts(self.backbone, [row.example for row in rows], run), cached

    def apart(self, rows: Sequence[PassRow]) -> list[tuple[list[int], list[int]]]:
        """Return the rows to run in one pass each, those with a kept beginning and those without: their indices, and
        how many tokens of each are not read again.
        """
        lengths = self.kept.lengths(rows)
        groups = [[at for at, size in enumerate(lengths) if bool(size) == is_kept] for is_kept in (True, False)]
        return [(group, [lengths[at] for at in group]) for group in groups if group]

    def run(
        self, rows: Sequence[PassRow], lengths: Sequence[int], *, pad_side: Side = "right", keep: bool = False
    ) -> Pass:
        """Run rows of one side in one pass, each behind its beginning of this length."""
        past = self.kept.past(rows, lengths) if any(lengths) else None
        left = [row.behind(size) for row, size in zip(rows, lengths, strict=True)]
        brought: dict[tuple[bytes, int], Tensor] = {}
        for row, (_, vectors) in zip(rows, left, strict=True):
            brought.setdefault((row.digest, len(vectors)), vectors)
        number = {name: at for at, name in enumerate(brought)}
        owners = [number[row.digest, len(vectors)] for row, (_, vectors) in zip(rows, left, strict=True)]
        learned = Learned.join(list(map(Learned, brought.values())), rows=owners).to(self.backbone.device)
        batch = collate([example for example, _ in left], learned, pad_side=pad_side)
        self.passes += 1
        self.tokens_read += batch.tokens
        self.cached_tokens += sum(lengths)
        return run_batch(self.backbone, batch, learned, past=past, keep=keep)
