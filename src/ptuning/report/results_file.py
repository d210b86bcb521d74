"""The schema of ``results.json``: one data class for each part, whose fields are the keys of the file.

:class:`Results` is the whole file. Experiments fill it in and write it; the report reads it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from ptuning.errors import FileError
from ptuning.files import Json, Unchecked, read_json, write_json
from ptuning.metrics import primary
from ptuning.names import CELLS_FOLDER, LEARNED, MANUAL, RANDOM_WEIGHTS, RESULTS_FILE, is_folder_name
from ptuning.statistics import Score

FORMAT_VERSION = 1
AGAIN = "run the benchmark again"  # the advice about a damaged file
Status = Literal["done", "failed", "waiting"]
# The methods of the written prompt. A run that lacks the first is compared with the second.
WRITTEN = (MANUAL, "manual-restricted")


@dataclass(frozen=True)
class ScoreWithSpread(Score):
    """A mean with its 95 % interval over ``n`` rows or tasks, and its deviation and lowest score over several seeds."""

    std: float | None = None
    seeds: int = 1
    lowest: float | None = None


Scores = Mapping[str, ScoreWithSpread]  # name of a score -> value
ScoreTable = Mapping[str, Scores]  # method -> its scores


@dataclass(frozen=True)
class Cell:
    """One method on one task with one seed."""

    task: str
    method: str
    seed: int

    @property
    def folder(self) -> str:
        """Its folder, relative to that of the results; a FileError if a name, which data may bring, is no folder's."""
        for name in (self.task, self.method.removesuffix(RANDOM_WEIGHTS)):
            if not is_folder_name(name, spaces=True):
                raise FileError(
                    f"'{name}' cannot be the name of a task or a method: it becomes a folder; use letters, digits, "
                    "spaces and - _ . + ="
                )
        return f"{CELLS_FOLDER}/{self.task}/{self.method}/seed-{self.seed}"


@dataclass(frozen=True)
class CellRecord(Cell):
    """The outcome of a cell: scores on the test part by name, and the fields of a cell's result.

    ``n`` is the number of test records, or of groups of them that are scored together, ``seconds`` the time taken by
    the start that finished it, ``tried`` how many settings were compared on the development part, and ``run`` the
    folder of its files, relative to that of the results.
    """

    status: Status
    scores: Mapping[str, float]
    n: int
    seconds: float
    tried: int
    run: str
    error: str | None


@dataclass(frozen=True)
class MethodInfo:
    """A method in a few words, whether it trains weights, and whether it learns a prompt."""

    describe: str = ""
    trained: bool = False
    learns_slots: bool = False


@dataclass(frozen=True)
class ChosenSetting(Cell):
    """The setting that a cell chose: its shares of right rows on the development part and on the reported part."""

    dev: float
    test: float


@dataclass(frozen=True)
class Agreement:
    """How well the development score of a choice predicts its reported score.

    ``correlation`` is the rank correlation over cells after each task's means are subtracted, None where it is
    undefined. ``mean_gap`` is the mean of the development share minus the reported one.
    """

    cells: Sequence[ChosenSetting]
    correlation: float | None
    mean_gap: float | None


@dataclass(frozen=True)
class TrainingWarning(Cell):
    """Something about the training of a cell that a reader should know."""

    text: str


