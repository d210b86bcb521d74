"""A training run from data to files: split, bind, fit, leave ``prompt/``, ``run.json`` and ``predictions.jsonl``."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from ptuning.backbone.backbone import Backbone
from ptuning.config import RECIPE, TrainConfig, Tune, derived_seed, start_seed
from ptuning.data.questions import Questions, as_questions, split_questions, with_few_choices
from ptuning.data.task_files import TaskFile
from ptuning.engine.evaluate import evaluate, measure_ceiling
from ptuning.engine.objective import TRAIN_CHOICES, Item, choice_items, in_small_passes, label_items, target_items
from ptuning.engine.prefix_cache import ConstantParts, constant_parts
from ptuning.errors import ConfigError, FileError, TemplateError
from ptuning.files import Json, check_room, make_folder, write_json, write_json_lines
from ptuning.names import ALONG, CHECKPOINT_FOLDER, LEARNED, MANUAL, PREDICTIONS_FILE, PROMPT_FOLDER, RUN_FILE
from ptuning.progress import OnProgress
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import BackboneId, Prompt, as_template
from ptuning.prompt.score import guessed, prediction_rows
from ptuning.provenance import about_data, versions
from ptuning.records import TARGET_FIELD, Record, Records, require_targets
from ptuning.template.fill import BoundTemplate
from ptuning.template.labels import LabelWords, Scoring
from ptuning.template.language import Template
from ptuning.training.identity import identity_of_run
from ptuning.training.run_folder import check_folder, checkpoint_folder, clear_folder
from ptuning.training.trainer import CHOICE_RULE, Trainer

FORMAT_VERSION = 1
# Room for the prompt, the record and the predictions, besides the checkpoint.
FILES_BYTES = 5_000_000


@dataclass(frozen=True)
class TrainResult:
    """What a training run leaves.

    Args:
        prompt: The chosen prompt.
        record: What stands in ``run.json``.
        folder: Where the files lie, or None.
    """

    prompt: Prompt
    record: Mapping[str, Json]
    folder: Path | None


def train(
    template: str | Template,
    data: Sequence[Record] | Questions,
    *,
    backbone: Backbone,
    dev: Sequence[Record] | Questions | None = None,
    config: TrainConfig | None = None,
    labels: LabelWords | str | None = None,
    task: TaskFile | None = None,
    calibrate: bool | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: OnProgress | None = None,
    should_stop: Callable[[], bool] | None = None,
    ceiling: bool = False,
    command: str | None = None,
    constants: ConstantParts | None = None,
) -> TrainResult:
    """Learn the slot vectors of a template: alone, on a frozen backbone, or along with weights of a copy of it.

    Args:
        template: A pattern with slots, such as ``[P:The capital of] [X] [P:is] [Y]``; without any where the backbone is
            trained (``tune``).
        data: Records to learn from, with targets, or questions of a task.
        backbone: From :func:`ptuning.load_backbone`; it does not change.
        dev: Records to choose by; without them a seeded share of ``data`` is set aside.
        config: Settings; the defaults of :class:`TrainConfig` otherwise.
        labels: Label words, for classification; by default the task's.
        task: The task that ``data`` belongs to, which the prompt carries along.
        calibrate: Whether what an empty record would score is taken off labels and choices; by default as the task
            says.
        out: Folder for prompt, record, predictions and checkpoint; without it nothing is written.
        resume: Go on from the checkpoint in ``out``; a finished run is returned as it is.
        overwrite: Replace an earlier run in ``out``.
        report: Called with progress.
        should_stop: Asked after every step, and after every pass over the text in front of the slots.
        ceiling: Whether to measure the speed of a bare forward and backward pass as well.
        command: The command line, for the record.
        constants: What is kept of the text in front of the slots, where several runs share it and their caller clears
            it; by default it is shared by the starts of this one.

    Returns:
        The chosen prompt and the record of the run.

    Raises:
        PTuningError: Of the stage at fault; before training starts, with nothing written.
    """
    run = Run(
        template, data, backbone=backbone, dev=dev, config=config, labels=labels, task=task, calibrate=calibrate,
        out=out, resume=resume, overwrite=overwrite, ceiling=ceiling, command=command,
    )  # fmt: skip
    if run.finished is not None:
        return run.finished
    parts = constant_parts(backbone, run.config) if constants is None else contextlib.nullcontext(constants)
    # Whoever calls may have gradients off.
    with torch.inference_mode(mode=False), torch.enable_grad(), parts as shared:
        for number in range(run.config.starts):
            trainer = run.trainer(number, checkpoint=run.checkpoint(number), constants=shared)
            if not number:
                run.clear()
            if resume and trainer.load():
                run.seconds_before += trainer.state.train_seconds
            trainer.fit(run.items["train"], run.items["dev"], report=report, should_stop=should_stop)
            run.add(number, trainer)
        return run.result()


class Run:
    """A training run that has been checked, and its files: what it learns from, its record, and in the end its result.

    Args:
        template, data, backbone, dev, config, labels, task, calibrate, out, resume, overwrite, ceiling, command: As of
            :func:`train`.

    Raises:
        PTuningError: If anything cannot be used; nothing has been written then.
    """

    def __init__(
        self,
        template: str | Template,
        data: Sequence[Record] | Questions,
        *,
        backbone: Backbone,
        dev: Sequence[Record] | Questions | None = None,
        config: TrainConfig | None = None,
        labels: LabelWords | str | None = None,
        task: TaskFile | None = None,
        calibrate: bool | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
        ceiling: bool = False,
        command: str | None = None,
    ) -> None:
        self._began = time.monotonic()
        config = config or TrainConfig()
        if resume and out is None:
            raise ConfigError("there is nothing to resume without the folder of the run (out)")
        parsed = as_template(template)
        if not parsed.has_slots and config.tune == "frozen":
            raise TemplateError(
                f"the template '{parsed}' has no slots, so there is nothing to learn; write words as [P:words] to "
                "start from them, let --manual do it, or train the backbone's own weights (--tune tuned or lora)"
            )
        words = LabelWords.parse(labels) if isinstance(labels, str) else labels
        if task is not None:
            words = words or task.label_words
        asked = (
            {"train": as_questions(data)} if dev is None else {"train": as_questions(data), "dev": as_questions(dev)}
        )
        scoring = _scoring(task, calibrate, closed=words is not None or asked["train"].has_choices)
        parts = {name: questions.records for name, questions in asked.items()}
        for name, records in parts.items():
            _check(name, records, words)
        multiline = any("\n" in record[TARGET_FIELD] for record in parts["train"])
        bound = BoundTemplate(parsed, tokenizer=backbone.tokenizer, kind=backbone.kind, multiline=multiline)
        if parsed.has_slots and not bound.slots:
            raise TemplateError(
                f"all slots of '{parsed}' stand behind [Y], where a model that reads from left to right does not see "
                "them; move them in front of it"
            )
        if words is not None:
            words.check_ids(bound, parts["train"][0], unknown_id=backbone.tokenizer.unknown_id)
        items = {name: _items(bound, questions, words, config, scoring) for name, questions in asked.items()}
        if dev is None:
            asked, items = _set_aside(asked["train"], items["train"], config)
            parts = {name: questions.records for name, questions in asked.items()}
        if asked["train"].has_choices:
            few = with_few_choices(asked["train"], TRAIN_CHOICES, seed=config.seed)
            items["train"] = _items(bound, few, words, config, scoring)
            config = in_small_passes(config, items["train"])
        record = _first_record(parsed, words, parts, items, backbone, config, command)
        record |= _of_task(task, record, scoring, has_choices=asked["train"].has_choices)
        self.template, self.bound, self.backbone, self.config = parsed, bound, backbone, config
        self.items, self.record = items, record
        self.identity = identity_of_run(record)
        self.folder = Path(out) if out is not None else None
        self.finished: TrainResult | None = None
        # Seconds of training in earlier starts of this run.
        self.seconds_before = 0.0
        self.dev, self._words, self._task, self._scoring, self._ceiling = asked["dev"], words, task, scoring, ceiling
        self._best: tuple[int, Trainer] | None = None
        self._starts: dict[int, dict[str, Json]] = {}
        self._replaces = overwrite and not resume
        if self.folder is not None:
            found = check_folder(self.folder, self.identity, resume=resume, overwrite=overwrite)
            if found is not None:
                self.finished = TrainResult(Prompt.load(self.folder / PROMPT_FOLDER), found, self.folder)

    def trainer(
        self, number: int, *, checkpoint: Path | None = None, constants: ConstantParts | None = None
    ) -> Trainer:
        """Return the trainer of one of several starts, from 0.

        Args:
            number: Which start.
            checkpoint: Folder of its checkpoint.
            constants: What is kept of the text in front of the slots, where prompts are trained together.

        Raises:
            FileError: If there is no room for the run's files.
        """
        found = Trainer(
            self.backbone,
            self.bound,
            config=replace(self.config, seed=start_seed(self.config.seed, number)),
            checkpoint=checkpoint,
            identity=self.identity,
            constants=constants,
        )
        if self.folder is not None and not number:
            check_room(self.folder, _needed_bytes(found))
        return found

    def clear(self) -> None:
        """Remove the run that this one replaces, and what killed ones left half written: once it is known to start."""
        if self.folder is not None:
            clear_folder(self.folder, replaces=self._replaces)

    def checkpoint(self, number: int) -> Path | None:
        """Return where the checkpoint of a start lies, if there are files."""
        return checkpoint_folder(self.folder, number) if self.folder is not None else None

    def add(self, number: int, trainer: Trainer) -> None:
        """Take in a start that was trained; the best on the development part is the run's, of equal ones the first."""
        self._starts[number] = _start(trainer)
        if self._best is None or (_rank(trainer), -number) > (_rank(self._best[1]), -self._best[0]):
            self._best = number, trainer

    @property
    def is_trained(self) -> bool:
        """Whether all starts are in."""
        return len(self._starts) == self.config.starts

    def result(self, *, seconds: float | None = None, more: Mapping[str, Json] | None = None) -> TrainResult:
        """Return what was learned, and write it down if there is a folder.

        Args:
            seconds: How long it took; by default since the run was made.
            more: What else the record says.
        """
        assert self._best is not None, "nothing was trained"
        (_, best), config, record = self._best, self.config, dict(self.record)
        prompt = self.prompt(best)
        taken = time.monotonic() - self._began + self.seconds_before if seconds is None else seconds
        record |= {**_outcome(best, seconds=taken), **(more or {})}
        if config.starts > 1:
            record["starts"] = [self._starts[number] for number in sorted(self._starts)]
        if self._ceiling:
            record["ceiling_tokens_per_second"] = measure_ceiling(
                self.backbone, self.items["train"], batch_size=config.batch_size, slots=self.bound.slots
            )
        if self.folder is not None and best.accelerator.is_main_process:
            _write(self.folder, prompt, record, self.dev, self.items["dev"], best)
        return TrainResult(prompt, record, self.folder)

    def prompt(self, trainer: Trainer) -> Prompt:
        """Return the prompt that a trainer has learned, with all that it carries along."""
        return replace(
            _prompt(self.template, self._words, trainer, self.items),
            task=self._task,
            calibrate=self._scoring.calibrate,
            normalise=self._scoring.normalise,
        )


