"""Methods that train nothing: the majority answer, the manual prompt, and examples in context."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ptuning.data.questions import Question, Questions, as_questions
from ptuning.data.splits import draw_records
from ptuning.errors import ConfigError, TemplateError
from ptuning.files import Json
from ptuning.method.base import Method, Setup, Solution, Task
from ptuning.metrics import Answer
from ptuning.metrics.generation import value_of_texts
from ptuning.names import MAJORITY, MANUAL
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.score import answer_records
from ptuning.records import TARGET_FIELD
from ptuning.template.examples import with_examples
from ptuning.template.language import Template
from ptuning.training.run import JUDGED_RECORDS

# Numbers of examples to try, and how often each number is drawn. Each combination is one tried setting.
IN_CONTEXT_EXAMPLES = (1, 4, 16, 32)
IN_CONTEXT_DRAWS = 3
# Maximum number of tokens of examples and question together: small models answer worse after very long contexts.
IN_CONTEXT_TOKENS = 2048
BY_DEFAULT = ("compare", "lama", "superglue")


def majority(task: Task, _: Setup) -> Solution:
    """Rank answers by their frequency in the training part; where rows bring their own choices, by their place."""
    if not task.answer_space.has_choices:
        counts = Counter(row.record[TARGET_FIELD].strip() for row in task.train)
        ranked = sorted(counts, key=lambda text: (-counts[text], text))
        return Solution.of_ranking(lambda _: ranked, answer=ranked[0])
    right = Counter(place for row in task.train for place in row.answers)
    places = sorted(right, key=lambda place: (-right[place], place))

    def answer(row: Question) -> Answer:
        count = len(row.choices)
        texts = [row.choices[place] for place in (*places, *range(count)) if place < count]
        return Answer.of_ranked(list(dict.fromkeys(texts)), row.right)

    return Solution(lambda questions: list(map(answer, questions)), {"answer": f"choice {places[0] + 1}"})


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
    """Whether targets contain line breaks. A generated answer then does not end with its first line."""
    return any("\n" in row.record[TARGET_FIELD] for row in task.train)


def target_tokens(task: Task, setup: Setup) -> int:
    """Return the number of tokens of the longest training target, which limits the length of generated answers."""
    bound = Prompt.manual(task.manual).bind(setup.backbone)
    return max(example.own_tokens for example in bound.examples(task.train.records))


def in_context(task: Task, setup: Setup) -> Solution:
    """Put examples before the question. Their number, draw and order are chosen on the development part.

    Source: Brown et al. (2020), section 2 (few-shot).
    """
    tried: list[dict[str, Json]] = []
    best: tuple[float, Template] | None = None
    dev = task.dev
    if task.text_metrics:  # generating takes long: as many texts as a training generates after an epoch
        dev = as_questions(draw_records(dev.records, JUDGED_RECORDS, seed=setup.seed))
    for count, draw, template in drawn_examples(task, setup):
        try:
            answers = prompt_solution(task, setup, template, closed=task.vocabulary).answer(dev)
        except TemplateError:
            continue  # these examples do not fit before the question
        if task.text_metrics:
            score = value_of_texts([answer.text for answer in answers], dev.records, task.text_metrics[0])
        else:
            score = sum(answer.hit for answer in answers) / len(answers)
        tried.append({"settings": {"examples": count, "draw": draw}, "dev_score": score})
        if best is None or score > best[0]:
            best = score, template
    if best is None:
        raise ConfigError(
            f"{task.name}: none of {len(task.train)} training records fits before the question, so in-context has no "
            "examples"
        )
    chosen = next(setting for setting in tried if setting["dev_score"] == best[0])
    solution = prompt_solution(task, setup, best[1], closed=task.vocabulary)
    return Solution(solution.answer, {"tried": list(tried), "chosen": chosen, "prompt": str(best[1])})


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
        for draw in range(IN_CONTEXT_DRAWS if count <= len(shown) else 0):
            # Each draw is independent: 16 examples are not the 4 from before and 12 more, so that orders differ too.
            chooser = random.Random(f"in-context {setup.seed} {count} {draw}")
            yield count, draw, with_examples(task.manual, chooser.sample(shown, count), kind=setup.backbone.kind)


def example_counts(task: Task, setup: Setup) -> list[int]:
    """Return the numbers of examples that fit before the longest training record; always the smallest one."""
    bound = Prompt.manual(task.manual).bind(setup.backbone)
    records = [task.answer_space.verbalized(row.record) for row in task.train]
    lengths = [len(example.token_ids) + example.own_tokens for example in bound.examples(records)]
    space = min(setup.backbone.tokenizer.max_tokens, IN_CONTEXT_TOKENS) - max(lengths)
    fitting = [count for count in IN_CONTEXT_EXAMPLES if count * sum(lengths) / len(lengths) <= space]
    return fitting or [IN_CONTEXT_EXAMPLES[0]]


# In the order of tables.
UNTRAINED = (
    Method(
        MAJORITY,
        "the most frequent answer of the training part",
        majority,
        reads_manual=False,
        default_for=BY_DEFAULT,
    ),
    Method(MANUAL, "the manual prompt (MP)", manual, reads_train=False, default_for=BY_DEFAULT),
    Method(
        "manual-restricted",
        "the manual prompt, choosing among the task's objects",
        manual_restricted,
        reads_train=False,
        open_only=True,
        default_for=("compare", "lama"),
    ),
    Method(
        "in-context",
        "examples of the training part before the manual prompt",
        in_context,
        seeded=True,
        default_for=BY_DEFAULT,
    ),
)
