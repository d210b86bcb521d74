"""What a method is: names, controls, answers of ranked texts, and a list that one's own can join."""

from __future__ import annotations

import pytest

import ptuning.method
from ptuning.data.questions import Question, as_questions
from ptuning.errors import ConfigError
from ptuning.method.base import Methods, Setup, Solution, Task
from ptuning.method.registry import METHODS, methods
from ptuning.metrics import Answer
from ptuning.template.kinds import KINDS


def nothing(_: Task, __: Setup) -> Solution:
    return Solution.of_ranking(lambda _: [])


def test_an_answer_among_ranked_texts() -> None:
    assert Answer.of_ranked(["yes", "no"], Question({"y": "yes"}).right) == Answer("yes", True, 1)
    assert Answer.of_ranked(["yes", "no"], Question({"y": " no\n"}).right) == Answer("yes", False, 2)
    assert Answer.of_ranked(["yes", "no"], Question({"y": "maybe"}).right) == Answer("yes", False, 0)
    assert Answer.of_ranked([], Question({"y": "maybe"}).right) == Answer("", False, 0)


def test_a_solution_of_a_ranking_answers_each_record() -> None:
    solution = Solution.of_ranking(lambda record: [record["x"], "no"], answer="no")
    assert solution.record == {"answer": "no"}
    found = solution.answer(as_questions([{"x": "yes", "y": "yes"}, {"x": "one", "y": "no"}]))
    assert found == [Answer("yes", True, 1), Answer("one", False, 2)]


def test_a_method_joins_the_list_under_its_name() -> None:
    mine = Methods()
    assert mine.register("mine", describe="always nothing", seeded=True, learns_slots=True)(nothing) is nothing
    found = mine.find("mine")
    assert (found.name, found.describe, found.fit) == ("mine", "always nothing", nothing)
    assert (found.trained, found.seeded, found.reads_train, found.learns_slots) == (False, True, True, True)
    assert mine.default_for("compare") == []  # it runs only if it is named
    assert (list(mine), len(mine), mine["mine"]) == (["mine"], 1, found)
    for name in ("mine", "all"):  # which stands for the list
        with pytest.raises(ConfigError, match=f"there is a method '{name}' already"):
            mine.register(name, describe="another")
    assert "mine" not in METHODS


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "a\\b", "a@b", "a,b", "a b", "a\nb"])
def test_a_name_that_could_be_no_folder_or_option(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a valid name for a method"):
        Methods().register(name, describe="")


def test_the_control_of_a_trained_method() -> None:
    mine = Methods()
    mine.register("learns", describe="it learns", trained=True)(nothing)
    mine.register("knows", describe="it knows")(nothing)
    control = mine.find("learns@random-weights")
    assert (control.name, control.fit, control.trained) == ("learns@random-weights", nothing, True)
    assert control.seeded  # its weights are drawn, whatever the method draws
    assert control.describe == "it learns; backbone with random weights"
    assert not mine.find("learns").seeded
    for wrong in ("knows@random-weights", "learns@shuffled", "learns@", "learns@random-weights@random-weights"):
        with pytest.raises(ConfigError, match=f"'{wrong}': only @random-weights may follow"):
            mine.find(wrong)
    with pytest.raises(ConfigError, match=r"unknown method 'learn'\. Did you mean 'learns'\? Known: learns, knows"):
        mine.find("learn@random-weights")


def test_what_people_call_a_method_finds_it() -> None:
    assert METHODS.find("lora") is METHODS["manual+lora"]
    assert METHODS.find("lora lora_rank=4").name == "manual+lora lora_rank=4"
    assert METHODS.find("lora@random-weights").name == "manual+lora@random-weights"


def test_the_methods_of_the_paper() -> None:
    assert list(methods) == [
        "majority", "manual", "manual-restricted", "in-context",
        "p-tuning", "fine-tuning", "manual+fine-tuning", "p-tuning+fine-tuning", "manual+lora", "p-tuning+lora",
        *KINDS, "p-tuning+head", "p-tuning-v2+head",
    ]  # fmt: skip
    assert methods.every == list(methods)[:-2]
    assert [name for name, method in methods.items() if method.trained] == list(methods)[4:]
    assert [name for name, method in methods.items() if not method.seeded] == list(methods)[:3]
    assert [name for name, method in methods.items() if method.learns_slots] == [
        "p-tuning", "p-tuning+fine-tuning", "p-tuning+lora", *KINDS, "p-tuning+head", "p-tuning-v2+head",
    ]  # fmt: skip
    assert {name: method.train_backbone for name, method in methods.items() if method.trained} == {
        "p-tuning": "none", "fine-tuning": "full", "manual+fine-tuning": "full", "p-tuning+fine-tuning": "full",
        "manual+lora": "lora", "p-tuning+lora": "lora", **dict.fromkeys(KINDS, "none"),
        "p-tuning+head": "head", "p-tuning-v2+head": "head",
    }  # fmt: skip
    assert list(KINDS) == ["prompt-tuning", "prefix-tuning", "p-tuning-v2", "context-tuning", "hybrid"]


@pytest.mark.parametrize(
    ("suite", "names"),
    [
        ("compare", ["majority", "manual", "manual-restricted", "in-context", "p-tuning"]),
        ("lama", ["majority", "manual", "manual-restricted", "in-context", "p-tuning"]),
        ("superglue", ["majority", "manual", "in-context", "p-tuning", "fine-tuning", "manual+fine-tuning"]),
    ],
)
def test_the_methods_that_run_if_none_are_named(suite: str, names: list[str]) -> None:
    assert methods.default_for(suite) == names


def test_a_method_of_ones_own_imports_from_the_room() -> None:
    """As docs/compare.md tells users."""
    assert (ptuning.method.Solution, ptuning.method.Task, ptuning.method.Setup) == (Solution, Task, Setup)
    with pytest.raises(AttributeError, match="has no attribute 'Solutions'"):
        getattr(ptuning.method, "Solutions")  # noqa: B009
