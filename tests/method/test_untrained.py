"""Methods that train nothing: the majority, manual prompts, and examples in context."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.data.questions import Questions, as_questions
from ptuning.errors import ConfigError, TemplateError
from ptuning.method import untrained
from ptuning.method.base import Setup, Solution, Task
from ptuning.method.untrained import in_context, is_multiline, majority, manual, manual_restricted, target_tokens
from ptuning.metrics import Answer
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.score import answer_records
from ptuning.records import Record, Records
from ptuning.template.examples import filled, with_examples
from ptuning.template.language import Template
from tests.conftest import WARM, bound

MANUAL = "[X] is [Y] ."
WORDS = ("yes", "good", "great", "bad")
TRAIN: list[Record] = [{"x": f"P {at}", "y": WORDS[at % 4]} for at in range(40)]
DEV: list[Record] = [{"x": f"Kenya {at}", "y": WORDS[at % 3]} for at in range(6)]


def task(train: Sequence[Record] = TRAIN, dev: Sequence[Record] = DEV, *, pattern: str = MANUAL, **more: Any) -> Task:
    objects = tuple(sorted({row["y"] for row in [*train, *dev]}))
    more = {"single_token": True, **more}
    return Task(
        "P1", as_questions(train), as_questions(dev), Template.parse(pattern), Template.parse(WARM), objects, **more
    )


def test_the_manual_prompt_is_asked_as_it_is(backbone: Backbone) -> None:
    plain = Prompt.manual(MANUAL)
    for closed in (None, ("yes", "bad")):
        solution = manual(task(vocabulary=closed), Setup(backbone))
        expected = answer_records(PromptModel(backbone), plain, Records(DEV), closed=closed, single_token=True)
        assert solution.answer(as_questions(DEV)) == expected
        assert solution.record == {"prompt": MANUAL}


def test_the_restricted_prompt_chooses_among_the_tasks_objects(backbone: Backbone) -> None:
    for single in (True, False):
        answers = manual_restricted(task(single_token=single), Setup(backbone)).answer(as_questions(DEV))
        assert {answer.text for answer in answers} <= set(WORDS)
        assert all(answer.rank is not None and answer.rank <= 4 for answer in answers)


def test_generated_answers_are_limited_by_the_training_targets(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"x": "a", "y": "yes"}, {"x": "b", "y": "a good film"}]
    here = task(rows, [{"x": "c", "y": "a good film and a bad one"}], single_token=False)
    longest = max(example.own_tokens for example in bound(causal, MANUAL).examples(rows))
    assert target_tokens(here, Setup(causal)) == longest
    assert not is_multiline(here)
    assert is_multiline(task([{"x": "Kenya", "y": "yes\nno"}]))
    given: list[tuple[int | None, bool]] = []

    def answer_records(_: object, prompt: Prompt, *__: object, max_tokens: int | None, **___: object) -> list[Answer]:
        given.append((max_tokens, prompt.multiline))
        return []

    monkeypatch.setattr(untrained, "answer_records", answer_records)
    manual(here, Setup(causal)).answer(as_questions(DEV))
    assert given == [(longest, False)]


def test_the_majority_is_counted_in_the_training_part(causal: Backbone) -> None:
    rows = [{"x": "a", "y": y} for y in ("yes", "no", " yes", "no ", "good")]
    solution = majority(task(rows, [{"x": "b", "y": "great"}] * 9), Setup(causal))
    assert solution.record == {"answer": "no"}  # of equally frequent ones the first in the alphabet
    test = as_questions([{"x": "c", "y": y} for y in ("no", "yes", "good", "great")])
    assert solution.answer(test) == [Answer("no", at == 1, at) for at in (1, 2, 3, 0)]


def examples_in(solution: Solution) -> list[str]:
    """The lines in front of the question."""
    return str(solution.record["prompt"]).splitlines()[:-1]


def test_a_filled_example() -> None:
    pieces = Template.parse("{kind}: {name!}, it is [Y] (or so).").pieces
    assert filled(pieces, {"kind": "film", "name": "Heat", "y": "great"}) == "film: Heat, it is great (or so)."
    causal = with_examples(Template.parse(MANUAL), TRAIN[:2], kind="causal")
    # The examples are whole; behind the question's target such a model would see nothing.
    assert str(causal) == f"P 0 is yes .\nP 1 is good .\n{MANUAL.removesuffix(' .')}"
    masked = with_examples(Template.parse("So [X] is [Y] ."), TRAIN[:2], kind="masked")
    assert str(masked) == "So P 0 is yes . So P 1 is good . So [X] is [Y] ."


def test_an_example_is_the_text_that_the_question_would_have_been(causal: Backbone) -> None:
    """With the target of the example in the question's place, the model reads the same sentence twice."""
    twice = with_examples(Template.parse(MANUAL), TRAIN[:1], kind="causal")
    (example,) = bound(causal, str(twice)).examples(TRAIN[:1])
    read = causal.tokenizer.decode(list(example.token_ids + example.target_ids))
    assert read.removeprefix("<s>").strip() == "P 0 is yes .\nP 0 is yes"


