"""KV cache for the text before the first slot: it never changes in training, so it is computed once."""

from __future__ import annotations

import io
import itertools
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import IO, NamedTuple, cast

import psutil
import torch
from torch import Tensor
from torch.nn.functional import pad

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import batches, collate, one_sided
from ptuning.engine.memory import in_parts
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.template.encode import Example
from ptuning.template.segments import Ids

logger = logging.getLogger(__name__)

# Each step copies the cached keys and values of its rows together, so caching short texts does not pay.
# Source: docs/decisions.md, decision 27.
MIN_PREFIX_TOKENS = 8
# Room on the disk that others keep, and the number of files among which the cache's own room is divided: a file goes
# when none of its texts is wanted any more.
SPARED_DISK_BYTES = 2 << 30
FILES = 64

OnCached = Callable[[int, int], None]


class PastKeyValues(NamedTuple):
    """Keys and values before B rows, (B, H, C, D) each for every layer, and the mask over them, (B, C) int64; each row
    has ``tokens`` of them before it, (B, 1) int64, whether it reads them or not.
    """

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, parts: Sequence[Tensor | None]) -> PastKeyValues:
        """Return the keys and values before each of B rows, (L, 2, H, C, D) or None, which not all are; rows can share
        a tensor. Shorter ones are padded on the left, so that all end in the same column.
        """
        longest = max((part for part in parts if part is not None), key=lambda part: part.shape[3])
        layers, two, heads, width, depth = longest.shape
        starts = [width if part is None else width - part.shape[3] for part in parts]
        mask = torch.zeros(len(parts), width, dtype=torch.int64, device=longest.device)
        for row, start in enumerate(starts):
            mask[row, start:] = 1
        if all(part is longest for part in parts):
            whole = longest[:, :, None].expand(layers, two, len(parts), heads, width, depth)  # nothing is copied
        elif any(part is not None and part.requires_grad for part in parts):
            # Rows copied into place one by one would copy the gradient of all rows for each.
            padded = {
                id(part): pad(longest[:, :, :, :0] if part is None else part, (0, 0, start, 0))
                for part, start in zip(parts, starts, strict=True)
            }
            runs = [(key, len(list(rows))) for key, rows in itertools.groupby(map(id, parts))]
            copies = [padded[key][:, :, None].expand(-1, -1, count, -1, -1, -1) for key, count in runs]
            whole = torch.cat(copies, dim=2)
        else:
            whole = longest.new_zeros(layers, two, len(parts), heads, width, depth)
            for row, (part, start) in enumerate(zip(parts, starts, strict=True)):
                if part is not None:
                    whole[:, :, row, :, start:] = part
        return cls([(keys, values) for keys, values in whole], mask, mask.sum(dim=1, keepdim=True))

    def hiding(self, unread: Sequence[Ids]) -> PastKeyValues:
        """Return the same for rows of which each does not read some of its own columns."""
        if not any(unread):
            return self
        mask, starts = self.mask.clone(), (self.mask.shape[1] - self.tokens[:, 0]).tolist()
        for row, columns in enumerate(unread):
            mask[row, [starts[row] + column for column in columns]] = 0
        return self._replace(mask=mask)


class OnDisk(NamedTuple):
    """Place of a cache entry in a file."""

    file: IO[bytes]
    at: int
    shape: torch.Size
    dtype: torch.dtype
    size: int


