"""What a benchmark left, read back and checked: ``results.json`` and the files of its cells. Knows nothing of pages,
and nothing of what wrote them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ptuning.errors import FileError
from ptuning.files import Json, read_json, read_json_lines
from ptuning.metrics import primary
from ptuning.names import LEARNED_BY_TUNE, MANUAL, PREDICTIONS_FILE, RANDOM_WEIGHTS, RESULTS_FILE, RUN_FILE
from ptuning.statistics import Score

FORMAT_VERSION = 1
STATUSES = ("done", "failed", "waiting")
# The pair that the paper is about; where a run lacks the first of a line, the next stands in.
WRITTEN, LEARNED = (MANUAL, "manual-restricted"), tuple(LEARNED_BY_TUNE.values())


@dataclass(frozen=True)
class Estimate(Score):
    """A score with its spread over trainings.

    Args:
        std: Standard deviation over seeds, where there are several.
        seeds: How many trainings it is a mean of.
        lowest: The lowest of them, where there are several.
    """

    std: float | None = None
    seeds: int | None = None
    lowest: float | None = None


@dataclass(frozen=True)
class CellRecord:
    """One method on one task with one seed.

    Args:
        task: Name of the task.
        method: Name of the method.
        seed: Seed of the training.
        status: ``done``, ``failed`` or ``waiting``.
        seconds: How long it took.
        tried: How many settings were tried on the development part.
        run: Folder of the run, relative to that of the results.
        error: Why it failed.
    """

    task: str
    method: str
    seed: int
    status: str
    seconds: float | None
    tried: int | None
    run: str | None
    error: str | None


@dataclass(frozen=True)
class Agreement:
    """How the development score of what was chosen compares with the reported one, both as shares of right rows.

    Args:
        points: Task, method, development and reported share of each cell.
        correlation: Rank correlation over cells, tasks' means taken off; None where it has no meaning.
        mean_gap: Mean of the development share less the reported one.
    """

    points: Sequence[tuple[str, str, float, float]]
    correlation: float | None
    mean_gap: float | None


@dataclass(frozen=True)
class Wording:
    """One written pattern of a relation, with the score of each method that started from it."""

    pattern: str
    scores: Mapping[str, Estimate]


@dataclass(frozen=True)
class Spread:
    """How far the scores of a relation's wordings lie apart.

    Args:
        min, max, range: Of the scores, as fractions.
        std: Their standard deviation; None for a single wording.
        patterns: How many wordings these are.
    """

    min: float
    max: float
    range: float
    std: float | None
    patterns: int


@dataclass(frozen=True)
class Relation:
    """A relation in several wordings, and per method how far their scores lie apart."""

    wordings: Sequence[Wording]
    spread: Mapping[str, Spread]


@dataclass(frozen=True)
class Answer:
    """A test record with what a method answered."""

    fields: Mapping[str, str]
    target: str
    prediction: str
    rank: int | None
    hit: bool


@dataclass(frozen=True)
class Findings:
    """Everything in ``results.json``; its parts are named as they are there.

    ``tasks``, ``macro`` and ``by_type`` lead from names to method to score name to estimate.
    """

    folder: Path
    suite: str
    command: str | None
    backbone: Mapping[str, Json]
    settings: Mapping[str, Json]
    versions: Mapping[str, Json]
    task_info: Mapping[str, Mapping[str, Json]]
    methods: Mapping[str, str]
    cells: Sequence[CellRecord]
    tasks: Mapping[str, Mapping[str, Mapping[str, Estimate]]]
    macro: Mapping[str, Mapping[str, Estimate]]
    by_type: Mapping[str, Mapping[str, Mapping[str, Estimate]]]
    differences: Mapping[str, Mapping[str, Estimate]]
    paraphrases: Mapping[str, Relation]
    agreement: Agreement | None = None
    warnings: Sequence[str] = ()

    @property
    def primary(self) -> str:
        """The score to show where there is room for one."""
        return primary(name for methods in self.tasks.values() for scores in methods.values() for name in scores)

    @property
    def overall(self) -> Mapping[str, Mapping[str, Estimate]]:
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
    def pair(self) -> tuple[str, str]:
        """The methods of the written and of the learned prompt, as far as this run has them."""
        written, learned = (
            next((name for name in names if name in self.overall), names[0]) for names in (WRITTEN, LEARNED)
        )
        return written, learned

    @property
    def controls(self) -> list[str]:
        """The methods that ran on a backbone with random weights."""
        return [name for name in self.ordered(self.overall) if name.endswith(RANDOM_WEIGHTS)]

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Return names of methods, each once, in the order in which the file lists the methods."""
        listed = dict.fromkeys([*self.methods, *(cell.method for cell in self.cells)])
        present = dict.fromkeys(names)
        return [*(name for name in listed if name in present), *(name for name in present if name not in listed)]

    def named(self, task: str) -> str:
        """Return a task's name with its label."""
        label = self.task_info.get(task, {}).get("label")
        return f"{task} ({label})" if label else task

    def done(self, method: str, task: str | None = None) -> list[CellRecord]:
        """Return the finished cells of a method, on one task or on all, in order of their seeds."""
        found = [cell for cell in self.cells if cell.method == method and task in (None, cell.task)]
        return sorted((cell for cell in found if cell.status == "done"), key=lambda cell: cell.seed)

    def run_of(self, cell: CellRecord) -> Mapping[str, Json] | None:
        """Return the ``run.json`` of a cell, or None where there is none.

        Raises:
            FileError: If it is damaged.
        """
        path = self._file(cell, RUN_FILE)
        return read_json(path) if path is not None and path.is_file() else None

    def curve_of(self, cell: CellRecord) -> list[tuple[int, float]]:
        """Return (epoch, development score) pairs of a training, epoch 0 being the start; none where nothing trained.

        Raises:
            FileError: If its ``run.json`` is damaged.
        """
        record = self.run_of(cell) or {}
        source = _Source(f"{self.folder / (cell.run or '') / RUN_FILE}")
        history = [source.mapping(row, "history") for row in source.sequence(record.get("history") or [], "history")]
        points = [(source.whole(row, "epoch"), source.number(row, "dev_score")) for row in history]
        start = source.part(record, "start")
        if points and "dev_score" in start:
            points.insert(0, (0, source.number(start, "dev_score")))
        return points

    def answers_of(self, cell: CellRecord) -> list[Answer]:
        """Return what a cell answered on the test part; nothing where nothing was written.

        Raises:
            FileError: If its ``predictions.jsonl`` is damaged.
        """
        path = self._file(cell, PREDICTIONS_FILE)
        if path is None or not path.is_file():
            return []
        source = _Source(str(path))
        return [_answer(source, row, f"row {number}") for number, row in enumerate(read_json_lines(path), start=1)]

    def _file(self, cell: CellRecord, name: str) -> Path | None:
        return None if cell.run is None else self.folder / cell.run / name


