"""Examples in context: drawn by seed, chosen on the development part, never from the test part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.data.questions import Questions, as_questions
from ptuning.errors import ConfigError, TemplateError
from ptuning.method import in_context as in_context_module
from ptuning.method.base import Setup, Solution, Task
from ptuning.method.in_context import in_context
from ptuning.metrics import Answer
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.score import answer_records
from ptuning.records import Records
from ptuning.template.examples import filled, with_examples
from ptuning.template.language import Template
from tests.conftest import bound
from tests.method.test_manual import DEV, MANUAL, TRAIN, task


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
    found = [in_context(task(), Setup(causal, seed=seed)) for seed in (0, 0, 1, 2, 3)]
    for solution in found:
        lines = examples_in(solution)
        assert lines
        assert set(lines) <= known
        assert len(set(lines)) == len(lines)
        assert not any(row["x"] in str(solution.record["prompt"]) for row in DEV)
    assert found[0].record == found[1].record
    assert len({str(solution.record["prompt"]) for solution in found}) > 1
    assert found[0].answer(as_questions(DEV)) == found[1].answer(as_questions(DEV))


def test_only_as_many_examples_as_fit_are_tried(causal: Backbone) -> None:
    """A tiny model reads 64 tokens, and an example takes about eight."""
    tried: Any = in_context(task(), Setup(causal)).record["tried"]
    assert [(one["settings"]["examples"], one["settings"]["draw"]) for one in tried] == [
        (1, 0), (1, 1), (1, 2), (4, 0), (4, 1), (4, 2),
    ]  # fmt: skip
    few: Any = in_context(task(TRAIN[:3]), Setup(causal)).record["tried"]
    assert {one["settings"]["examples"] for one in few} == {1}
    long = [{"x": "the movie was great and " * 12, "y": "yes"}] * 2
    with pytest.raises(ConfigError, match="P1: none of 2 training records fits in front of the question"):
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
    scores = {(4, 1): 5 / 6, (16, 0): 4 / 6, (32, 2): 5 / 6}
    monkeypatch.setattr(in_context_module, "prompt_solution", stub(lambda *which: scores.get(which, 1 / 6)))
    monkeypatch.setattr(in_context_module, "example_counts", lambda *_: in_context_module.IN_CONTEXT_EXAMPLES)
    found = in_context(task(), Setup(causal))
    assert found.record["chosen"] == {"settings": {"examples": 4, "draw": 1}, "dev_score": 5 / 6}
    assert len(examples_in(found)) == 4  # of equal scores the first, which has fewer examples
    tried: Any = found.record["tried"]
    assert len(tried) == 12


def test_texts_are_chosen_by_their_first_metric_on_as_many_records_as_a_training_writes(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share of hits is 0 for all."""
    asked: list[int] = []

    def solution(_: Task, __: Setup, template: Template, *, closed: object) -> Solution:
        longer = str(template).count("\n") == 4

        def answer(questions: Questions) -> list[Answer]:
            asked.append(len(questions))
            return [Answer(f"so {row.record['y']}" if longer else "nothing", hit=False) for row in questions]

        return Solution(answer)

    monkeypatch.setattr(in_context_module, "prompt_solution", solution)
    monkeypatch.setattr(in_context_module, "example_counts", lambda *_: (1, 4))
    monkeypatch.setattr(in_context_module, "JUDGED_RECORDS", 2)
    found = in_context(replace(task(), text_metrics=("chrf", "exact")), Setup(causal))
    chosen: Any = found.record["chosen"]
    assert chosen["settings"] == {"examples": 4, "draw": 0}
    assert 10 < chosen["dev_score"] <= 100
    assert set(asked) == {2}


def test_a_draw_that_does_not_fit_says_nothing_of_the_next(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_context_module, "example_counts", lambda *_: in_context_module.IN_CONTEXT_EXAMPLES)
    scores = {(4, 0): None, (4, 1): 1.0}
    monkeypatch.setattr(in_context_module, "prompt_solution", stub(lambda *which: scores.get(which, 0.5)))
    assert in_context(task(), Setup(causal)).record["chosen"] == {
        "settings": {"examples": 4, "draw": 1},
        "dev_score": 1.0,
    }


def test_examples_in_front_of_a_masked_model(masked: Backbone) -> None:
    solution = in_context(task(TRAIN[:4]), Setup(masked))
    prompt = str(solution.record["prompt"])
    assert "\n" not in prompt
    assert prompt.endswith(f" . {MANUAL}")
    shown = Prompt.manual(Template.parse(prompt))
    assert solution.answer(as_questions(DEV)) == answer_records(
        PromptModel(masked), shown, Records(DEV), single_token=True
    )


def test_text_that_is_a_special_token_is_not_shown_as_an_example(masked: Backbone) -> None:
    """In a template "[MASK]" would be a second mask."""
    special = masked.tokenizer.decode([masked.tokenizer.mask_id or 0]) or "[MASK]"
    rows = [{"x": f"{next(iter(masked.tokenizer.special_ids))} {special}", "y": "yes"}, {"x": "Kenya", "y": "good"}]
    solution = in_context(task(rows), Setup(masked))
    assert str(solution.record["prompt"]) == f"Kenya is good . {MANUAL}"
