"""What the task commands print. Computes nothing, and loads nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from ptuning.cli.terminal import heading, line, results, say

if TYPE_CHECKING:
    from ptuning.data.task_check import Findings
    from ptuning.data.task_files import TaskFile


def tasks(found: Sequence[TaskFile]) -> None:
    """Print the shipped tasks."""
    heading("shipped tasks; --task NAME, or --task FILE for one of your own")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("name", "answers", "what is asked"):
        table.add_column(name)
    for one in found:
        table.add_row(one.name, one.answer_space.described, escape(one.about))
    results().print(table)


def task(found: TaskFile) -> None:
    """Print one task: its templates, and its file, which can be copied and changed."""
    heading(f"{found.name}, version {found.version}: {found.about}")
    for number, (manual, learned) in enumerate(zip(found.manual, found.learned, strict=True), start=1):
        line(f"pattern {number}  manual   {manual}")
        line(f"           learned  {learned}")
    line("")
    line(found.text.strip())


def findings(found: TaskFile, checked: Findings) -> None:
    """Print what a check found; problems are left to the error."""
    heading(f"{found.name}, version {found.version}: {found.answer_space.described}, {len(found.manual)} patterns")
    for fact in checked.facts:
        line(f"  {fact}")
    for doubt in checked.doubts:
        say(f"warning: {doubt}")
