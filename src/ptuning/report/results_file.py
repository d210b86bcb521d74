"""The files of a comparison: ``results.json`` (:class:`Results`) and those of a cell, with one class for each part.

Experiments fill the classes in and write them; pydantic checks what the report reads.
"""

import dataclasses
import functools
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ptuning.errors import FileError
from ptuning.files import (
    FileModel,
    Json,
    WholeNumber,
    read_json,
    read_json_lines,
    validate,
    write_json,
)
from ptuning.metrics import Answer, primary
from ptuning.names import CELLS_FOLDER, LEARNED, MANUAL, RANDOM_WEIGHTS, RESULTS_FILE, RUN_FILE, is_folder_name
from ptuning.records import References, plain
from ptuning.statistics import Score

FORMAT_VERSION = 1
AGAIN = "run the comparison again"  # the advice about a damaged file
Status = Literal["done", "failed", "waiting"]
# The methods of the manual prompt. A run without the first is compared with the second.
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
    seed: WholeNumber

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
    """The outcome of a cell: its scores on the test part by name.

    ``n`` is the number of test records, or of groups of them that are scored together, ``seconds`` the time taken by
    the start that finished it, ``tried`` the number of settings compared on the development part, and ``run`` the
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
    """The results of a comparison.

    Args:
        suite: ``compare``, ``lama`` or ``superglue``.
        backbone: Name, fingerprint, size and the like of the backbone.
        settings: The settings of the comparison, and those of training that act on one of its methods.
        task_info: Task -> templates, data and the like.
        methods: Method -> what it is.
        warnings: Warnings of trainings; None unless the suite gathers them.
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
    backbone: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    task_info: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
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
        """Return the content of ``results.json``; a part that this comparison does not have is left out."""
        left_out = {name for name in ("agreement", "warnings", "by_value") if getattr(self, name) in (None, {})}
        value = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return {name: part for name, part in value.items() if name not in {"folder", *left_out}}

    def write(self) -> None:
        """Write ``results.json``."""
        write_json(self.folder / RESULTS_FILE, self.to_json())

    @property
    def failed(self) -> list[CellRecord]:
        """The cells that failed."""
        return [cell for cell in self.cells if cell.status == "failed"]

    @property
    def primary(self) -> str:
        """The most important score."""
        return primary(name for methods in self.tasks.values() for scores in methods.values() for name in scores)

    @property
    def overall(self) -> ScoreTable:
        """Every method's scores over all tasks: the means over several, or those of the only one."""
        return next(iter(self.tasks.values())) if len(self.tasks) == 1 else self.macro

    @property
    def unit(self) -> str:
        """The unit that a task's n counts."""
        return {"compare": "records", "superglue": "rows"}.get(self.suite, "facts")

    @property
    def overall_unit(self) -> str:
        """The unit that n counts in the scores over all tasks."""
        return self.unit if len(self.tasks) == 1 else "tasks"

    @property
    def shown_types(self) -> Mapping[str, ScoreTable]:
        """The scores by type of relation; none if all tasks are of one type, whose means those over all tasks are."""
        counts = [score.n for table in self.by_type.values() for row in table.values() for score in row.values()]
        return {} if len(self.by_type) == 1 and max(counts, default=0) >= len(self.tasks) else self.by_type

    @property
    def pair(self) -> tuple[str, str]:
        """The methods of the written and of the learned prompt, as far as this run has them."""
        controls = set(self.controls)
        learned = [name for name, method in self.methods.items() if method.learns_slots and name not in controls]
        written = next((name for name in WRITTEN if name in self.overall), MANUAL)
        return written, next((name for name in learned if name in self.overall), LEARNED)

    @property
    def ranked(self) -> list[str]:
        """The methods by their primary score over all tasks, the best first."""
        name = self.primary
        scores = {method: scores[name].value for method, scores in self.overall.items() if name in scores}
        return sorted(scores, key=lambda method: -scores[method])

    def difference(self, first: str, second: str, score: str) -> Score | None:
        """Return a paired difference of two methods, in either direction of the file; None if it has none."""
        difference = self.differences.get(f"{first} - {second}", {}).get(score)
        back = self.differences.get(f"{second} - {first}", {}).get(score)
        if difference is None and back is not None:
            return Score(-back.value, -back.high, -back.low, back.n)
        return difference

    @property
    def controls(self) -> list[str]:
        """The methods that ran on a backbone with random weights."""
        return [name for name in self.ordered(self.overall) if name.endswith(RANDOM_WEIGHTS)]

    def best_first(self, names: Iterable[str]) -> list[str]:
        """Return names of methods, each once, the best over all tasks first."""
        ranked = self.ranked
        return sorted(self.ordered(names), key=lambda name: ranked.index(name) if name in ranked else len(ranked))

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Return names of methods, each once, in the order of the file."""
        present = dict.fromkeys(names)
        return [name for name in {**self._listed, **present} if name in present]

    @functools.cached_property
    def _listed(self) -> Mapping[str, None]:
        return dict.fromkeys([*self.methods, *(cell.method for cell in self.cells)])

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
        cells: dict[tuple[str, str | None], list[CellRecord]] = defaultdict(list)
        for cell in sorted(self.cells, key=lambda cell: cell.seed):
            if cell.status == "done":
                cells[cell.method, cell.task].append(cell)
                cells[cell.method, None].append(cell)
        return cells

    def folder_of(self, cell: CellRecord) -> Path:
        """Return the folder of a cell's files."""
        return self.folder / cell.run


