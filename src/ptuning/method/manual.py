"""The manual prompt: a written template without slots, asked as it is or with the answers restricted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ptuning.data.questions import Questions
from ptuning.files import Json
from ptuning.method.base import Method, Setup, Solution, Task
from ptuning.metrics import Answer
from ptuning.names import MANUAL
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.score import answer_records
from ptuning.records import TARGET_FIELD
from ptuning.template.language import Template


def manual(task: Task, setup: Setup) -> Solution:
    """Ask with the manual template as it is."""
    return prompt_solution(task, setup, task.manual, closed=task.vocabulary, max_length=setup.config.max_length)


def manual_restricted(task: Task, setup: Setup) -> Solution:
    """Ask with the manual template and take the likeliest of the task's objects. Without this restriction a causal
    model often goes on with "the".
    """
    return prompt_solution(task, setup, task.manual, closed=task.objects, max_length=setup.config.max_length)


def prompt_solution(
    task: Task, setup: Setup, template: Template, *, closed: Sequence[str] | None, max_length: int | None = None
) -> Solution:
    """Return the solution that asks the frozen backbone with a template without slots, with rows of ``max_length``."""
    prompt = Prompt.manual(template, label_words=task.words, task=task.file)
    prompt = replace(prompt, multiline=is_multiline(task), max_length=max_length)
    return answering(task, setup, PromptModel(setup.backbone), prompt, closed=closed)


def answering(
    task: Task, setup: Setup, model: PromptModel, prompt: Prompt, *, closed: Sequence[str] | None, **record: Json
) -> Solution:
    """Return the solution that answers with a prompt, manual or learned."""

    def answer(questions: Questions) -> list[Answer]:
        return answer_records(
            model,
            prompt,
            questions,
            closed=closed,
            single_token=task.single_token,
            max_tokens=target_tokens(task, setup) if task.is_written and closed is None else None,
            num_beams=task.num_beams,
            report=setup.watched,
        )

    return Solution(answer, {**record, "prompt": str(prompt.template)})


def is_multiline(task: Task) -> bool:
    """Whether targets contain line breaks. A written answer then does not end with its first line."""
    return any("\n" in row.record[TARGET_FIELD] for row in task.train)


def target_tokens(task: Task, setup: Setup) -> int:
    """Return the number of tokens of the longest training target, which limits the length of written answers."""
    bound = Prompt.manual(task.manual).bind(setup.backbone)
    return max(example.own_tokens for example in bound.examples(task.train.records))


MANUAL_PROMPT = Method(
    MANUAL,
    "the manual prompt (MP)",
    manual,
    reads_train=False,
    default_for=("compare", "lama", "superglue"),
)
MANUAL_RESTRICTED = Method(
    "manual-restricted",
    "the manual prompt, choosing among the task's objects",
    manual_restricted,
    reads_train=False,
    open_only=True,
    default_for=("compare", "lama"),
)
