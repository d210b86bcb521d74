"""In-context learning: examples of the training part in front of the question."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from ptuning.data.questions import Questions, as_questions
from ptuning.data.splits import draw_records
from ptuning.errors import ConfigError, TemplateError
from ptuning.files import Json
from ptuning.method.base import Method, Setup, Solution, Task
from ptuning.method.manual import prompt_solution
from ptuning.metrics import Answer
from ptuning.metrics.generation import value_of_texts
from ptuning.prompt.prompt import Prompt
from ptuning.template.examples import with_examples
from ptuning.template.language import Template
from ptuning.training.run import JUDGED_RECORDS

# Numbers of examples to try, and how often each number is drawn. Each combination is one tried setting.
IN_CONTEXT_EXAMPLES = (1, 4, 16, 32)
IN_CONTEXT_DRAWS = 3
# Most tokens of examples and question together: small models answer worse after very long contexts.
IN_CONTEXT_TOKENS = 2048


def in_context(task: Task, setup: Setup) -> Solution:
    """Put examples in front of the question. Their number, draw and order are chosen on the development part.

    Source: Brown et al. (2020), section 2 (few-shot).
    """
    tried: list[dict[str, Json]] = []
    best: tuple[float, Template] | None = None
    dev = task.dev
    if task.text_metrics:  # writing takes long: as many texts as a training writes after an epoch
        dev = as_questions(draw_records(dev.records, JUDGED_RECORDS, seed=setup.seed))
    for count, draw, template in drawn_examples(task, setup):
        try:
            answers = prompt_solution(task, setup, template, closed=task.vocabulary).answer(dev)
        except TemplateError:
            continue  # these examples do not fit in front of the question
        score = dev_score(task, answers, dev)
        tried.append({"settings": {"examples": count, "draw": draw}, "dev_score": score})
        if best is None or score > best[0]:
            best = score, template
    if best is None:
        raise ConfigError(
            f"{task.name}: none of {len(task.train)} training records fits in front of the question, so in-context "
            "has nothing to show"
        )
    found = prompt_solution(task, setup, best[1], closed=task.vocabulary)
    chosen = next(one for one in tried if one["dev_score"] == best[0])
    return Solution(found.answer, {"tried": list(tried), "chosen": chosen, "prompt": str(best[1])})


def dev_score(task: Task, answers: Sequence[Answer], dev: Questions) -> float:
    """Return what a setting is chosen by: the task's first metric for texts, or the share of hits."""
    if task.text_metrics:
        return value_of_texts([answer.text for answer in answers], dev.records, task.text_metrics[0])
    return sum(answer.hit for answer in answers) / len(answers)


def drawn_examples(task: Task, setup: Setup) -> Iterator[tuple[int, int, Template]]:
    """Yield each tried setting: number of examples, number of the draw, and the template with these examples."""
    # Examples become literal text of the template, in which a special token such as "[MASK]" would act as one.
    specials = setup.backbone.tokenizer.special_ids
    shown = [
        task.answer_space.verbalized(row.record)
        for row in task.train
        if not any(token in text for text in row.record.values() for token in specials)
    ]
    for count in example_counts(task, setup):
        if count > len(shown):
            continue
        for draw in range(IN_CONTEXT_DRAWS):
            # Each draw is independent: 16 examples are not the 4 from before and 12 more, so that orders differ too.
            chooser = random.Random(f"in-context {setup.seed} {count} {draw}")
            yield count, draw, with_examples(task.manual, chooser.sample(shown, count), kind=setup.backbone.kind)


def example_counts(task: Task, setup: Setup) -> list[int]:
    """Return the numbers of examples that fit in front of the longest training record; always the smallest one."""
    bound = Prompt.manual(task.manual).bind(setup.backbone)
    records = [task.answer_space.verbalized(row.record) for row in task.train]
    lengths = [len(example.token_ids) + example.own_tokens for example in bound.examples(records)]
    room = min(setup.backbone.tokenizer.max_tokens, IN_CONTEXT_TOKENS) - max(lengths)
    fitting = [count for count in IN_CONTEXT_EXAMPLES if count * sum(lengths) / len(lengths) <= room]
    return fitting or [IN_CONTEXT_EXAMPLES[0]]


IN_CONTEXT = Method(
    "in-context",
    "examples of the training part in front of the manual prompt",
    in_context,
    seeded=True,
    default_for=("compare", "lama", "superglue"),
)
