"""What stands in front of a row's first slot is the same in every epoch: its keys and values, run once and kept. Knows
no training loop.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import psutil
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import MAX_BATCH_TOKENS, collate
from ptuning.engine.learned import Learned
from ptuning.template.fill import Example
from ptuning.template.segments import Ids

logger = logging.getLogger(__name__)

# Rows pay for a cache by having it copied together in every step, so short constant parts are not worth one.
# Source: docs/decisions.md, decision 27.
MIN_PREFIX_TOKENS = 8
# Left free on the disk when keys and values are put there.
SPARED_DISK_BYTES = 2 << 30

Told = Callable[[int, int], None]


class Past(NamedTuple):
    """Keys and values before B rows, (B, H, C, D) each for every layer, and the mask over them, (B, C) int64."""

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor


class PrefixCache:
    """Keys and values of the tokens in front of each row's first slot, of a frozen causal backbone.

    No slot changes them and no gradient flows through them, so they are computed once, in a pass of their own, and rows
    then run from their first slot onwards: in training, for the development part, in every epoch. They are kept by the
    ids they belong to, so rows that begin alike share them, and live as long as this context, for its one backbone.

    Args:
        backbone: The language model.
        memory_share: Which share of the free memory they may take; what is more goes to the disk, and what does not
            fit there is computed anew in each step. 0 turns all of it off.

    Source: docs/decisions.md, decision 27.
    """

    def __init__(self, backbone: Backbone, *, memory_share: float) -> None:
        self.backbone = backbone
        self.is_used = False
        self.memory_bytes = 0
        self.disk_bytes = 0
        self._memory_share = memory_share
        self._memory: dict[Ids, Tensor] = {}
        self._disk: dict[Ids, tuple[safetensors.safe_open, str]] = {}
        # File on the disk -> its ids and its size.
        self._files: dict[Path, tuple[list[Ids], int]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._spilled = 0

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop all keys and values; rows run whole until the next :meth:`prepare`."""
        self._memory.clear()
        self._disk.clear()
        self._files.clear()
        self.is_used, self.memory_bytes, self.disk_bytes = False, 0, 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def keep_only(self, examples: Iterable[Example]) -> None:
        """Drop what other rows than these begin with; what is on the disk goes once no row needs its file."""
        wanted = {cacheable_ids(example) for example in examples}
        for ids in [ids for ids in self._memory if ids not in wanted]:
            self.memory_bytes -= self._memory.pop(ids).nbytes
        for file, (listed, size) in list(self._files.items()):
            if wanted.isdisjoint(listed):
                for ids in listed:
                    del self._disk[ids]
                del self._files[file]
                self.disk_bytes -= size
                file.unlink(missing_ok=True)

    def prepare(self, examples: Iterable[Example], *, report: Told | None = None) -> bool:
        """Compute what rows begin with, if the backbone can stand behind it and it is long enough to pay.

        Args:
            examples: All rows that will be run.
            report: Called after every pass with the number of tokens done, and of all. What it raises ends this; what
                was computed stays, and the rest is computed when it is asked for.

        Returns:
            Whether it pays, so that these rows are to run from their first slot onwards.
        """
        constant = [cacheable_ids(example) for example in examples]
        if not self.pays(constant):
            return False
        self.keep(constant, report=report)
        return True

    def pays(self, constant: Sequence[Ids]) -> bool:
        """Whether the backbone can stand behind what rows begin with, and it is long enough to be worth keeping.

        Args:
            constant: What each row begins with (:func:`cacheable_ids`).
        """
        enough = sum(map(len, constant)) >= MIN_PREFIX_TOKENS * len(constant)
        return bool(self._memory_share) and enough and self.backbone.shares_prefix

    def keep(self, constant: Iterable[Ids], *, report: Told | None = None) -> None:
        """Compute what rows begin with, and keep it.

        Args:
            constant: What each row begins with.
            report: As of :meth:`prepare`.
        """
        self.is_used = True
        wanted = sorted({ids for ids in constant if ids} - self._memory.keys() - self._disk.keys())
        wanted.sort(key=len)
        budget = self.budget()
        total, done = sum(map(len, wanted)), 0
        for group in text_groups(wanted):
            parts = dict(zip(group, self._run(group), strict=True))
            self._spill({ids: part for ids, part in parts.items() if not self._keep(ids, part, budget)})
            done += sum(map(len, group))
            if report is not None:
                report(done, total)

    def budget(self) -> int:
        """Return how many bytes of memory may be taken in all, as much as is free now."""
        return int(self._memory_share * free_bytes(self.backbone.device)) + self.memory_bytes

    def to_json(self) -> dict[str, int]:
        """Return what was kept, as it stands in the record of a run; zeros if rows ran whole."""
        return {"tokens": self.tokens, "memory_bytes": self.memory_bytes, "disk_bytes": self.disk_bytes}

    @property
    def tokens(self) -> int:
        """Number of tokens whose keys and values are kept."""
        return sum(map(len, self._memory)) + sum(map(len, self._disk))

    @torch.no_grad()
    def _run(self, group: Sequence[Ids]) -> list[Tensor]:
        """Return the keys and values of some beginnings, (L, 2, H, C, D) each, of L layers and H heads of width D."""
        rows = [Example(ids, (), (), (), 0) for ids in group]
        batch = collate(rows, Learned.none(self.backbone.width)).to(self.backbone.device)
        memory = self.backbone.remember(
            self.backbone.embed(batch.token_ids), mask=batch.mask, positions=batch.positions
        )
        whole = torch.stack([torch.stack(pair) for pair in memory.layers])  # (L, 2, B, H, C, D)
        return [whole[:, :, row, :, : len(ids)].clone() for row, ids in enumerate(group)]

    def _keep(self, ids: Ids, part: Tensor, budget: int) -> bool:
        fits = self.memory_bytes + part.nbytes <= budget
        if fits:
            self._memory[ids] = part
            self.memory_bytes += part.nbytes
        return fits

    def _spill(self, parts: dict[Ids, Tensor]) -> None:
        """Put keys and values on the disk, if there is room; if not, they will be computed when they are asked for."""
        if not parts:
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="ptuning-cache-")
        size = sum(part.nbytes for part in parts.values())
        if shutil.disk_usage(self._folder.name).free < size + SPARED_DISK_BYTES:
            logger.info("no room on the disk for the keys and values of %d rows; they are computed anew", len(parts))
            return
        self._spilled += 1
        file = Path(self._folder.name) / f"{self._spilled}.safetensors"
        safetensors.torch.save_file({str(index): part for index, part in enumerate(parts.values())}, file)
        mapped = safetensors.safe_open(file, framework="pt")
        self._disk |= {ids: (mapped, str(index)) for index, ids in enumerate(parts)}
        self._files[file] = list(parts), size
        self.disk_bytes += size

    def _find(self, wanted: Iterable[Ids]) -> dict[Ids, Tensor]:
        """Return keys and values, (L, 2, H, C, D) each, those that are kept nowhere computed now."""
        found: dict[Ids, Tensor] = {}
        missing = []
        for ids in wanted:
            if ids in self._memory:
                found[ids] = self._memory[ids]
            elif ids in self._disk:
                mapped, name = self._disk[ids]
                part: Tensor = mapped.get_tensor(name)  # type: ignore[no-untyped-call]
                found[ids] = part.to(self.backbone.device)
            else:
                missing.append(ids)
        for group in text_groups(sorted(missing, key=len)):
            found |= dict(zip(group, self._run(group), strict=True))
        return found

    def past(self, texts: Sequence[Ids]) -> Past:
        """Return the keys and values of the texts before B rows' first slots, put together for one pass.

        All end at the same place, where the rows go on.

        Args:
            texts: Of each row (:func:`cacheable_ids`); at least one is not empty.
        """
        parts = self._find(dict.fromkeys(ids for ids in texts if ids))
        width = max(map(len, texts))
        some = next(iter(parts.values()))
        layers, two, heads, _, size = some.shape
        mask = torch.zeros(len(texts), width, dtype=torch.int64, device=some.device)
        if len(set(texts)) == 1:
            whole = some[:, :, None].expand(layers, two, len(texts), heads, width, size)  # nothing is copied
            mask[:] = 1
        else:
            whole = some.new_zeros(layers, two, len(texts), heads, width, size)
            for row, ids in enumerate(texts):
                if ids:
                    whole[:, :, row, :, width - len(ids) :] = parts[ids]
                    mask[row, width - len(ids) :] = 1
        return Past([(keys, values) for keys, values in whole], mask)


def free_bytes(device: torch.device) -> int:
    """Return how much memory is free where a backbone runs."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def cacheable_ids(example: Example) -> Ids:
    """Return the ids in front of the first slot, and of the first scored position where there is no slot."""
    return example.token_ids[: min((*example.slot_positions[:1], *example.logit_positions[:1]))]


def row_behind(example: Example, start: int) -> Example:
    """Return what is left of a row from a position onwards."""
    return replace(
        example,
        token_ids=example.token_ids[start:],
        slot_positions=tuple(position - start for position in example.slot_positions),
        logit_positions=tuple(position - start for position in example.logit_positions),
    )


def text_groups(ordered: Sequence[Ids]) -> Iterator[list[Ids]]:
    """Yield beginnings to run together, shortest first, within the bounds of one forward pass."""
    group: list[Ids] = []
    for ids in ordered:
        if group and (len(group) + 1) * len(ids) > MAX_BATCH_TOKENS:
            yield group
            group = []
        group.append(ids)
    if group:
        yield group