def test_examples_are_those_of_the_training_part_and_drawn_by_seed(causal: Backbone) -> None:
    known = {filled(Template.parse(MANUAL).pieces, row) for row in TRAIN}
    solutions = [in_context(task(), Setup(causal, seed=seed)) for seed in (0, 0, 1, 2, 3)]
    for solution in solutions:
        lines = examples_in(solution)
        assert lines
        assert set(lines) <= known
        assert len(set(lines)) == len(lines)
        assert not any(row["x"] in str(solution.record["prompt"]) for row in DEV)
    assert solutions[0].record == solutions[1].record
    assert len({str(solution.record["prompt"]) for solution in solutions}) > 1
    assert solutions[0].answer(as_questions(DEV)) == solutions[1].answer(as_questions(DEV))


def test_only_as_many_examples_as_fit_are_tried(causal: Backbone) -> None:
    """A tiny model reads 64 tokens, and an example takes about eight."""
    tried: Any = in_context(task(), Setup(causal)).record["tried"]
    assert [(setting["settings"]["examples"], setting["settings"]["draw"]) for setting in tried] == [
        (1, 0), (1, 1), (1, 2), (4, 0), (4, 1), (4, 2),
    ]  # fmt: skip
    few: Any = in_context(task(TRAIN[:3]), Setup(causal)).record["tried"]
    assert {setting["settings"]["examples"] for setting in few} == {1}
    long = [{"x": "the movie was great and " * 12, "y": "yes"}] * 2
    with pytest.raises(ConfigError, match="P1: none of 2"):
        in_context(task(long), Setup(causal))


def stub(score: Callable[[int, int], float | None]) -> Callable[..., Solution]:
    """A stand-in whose share of hits is a function of the number of examples and of how often that was tried."""
    draws: dict[int, int] = {}

    def prompt_solution(_: Task, __: Setup, template: Template, *, closed: object) -> Solution:
        count = str(template).count("\n")
        draws[count] = draws.get(count, -1) + 1
        wanted = score(count, draws[count])

        def answer(records: Questions) -> list[Answer]:
            if wanted is None:
                raise TemplateError("does not fit")
            return [Answer("", at < wanted * len(records)) for at in range(len(records))]

        return Solution(answer)

    return prompt_solution


def test_number_and_draw_are_chosen_by_the_development_score(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw that does not fit leaves the next ones."""
    scores = {(4, 0): None, (4, 1): 5 / 6, (16, 0): 4 / 6, (32, 2): 5 / 6}
    monkeypatch.setattr(untrained, "prompt_solution", stub(lambda *which: scores.get(which, 1 / 6)))
    monkeypatch.setattr(untrained, "example_counts", lambda *_: untrained.IN_CONTEXT_EXAMPLES)
    solution = in_context(task(), Setup(causal))
    assert solution.record["chosen"] == {"settings": {"examples": 4, "draw": 1}, "dev_score": 5 / 6}
    assert len(examples_in(solution)) == 4  # of equal scores the first, which has fewer examples
    tried: Any = solution.record["tried"]
    assert len(tried) == 11


def test_texts_are_chosen_by_their_first_metric_on_as_many_records_as_a_training_writes(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share of hits is 0 for all."""
    counts: list[int] = []

    def stand_in(_: Task, __: Setup, template: Template, *, closed: object) -> Solution:
        longer = str(template).count("\n") == 4

        def answer(questions: Questions) -> list[Answer]:
            counts.append(len(questions))
            return [Answer(f"so {row.record['y']}" if longer else "nothing", hit=False) for row in questions]

        return Solution(answer)

    monkeypatch.setattr(untrained, "prompt_solution", stand_in)
    monkeypatch.setattr(untrained, "example_counts", lambda *_: (1, 4))
    monkeypatch.setattr(untrained, "JUDGED_RECORDS", 2)
    solution = in_context(replace(task(), text_metrics=("chrf", "exact")), Setup(causal))
    chosen: Any = solution.record["chosen"]
    assert chosen["settings"] == {"examples": 4, "draw": 0}
    assert 10 < chosen["dev_score"] <= 100
    assert set(counts) == {2}


def test_examples_before_the_question_of_a_masked_model(masked: Backbone) -> None:
    """Text that is a special token is no example: in a template "[MASK]" would be a second mask."""
    special = masked.tokenizer.decode([masked.tokenizer.mask_id or 0]) or "[MASK]"
    rows = [{"x": f"{next(iter(masked.tokenizer.special_ids))} {special}", "y": "yes"}, {"x": "Kenya", "y": "good"}]
    solution = in_context(task(rows), Setup(masked))
    prompt = str(solution.record["prompt"])
    assert prompt == f"Kenya is good . {MANUAL}"
    shown = Prompt.manual(Template.parse(prompt))
    assert solution.answer(as_questions(DEV)) == answer_records(
        PromptModel(masked), shown, Records(DEV), single_token=True
    )
