"""What a check says of a task before a model is loaded: words, data, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.tokenizer import TextTokenizer
from ptuning.data.answer_space import AnswerSpace
from ptuning.data.checks import Report, check_data, check_known, check_words
from ptuning.data.questions import as_questions
from ptuning.data.task_files import TaskFile
from ptuning.template.segments import Kind
from tests.conftest import bound

TASK = """
name = "moods"
version = "1"
[labels]
good = ["great", "good"]
bad = ["terrible"]
[[patterns]]
manual = "{text} It was [Y]."
"""
ROWS: list[dict[str, object]] = [{"text": "a film", "label": "good"}, {"text": "  ", "label": "good"}]
Check = Callable[..., Report]


@pytest.fixture
def check(raw_tokenizer: Callable[[str], PreTrainedTokenizerFast]) -> Check:
    """Check a task file's text with a tiny tokenizer of a family."""

    def words(text: str, *, family: str = "llama", rows: list[dict[str, object]] | None = None) -> Report:
        task, kind = TaskFile.parse(text), "masked" if family in ("bert", "roberta") else "causal"
        parts = {"train": task.read_rows(rows)} if rows else {}
        found: Kind = "masked" if kind == "masked" else "causal"
        return check_words(task, TextTokenizer(raw_tokenizer(family), max_tokens=64), found, parts=parts)

    return words


def test_the_tokens_of_words_are_told_once_for_all_patterns(check: Check) -> None:
    found = check(TASK + '[[patterns]]\nmanual = "Text: {text} It was [Y]."')
    assert len(found.facts) == 1
    assert found.facts[0].startswith("label words and their tokens: good: 'great' [")
    assert (found.warnings, found.problems) == ((), ())


def test_words_that_collide_or_are_unknown_are_problems_of_every_pattern(check: Check) -> None:
    found = check(TASK.replace('"terrible"', '"漢"'), family="bert")
    assert len(found.problems) == 2
    assert found.problems[0].startswith("pattern 1, manual: the word '漢' of label 'bad' is unknown to the tokenizer")
    found = check(TASK.replace('"great"', '"no film"').replace('"terrible"', '"no  film"'), family="bert")
    assert any("have the same token ids" in problem for problem in found.problems)


def test_rows_that_are_shortened_and_rows_that_do_not_fit(check: Check) -> None:
    rows: list[dict[str, object]] = [{"text": "city " * 80, "label": "bad"}, *ROWS]
    found = check(TASK, rows=rows)
    assert found.problems == ()
    assert (
        "pattern 1, manual: 1 of 3 rows are shortened to 64 tokens, in the fields without '!': text" in found.warnings
    )
    kept = check(TASK.replace("{text}", "{text!}"), rows=rows)
    assert any("does not fit" in problem for problem in kept.problems)


def test_rows_that_bring_their_choices(check: Check) -> None:
    text = 'name="c"\nversion="1"\n[choices]\nfrom=["a","b"]\n[[patterns]]\nmanual="[X] is [Y]"'
    assert check(text) == Report()
    rows: list[dict[str, object]] = [{"x": "city", "a": "yes", "b": "people " * 80, "label": 0}]
    found = check(text, rows=rows)
    assert all("does not fit" in problem for problem in found.problems)
    assert len(found.problems) == 2


def test_what_stands_in_the_data() -> None:
    task = TaskFile.parse(TASK)
    found = check_data(task, {"train": task.read_rows(ROWS), "test": task.read_rows(ROWS, labelled=False)})
    assert found.facts == ("train: 2 rows of in memory; good 2, bad 0", "test: 2 rows of in memory")
    assert found.warnings[:2] == ("train: no row has the label bad", "train: the field 'text' is empty in 1 row: row 2")
    text = 'name="c"\nversion="1"\ngroup="g"\n[choices]\nfrom=["a[]"]\n[[patterns]]\nmanual="[X] is [Y]"'
    choose = TaskFile.parse(text)
    rows = choose.read_rows([{"x": "b", "a": list("abcd"[:n]), "label": 0, "g": 1} for n in (2, 3, 4)])
    assert check_data(choose, {"dev": rows}).facts == (
        "dev: 3 rows of in memory; 2 to 4 choices, 3 in the middle; 1 groups",
    )


def test_targets_and_fields_that_the_tokenizer_does_not_know(check: Check) -> None:
    task = TASK.replace('[labels]\ngood = ["great", "good"]\nbad = ["terrible"]\n', "")
    rows: list[dict[str, object]] = [{"text": "a film", "label": "good"}, {"text": "漢漢", "label": "\U0001f642"}]
    found = check(task, family="bert", rows=rows)
    assert any(
        "1 of 2 targets of in memory are unknown to the tokenizer, such as '\U0001f642'" in one
        for one in found.warnings
    )
    assert any("the field 'text' of 1 of 2 records of in memory is mostly unknown" in one for one in found.warnings)
    assert (len(found.warnings), found.problems) == (2, ())
    assert check(task, family="llama", rows=rows) == Report()
    (manual, learned) = check(task, family="bert", rows=rows[1:]).problems
    assert "1 of 1 targets" in manual
    assert "the vocabulary does not fit the data" in learned


def test_a_template_may_begin_with_a_field(make_backbone: Callable[[str], Backbone]) -> None:
    """Targets are tokenised without their rows; a causal model without BOS needs something in front of them."""
    known = as_questions([{"x": "Kenya", "y": "Nairobi"}])
    assert check_known(bound(make_backbone("gpt2"), "[X] [Y]"), AnswerSpace(), [known]) == []
