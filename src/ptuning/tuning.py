"""Methods that train: p-tuning and fine-tuning, alone and together, each trying the same number of settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from ptuning.answers import answer_records, task_items
from ptuning.baselines import is_multiline, target_tokens
from ptuning.config import TrainConfig
from ptuning.errors import ConfigError
from ptuning.files import Json
from ptuning.head import HeadModel
from ptuning.fill import BoundTemplate
from ptuning.method import METHODS, Answer, Setup, Solution, Task
from ptuning.predict import PromptModel
from ptuning.prompt import BackboneId, Prompt
from ptuning.questions import Questions
from ptuning.runs import train
from ptuning.template import Field, Literal, Piece, Target, Template
from ptuning.trainer import Trainer
from ptuning.weights import KeptWeights

LEARNED = "p-tuning"
# Learning rates in the order they are tried; the first is what a single try takes. Those of p-tuning are factors of the
# configured rate. Source: docs/paper.md (what was tried).
TRIED_FACTORS = (1.0, 2.0, 0.5, 4.0, 0.25)
# Cost of training in forward passes: backward to the slots is as dear as forward, to all weights twice as dear.
FROZEN_PASSES, TUNED_PASSES = 2.5, 4.5


@METHODS.register(
    LEARNED, describe="the learned prompt, backbone frozen", trained=True, seeded=True, passes=(FROZEN_PASSES, 1.0)
)
def p_tuning(task: Task, setup: Setup) -> Solution:
    """Learn the slots of the task's template on the frozen backbone.

    Source: Liu et al. (2021), section 3.
    """
    results, tried = [], list[dict[str, Json]]()
    for number, factor in enumerate(tried_factors(setup.tries), start=1):
        config = replace(setup.config, seed=setup.seed, lr=setup.config.lr * factor)
        result = train(
            task.template,
            task.train,
            dev=task.dev,
            task=task.file,
            backbone=setup.backbone,
            config=config,
            out=setup.folder / f"try-{number}" if setup.folder is not None else None,
            resume=setup.folder is not None,
            report=setup.report,
            should_stop=setup.should_stop,
        )
        results.append(result)
        name = "accuracy" if task.file is not None else "exact_match"
        score, loss = result.prompt.scores[name], result.prompt.scores["loss"]
        tried.append({"settings": {"lr": config.lr}, "dev_score": score, "dev_loss": loss})
    best = _best(tried)
    prompt = results[best].prompt
    kept = {name: results[best].record[name] for name in ("history", "chosen_epoch", "trainable_parameters")}
    return _solution(task, setup, PromptModel(setup.backbone), prompt, {**_tries(tried), **kept})


@METHODS.register(
    "fine-tuning",
    describe="subject and target only, all weights trained (FT)",
    trained=True,
    seeded=True,
    passes=(TUNED_PASSES, 1.0),
)
def fine_tuning(task: Task, setup: Setup) -> Solution:
    """Train all weights on the fields and the target, without words around them; with a classification head where the
    task has labels, or rows bring choices.

    Source: Liu et al. (2021), section 4.1 (FT), and section 4.2 with a head.
    """
    if task.file is not None:
        return _tune_head(task, setup)
    return _tune(task, setup, bare(task.manual))


@METHODS.register(
    "manual+fine-tuning",
    describe="the manual prompt, all weights trained (MP+FT)",
    trained=True,
    seeded=True,
    passes=(TUNED_PASSES, 1.0),
)
def manual_fine_tuning(task: Task, setup: Setup) -> Solution:
    """Train all weights on the manual template.

    Source: Liu et al. (2021), section 4.1 (MP+FT).
    """
    return _tune(task, setup, task.manual)


@METHODS.register(
    "p-tuning+fine-tuning",
    describe="the learned prompt, all weights trained along",
    trained=True,
    seeded=True,
    passes=(TUNED_PASSES, 1.0),
)
def p_tuning_fine_tuning(task: Task, setup: Setup) -> Solution:
    """Train the slots and all weights together.

    Source: Liu et al. (2021), section 4.2 (the setting of its SuperGLUE experiments).
    """
    return _tune(task, setup, task.template)


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


def _tune(task: Task, setup: Setup, template: Template) -> Solution:
    """Train copies of the backbone, one for each tried learning rate, and answer with the one best on the development
    part; the backbone itself is left as it is.
    """
    tried: list[dict[str, Json]] = []
    best: tuple[Prompt, dict[str, Json]] | None = None
    with KeptWeights(setup.folder) as kept:
        for factor in tried_factors(setup.tries):
            rate = setup.config.backbone_lr * factor
            config = replace(setup.config, seed=setup.seed, tune="tuned", backbone_lr=rate)
            trainer = _fit(task, setup, template, config)
            state = trainer.state
            tried.append(
                {"settings": {"backbone_lr": rate}, "dev_score": state.best_score, "dev_loss": state.best_loss}
            )
            if _best(tried) == len(tried) - 1:
                found: dict[str, Json] = {
                    "history": [dict(epoch) for epoch in state.history],
                    "chosen_epoch": state.chosen_epoch,
                    "trainable_parameters": trainer.trainable_parameters,
                }
                best = _prompt(task, template, trainer), found
                kept.keep(trainer.backbone)
            del trainer  # and with it gradients and moments, before the next copy is made
        assert best is not None
        chosen = setup.backbone.copy()
        kept.restore(chosen)
    prompt, record = best
    return _solution(task, setup, PromptModel(chosen), prompt, {**_tries(tried), **record})


def _tune_head(task: Task, setup: Setup) -> Solution:
    """Train copies of the backbone with a classification head, and answer with the best one."""
    tried: list[dict[str, Json]] = []
    best: HeadModel | None = None
    for factor in tried_factors(setup.tries):
        rate = setup.config.backbone_lr * factor
        config = replace(setup.config, seed=setup.seed, tune="tuned", backbone_lr=rate)
        model = HeadModel(task, setup, config)
        tried.append({"settings": {"backbone_lr": rate}, "dev_score": model.score, "dev_loss": model.loss})
        if _best(tried) == len(tried) - 1:
            best = model
    assert best is not None
    return Solution(best.answer, {**_tries(tried), **best.record, "prompt": str(best.bound.template)})


def _fit(task: Task, setup: Setup, template: Template, config: TrainConfig) -> Trainer:
    """Train a copy of the backbone; it holds the best weights in the end."""
    backbone = setup.backbone.copy()
    multiline = is_multiline(task)
    bound = BoundTemplate(template, tokenizer=backbone.tokenizer, kind=backbone.kind, multiline=multiline)
    train_items, dev_items = (
        task_items(bound, part, task, with_stop=config.learn_to_stop) for part in (task.train, task.dev)
    )
    with KeptWeights(setup.folder) as kept:
        trainer = Trainer(backbone, bound, config=config, kept=kept)
        trainer.fit(train_items, dev_items, report=setup.report, should_stop=setup.should_stop)
    return trainer


def _prompt(task: Task, template: Template, trainer: Trainer) -> Prompt:
    if not template.has_slots:
        return replace(Prompt.manual(template, task=task.file), multiline=trainer.bound.multiline)
    return replace(
        Prompt(template, trainer.best_vectors, BackboneId.of(trainer.backbone), method="p-tuning+fine-tuning"),
        multiline=trainer.bound.multiline,
        task=task.file,
        label_words=task.file.label_words if task.file is not None else None,
        calibrate=task.file is not None and task.file.calibrate,
        normalise=task.file.normalise if task.file is not None else "sum",
    )


def _solution(task: Task, setup: Setup, model: PromptModel, prompt: Prompt, record: dict[str, Json]) -> Solution:
    is_written = not task.single_token and task.file is None

    def answer(questions: Questions) -> list[Answer]:
        return answer_records(
            model,
            prompt,
            questions,
            closed=task.vocabulary,
            single_token=task.single_token,
            max_tokens=target_tokens(task, setup, task.manual) if is_written else None,
            report=setup.report,
        )

    return Solution(answer, {**record, "prompt": str(prompt.template)})


def _best(tried: Sequence[dict[str, Json]]) -> int:
    """Return the place of the highest development score; of equal ones the lowest loss, then the earliest."""
    keys = [(cast("float", one["dev_score"]), -cast("float", one["dev_loss"])) for one in tried]
    return keys.index(max(keys))


def _tries(tried: Sequence[dict[str, Json]]) -> dict[str, Json]:
    return {"tried": list(tried), "chosen": tried[_best(tried)]}
