"""Methods that train: p-tuning, fine-tuning, LoRA, alone and together, each trying the same number of settings."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import cast

from ptuning.config import Tune
from ptuning.data.questions import Questions
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.errors import ConfigError
from ptuning.files import Json
from ptuning.method.base import METHODS, Setup, Solution, Task
from ptuning.method.baselines import target_tokens
from ptuning.method.classification_head import HeadModel
from ptuning.metrics import Answer
from ptuning.names import LEARNED, LEARNED_BY_TUNE
from ptuning.prompt.answer import answer_records
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.template.language import Field, Literal, Piece, Target, Template
from ptuning.training.prepare import prepare
from ptuning.training.run import TrainingRun
from ptuning.training.spec import FleetPrompt

# Learning rates in the order they are tried; the first is what a single try takes. Those of p-tuning are factors of the
# configured rate. Source: docs/decisions.md, decision 14 (what was tried).
TRIED_FACTORS = (1.0, 2.0, 0.5, 4.0, 0.25)
# So many evaluations with the same guess for every row are worth a warning.
STUCK_EVALUATIONS = 3
# Cost of training in forward passes: backward to the slots is as dear as forward, to all weights twice as dear.
PASSES: Mapping[Tune, float] = {"frozen": 2.5, "lora": 3.5, "tuned": 4.5}
# Which setting is the learning rate that is tried.
RATES: Mapping[Tune, str] = {"frozen": "lr", "tuned": "backbone_lr", "lora": "lora_lr"}


def _register(name: str, describe: str, template: Callable[[Task], Template], *, tune: Tune) -> None:
    """Register the method that trains on one of a task's templates."""

    def fit(task: Task, setup: Setup) -> Solution:
        return _learn(task, setup, template(task), tune=tune)

    def prompts(task: Task, setup: Setup) -> list[FleetPrompt]:
        return _tried(task, setup, template(task), tune=tune)

    METHODS.register(
        name,
        describe=describe,
        trained=True,
        seeded=True,
        passes=(PASSES[tune], 1.0),
        prompts=prompts if tune == "frozen" else None,
    )(fit)


# In the order of tables. Sources: Liu et al. (2021), section 3 (p-tuning), 4.1 (FT, MP+FT), 4.2 (all weights trained
# along, and FT with a head); Hu et al. (2021), section 4 (LoRA).
_register(LEARNED, "the learned prompt, backbone frozen", attrgetter("template"), tune="frozen")


@METHODS.register(
    "fine-tuning",
    describe="subject and target only, all weights trained (FT)",
    trained=True,
    seeded=True,
    passes=(PASSES["tuned"], 1.0),
)
def fine_tuning(task: Task, setup: Setup) -> Solution:
    """Train all weights on the fields and the target, without words around them; with a classification head where the
    task has labels, or rows bring choices.
    """
    if task.is_closed:
        return _tune_head(task, setup)
    return _learn(task, setup, bare(task.manual), tune="tuned")


_register("manual+fine-tuning", "the manual prompt, all weights trained (MP+FT)", attrgetter("manual"), tune="tuned")
_register(
    LEARNED_BY_TUNE["tuned"], "the learned prompt, all weights trained along", attrgetter("template"), tune="tuned"
)
_register("manual+lora", "the manual prompt, adapters trained (LoRA)", attrgetter("manual"), tune="lora")
_register(LEARNED_BY_TUNE["lora"], "the learned prompt, adapters trained along", attrgetter("template"), tune="lora")


def bare(manual: Template) -> Template:
    """Return the template that holds a manual one's fields and target, and none of its words.

    Example:
        >>> str(bare(Template.parse("The capital of [X] is [Y] .")))
        '[X] [Y]'
    """
    pieces: list[Piece] = []
    for name in manual.fields:
        keep = any(isinstance(piece, Field) and piece.name == name and piece.keep for piece in manual.pieces)
        pieces += [Field(name, keep), Literal(" ")]
    return Template((*pieces, Target()))


def tried_factors(tries: int) -> Sequence[float]:
    """Return the factors of the learning rate that so many tries take.

    Raises:
        ConfigError: If there are not so many.
    """
    if not 1 <= tries <= len(TRIED_FACTORS):
        raise ConfigError(f"tries is {tries}; it must be a whole number from 1 to {len(TRIED_FACTORS)}")
    return TRIED_FACTORS[:tries]


def _tried(task: Task, setup: Setup, template: Template, *, tune: Tune) -> list[FleetPrompt]:
    """Return a training for each of the tried learning rates, named after the folder of its files.

    Several starts are for slots; what has none would draw nothing else in them than the order of the data.
    """
    setting, found = RATES[tune], []
    starts = setup.config.starts if template.has_slots else 1
    same = replace(setup.config, seed=setup.seed, tune=tune, keep="difference", starts=starts)
    for number, factor in enumerate(tried_factors(setup.tries), start=1):
        rate = getattr(setup.config, setting) * factor
        config = replace(same, **{setting: rate})
        found.append(FleetPrompt(f"try-{number}", template, task.train, task.dev, config=config, task=task.file))
    return found