class PrefixCache:
    """Keys and values of the text before each row's first slot, by its token ids, for a frozen causal backbone.

    Slots do not change them and no gradient flows through them. So they are computed once, and rows then run from their
    first slot onwards. Entries beyond ``memory_share`` of the free memory (0 turns the cache off) go to files of at
    most ``disk_bytes`` together, in the folder for temporary files; those without room there are computed anew in each
    step. The files have no names, so that they are gone when the process ends, however it ends. As a context manager,
    the cache drops everything at the end.
    Source: docs/decisions.md, decision 27.
    """

    def __init__(self, backbone: Backbone, *, memory_share: float, disk_bytes: int = 0) -> None:
        self.backbone = backbone
        self.is_used = False
        self.memory_bytes = 0
        self.disk_limit = disk_bytes
        self._memory_share = memory_share
        self._memory: dict[Ids, Tensor] = {}
        self._disk: dict[Ids, OnDisk] = {}
        self._files: dict[IO[bytes], int] = {}  # with the bytes written to each
        self.token_bytes = 0  # of one token, once any text was computed
        self._has_warned = False

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop everything; rows run whole until the next :meth:`prepare`."""
        self._memory.clear()
        self._disk.clear()
        self.is_used, self.memory_bytes = False, 0
        self._close_files()

    def _close_files(self) -> None:
        """Close, and so remove, the files that hold nothing that is wanted."""
        for file in self._files.keys() - {entry.file for entry in self._disk.values()}:
            del self._files[file]
            file.close()

    def keep_only(self, examples: Iterable[Example]) -> None:
        """Drop the entries that none of these rows needs."""
        wanted = {self.ids_of(example) for example in examples}
        for ids in self._memory.keys() - wanted:
            self.memory_bytes -= self._memory.pop(ids).nbytes
        for ids in self._disk.keys() - wanted:
            del self._disk[ids]
        self._close_files()

    def prepare(self, examples: Iterable[Example], *, report: OnCached | None = None) -> bool:
        """Fill the cache for rows, if that :meth:`pays`, and return whether it does.
        ``report`` gets the tokens done and of all after every pass. If it raises, the rest is computed when needed.
        """
        texts = [self.ids_of(example) for example in examples]
        if not self.pays(texts):
            return False
        self.keep(texts, report=report)
        return True

    def ids_of(self, example: Example) -> Ids:
        """Return the token ids before a row's first slot whose keys and values, computed apart, are those of the
        whole row; none if the whole row is read with other positions (:meth:`Backbone.side`).
        """
        ids = cacheable_ids(example)
        return ids if self.backbone.side(len(ids)) == self.backbone.side(len(example.token_ids)) else ()

    def pays(self, texts: Sequence[Ids]) -> bool:
        """Whether the backbone can use cached texts (:meth:`ids_of` each row), and they are worth caching."""
        enough = sum(map(len, texts)) >= MIN_PREFIX_TOKENS * len(texts)
        return bool(self._memory_share) and enough and self.backbone.keeps_prefixes

    def keep(self, texts: Iterable[Ids], *, report: OnCached | None = None) -> None:
        """Compute and keep the keys and values of texts; ``report`` as for :meth:`prepare`."""
        self.is_used = True
        wanted = sorted({ids for ids in texts if ids} - self._memory.keys() - self._disk.keys())
        budget = self.budget()
        total, done, left_out = sum(map(len, wanted)), 0, 0
        for group in text_groups(wanted, self.backbone.side):
            for ids, part in zip(group, self._run(group), strict=True):
                if self.memory_bytes + part.nbytes <= budget:
                    self._memory[ids] = part
                    self.memory_bytes += part.nbytes
                elif not self._write(ids, part):
                    left_out += 1
            done += sum(map(len, group))
            if report is not None:
                report(done, total)
        logger.info("KV cache of %d tokens before the slots: %s", self.tokens, self.size)
        if left_out and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the KV cache takes %s, and has no room for %d of %d texts before the slots; they are computed "
                "anew in every step. More memory (cache_memory) or disk (cache_disk) makes training faster",
                self.size,
                left_out,
                len(wanted),
            )

    @property
    def disk_bytes(self) -> int:
        """Bytes of its files."""
        return sum(self._files.values())

    @property
    def size(self) -> str:
        """Size in memory and on disk, in words."""
        disk = f" and {self.disk_bytes / 1e6:,.1f} MB on the disk" if self.disk_bytes else ""
        return f"{self.memory_bytes / 1e6:,.1f} MB of memory{disk}"

    def budget(self) -> int:
        """Return the most bytes of memory that the cache may take, by how much is free now."""
        return int(self._memory_share * free_bytes(self.backbone.device)) + self.memory_bytes

    def to_json(self) -> dict[str, int]:
        """Return the size of the cache, for the record of a run; zeros if rows ran whole."""
        return {"tokens": self.tokens, "memory_bytes": self.memory_bytes, "disk_bytes": self.disk_bytes}

    @property
    def tokens(self) -> int:
        """Number of cached tokens."""
        return sum(map(len, self._memory)) + sum(map(len, self._disk))

    @torch.no_grad()
    def _run(self, group: Sequence[Ids]) -> list[Tensor]:
        """Return the keys and values of texts, (L, 2, H, C, D) each, of L layers and H heads of width D."""
        parts = in_parts(
            lambda part: self._run_whole([group[at] for at in part]), list(map(len, group)), backbone=self.backbone
        )
        return [entry for part in parts for entry in part]

    def _run_whole(self, group: Sequence[Ids]) -> list[Tensor]:
        rows = [Example(ids, (), (), (), 0) for ids in group]
        batch = collate(rows, PromptBatch.none(self.backbone.width)).to(self.backbone.device)
        memory = self.backbone.remember(
            self.backbone.embed(batch.token_ids), mask=batch.mask, positions=batch.positions
        )
        whole = torch.stack([torch.stack(pair) for pair in memory.layers])  # (L, 2, B, H, C, D)
        self.token_bytes = whole[:, :, 0, :, 0].nbytes
        return [whole[:, :, row, :, : len(ids)].clone() for row, ids in enumerate(group)]

    def _write(self, ids: Ids, part: Tensor) -> bool:
        """Write an entry to a file, and return whether that could be done. After a failure nothing more is written."""
        if self.disk_bytes + part.nbytes > self.disk_limit:
            return False
        try:
            if shutil.disk_usage(tempfile.gettempdir()).free < part.nbytes + SPARED_DISK_BYTES:
                return False
            file = self._file()
            self._disk[ids] = OnDisk(file, self._files[file], part.shape, part.dtype, part.nbytes)
            left = memoryview(part.cpu().contiguous().view(torch.uint8).numpy().data.cast("B"))
            file.seek(self._files[file])
            while left:
                left = left[file.write(left) :]
            self._files[file] += part.nbytes
        except OSError as error:
            self._disk.pop(ids, None)
            self.disk_limit = 0
            logger.warning("the KV cache cannot be written to the disk (%s); what has no room is computed anew", error)
            return False
        return True

    def _file(self) -> IO[bytes]:
        """Return the file that is written to: the last one, or a new one if that has its share."""
        last = next(reversed(self._files), None)
        if last is None or self._files[last] > self.disk_limit / FILES:
            last = tempfile.TemporaryFile(buffering=0, prefix="ptuning-cache-")  # noqa: SIM115 - open beyond this call
            self._files[last] = 0
        return last

    def _read(self, entry: OnDisk) -> Tensor | None:
        """Return an entry from its file; None if it cannot be read."""
        data = bytearray(entry.size)
        left = memoryview(data)
        try:
            entry.file.seek(entry.at)
            while left:
                read = cast("io.RawIOBase", entry.file).readinto(left)
                if not read:
                    return None
                left = left[read:]
        except OSError:
            return None
        return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape).to(self.backbone.device)

    def find(self, wanted: Iterable[Ids]) -> dict[Ids, Tensor]:
        """Return the keys and values of texts (:meth:`ids_of`), (L, 2, H, C, D) each; those that are not cached are
        computed now.
        """
        parts: dict[Ids, Tensor] = {}
        missing = []
        for ids in wanted:
            part = self._memory.get(ids)
            if part is None and ids in self._disk:
                part = self._read(self._disk[ids])
            if part is None:
                missing.append(ids)
            else:
                parts[ids] = part
        for group in text_groups(missing, self.backbone.side):
            parts |= dict(zip(group, self._run(group), strict=True))
        return parts


def free_bytes(device: torch.device) -> int:
    """Return the free memory of the device that a backbone runs on."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def cacheable_ids(example: Example) -> Ids:
    """Return the token ids before the first slot, or before the first scored position in a row without slots; none
    after a learned prefix.
    """
    if example.prefix_length:
        return ()
    return example.token_ids[: min((*example.slot_positions[:1], *example.logit_positions[:1]))]


def drop_prefix(example: Example, start: int) -> Example:
    """Return a row without its first ``start`` tokens and slots."""
    return replace(
        example,
        token_ids=example.token_ids[start:],
        slot_positions=tuple(position - start for position in example.slot_positions if position >= start),
        logit_positions=tuple(position - start for position in example.logit_positions),
        unread=tuple(position - start for position in example.unread),
    )


def text_groups(texts: Sequence[Ids], side: Callable[[int], bool]) -> Iterator[list[Ids]]:
    """Yield texts that share a forward pass, of one ``side`` and within the bounds of a pass, the shortest first."""
    for same in one_sided(list(map(len, texts)), side):
        for chosen in batches([[Example(texts[index], (), (), (), 0)] for index in same]):
            yield [texts[same[place]] for place in chosen]