def _rank(trainer: Trainer) -> tuple[float, float]:
    return trainer.state.best_score, -trainer.state.best_loss


def _needed_bytes(trainer: Trainer) -> int:
    """Return the room that a run takes on disk while it goes on. A file is written beside the one that it replaces."""
    starts = trainer.config.starts
    encoder = 4 * sum(weight.numel() for weight in trainer.encoder.parameters())
    backbone = 4 * sum(weight.numel() for weight in trainer.weights.values())
    # Of each start the encoder with both moments, and the backbone's best weights; of the one in training also the
    # backbone's weights with both moments, twice; and in the end the prompt's.
    return FILES_BYTES + starts * 8 * encoder + (starts + 1 + 2 * 3 + 1) * backbone


def _check(name: str, records: Records, words: LabelWords | None) -> None:
    """Check that a part has records, and each of them a target or a label."""
    if not records:
        raise FileError(f"the {name} data ({records.name}) holds no records")
    require_targets(records)
    if words is not None:
        words.check_records(records)


def _set_aside(
    questions: Questions, items: Sequence[Item], config: TrainConfig
) -> tuple[dict[str, Questions], dict[str, list[Item]]]:
    """Take a development part out of the training data. Everything was read before, so errors count its own records."""
    made = {id(one): item for one, item in zip(questions, items, strict=True)}
    kept, aside = split_questions(questions, fraction=config.dev_fraction, seed=config.seed)
    parts = {"train": kept, "dev": aside}
    return parts, {name: [made[id(one)] for one in part] for name, part in parts.items()}


