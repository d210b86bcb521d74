"""Write the files that SuperGLUE's server takes, from the folder of a finished ``ptuning superglue``.

    python scripts/superglue_server.py FOLDER

FOLDER gets server/METHOD/seed-N/TASK.jsonl for each finished cell of a SuperGLUE task: of the test split if it was
answered, otherwise of the reported part. server/README.md says which. An earlier FOLDER/server is replaced.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from ptuning.data.task_files import TaskFile, load_task
from ptuning.errors import FileError, PTuningError
from ptuning.experiment.superglue import SUITE, TASKS
from ptuning.files import Json, make_folder, read_json_lines, write_json_lines, write_text
from ptuning.names import PREDICTIONS_FILE, UNLABELLED_FILE
from ptuning.report.results_file import read_results

SERVER_FOLDER = "server"
FROM_TEST = "the test split, whose labels only the server knows"
FROM_REPORTED = "the part that is reported here; there was no test split"
NOTE = """Files as super.gluebenchmark.com takes them, one folder per method and seed.

What each task's lines are made of:
{sources}

Only lines of the test split can be handed in. A submission also needs the diagnostics AX-b and AX-g, which are not
tasks of the paper.
"""


def main() -> None:
    """Write the files, or one line that says why they cannot be written."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        write_server_files(Path(sys.argv[1]))
    except PTuningError as error:
        sys.exit(f"error: {error}")


def write_server_files(folder: Path) -> None:
    """Write the files of all finished cells in a folder of results.

    Raises:
        FileError: If these are not results of SuperGLUE, or only a draw of the rows was answered.
    """
    results = read_results(folder)
    if results.suite != SUITE:
        raise FileError(f"{folder} holds results of ptuning {results.suite}, not of ptuning {SUITE}")
    if results.settings.get("limit") is not None:
        raise FileError(f"{folder} holds answers to a draw of the rows (--limit), which cannot be handed in")
    server = folder / SERVER_FOLDER
    shutil.rmtree(server, ignore_errors=True)
    sources: dict[str, str] = {}
    for cell in results.cells:
        if cell.task not in TASKS or cell.status != "done":
            continue
        from_test = (results.folder_of(cell) / UNLABELLED_FILE).is_file()
        rows = read_json_lines(results.folder_of(cell) / (UNLABELLED_FILE if from_test else PREDICTIONS_FILE))
        place = server / cell.method / f"seed-{cell.seed}"
        make_folder(place)
        write_json_lines(place / f"{cell.task}.jsonl", server_lines(load_task(cell.task), rows))
        sources[cell.task] = FROM_TEST if from_test else FROM_REPORTED
    if not sources:
        raise FileError(f"{folder} holds no finished cell of a SuperGLUE task")
    listed = "\n".join(f"- {task}: {source}" for task, source in sources.items())
    write_text(server / "README.md", NOTE.format(sources=listed))


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


if __name__ == "__main__":
    main()
