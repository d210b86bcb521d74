"""Methods: names, controls, answers of ranked texts, and a list that one's own can join."""

import pytest

import ptuning.method
from ptuning.data.questions import Question, as_questions
from ptuning.errors import ConfigError
from ptuning.method.base import Method, Methods, Setup, Solution, Task
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


def test_a_method_joins_the_list_under_its_name() -> None:
    mine = Methods()
    assert mine.register("mine", describe="always nothing", seeded=True, learns_slots=True)(nothing) is nothing
    method = mine.find("mine")
    assert method == Method("mine", "always nothing", nothing, seeded=True, learns_slots=True)
    assert mine.default_for("compare") == []  # it runs only if it is named
    for name in ("mine", "all"):
        with pytest.raises(ConfigError, match=f"'{name}' already"):
            mine.register(name, describe="another")
    assert "mine" not in METHODS
    solution = Solution.of_ranking(lambda record: [record["x"], "no"], answer="no")
    assert solution.record == {"answer": "no"}
    questions = as_questions([{"x": "yes", "y": "yes"}, {"x": "one", "y": "no"}])
    assert solution.answer(questions) == [Answer("yes", True, 1), Answer("one", False, 2)]


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "a\\b", "a@b", "a,b", "a b", "a\nb"])
def test_a_name_that_could_be_no_folder_or_option(name: str) -> None:
    with pytest.raises(ConfigError, match="not a valid name"):
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
        with pytest.raises(ConfigError, match=f"'{wrong}'.*@random-weights"):
            mine.find(wrong)
    with pytest.raises(ConfigError, match=r"'learn'.*'learns'"):
        mine.find("learn@random-weights")


def test_a_short_name_finds_a_method() -> None:
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


def test_a_method_of_ones_own_imports_from_the_package() -> None:
    assert (ptuning.method.Solution, ptuning.method.Task, ptuning.method.Setup) == (Solution, Task, Setup)
    with pytest.raises(AttributeError, match="'Solutions'"):
        getattr(ptuning.method, "Solutions")  # noqa: B009
