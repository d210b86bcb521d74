"""What training and scoring read of a task's questions."""

from __future__ import annotations

from ptuning.data.questions import Questions
from ptuning.engine.objective import Item, choice_items, label_items, target_items
from ptuning.method.base import Task
from ptuning.prompt.prompt import Prompt
from ptuning.template.fill import BoundTemplate


def task_items(bound: BoundTemplate, questions: Questions, task: Task, *, with_stop: bool = False) -> list[Item]:
    """Return what training and scoring read of a task's questions: targets, label words, or each row's choices."""
    if task.file is None or not task.file.is_closed:
        return target_items(bound, questions.records, with_stop=with_stop)
    scoring = Prompt.manual(task.manual, task=task.file).scoring()
    if task.file.label_words is not None:
        return label_items(bound, questions.records, task.file.label_words, scoring=scoring)
    return choice_items(bound, questions, scoring=scoring)
