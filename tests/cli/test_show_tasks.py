"""What the task commands print: every shipped task on 80 columns, and a task's own file as it is."""

from __future__ import annotations

from collections.abc import Callable

from ptuning.cli import show_tasks
from ptuning.data.task_check import Findings
from ptuning.data.task_files import load_task, shipped_tasks
from tests.cli.test_experiments import printed as printed

Printed = Callable[[], tuple[str, str]]


def test_the_list_names_each_task_with_its_kind_of_answers(printed: Printed) -> None:
    show_tasks.tasks(shipped_tasks())
    out, _ = printed()
    for task in shipped_tasks():
        assert any(line.startswith(task.name) for line in out.splitlines())
    assert max(len(line) for line in out.splitlines()) <= 80
    assert [load_task(name).answer_space.described for name in ("COPA", "topic")] == ["own choices", "6 labels"]


def test_a_task_is_shown_with_its_file(printed: Printed) -> None:
    task = load_task("RTE")
    show_tasks.task(task)
    out, _ = printed()
    assert task.text.strip() in out
    assert f"pattern 2  manual   {task.manual[1]}" in out
    assert f"           learned  {task.learned[1]}" in out


def test_facts_are_results_and_doubts_are_warnings(printed: Printed) -> None:
    show_tasks.findings(load_task("RTE"), Findings(("train: 3 rows",), ("odd",), ("bad",)))
    out, err = printed()
    assert "RTE, version 1: 2 labels, 2 patterns" in out
    assert "  train: 3 rows" in out
    assert err.strip() == "warning: odd"
