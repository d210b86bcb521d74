"""`ptuning task list`, `show` and `check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ptuning.backbone import sources
from ptuning.cli import terminal
from ptuning.cli.inputs import load_tokenizer
from ptuning.cli.options import AskedBackbone, StrictOption, takes, tokenizer_options
from ptuning.errors import FileError, TaskError

if TYPE_CHECKING:
    from ptuning.data.checks import Report
    from ptuning.data.questions import Questions
    from ptuning.data.task_files import TaskFile

TaskArgument = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped task, or a task file.")]
# The parts of a data folder that a check reads, if they are there.
PARTS = ("train", "dev", "val", "test")


def list_tasks() -> None:
    """List the shipped tasks.

    Example: ptuning task list
    """
    from ptuning.data.task_files import shipped_tasks

    terminal.heading("shipped tasks; --task NAME, or --task FILE for one of your own")
    table = terminal.table("name", "answers", "what is asked", narrow=True)
    for one in shipped_tasks():
        table.add_row(one.name, one.answer_space.described, escape(one.about))
    terminal.results().print(table)


def show_task(task: TaskArgument) -> None:
    """Show a task's templates and its file, which may be the beginning of one of your own.

    Example: ptuning task show RTE
    """
    from ptuning.data.task_files import load_task

    found = load_task(task)
    terminal.heading(f"{found.name}, version {found.version}: {found.about}")
    for number, (manual, learned) in enumerate(zip(found.manual, found.learned, strict=True), start=1):
        terminal.line(f"pattern {number}  manual   {manual}")
        terminal.line(f"           learned  {learned}")
    terminal.line("")
    terminal.line(found.text.strip())


@takes(backbone=tokenizer_options)
def check_task(
    task: TaskArgument,
    data: Annotated[Path | None, typer.Option(metavar="DIR|FILE", help="Rows to read as well.")] = None,
    strict: StrictOption = False,
    *,
    backbone: AskedBackbone,
) -> None:
    """Check a task file: its keys, its templates, its label words with a backbone's tokenizer, and rows of data. Loads
    no weights.

    Example: ptuning task check RTE --data fewglue
    """
    from ptuning.data.task_files import find_split, load_task

    found = load_task(task)
    parts: dict[str, Questions] = {}
    if data is not None and not data.is_dir():
        parts["data"] = found.read(data)
    elif data is not None:
        parts["train"] = found.read(find_split(data, found, "train"))
        for name in PARTS[1:]:
            try:
                path = find_split(data, found, name)
            except FileError:
                continue  # only the training part must be there
            parts[name] = found.read(path, labelled=name != "test")
    tokenizer, kind = load_tokenizer(backbone)
    from ptuning.data.checks import check_data, check_words

    checked = check_data(found, parts) + check_words(found, tokenizer, kind, parts=parts)
    show_report(found, checked)
    problems = checked.problems + (checked.warnings if strict else ())
    if problems:
        raise TaskError(f"{task}: " + "\n  ".join(problems))
    terminal.line(f"fine with the tokenizer of {backbone.name or sources.BACKBONE}")


def show_report(found: TaskFile, checked: Report) -> None:
    """Print the facts and warnings of a check; its problems are in the error."""
    what = found.answer_space.described
    terminal.heading(f"{found.name}, version {found.version}: {what}, {len(found.manual)} patterns")
    for fact in checked.facts:
        terminal.line(f"  {fact}")
    for warning in checked.warnings:
        terminal.say(f"warning: {warning}")
