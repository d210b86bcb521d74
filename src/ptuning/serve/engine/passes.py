"""Passes over rows of any prompts, each behind what is kept of its beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import Side, batches, collate, cut_by_length
from ptuning.engine.learned import Learned
from ptuning.engine.passes import MIN_SAVED_TOKENS, Pass, logits_in_parts, run_batch
from ptuning.engine.side_by_side import run_side_by_side
from ptuning.serve.engine.beginnings import Beginnings, PassRow
from ptuning.template.encode import Example

# Rows with one beginning run side by side from so many on, up to so many tokens; fewer go with others in one pass.
SIDE_BY_SIDE_ROWS, SIDE_BY_SIDE_TOKENS = 4, 2048


@dataclass(frozen=True)
class Together:
    """Rows of one pass, by their places, and how many tokens of each are not read again; ``side_by_side`` if all have
    one beginning, and are read one behind the other.
    """

    places: list[int]
    begun: list[int]
    side_by_side: bool = False


class Passes:
    """Runs rows on one backbone, and counts the tokens that were read and those that were not since they were kept."""

    def __init__(self, backbone: Backbone, kept: Beginnings) -> None:
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

    def logits(self, rows: Sequence[PassRow]) -> tuple[Tensor, list[int]]:
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
        self, rows: Sequence[PassRow], *, side_by_side: bool = False, cut: bool = False, whole: bool = False
    ) -> list[Together]:
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
            parts = _parts([len(rows[at].example.token_ids) - begun[at] for at in places]) if is_one else None
            if parts is None:
                parts = self._padded([rows[at] for at in places], [begun[at] for at in places], cut=cut)
            for part in parts:
                chosen = [places[at] for at in part]
                found.append(Together(chosen, [begun[at] for at in chosen], is_one))
        return found

    def _padded(self, rows: Sequence[PassRow], begun: Sequence[int], *, cut: bool) -> list[list[int]]:
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

    def run(self, rows: Sequence[PassRow], group: Together, *, pad_side: Side = "right", keep: bool = False) -> Pass:
        """Run rows of one side in one pass, each behind its beginning."""
        examples, learned = self._left(rows, group.begun)
        past = self.kept.past(rows, group.begun) if any(group.begun) else None
        batch = collate(examples, learned, pad_side=pad_side)
        self._count(batch.tokens, group)
        wants = self.kept.wants(rows)
        found = run_batch(self.backbone, batch, learned, past=past, keep=keep or wants)
        if wants:
            self.kept.keep(rows, found)
        return found if keep else replace(found, memory=None)

    def _side_by_side(self, rows: Sequence[PassRow], group: Together) -> Tensor:
        examples, learned = self._left(rows, group.begun)
        beginning = self.kept.past(rows[:1], group.begun[:1]).layers
        self._count(sum(len(example.token_ids) for example in examples), group)
        return run_side_by_side(self.backbone, examples, learned, beginning)

    def _left(self, rows: Sequence[PassRow], begun: Sequence[int]) -> tuple[list[Example], Learned]:
        """Return what is left of rows behind their beginnings, and what their prompts bring to it."""
        left = [row.behind(size) for row, size in zip(rows, begun, strict=True)]
        brought: dict[tuple[bytes, int, bool], Learned] = {}
        owners = [(row.digest, len(own.vectors), own.has_blocks) for row, (_, own) in zip(rows, left, strict=True)]
        for owner, (_, own) in zip(owners, left, strict=True):
            brought.setdefault(owner, own)
        number = {owner: at for at, owner in enumerate(brought)}
        learned = Learned.join(list(brought.values()), rows=[number[owner] for owner in owners])
        return [example for example, _ in left], learned.to(self.backbone.device)

    def _count(self, tokens: int, group: Together) -> None:
        self.passes += 1
        self._behind += tokens
        self._begun += sum(group.begun)


def _parts(lengths: Sequence[int]) -> list[list[int]]:
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