def load_findings(folder: str | Path) -> Findings:
    """Read and check what a benchmark left.

    Args:
        folder: The folder that holds ``results.json``.

    Raises:
        FileError: If the file is missing, damaged, or of another format.
    """
    path = Path(folder) / RESULTS_FILE
    if not path.is_file():
        raise FileError(f"there is no {path}; a report is built from the folder that a benchmark wrote")
    value, source = read_json(path), _Source(str(path))
    version = value.get("format_version")
    if version != FORMAT_VERSION:
        raise FileError(
            f"{path} has format_version {json.dumps(version)}, and this version of ptuning reads {FORMAT_VERSION}; "
            "build the report with the version that wrote it"
        )
    missing = [name for name in ("suite", "cells", "tasks") if name not in value]
    if missing:
        raise FileError(f"{path} is damaged: it has no {', '.join(missing)}; run the benchmark again")
    parts = {name: source.part(value, name) for name in ("tasks", "by_type", "paraphrases", "methods", "task_info")}
    about = {name: source.mapping(one, f"methods {name}") for name, one in parts["methods"].items()}
    return Findings(
        folder=Path(folder),
        suite=source.text(value, "suite"),
        command=source.optional_text(value, "command"),
        backbone=source.part(value, "backbone"),
        settings=source.part(value, "settings"),
        versions=source.part(value, "versions"),
        task_info={name: source.mapping(one, f"task_info {name}") for name, one in parts["task_info"].items()},
        methods={name: source.optional_text(one, "describe") or "" for name, one in about.items()},
        cells=[_cell(source, row) for row in source.sequence(value["cells"], "cells")],
        tasks={name: source.table(one, f"tasks {name}") for name, one in parts["tasks"].items()},
        macro=source.table(source.part(value, "macro"), "macro"),
        by_type={name: source.table(one, f"by_type {name}") for name, one in parts["by_type"].items()},
        differences=source.table(source.part(value, "differences"), "differences"),
        paraphrases={name: _relation(source, one, f"paraphrases {name}") for name, one in parts["paraphrases"].items()},
        agreement=_agreement(source, source.part(value, "agreement")),
        warnings=[_warning(source, one) for one in source.sequence(value.get("warnings") or [], "warnings")],
    )