def _items(
    bound: BoundTemplate, questions: Questions, words: LabelWords | None, config: TrainConfig, scoring: Scoring
) -> list[Item]:
    if words is not None:
        return label_items(bound, questions.records, words, scoring=scoring)
    if questions.has_choices:
        return choice_items(bound, questions, scoring=scoring)
    return target_items(bound, questions.records, with_stop=config.learn_to_stop)


def _scoring(task: TaskFile | None, calibrate: bool | None, *, closed: bool) -> Scoring:
    """Return how labels and choices are scored: as the task says, unless asked otherwise."""
    if calibrate and not closed:
        raise ConfigError("calibration is for label words and choices; a target that is written has none to compare")
    if task is None:
        return Scoring(calibrate=bool(calibrate))
    return Scoring(task.normalise, task.calibrate if calibrate is None else calibrate, task.closed_fields)


def _of_task(
    task: TaskFile | None, record: Mapping[str, Json], scoring: Scoring, *, has_choices: bool
) -> dict[str, Json]:
    """Return what the record says of the task; a run without one stays as it always was."""
    if task is None and not has_choices and not scoring.calibrate:
        return {}
    settings = cast("Mapping[str, Json]", record["settings"])
    return {
        "task": task.to_json() if task else None,
        "choices": has_choices,
        "settings": {**settings, "normalise": scoring.normalise, "calibrate": scoring.calibrate},
    }