def read_results(folder: str | Path) -> Results:
    """Read ``results.json`` in a folder; raise FileError if it is missing, damaged, or of another format."""
    path = Path(folder) / RESULTS_FILE
    if not os.path.isfile(path):
        raise FileError(f"there is no {path}; a report is built from the folder that a comparison wrote")
    value = read_json(path)
    version = value.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise FileError(
            f"{path} has format_version {json.dumps(version)}, and this version of ptuning reads {FORMAT_VERSION}; "
            "build the report with the version that wrote it"
        )
    where = f"{path} is damaged"
    try:
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise FileError(f"{where}: it has a number that is not finite; {AGAIN}") from error
    results = validate(Results, {"cells": None, "tasks": None, **value}, where, advice=AGAIN)
    for number, cell in enumerate(results.cells, start=1):
        place = PurePosixPath(cell.run)
        if place.is_absolute() or ".." in place.parts:
            raise FileError(f"{where}: 'cells #{number}.run' must be inside the folder of the results; {AGAIN}")
    return dataclasses.replace(results, folder=Path(folder))


@dataclass(frozen=True)
class AnsweredRow:
    """A row of a test part with the answer of a method: a line of ``predictions.jsonl``.

    ``target`` is None where labels are not known, ``idx`` the row's number or numbers in the data set, and ``group``
    what it is scored together with. ``choices`` are the texts to choose among, where the row brings them.
    """

    record: Mapping[str, str]
    target: str | None
    answer: Answer
    idx: Json = None
    group: str | None = None
    choices: Sequence[str] = ()

    @property
    def right(self) -> Sequence[str]:
        """The target as the list of right answers that metrics read."""
        return (self.target or "",)

    def to_json(self) -> dict[str, Json]:
        """Return the line."""
        optional: dict[str, Json] = {"idx": self.idx, "group": self.group, "choices": list(self.choices) or None}
        return {
            "record": plain(self.record),
            **{name: value for name, value in optional.items() if value is not None},
            "target": self.target,
            "prediction": self.answer.text,
            "rank": self.answer.rank,
            "hit": self.answer.hit,
            "log_prob": self.answer.log_prob,
            **({} if self.answer.known else {"known": False}),
        }


class _Line(FileModel, allow_inf_nan=True):
    """A line of ``predictions.jsonl`` as it is read; the log-probability of an impossible answer is -Infinity."""

    record: dict[str, str | list[str]]
    hit: bool
    target: str | None = None
    prediction: str = ""
    rank: int | None = None
    log_prob: float | None = None
    known: bool = True
    idx: Any = None
    group: str | None = None
    choices: tuple[str, ...] = ()


class _Epoch(FileModel):
    epoch: WholeNumber = 0
    dev_score: float | None = None


class _Curve(FileModel):
    """The learning curve in ``run.json``."""

    history: tuple[_Epoch, ...] = ()
    start: _Epoch = _Epoch()


def read_answers(path: Path) -> list[AnsweredRow]:
    """Read ``predictions.jsonl``; raise FileError if it is missing or damaged."""
    rows = []
    for number, value in enumerate(read_json_lines(path), start=1):
        line = validate(_Line, value, f"{path}, row {number} is damaged", advice=AGAIN)
        record = {name: References(text) if isinstance(text, list) else text for name, text in line.record.items()}
        answer = Answer(line.prediction, line.hit, line.rank, line.log_prob, line.known)
        rows.append(AnsweredRow(record, line.target, answer, line.idx, line.group, line.choices))
    return rows


def read_curve(folder: Path) -> list[tuple[int, float]] | None:
    """Read a cell's learning curve: (epoch, development score), epoch 0 being the start; None without ``run.json``."""
    if not (folder / RUN_FILE).is_file():
        return None
    value = read_json(folder / RUN_FILE)
    curve = validate(_Curve, value, f"{folder / RUN_FILE} is damaged", advice=AGAIN)
    rows = (curve.start, *curve.history) if curve.history else ()
    return [(row.epoch, row.dev_score) for row in rows if row.dev_score is not None]