@dataclass(frozen=True)
class _Source:
    """A file whose values are taken out with the type they must have; an error names the file and the place."""

    path: str

    def wrong(self, where: str, wanted: str, value: Json) -> FileError:
        shown = json.dumps(value, ensure_ascii=False)
        shown = shown if len(shown) <= 60 else f"{shown[:59]}…"
        return FileError(f"{self.path} is damaged: {where} must be {wanted}, and is {shown}; run the benchmark again")

    def mapping(self, value: Json, where: str) -> Mapping[str, Json]:
        if not isinstance(value, Mapping):
            raise self.wrong(where, "an object", value)
        return value

    def part(self, value: Mapping[str, Json], name: str) -> Mapping[str, Json]:
        """Take a part that may be missing or null, and is empty then."""
        found = value.get(name)
        return self.mapping({} if found is None else found, name)

    def sequence(self, value: Json, where: str) -> list[Json]:
        if not isinstance(value, list):
            raise self.wrong(where, "a list", value)
        return value

    def text(self, value: Mapping[str, Json], name: str) -> str:
        found = value.get(name)
        if not isinstance(found, str):
            raise self.wrong(name, "text", found)
        return found

    def optional_text(self, value: Mapping[str, Json], name: str) -> str | None:
        return None if value.get(name) is None else self.text(value, name)

    def number(self, value: Mapping[str, Json], name: str, where: str = "") -> float:
        found = value.get(name)
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            raise self.wrong(f"{where} {name}".strip(), "a number", found)
        return float(found)

    def optional_number(self, value: Mapping[str, Json], name: str, where: str = "") -> float | None:
        return None if value.get(name) is None else self.number(value, name, where)

    def whole(self, value: Mapping[str, Json], name: str, where: str = "") -> int:
        found = self.number(value, name, where)
        if not found.is_integer():
            raise self.wrong(f"{where} {name}".strip(), "a whole number", found)
        return int(found)

    def optional_whole(self, value: Mapping[str, Json], name: str, where: str = "") -> int | None:
        return None if value.get(name) is None else self.whole(value, name, where)

    def estimates(self, value: Json, where: str) -> dict[str, Estimate]:
        """Take a mapping of names to scores."""
        listed = {name: self.mapping(one, f"{where} {name}") for name, one in self.mapping(value, where).items()}
        return {
            name: Estimate(
                value=self.number(one, "value", f"{where} {name}"),
                low=self.number(one, "low", f"{where} {name}"),
                high=self.number(one, "high", f"{where} {name}"),
                n=self.whole(one, "n", f"{where} {name}"),
                std=self.optional_number(one, "std", f"{where} {name}"),
                seeds=self.optional_whole(one, "seeds", f"{where} {name}"),
                lowest=self.optional_number(one, "lowest", f"{where} {name}"),
            )
            for name, one in listed.items()
        }

    def table(self, value: Json, where: str) -> dict[str, dict[str, Estimate]]:
        """Take a mapping of methods, or of pairs of them, to scores."""
        return {name: self.estimates(one, f"{where} {name}") for name, one in self.mapping(value, where).items()}


def _cell(source: _Source, value: Json) -> CellRecord:
    row = source.mapping(value, "a cell")
    status = source.text(row, "status")
    if status not in STATUSES:
        raise source.wrong("a cell's status", f"one of {', '.join(STATUSES)}", status)
    run = source.optional_text(row, "run")
    if run is not None and (PurePosixPath(run).is_absolute() or ".." in PurePosixPath(run).parts):
        raise source.wrong("a cell's run", "a folder inside that of the results", run)
    return CellRecord(
        task=source.text(row, "task"),
        method=source.text(row, "method"),
        seed=source.optional_whole(row, "seed") or 0,
        status=status,
        seconds=source.optional_number(row, "seconds"),
        tried=source.optional_whole(row, "tried"),
        run=run,
        error=source.optional_text(row, "error"),
    )


def _agreement(source: _Source, value: Mapping[str, Json]) -> Agreement | None:
    """Take how far development and reported scores agree; None where a benchmark does not say so."""
    if not value:
        return None
    rows = [source.mapping(one, "agreement cells") for one in source.sequence(value.get("cells"), "agreement cells")]
    return Agreement(
        [
            (
                source.text(row, "task"),
                source.text(row, "method"),
                source.number(row, "dev"),
                source.number(row, "test"),
            )
            for row in rows
        ],
        source.optional_number(value, "correlation", "agreement"),
        source.optional_number(value, "mean_gap", "agreement"),
    )


def _warning(source: _Source, value: Json) -> str:
    row = source.mapping(value, "warnings")
    where = f"{source.text(row, 'task')}, {source.text(row, 'method')}, seed {source.whole(row, 'seed')}"
    return f"{where}: {source.text(row, 'text')}"


def _answer(source: _Source, value: Json, where: str) -> Answer:
    row = source.mapping(value, where)
    fields = source.mapping(row.get("record"), f"{where} record")
    return Answer(
        fields={name: str(text) for name, text in fields.items()},
        target=source.text(row, "target"),
        prediction=source.optional_text(row, "prediction") or "",
        rank=source.optional_whole(row, "rank", where),
        hit=bool(row.get("hit")),
    )


def _relation(source: _Source, value: Json, where: str) -> Relation:
    found = source.mapping(value, where)
    patterns = source.sequence(found.get("patterns"), f"{where} patterns")
    rows = [source.mapping(one, f"{where} patterns") for one in patterns]
    spread = {name: source.mapping(one, f"{where} spread") for name, one in source.part(found, "spread").items()}
    return Relation(
        [Wording(source.text(one, "pattern"), source.estimates(one.get("scores"), f"{where} scores")) for one in rows],
        {method: _spread(source, numbers, f"{where} spread {method}") for method, numbers in spread.items()},
    )


def _spread(source: _Source, numbers: Mapping[str, Json], where: str) -> Spread:
    return Spread(
        min=source.number(numbers, "min", where),
        max=source.number(numbers, "max", where),
        range=source.number(numbers, "range", where),
        std=source.optional_number(numbers, "std", where),
        patterns=int(source.number(numbers, "patterns", where)),
    )