def _first_record(
    template: Template,
    words: LabelWords | None,
    parts: Mapping[str, Records],
    items: Mapping[str, Sequence[Item]],
    backbone: Backbone,
    config: TrainConfig,
    command: str | None,
) -> dict[str, Json]:
    """Return what is known of a run before it starts."""
    streams = ("slot starts", "encoder weights", "data order", "dropout")
    data: dict[str, Json] = {
        name: about_data(
            records,
            kept=len(items[name]),
            dropped=len(records) - len(items[name]),
            shortened=sum(any(example.shortened for example in item.inputs) for item in items[name]),
        )
        for name, records in parts.items()
    }
    return {
        "format_version": FORMAT_VERSION,
        "command": command,
        "method": method_name(template, config.tune),
        "tune": config.tune,
        "recipe": RECIPE,
        "settings": {
            "template": str(template),
            "label_words": {label: list(listed) for label, listed in words.words.items()} if words else None,
            **config.to_json(),
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "device": str(backbone.device),
        },
        "seeds": {"seed": config.seed, **{stream: derived_seed(config.seed, stream) for stream in streams}},
        "versions": dict(versions()),
        "threads": torch.get_num_threads(),
        "backbone": backbone.to_json(),
        "data": {**data, "test": None},
    }


def method_name(template: Template, tune: Tune) -> str:
    """Return what it is called to train a template's slots, or a manual template, together with the backbone or not."""
    return (LEARNED if template.has_slots else MANUAL) + ALONG[tune]


def _start(trainer: Trainer) -> dict[str, Json]:
    state = trainer.state
    return {
        "seed": trainer.config.seed,
        "dev_score": state.best_score,
        "dev_loss": state.best_loss,
        "chosen_epoch": state.chosen_epoch,
    }


def _outcome(trainer: Trainer, *, seconds: float) -> dict[str, Json]:
    state = trainer.state
    return {
        "trainable_parameters": trainer.trainable_parameters,
        "frozen_parameters": 0 if trainer.config.tune == "tuned" else trainer.frozen.parameters,
        "slots": trainer.bound.slots,
        "start": dict(state.start),
        "history": [dict(epoch) for epoch in state.history],
        "choice_rule": CHOICE_RULE,
        "chosen_epoch": state.chosen_epoch,
        "stopped_early": len(state.history) < trainer.config.epochs,
        "seconds": seconds,
        "train_seconds": state.train_seconds,
        "tokens_per_second": state.train_tokens / state.train_seconds if state.train_seconds else None,
        "constant_part": dict(trainer.constant_part),
    }


def _prompt(
    template: Template,
    words: LabelWords | None,
    trainer: Trainer,
    items: Mapping[str, Sequence[Item]],
) -> Prompt:
    longest = max(choice.own_tokens for item in items["train"] for choice in item.choices)
    name = "accuracy" if items["dev"][0].answers else "exact_match"
    return Prompt(
        template,
        trainer.best_vectors if template.has_slots else None,
        BackboneId.of(trainer.frozen),
        label_words=words,
        target_tokens=longest,
        multiline=trainer.bound.multiline,
        method=method_name(template, trainer.config.tune),
        seed=trainer.config.seed,
        scores={name: trainer.state.best_score, "loss": trainer.state.best_loss},
        weights=trainer.trained_weights(),
    )


def _write(
    folder: Path, prompt: Prompt, record: Mapping[str, Json], dev: Questions, items: Sequence[Item], best: Trainer
) -> None:
    make_folder(folder)
    prompt.save(folder / PROMPT_FOLDER, overwrite=True)
    kept = best.constants if best.skips_constants else None
    found = evaluate(best.backbone, items, vectors=best.best_vectors, slots=prompt.slots, constants=kept)
    # Scoring labels and choices has chosen among them; a written answer is still to be written.
    predictions = guessed(prompt, dev, found) or PromptModel(best.backbone).predict(dev, prompt)
    write_json_lines(folder / PREDICTIONS_FILE, prediction_rows(dev.records, predictions, found.hits))
    write_json(folder / RUN_FILE, record)
    shutil.rmtree(folder / CHECKPOINT_FOLDER, ignore_errors=True)
