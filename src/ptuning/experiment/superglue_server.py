"""Files for the SuperGLUE server: one per task, made from the answers of finished cells."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import cast

from ptuning.data.task_files import TaskFile
from ptuning.experiment.cells import Job
from ptuning.experiment.suite import UNLABELLED_FILE
from ptuning.files import Json, make_folder, read_json_lines, write_json_lines, write_text
from ptuning.names import PREDICTIONS_FILE
from ptuning.report.results_file import Results

logger = logging.getLogger(__name__)

SERVER_FOLDER = "server"
FROM_TEST = "the test split, whose labels only the server knows"
FROM_REPORTED = "the part that is reported here; there was no test split"
NOTE = """Files as super.gluebenchmark.com takes them, one folder per method and seed.

What each task's lines are made of:
{sources}

Only lines of the test split can be handed in. A submission also needs the diagnostics AX-b and AX-g, which are not
tasks of the paper.
"""


def write_server_files(results: Results, jobs: Sequence[Job], *, is_draw: bool) -> None:
    """Write ``server/METHOD/seed-N/TASK.jsonl`` for each finished cell: of the test split if there is one, otherwise of
    the reported part.

    Args:
        results: The results; their folder holds the answers.
        jobs: The tasks of the benchmark.
        is_draw: Whether only a draw of rows was answered. Nothing is written then, since it could not be handed in.
    """
    if is_draw:
        logger.info("no files for the server: only a draw of the rows was answered")
        return
    found = {job.task.name: job for job in jobs}
    for result in results.cells:
        job = found.get(result.task)
        if job is None or job.task.file is None or result.status != "done":
            continue
        name = PREDICTIONS_FILE if job.unlabelled is None else UNLABELLED_FILE
        rows = read_json_lines(results.folder / result.folder / name)
        folder = results.folder / SERVER_FOLDER / result.method / f"seed-{result.seed}"
        make_folder(folder)
        write_json_lines(folder / f"{job.task.name}.jsonl", server_lines(job.task.file, rows))
    if not (results.folder / SERVER_FOLDER).is_dir():
        return
    there = {path.stem for path in (results.folder / SERVER_FOLDER).rglob("*.jsonl")}
    sources = [f"{name}: {FROM_REPORTED if job.unlabelled is None else FROM_TEST}" for name, job in found.items()]
    sources += [f"{name}: of an earlier run into this folder" for name in sorted(there - found.keys())]
    listed = "\n".join(f"- {source}" for source in sources)
    write_text(results.folder / SERVER_FOLDER / "README.md", NOTE.format(sources=listed))


def server_lines(file: TaskFile, rows: Sequence[Mapping[str, Json]]) -> list[dict[str, Json]]:
    """Return the lines of a task's file for the server, made from the rows of a cell's answers."""
    numbers = [row.get("idx", at) for at, row in enumerate(rows)]
    if any(isinstance(number, Mapping) and "answer" in number for number in numbers):
        return _nested(rows)
    return [
        {
            "idx": number["query"] if isinstance(number, Mapping) and "query" in number else number,
            "label": _server_label(file, row),
        }
        for number, row in zip(numbers, rows, strict=True)
    ]


def _server_label(file: TaskFile, row: Mapping[str, Json]) -> Json:
    said, choices = row["prediction"], row.get("choices")
    if not isinstance(choices, list):
        written = file.as_in_file(str(said))
        return str(written).lower() if isinstance(written, bool) else written
    if file.reader.choices is not None and file.reader.choices.phrases is not None:
        return str(said == choices[0])  # "True" if the pronoun refers to the first choice
    is_named = isinstance(row.get("idx"), Mapping)
    return said if is_named else choices.index(said)


def _nested(rows: Sequence[Mapping[str, Json]]) -> list[dict[str, Json]]:
    """Return one line per passage, with its questions and their answers nested in it (MultiRC)."""
    passages: dict[Json, dict[Json, list[Json]]] = {}
    for row in rows:
        number = cast("Mapping[str, Json]", row["idx"])
        answers = passages.setdefault(number["passage"], {}).setdefault(number["question"], [])
        answers.append({"idx": number["answer"], "label": int(row["prediction"] == "true")})
    return [
        {
            "idx": passage,
            "passage": {"questions": [{"idx": question, "answers": found} for question, found in questions.items()]},
        }
        for passage, questions in passages.items()
    ]