def _learn(task: Task, setup: Setup, template: Template, *, tune: Tune) -> Solution:
    """Train with each of the tried learning rates, as ``ptuning train`` does, and answer with what is best on the
    development part. Its files stay, but for those with all weights of a backbone, once the method is fitted.
    """
    setting = RATES[tune]
    records, tried = list[Mapping[str, Json]](), list[dict[str, Json]]()
    with contextlib.ExitStack() as temporary:
        share = replace(setup.config, tune=tune).prefix_cache_share
        prefix_cache = temporary.enter_context(PrefixCache(setup.backbone, memory_share=share))
        # Not in memory: there it would bound the size of a backbone that can be tuned.
        folder = setup.folder or Path(temporary.enter_context(tempfile.TemporaryDirectory(prefix="ptuning-")))
        for one in _tried(task, setup, template, tune=tune):
            result = TrainingRun(prepare(one, setup.backbone), out=folder / one.name, resume=True).train(
                report=setup.report, should_stop=setup.should_stop, prefix_cache=prefix_cache
            )
            records.append(result.record)
            name = "accuracy" if task.is_closed else "exact_match"
            score, loss = result.prompt.scores[name], result.prompt.scores["loss"]
            rate = getattr(one.settings, setting)
            tried.append({"settings": {setting: rate}, "dev_score": score, "dev_loss": loss})
            del result  # and with it the weights, before the next copy is made
        best = _best(tried)
        prompt = Prompt.load(folder / f"try-{best + 1}")
        model = PromptModel(setup.backbone).for_prompt(prompt)
        for number in range(1, len(tried) + 1) if tune == "tuned" else ():
            shutil.rmtree(folder / f"try-{number}", ignore_errors=True)
    return _solution(task, setup, model, prompt, {**_tries(tried), **_noted(records[best])})


def _tune_head(task: Task, setup: Setup) -> Solution:
    """Train copies of the backbone with a classification head, and answer with the one best on the development part."""
    tried: list[dict[str, Json]] = []
    best: HeadModel | None = None
    for factor in tried_factors(setup.tries):
        rate = setup.config.backbone_lr * factor
        model = HeadModel(task, setup, replace(setup.config, seed=setup.seed, tune="tuned", backbone_lr=rate))
        tried.append({"settings": {"backbone_lr": rate}, "dev_score": model.score, "dev_loss": model.loss})
        if _best(tried) == len(tried) - 1:
            best = model
        del model  # so that no more than two copies of the backbone are there at a time
    assert best is not None
    prompt = str(best.bound.template)
    return Solution(best.answer, {**_tries(tried), **_noted(best.record), "prompt": prompt})


def _noted(record: Mapping[str, Json]) -> dict[str, Json]:
    """Return what a cell's record keeps of a training, with a warning where its guesses were stuck."""
    kept = {name: record[name] for name in ("start", "history", "chosen_epoch", "trainable_parameters")}
    text = stuck(cast("Sequence[Mapping[str, float]]", [record["start"], *cast("list[Json]", record["history"])]))
    return {**kept, **({"warnings": [text]} if text else {})}


def stuck(evaluations: Sequence[Mapping[str, float]]) -> str | None:
    """Return a warning if all guesses on the development part were one class in several evaluations in a row, though
    not all rows are of that class.

    Args:
        evaluations: The start's and each epoch's.
    """
    longest = run = 0
    for one in evaluations:
        run = run + 1 if one.get("guessed_classes") == 1 and one["dev_score"] < 1 else 0
        longest = max(longest, run)
    if longest < STUCK_EVALUATIONS:
        return None
    return f"{longest} evaluations in a row guessed one class for every row of the development part"


def _solution(task: Task, setup: Setup, model: PromptModel, prompt: Prompt, record: dict[str, Json]) -> Solution:
    def answer(questions: Questions) -> list[Answer]:
        return answer_records(
            model,
            prompt,
            questions,
            closed=task.vocabulary,
            single_token=task.single_token,
            max_tokens=target_tokens(task, setup) if task.is_written else None,
            report=setup.report,
        )

    return Solution(answer, {**record, "prompt": str(prompt.template)})


def _best(tried: Sequence[dict[str, Json]]) -> int:
    """Return the place of the highest development score; of equal ones the lowest loss, then the earliest."""
    keys = [(cast("float", one["dev_score"]), -cast("float", one["dev_loss"])) for one in tried]
    return keys.index(max(keys))


def _tries(tried: Sequence[dict[str, Json]]) -> dict[str, Json]:
    return {"tried": list(tried), "chosen": tried[_best(tried)]}
