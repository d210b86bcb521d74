"""Methods that train nothing: the majority answer, the manual prompt, and examples in context."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ptuning.data.questions import Questions
from ptuning.data.task_files import TaskFile
from ptuning.engine.passes import run_tokens
from ptuning.errors import ConfigError, TemplateError
from ptuning.files import Json
from ptuning.method.base import METHODS, Setup, Solution, Task
from ptuning.method.items import task_items
from ptuning.metrics import Answer
from ptuning.prompt.answer import answer_records
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.records import TARGET_FIELD, Record
from ptuning.statistics import majority as most_frequent
from ptuning.template.language import Field, Literal, Piece, Target, Template

# How many examples stand in front of the question, and how often they are drawn: each combination is one tried setting.
IN_CONTEXT_EXAMPLES = (1, 4, 16, 32)
IN_CONTEXT_DRAWS = 3
# Examples and question together take no more tokens than this, however many the backbone could read: time grows with
# them, and a small model gets lost.
IN_CONTEXT_TOKENS = 2048
# Development records whose tokens are counted for an estimate; the others are taken to be alike.
COUNTED_RECORDS = 64

REFERENCE = "manual"
FREE_METHODS = ("majority", REFERENCE, "manual-restricted", "in-context")


@METHODS.register("majority", describe="the most frequent answer of the training part")
def majority(task: Task, _: Setup) -> Solution:
    """Rank answers by how often they stand in the training part."""
    if task.file is not None and task.file.has_choices:
        return _majority_place(task)
    counts = Counter(row.record[TARGET_FIELD].strip() for row in task.train)
    ranked = sorted(counts, key=lambda text: (-counts[text], text))
    return Solution.of_ranking(lambda _: ranked, answer=most_frequent(list(counts.elements())))


def _majority_place(task: Task) -> Solution:
    """Choose the place that is right most often in the training part, where each row has choices of its own."""
    counts = Counter(place for row in task.train for place in row.answers)
    places = sorted(counts, key=lambda place: (-counts[place], place))

    def answer(questions: Questions) -> list[Answer]:
        ordered = [
            [row.choices[place] for place in (*places, *range(len(row.choices))) if place < len(row.choices)]
            for row in questions
        ]
        return [
            Answer.of_ranked(list(dict.fromkeys(texts)), row.right)
            for texts, row in zip(ordered, questions, strict=True)
        ]

    return Solution(answer, {"answer": f"choice {places[0] + 1}"})


@METHODS.register(REFERENCE, describe="the manual prompt (MP)", passes=(0.0, 0.0), reads_train=False)
def manual(task: Task, setup: Setup) -> Solution:
    """Ask with the manual template as it is."""
    return prompt_solution(task, setup, task.manual, closed=task.vocabulary)


@METHODS.register(
    "manual-restricted",
    describe="the manual prompt, choosing among the task's objects",
    passes=(0.0, 0.0),
    reads_train=False,
)
def manual_restricted(task: Task, setup: Setup) -> Solution:
    """Ask with the manual template and take the likeliest of the task's objects: left alone, a causal model goes on
    with "the" and the like.
    """
    return prompt_solution(task, setup, task.manual, closed=task.objects)


def in_context_tokens(task: Task, setup: Setup, rows: int) -> float:
    """Return the tokens that in-context runs to choose its examples and to answer so many rows: all of those in front,
    once a batch where the backbone can. Which number of examples will be chosen is not known, so it is their mean.
    """
    dev = Questions(task.dev[:COUNTED_RECORDS])
    costs = []
    for template in (template for _, draw, template in drawn_examples(task, setup) if draw == 0):
        bound = replace(Prompt.manual(template, task=task.file), multiline=is_multiline(task)).bind(setup.backbone)
        try:
            items = task_items(bound, dev, task)
        except TemplateError:
            continue  # as in_context does
        costs.append(run_tokens(setup.backbone, [item.inputs for item in items]) / len(dev))
    tried = IN_CONTEXT_DRAWS * len(task.dev) * sum(costs)
    return tried + rows * sum(costs) / max(1, len(costs))


@METHODS.register(
    "in-context",
    describe="examples of the training part in front of the manual prompt",
    seeded=True,
    passes=(0.0, float(len(IN_CONTEXT_EXAMPLES) * IN_CONTEXT_DRAWS)),
    tokens=in_context_tokens,
)
def in_context(task: Task, setup: Setup) -> Solution:
    """Put examples in front of the question; how many, which ones and their order are chosen on the development part.

    Source: Brown et al. (2020), section 2 (few-shot).
    """
    tried: list[dict[str, Json]] = []
    best: tuple[float, Template] | None = None
    for count, draw, template in drawn_examples(task, setup):
        try:
            answers = prompt_solution(task, setup, template, closed=task.vocabulary).answer(task.dev)
        except TemplateError:
            continue  # these examples do not fit in front of the question
        hits = sum(answer.hit for answer in answers) / len(answers)
        tried.append({"settings": {"examples": count, "draw": draw}, "dev_score": hits})
        if best is None or hits > best[0]:
            best = hits, template
    if best is None:
        raise ConfigError(
            f"{task.name}: none of {len(task.train)} training records fits in front of the question, so in-context "
            "has nothing to show"
        )
    found = prompt_solution(task, setup, best[1], closed=task.vocabulary)
    scores = [one["dev_score"] for one in tried]
    return Solution(
        found.answer, {"tried": list(tried), "chosen": tried[scores.index(best[0])], "prompt": str(best[1])}
    )


def drawn_examples(task: Task, setup: Setup) -> Iterator[tuple[int, int, Template]]:
    """Yield what is tried: how many examples, which draw of them, and the template with them in front."""
    # In front of the question a record's words are the template's own, where "[MASK]" would be a mask.
    specials = setup.backbone.tokenizer.special_ids
    shown = [
        _spoken(row.record, task.file)
        for row in task.train
        if not any(token in text for text in row.record.values() for token in specials)
    ]
    for count in example_counts(task, setup):
        if count > len(shown):
            continue
        for draw in range(IN_CONTEXT_DRAWS):
            # Each drawn anew: 16 examples are not 4 and 12 more, so that orders differ as well.
            chooser = random.Random(f"in-context {setup.seed} {count} {draw}")
            yield count, draw, with_examples(task.manual, chooser.sample(shown, count), kind=setup.backbone.kind)


def prompt_solution(task: Task, setup: Setup, template: Template, *, closed: Sequence[str] | None) -> Solution:
    """Return the solution that asks the frozen backbone with a template without slots."""
    prompt = replace(Prompt.manual(template, task=task.file), multiline=is_multiline(task))
    model, is_written = PromptModel(setup.backbone), task.is_written and closed is None

    def answer(questions: Questions) -> list[Answer]:
        return answer_records(
            model,
            prompt,
            questions,
            closed=closed,
            single_token=task.single_token,
            max_tokens=target_tokens(task, setup) if is_written else None,
            report=setup.report,
        )

    return Solution(answer, {"prompt": str(template)})


def is_multiline(task: Task) -> bool:
    """Whether targets hold line breaks, so that an answer does not end with its first line."""
    return any("\n" in row.record[TARGET_FIELD] for row in task.train)


def target_tokens(task: Task, setup: Setup) -> int:
    """Return the number of tokens of the longest training target: how long a written answer may get."""
    bound = Prompt.manual(task.manual).bind(setup.backbone)
    return max(example.own_tokens for example in bound.examples(task.train.records))


def example_counts(task: Task, setup: Setup) -> list[int]:
    """Return the numbers of examples to try: those of :data:`IN_CONTEXT_EXAMPLES` that fit in front of the longest
    training record, so that no question is cut short for the sake of examples; at least the smallest one.
    """
    bound = Prompt.manual(task.manual).bind(setup.backbone)
    records = [_spoken(row.record, task.file) for row in task.train]
    lengths = [len(example.token_ids) + example.own_tokens for example in bound.examples(records)]
    room = min(setup.backbone.tokenizer.max_tokens, IN_CONTEXT_TOKENS) - max(lengths)
    fitting = [count for count in IN_CONTEXT_EXAMPLES if count * sum(lengths) / len(lengths) <= room]
    return fitting or [IN_CONTEXT_EXAMPLES[0]]


def _spoken(record: Record, file: TaskFile | None) -> Record:
    """Return a record with the first word of its label as its target."""
    if file is None or file.label_words is None:
        return record
    return {**record, TARGET_FIELD: file.label_words.words[record[TARGET_FIELD]][0]}


def with_examples(manual: Template, examples: Sequence[Record], *, kind: str) -> Template:
    """Return a manual template with filled-in examples in front, a line each (a masked model's tokenizer knows no
    lines: there a space keeps them apart).
    """
    end = "\n" if kind == "causal" else " "
    shown = "".join(filled(manual.pieces, record) + end for record in examples)
    # Examples are whole sentences; behind the question's target a causal model sees nothing.
    pieces = (manual.without_tail()[0] if kind == "causal" else manual).pieces
    if isinstance(pieces[0], Literal):
        return Template((Literal(shown + pieces[0].text), *pieces[1:]))
    return Template((Literal(shown), *pieces))


def filled(pieces: Sequence[Piece], record: Record) -> str:
    """Return a manual template's text with a record's fields and target in it."""
    parts = []
    for piece in pieces:
        if isinstance(piece, Literal):
            parts.append(piece.text)
        elif isinstance(piece, Field):
            parts.append(record[piece.name])
        elif isinstance(piece, Target):
            parts.append(record[TARGET_FIELD])
    return "".join(parts)
