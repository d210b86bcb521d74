"""`ptuning task list`, `show` and `check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ptuning.backbone import sources
from ptuning.cli import options, terminal
from ptuning.cli.inputs import load_tokenizer
from ptuning.cli.options import DATA, option
from ptuning.errors import FileError, TaskError

if TYPE_CHECKING:
    from ptuning.data.questions import Questions

TaskArgument = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped task, or a task file.")]
# The parts of a data folder that a check reads besides train, if they are there.
PARTS = ("dev", "val", "test")


def list_tasks() -> None:
    """List the shipped tasks.

    Example: ptuning task list
    """
    from ptuning.data.task_files import shipped_tasks

    terminal.heading("shipped tasks; --task NAME, or --task FILE for one of your own")
    table = terminal.table("name", "answers", "question")
    for task in shipped_tasks():
        table.add_row(task.name, task.answer_space.described, escape(task.about))
    terminal.results().print(table)


def show_task(task: TaskArgument) -> None:
    """Show a task's templates and its file, which may be the beginning of one of your own.

    Example: ptuning task show RTE
    """
    from ptuning.data.task_files import load_task

    file = load_task(task)
    terminal.heading(f"{file.name}, version {file.version}: {file.about}")
    for number, (manual, learned) in enumerate(zip(file.manual, file.learned, strict=True), start=1):
        terminal.line(f"pattern {number}  manual   {manual}\n           learned  {learned}")
    terminal.line(f"\n{file.text.strip()}")


def check_task(
    task: TaskArgument,
    data: Annotated[Path | None, option("Rows to read as well.", DATA, metavar="DIR|FILE")] = None,
    strict: Annotated[bool, option("Treat data warnings as errors.", DATA, "--strict")] = False,
    backbone: options.BackboneOption = None,
    model_arg: options.ModelArgOption = None,
) -> None:
    """Check a task file: its keys, its templates, its label words with a backbone's tokenizer, and rows of data.

    Example: ptuning task check RTE --data fewglue
    """
    from ptuning.data.task_files import find_split, load_task

    file = load_task(task)
    parts: dict[str, Questions] = {}
    if data is not None and not data.is_dir():
        parts["data"] = file.read(data)
    elif data is not None:
        parts["train"] = file.read(find_split(data, file, "train"))
        for name in PARTS:
            try:
                path = find_split(data, file, name)
            except FileError:
                continue  # only the training part must be there
            parts[name] = file.read(path, labelled=name != "test")
    tokenizer, kind = load_tokenizer(options.tokenizer_of(backbone, model_arg))
    from ptuning.data.checks import check_data, check_words

    checked = check_data(file, parts) + check_words(file, tokenizer, kind, parts=parts)
    answers = file.answer_space.described
    terminal.heading(f"{file.name}, version {file.version}: {answers}, {len(file.manual)} patterns")
    for fact in checked.facts:
        terminal.line(f"  {fact}")
    for warning in checked.warnings:
        terminal.say(f"warning: {warning}")
    problems = checked.problems + (checked.warnings if strict else [])
    if problems:
        raise TaskError(f"{task}: " + "\n  ".join(problems))
    terminal.line(f"fine with the tokenizer of {backbone or sources.BACKBONE}")