@dataclass(frozen=True)
class Results:
    """The results of an experiment.

    Args:
        suite: ``compare``, ``lama`` or ``superglue``.
        backbone: Name, fingerprint, size and the like of the backbone.
        settings: Every setting of the experiment and of training.
        task_info: Task -> templates, data and the like.
        methods: Method -> what it is.
        warnings: Warnings of trainings; None unless the experiment gathers them.
        cells: All cells, those waiting and failed included.
        tasks: Task -> method -> score on its test part.
        macro: Method -> score: means over the tasks.
        by_type: Type of relation -> method -> score: means over the tasks of the type.
        by_value: Value of a field of the test records -> method -> score on the records that have it.
        differences: ``A - B`` -> score: paired difference of two methods.
        folder: The folder of the file; not in the file.
    """

    suite: str
    command: str | None = None
    backbone: Mapping[str, Json] = field(default_factory=dict)
    settings: Mapping[str, Json] = field(default_factory=dict)
    versions: Mapping[str, Json] = field(default_factory=dict)
    task_info: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    methods: Mapping[str, MethodInfo] = field(default_factory=dict)
    agreement: Agreement | None = None
    warnings: Sequence[TrainingWarning] | None = None
    cells: Sequence[CellRecord] = ()
    tasks: Mapping[str, ScoreTable] = field(default_factory=dict)
    macro: ScoreTable = field(default_factory=dict)
    by_type: Mapping[str, ScoreTable] = field(default_factory=dict)
    by_value: Mapping[str, ScoreTable] = field(default_factory=dict)
    differences: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    folder: Path = Path()

    def to_json(self) -> dict[str, Json]:
        """Return the content of ``results.json``; a part that this experiment does not have is left out."""
        left_out = {name for name in ("agreement", "warnings", "by_value") if getattr(self, name) in (None, {})}
        found = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return {name: value for name, value in found.items() if name not in {"folder", *left_out}}

    @classmethod
    def from_json(cls, value: Unchecked, *, folder: Path = Path()) -> Results:
        """Read what :meth:`to_json` returned; raise FileError if a part is missing or is not what it must be."""
        missing = [name for name in ("suite", "cells", "tasks") if name not in value.mapping()]
        if missing:
            raise value.failure(f"it has no {', '.join(missing)}")
        for one in value.at("cells").items():
            path = PurePosixPath(one.at("run").text())
            if path.is_absolute() or ".." in path.parts:
                raise one.at("run").wrong("a folder inside that of the results")
        return value.to(cls, folder=folder)

    def write(self) -> None:
        """Write ``results.json``."""
        write_json(self.folder / RESULTS_FILE, self.to_json())

    @property
    def failed(self) -> list[CellRecord]:
        """The cells that failed."""
        return [one for one in self.cells if one.status == "failed"]

    @property
    def primary(self) -> str:
        """The score to show where there is room for one."""
        return primary(name for methods in self.tasks.values() for scores in methods.values() for name in scores)

    @property
    def overall(self) -> ScoreTable:
        """Every method's scores over all tasks: the means over several, or those of the only one."""
        return next(iter(self.tasks.values())) if len(self.tasks) == 1 else self.macro

    @property
    def unit(self) -> str:
        """What a task's n counts."""
        return {"compare": "records", "superglue": "rows"}.get(self.suite, "facts")

    @property
    def overall_unit(self) -> str:
        """What n counts in the scores over all tasks."""
        return self.unit if len(self.tasks) == 1 else "tasks"

    @property
    def shown_types(self) -> Mapping[str, ScoreTable]:
        """The scores by type of relation; none if all tasks are of one type, whose means those over all tasks are."""
        counts = [score.n for table in self.by_type.values() for found in table.values() for score in found.values()]
        return {} if len(self.by_type) == 1 and max(counts, default=0) >= len(self.tasks) else self.by_type

    @property
    def pair(self) -> tuple[str, str]:
        """The methods of the written and of the learned prompt, as far as this run has them."""
        controls = set(self.controls)
        learned = [name for name, one in self.methods.items() if one.learns_slots and name not in controls]
        written = next((name for name in WRITTEN if name in self.overall), MANUAL)
        return written, next((name for name in learned if name in self.overall), LEARNED)

    @property
    def ranked(self) -> list[str]:
        """The methods by their primary score over all tasks, the best first."""
        scores = {method: found[self.primary].value for method, found in self.overall.items() if self.primary in found}
        return sorted(scores, key=lambda method: -scores[method])

    def difference(self, one: str, other: str, score: str) -> Score | None:
        """Return a paired difference of two methods, whichever way round the file has it; None if it has none."""
        found = self.differences.get(f"{one} - {other}", {}).get(score)
        if found is None:
            back = self.differences.get(f"{other} - {one}", {}).get(score)
            found = None if back is None else Score(-back.value, -back.high, -back.low, back.n)
        return found

    @property
    def controls(self) -> list[str]:
        """The methods that ran on a backbone with random weights."""
        return [name for name in self.ordered(self.overall) if name.endswith(RANDOM_WEIGHTS)]

    def best_first(self, names: Iterable[str]) -> list[str]:
        """Return names of methods, each once, the best over all tasks first: what a narrow screen shows of a table."""
        found, ranked = self.ordered(names), self.ranked
        return sorted(found, key=lambda name: ranked.index(name) if name in ranked else len(ranked))

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Return names of methods, each once, in the order in which the file lists the methods."""
        present = dict.fromkeys(names)
        listed = self._listed
        return [*(name for name in listed if name in present), *(name for name in present if name not in listed)]

    @functools.cached_property
    def _listed(self) -> Mapping[str, None]:
        """The methods in the order of the file, each once."""
        return dict.fromkeys([*self.methods, *(one.method for one in self.cells)])

    def named(self, task: str) -> str:
        """Return the name of a task with its label."""
        label = self.task_info.get(task, {}).get("label")
        return f"{task} ({label})" if label else task

    def done(self, method: str, task: str | None = None) -> list[CellRecord]:
        """Return the finished cells of a method, on one task or on all, in order of their seeds."""
        return self._done.get((method, task), [])

    @functools.cached_property
    def _done(self) -> Mapping[tuple[str, str | None], list[CellRecord]]:
        """Method and task, or method and None for all tasks -> the finished cells in order of their seeds."""
        found: dict[tuple[str, str | None], list[CellRecord]] = defaultdict(list)
        for one in sorted(self.cells, key=lambda one: one.seed):
            if one.status == "done":
                found[one.method, one.task].append(one)
                found[one.method, None].append(one)
        return found

    def folder_of(self, cell: CellRecord) -> Path:
        """Return the folder of a cell's files."""
        return self.folder / cell.run


def read_results(folder: str | Path) -> Results:
    """Read ``results.json`` in a folder; raise FileError if it is missing, damaged, or of another format."""
    path = Path(folder) / RESULTS_FILE
    if not os.path.isfile(path):
        raise FileError(f"there is no {path}; a report is built from the folder that a benchmark wrote")
    value = read_json(path)
    version = value.get("format_version")
    if version != FORMAT_VERSION:
        raise FileError(
            f"{path} has format_version {json.dumps(version)}, and this version of ptuning reads {FORMAT_VERSION}; "
            "build the report with the version that wrote it"
        )
    return Results.from_json(Unchecked(value, f"{path} is damaged", advice=AGAIN), folder=Path(folder))
