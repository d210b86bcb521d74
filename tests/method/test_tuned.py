"""Methods that train: the backbone is left as it is, copies of it learn, and the best of the tries answers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.questions import as_questions
from ptuning.engine import prefix_cache
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.errors import ConfigError
from ptuning.method import tuned
from ptuning.method.base import Setup, Solution, Task
from ptuning.method.registry import METHODS
from ptuning.method.tuned import TRIED_FACTORS, bare, tried_factors
from ptuning.metrics import Answer
from ptuning.progress import Interrupted, Progress
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.score import answer_records
from ptuning.records import Record, Records
from ptuning.template.language import Template
from ptuning.template.segments import Ids
from ptuning.training.trainer import Trainer
from tests.conftest import FAMILIES, bound

MANUAL = "The capital of [X] is [Y] ."
WORDS = ("yes", "good", "great", "bad")
TRAIN: list[Record] = [{"x": name, "y": WORDS[at % 4]} for at, name in enumerate(("Kenya", "Peru", "a", "movie"))]
DEV: list[Record] = [{"x": "the movie", "y": "bad"}, {"x": "in Peru", "y": "good"}, {"x": "Kenya", "y": "great"}]
TUNING = ("fine-tuning", "manual+fine-tuning", "p-tuning+fine-tuning")
LORA = ("manual+lora", "p-tuning+lora")
TRAINED = ("p-tuning", *TUNING, *LORA)
# Every template with every way to train, once: for rules that hold for each of them alike.
KINDS = ("p-tuning", "fine-tuning", "manual+lora")
# Each method with a family, each family with a method: for rules that hold for every method of every family.
EACH = [(name, FAMILIES[at % len(FAMILIES)]) for at, name in enumerate(TRAINED)]
QUICK = TrainConfig(epochs=2, batch_size=2, lr=0.01, backbone_lr=1e-3, lora_lr=0.01, patience=9)
# Training takes steps; each epoch ends with scoring and writing all weights, so what learns by heart sees its rows
# several times in an epoch.
LEARNS = QUICK.adapted(epochs=3, backbone_lr=5e-3, patience=20)
SEEN = TRAIN * 12


def task(
    train: Sequence[Record] = TRAIN, dev: Sequence[Record] = DEV, *, template: str = "[P:The capital] [X] [P] [Y]"
) -> Task:
    parsed = Template.parse(template)
    return Task("P1", as_questions(train), as_questions(dev), Template.parse(MANUAL), parsed, WORDS, single_token=True)


def fit(method: str, backbone: Backbone, config: TrainConfig = QUICK, **more: Any) -> Solution:
    return METHODS[method].fit(more.pop("task", task()), Setup(backbone, config=config, **more))


def share(answers: Sequence[Answer]) -> float:
    return sum(answer.hit for answer in answers) / len(answers)


@pytest.mark.parametrize(("method", "family"), EACH)
def test_the_backbone_stays_as_it_is(method: str, backbone: Backbone) -> None:
    before = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    fingerprint = backbone.fingerprint
    solution = fit(method, backbone, tries=2)
    solution.answer(as_questions(DEV))
    assert all(torch.equal(weight, before[name]) for name, weight in backbone.model.state_dict().items())
    assert not backbone.model.training
    assert not any(weight.requires_grad or weight.grad is not None for weight in backbone.model.parameters())
    backbone.__dict__.pop("fingerprint")
    assert backbone.fingerprint == fingerprint


def test_tries_share_the_text_before_the_slots(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same for every learning rate, so it is run once; afterwards nothing of it is left."""
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 2)
    ran: list[PrefixCache] = []
    ids: list[Ids] = []
    real = PrefixCache._run

    def watch(parts: PrefixCache, group: Sequence[Ids]) -> list[torch.Tensor]:
        ran.append(parts)
        ids.extend(group)
        return real(parts, group)

    monkeypatch.setattr(PrefixCache, "_run", watch)
    solution = fit(
        "p-tuning", causal, QUICK.adapted(num_restarts=2), tries=2, task=task(template="{x} and {x} [P] [Y]")
    )
    assert len(ids) == len(set(ids)) == len({row["x"] for row in (*TRAIN, *DEV)})
    assert len(set(ran)) == 1
    assert not ran[0].tokens
    tried: Any = solution.record["tried"]
    assert len(tried) == 2


