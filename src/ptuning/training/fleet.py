"""Scheduler of a fleet: trains many prompts together on one frozen backbone, and resumes after an interruption."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ptuning.backbone.backbone import Backbone
from ptuning.engine.memory import total_bytes
from ptuning.engine.objective import ScoringRequest
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.engine.processes import this_writes, wait_for_all
from ptuning.errors import ConfigError, FileError, PTuningError, TrainingError
from ptuning.files import Unchecked, make_folder, read_json, write_json
from ptuning.names import FLEET_CHECKPOINT, STATE_FILE, remove
from ptuning.progress import Interrupted, OnProgress, Progress
from ptuning.template.encode import Example
from ptuning.training.encoders.together import copied_bytes
from ptuning.training.step import Step, take_steps
from ptuning.training.trainer import SAVING_PAUSE, Trainer

logger = logging.getLogger(__name__)

# Most prompts that train at the same time; each has an encoder and an optimizer in memory.
AT_ONCE = 16
# Share of the device's memory for encoders and optimizer states, so that those of wide backbones do not fill it.
STATE_SHARE = 0.25
# Each weight has a gradient and two moments beside it, all float32.
BYTES_PER_WEIGHT = 16


@dataclass(frozen=True)
class Member:
    """A prompt to be trained: at most ``epochs`` passes over ``train``; the best one on ``dev`` is chosen.

    ``make`` returns its trainer, which uses the given KV cache.
    """

    name: str
    make: Callable[[PrefixCache], Trainer]
    train: Sequence[ScoringRequest]
    dev: Sequence[ScoringRequest]
    epochs: int


@dataclass(eq=False)
class _Live:
    member: Member
    trainer: Trainer
    course: Iterator[Step]
    step: Step | None = None


@dataclass
class _State:
    """Contents of the checkpoint: name -> folder of each prompt in training, in order; names of those done."""

    live: dict[str, str] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)


class Fleet:
    """Prompts that train together. Their rows share passes; each prompt has its own encoder, optimizer, data order and
    development part. When a prompt finishes, the next one starts.

    Which prompts train together decides how sums are rounded. So a checkpoint holds all of them at one moment, and a
    resumed fleet continues with the same prompts. Those that finished after that moment finish again, with the same
    result.

    Args:
        at_once: Most prompts that train at the same time.
        memory_share, disk_bytes: As of :class:`~ptuning.engine.prefix_cache.PrefixCache`.
        checkpoint: Folder of the checkpoint; None writes none.
        checkpoint_seconds: Time between checkpoints, which take at most a twentieth of the time.

    Raises:
        ConfigError: If two prompts have the same name, or ``at_once`` is below 1.
    """

    def __init__(
        self,
        backbone: Backbone,
        members: Sequence[Member],
        *,
        at_once: int = AT_ONCE,
        memory_share: float,
        disk_bytes: int = 0,
        checkpoint: Path | None = None,
        checkpoint_seconds: float,
    ) -> None:
        if at_once < 1:
            raise ConfigError(f"at_once is {at_once}; it must be 1 or more")
        self.members = {member.name: member for member in members}
        if len(self.members) < len(members):
            raise ConfigError("two prompts of a fleet have the same name")
        self.backbone = backbone
        self.at_once = at_once
        self.checkpoint = checkpoint
        self._cache_room = memory_share, disk_bytes
        self._pause = checkpoint_seconds
        self._saved_at, self._saving_seconds = time.monotonic(), 0.0
        self._live: list[_Live] = []
        self._ended: dict[str, Trainer] = {}  # finished, but their results are not yet written
        self._finished: list[str] = []

    def resume(self) -> list[str] | None:
        """Return the names of the prompts that the checkpoint lists as done; None if there is none.

        Raises:
            TrainingError: If it is damaged.
        """
        state = self._read()
        return None if state is None else [name for name in state.finished if name in self.members]

    def release(self, name: str) -> None:
        """Mark a prompt as done: its result is written, and it is not trained again."""
        self._ended.pop(name, None)
        self._finished.append(name)

    def run(
        self, *, report: OnProgress | None = None, should_stop: Callable[[], bool] | None = None
    ) -> Iterator[tuple[str, Trainer | TrainingError]]:
        """Train, from the start or from the checkpoint, and yield each prompt that ends: its trainer, or its error.

        Prompts that were released are skipped. ``should_stop`` is asked after every step, and after every pass that
        fills the KV cache.

        Raises:
            Interrupted: If ``should_stop`` returned true; a checkpoint was written.
            TrainingError: If several processes train, or the checkpoint is of other settings.
        """
        state = self._read() or _State()
        wait_for_all()  # all have read it
        order = [name for name in (*state.live, *self.members) if name in self.members and name not in self._finished]
        waiting = deque(self.members[name] for name in dict.fromkeys(order))
        folders = {name: self._folder / folder for name, folder in state.live.items()} if self.checkpoint else {}
        work = _Work(sum(map(_records, waiting)))
        if self.checkpoint is not None and not state.live:
            self._save({})
        share, disk = self._cache_room
        with PrefixCache(self.backbone, memory_share=share, disk_bytes=disk) as prefix_cache:
            while waiting or self._live:
                while waiting and self._has_room(goes_on=waiting[0].name in folders):
                    one = self._begin(waiting.popleft(), prefix_cache, folders, report, should_stop)
                    try:
                        yield from self._go_on([one], {}, work)
                    except Interrupted:  # before its first step: it starts anew when resumed
                        self._between({}, lambda: True)
                if not self._live:
                    continue
                failed = self._take_steps()
                self._between(failed, should_stop)
                if report is not None:
                    for progress in self._progress(work, failed):
                        report(progress)
                before = len(self._live)
                yield from self._go_on(self._live, failed, work)
                if prefix_cache.is_used and len(self._live) < before:
                    prefix_cache.keep_only(row for one in self._live for row in _rows(one.member))
        if self.checkpoint is not None and this_writes():
            remove(self.checkpoint, FLEET_CHECKPOINT)

    def _take_steps(self) -> dict[Trainer, TrainingError]:
        """Take the next step of every prompt in training; return the errors of those that failed."""
        failed: dict[Trainer, TrainingError] = {}
        steps = [one.step for one in self._live if one.step is not None]
        for one, step, outcome in zip(self._live, steps, take_steps(steps), strict=True):
            if isinstance(outcome, TrainingError):
                failed[one.trainer] = outcome
            else:
                one.trainer.count(step, outcome)
        return failed

    def _has_room(self, *, goes_on: bool) -> bool:
        """Whether one more prompt may start. A prompt of the checkpoint always may, and the device's total memory
        counts, not the free one, so that a resumed fleet decides in the same way.
        """
        if not self._live or goes_on:
            return True
        device = self.backbone.device
        largest = max(
            one.trainer.learner.trainable_parameters
            * (BYTES_PER_WEIGHT + copied_bytes(one.trainer.learner.encoder, device))
            for one in self._live
        )
        fits = (len(self._live) + 1) * largest <= STATE_SHARE * total_bytes(device)
        return fits and len(self._live) < self.at_once

    def _begin(
        self,
        member: Member,
        prefix_cache: PrefixCache,
        folders: dict[str, Path],
        report: OnProgress | None,
        should_stop: Callable[[], bool] | None,
    ) -> _Live:
        trainer = member.make(prefix_cache)
        if trainer.learner.ranks.size > 1:
            raise TrainingError("a fleet trains in one process; train its prompts one by one, or start one process")
        if member.name in folders and not trainer.load_from(folders[member.name]):
            raise TrainingError(f"the checkpoint {folders[member.name]} is gone; start anew with --overwrite")

        def told(progress: Progress) -> None:
            if report is not None:
                report(replace(progress, note=f"{member.name}: {progress.note}", name=member.name))

        return _Live(member, trainer, trainer.steps(member.train, member.dev, report=told, should_stop=should_stop))

    def _go_on(
        self, ones: Sequence[_Live], failed: Mapping[Trainer, TrainingError], work: _Work
    ) -> Iterator[tuple[str, Trainer | TrainingError]]:
        still: list[_Live] = [one for one in self._live if one not in ones]
        ended: list[tuple[str, Trainer | TrainingError]] = []
        for one in ones:
            outcome = failed.get(one.trainer) or _advance(one)
            if outcome is None:
                still.append(one)
                continue
            work.ended += _records(one.member)
            ended.append((one.member.name, outcome))
            if isinstance(outcome, Trainer):
                self._ended[one.member.name] = outcome
        self._live = still
        yield from ended

    def _between(self, failed: Mapping[Trainer, TrainingError], should_stop: Callable[[], bool] | None) -> None:
        """Write a checkpoint if it is due or training is to stop; then stop."""
        stops = should_stop is not None and should_stop()
        pause = max(self._pause, SAVING_PAUSE * self._saving_seconds)
        if self.checkpoint is not None and (stops or time.monotonic() - self._saved_at > pause):
            going = {one.member.name: one.trainer for one in self._live if one.trainer not in failed}
            self._save({**self._ended, **going})
        if stops:
            done, everything = len(self._finished), len(self.members)
            raise Interrupted(f"stopped with {done} of {everything} prompts done and {len(self._live)} in training")

    def _progress(self, work: _Work, failed: Collection[Trainer]) -> Iterator[Progress]:
        """Yield the progress of the fleet, once with the numbers of each prompt that took a step."""
        done = work.ended + sum(
            (one.trainer.state.epoch - 1) * len(one.member.train) + one.trainer.state.position for one in self._live
        )
        note = f"{len(self._finished)} of {len(self.members)} prompts done, {len(self._live)} in training"
        for one in self._live:
            if one.trainer not in failed:
                yield Progress("train", done, work.total, note, one.member.name, one.trainer.numbers)

    @property
    def _folder(self) -> Path:
        assert self.checkpoint is not None
        return self.checkpoint

    def _read(self) -> _State | None:
        if self.checkpoint is None or not (self.checkpoint / STATE_FILE).is_file():
            return None
        try:
            saved = Unchecked(read_json(self.checkpoint / STATE_FILE))
            live = {name: one.text() for name, one in saved.at("live").table().items()}
            return _State(live, saved.at("finished").texts())
        except PTuningError as error:
            raise TrainingError(
                f"the checkpoint {self.checkpoint / STATE_FILE} is damaged ({error}); start anew with --overwrite"
            ) from error

    def _save(self, trainers: Mapping[str, Trainer]) -> None:
        """Write a checkpoint of all prompts: their files first, then the state file that makes them count.

        If it cannot be written, training goes on, the checkpoint before stays, and the next one is tried when it is
        due. Trained in another way, the prompts would be rounded in another way.
        """
        began = time.monotonic()
        if not this_writes():
            self._saved_at = began
            return
        try:
            self._write(self._save_all(trainers))
        except FileError as error:
            logger.warning("no checkpoint was written, and training goes on: %s", error)
        self._saved_at = time.monotonic()
        self._saving_seconds = self._saved_at - began

    def _save_all(self, trainers: Mapping[str, Trainer]) -> dict[str, str]:
        """Write the files of trainers into a new folder; return the folder of each."""
        taken = {entry.name for entry in self._folder.iterdir()} if self._folder.is_dir() else set()
        place = next(name for name in map("at-{}".format, itertools.count()) if name not in taken)
        folders = {name: f"{place}/{number}" for number, name in enumerate(trainers)}
        for name, trainer in trainers.items():
            trainer.save_to(self._folder / folders[name])
        return folders

    def _write(self, folders: Mapping[str, str]) -> None:
        make_folder(self._folder)
        write_json(self._folder / STATE_FILE, {"live": dict(folders), "finished": list(self._finished)})
        kept = {folder.partition("/")[0] for folder in folders.values()}
        for entry in self._folder.iterdir():
            layout = FLEET_CHECKPOINT.folder(entry.name)
            if layout is not None and entry.name not in kept:
                remove(entry, layout)


@dataclass
class _Work:
    """Records that are read in all, and those of prompts that have ended."""

    total: int
    ended: int = 0


def _rows(member: Member) -> Iterator[Example]:
    return (example for item in (*member.train, *member.dev) for example in item.inputs)


def _records(member: Member) -> int:
    return member.epochs * len(member.train)


def _advance(one: _Live) -> Trainer | TrainingError | None:
    try:
        one.step = next(one.course)
    except StopIteration:
        return one.trainer
    except TrainingError as error:
        return error
    return None