@pytest.mark.parametrize(("method", "starts"), [("p-tuning", 2), ("manual+fine-tuning", 1), ("p-tuning+lora", 2)])
def test_only_slots_have_several_starts(
    method: str, starts: int, causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[int] = []
    real = Trainer.steps

    def watch(trainer: Trainer, *args: Any, **options: Any) -> Any:
        began.append(trainer.config.seed)
        return real(trainer, *args, **options)

    monkeypatch.setattr(Trainer, "steps", watch)
    fit(method, causal, QUICK.adapted(num_restarts=2))
    assert len(set(began)) == len(began) == starts


@pytest.mark.parametrize(("method", "family"), [*((name, "gpt2") for name in TUNING), *EACH[1:4]])
def test_it_learns_the_training_facts(method: str, backbone: Backbone) -> None:
    plain = share(answer_records(PromptModel(backbone), Prompt.manual(MANUAL), Records(TRAIN), single_token=True))
    slow = LEARNS.adapted(epochs=6)  # tiny masked models take their time
    solution = fit(method, backbone, LEARNS if backbone.kind == "causal" else slow, task=task(SEEN, TRAIN))
    history: Any = solution.record["history"]
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    assert share(solution.answer(as_questions(TRAIN))) == 1.0 > plain
    learned = {"fine-tuning": "[X] [Y]", "manual+fine-tuning": MANUAL}.get(method, "[P:The capital] [X] [P] [Y]")
    # The prompt has what the model sees of it.
    assert solution.record["prompt"] == str(bound(backbone, learned).template)
    everything = sum(weight.numel() for weight in backbone.model.parameters())
    trained: Any = solution.record["trainable_parameters"]
    assert trained > everything if method.startswith("p-tuning") else trained == everything


@pytest.mark.parametrize("method", KINDS)
def test_what_answers_is_what_scored_best_on_the_development_part(method: str, causal: Backbone) -> None:
    """Steps so large that the last epoch is not the best one."""
    config = QUICK.adapted(epochs=5, lr=0.05, backbone_lr=0.02, lora_lr=0.2)
    solution = fit(method, causal, config)
    record: Any = solution.record
    scores = [epoch["dev_score"] for epoch in record["history"]]
    assert share(solution.answer(as_questions(DEV))) == record["chosen"]["dev_score"] >= max(scores)
    if record["chosen_epoch"]:
        chosen = record["history"][record["chosen_epoch"] - 1]
        assert (chosen["dev_score"], chosen["dev_loss"]) == (
            record["chosen"]["dev_score"], record["chosen"]["dev_loss"],
        )  # fmt: skip


@pytest.mark.parametrize("method", KINDS)
def test_each_try_takes_another_learning_rate_and_the_best_one_answers(method: str, causal: Backbone) -> None:
    config = QUICK
    record: Any = (several := fit(method, causal, config, tries=3, task=task(TRAIN, TRAIN))).record
    setting = "lr" if method == "p-tuning" else "lora_lr" if method in LORA else "backbone_lr"
    base = getattr(config, setting)
    assert [tried["settings"] for tried in record["tried"]] == [
        {setting: base * factor} for factor in TRIED_FACTORS[:3]
    ]
    best = max(record["tried"], key=lambda tried: (tried["dev_score"], -tried["dev_loss"]))
    assert record["chosen"] == best
    alone = fit(method, causal, config.adapted(**best["settings"]), task=task(TRAIN, TRAIN))
    assert several.answer(as_questions(DEV)) == alone.answer(as_questions(DEV))
    assert several.record["history"][-1]["dev_loss"] == alone.record["history"][-1]["dev_loss"]  # type: ignore[index,call-overload]


def test_the_choice_among_tries() -> None:
    def tried(*pairs: tuple[float, float]) -> Any:
        return [{"dev_score": score, "dev_loss": loss} for score, loss in pairs]

    assert tuned._best(tried((0.2, 1.0), (0.5, 3.0), (0.4, 0.1))) == 1
    assert tuned._best(tried((0.5, 1.0), (0.5, 0.9), (0.5, 0.9))) == 1
    assert tuned._best(tried((0.0, 1.0))) == 0


@pytest.mark.parametrize("tries", [0, 6])
def test_more_tries_than_there_are_settings(causal: Backbone, tries: int) -> None:
    assert list(tried_factors(1)) == [1.0]
    assert len(set(tried_factors(5))) == 5
    for method in TRAINED:
        with pytest.raises(ConfigError, match=f"tries is {tries}"):
            fit(method, causal, tries=tries)


@pytest.mark.parametrize(("method", "family"), [*zip(LORA, FAMILIES, strict=False)])
def test_adapters_learn_the_training_facts(method: str, backbone: Backbone) -> None:
    config = LEARNS.adapted(lora_lr=0.02)
    solution = fit(method, backbone, config, task=task(SEEN, TRAIN))
    history: Any = solution.record["history"]
    start: Any = solution.record["start"]
    assert history[-1]["train_loss"] < 0.9 * start["dev_loss"]  # on the same facts
    everything = sum(weight.numel() for weight in backbone.model.parameters())
    trained: Any = solution.record["trainable_parameters"]
    assert (0 < trained < everything) or method == "p-tuning+lora"


@pytest.mark.parametrize("method", KINDS)
def test_the_seed_decides_alone(method: str, causal: Backbone) -> None:
    def history(solution: Solution) -> list[dict[str, float]]:
        epochs: Any = solution.record["history"]
        return [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in epochs]

    first = fit(method, causal, seed=3)
    torch.manual_seed(99)
    second, other = fit(method, causal, seed=3), fit(method, causal, seed=4)
    assert history(first) == history(second) != history(other)
    assert first.answer(as_questions(DEV)) == second.answer(as_questions(DEV))


def test_a_closed_set_restricts_the_answers(causal: Backbone) -> None:
    closed = replace(task(), vocabulary=("yes", "bad", "one"))
    for method in TRAINED:
        answers = fit(method, causal, task=closed).answer(as_questions(DEV))
        assert {answer.text for answer in answers} <= {"yes", "bad", "one"}
        assert 0 in {answer.rank for answer in answers}  # a target that is not in it


@pytest.mark.parametrize("method", ["p-tuning", "manual+fine-tuning", "p-tuning+lora"])
def test_stopped_it_goes_on_where_it_was(method: str, causal: Backbone, tmp_path: Path) -> None:
    whole = fit(method, causal, tries=2)
    stops = iter([False] * 3 + [True])
    with pytest.raises(Interrupted):
        fit(method, causal, tries=2, folder=tmp_path, should_stop=lambda: next(stops))
    steps: list[Progress] = []
    resumed = fit(method, causal, tries=2, folder=tmp_path, report=steps.append)
    assert resumed.record["tried"] == whole.record["tried"]
    assert len([step for step in steps if step.stage == "train"]) == 8 - 4
    assert resumed.answer(as_questions(DEV)) == whole.answer(as_questions(DEV))


@pytest.mark.parametrize("method", TRAINED)
def test_whole_backbones_do_not_stay_on_disk(method: str, causal: Backbone, tmp_path: Path) -> None:
    """A comparison of many cells would fill any disk; prompts and adapters are small, and stay."""
    fit(method, causal, folder=tmp_path, tries=2)
    left = [] if method in TUNING else ["try-1", "try-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    for name in left:
        assert Prompt.load(tmp_path / name).method == method


def test_only_fields_and_target_are_left_of_a_bare_template() -> None:
    assert str(bare(Template.parse("[Y] is the capital of [X] , {place!} in [X] ."))) == "[X] {place!} [Y]"
    assert str(bare(Template.parse("It is [Y]"))) == "[Y]"


def test_guesses_that_are_stuck_on_one_class_are_a_warning() -> None:
    def evaluations(*classes: int, score: float = 0.5) -> list[dict[str, float]]:
        return [{"guessed_classes": number, "dev_score": score} for number in classes]

    assert tuned.stuck(evaluations(1, 1, 2, 1, 1)) is None
    assert "3 evaluations in a row guessed one class" in (tuned.stuck(evaluations(2, 1, 1, 1, 2)) or "")
    assert tuned.stuck(evaluations(1, 1, 1, score=1.0)) is None  # every row is of that class
    assert tuned.stuck([{"dev_score": 0.0}] * 5) is None  # nothing to guess among
