"""One training run, from data to files: ``prompt/``, ``run.json`` and ``predictions.jsonl``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.number_format import short_name
from ptuning.config import BY_LOSS, BY_SCORE, TrainConfig, acts_on, derived_seed, start_seed
from ptuning.data.checks import Labels, Merge
from ptuning.data.sources import Source
from ptuning.data.splits import draw_records
from ptuning.data.task_files import TaskFile
from ptuning.engine.evaluate import evaluate, measure_ceiling
from ptuning.engine.objective import STOP_WEIGHT, ScoringRequest, stop_weight
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.engine.processes import this_writes, wait_for_all
from ptuning.engine.soft_prompt import DeepParams, PromptBatch
from ptuning.errors import ConfigError
from ptuning.files import Json, check_room, make_folder, write_json, write_json_lines
from ptuning.names import (
    CHECKPOINT,
    CHECKPOINT_FOLDER,
    PREDICTIONS_FILE,
    PROMPT_FOLDER,
    RUN_FILE,
    remove,
)
from ptuning.progress import OnProgress, named
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.rows import MORE_TOKENS
from ptuning.prompt.score import guessed, prediction_rows
from ptuning.prompt.score_generation import epoch_metric
from ptuning.prompt.storage import BackboneId
from ptuning.provenance import described, versions
from ptuning.statistics import Score, score
from ptuning.template.language import Template
from ptuning.training.identity import identity_of_run, recipe_of
from ptuning.training.optimizer import with_gradients
from ptuning.training.prepare import Prepared, prepare
from ptuning.training.run_folder import check_folder, checkpoint_folder, clear_folder
from ptuning.training.spec import TrainSpec
from ptuning.training.trainer import Judge, Trainer

FORMAT_VERSION = 1
# Development records that texts are written for after each epoch: it takes longer than to score given ones.
JUDGED_RECORDS = 64
# Room for the prompt, the record and the predictions, besides the checkpoint.
FILES_BYTES = 5_000_000


@dataclass(frozen=True)
class TrainResult:
    """What a training run leaves: the chosen prompt, the content of ``run.json``, and the folder, if there is one."""

    prompt: Prompt
    record: Mapping[str, Json]
    folder: Path | None


def train(
    template: str | Template | None = None,
    data: Source | None = None,
    *,
    backbone: Backbone,
    manual: str | None = None,
    method: str | None = None,
    task: TaskFile | str | None = None,
    pattern: int | None = None,
    about: str | None = None,
    chat: bool = False,
    system: str | None = None,
    dev: Source | None = None,
    config: TrainConfig | None = None,
    labels: Labels | None = None,
    alias_label: Merge | None = None,
    strict: bool = False,
    calibrate: bool | None = None,
    fields: Mapping[str, str] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: OnProgress | None = None,
    should_stop: Callable[[], bool] | None = None,
    ceiling: bool = False,
    command: str | None = None,
) -> TrainResult:
    """Learn the slot vectors (soft prompt) of a template, on a frozen backbone or together with a copy's weights.

    Makes the same prompt as the command ``ptuning train``. Without a template, it follows from the form of the data.
    Only settings that act on the training may be given.

    Args:
        template: A pattern such as ``[P:The capital of] [X] [P:is] [Y]``; without slots where the backbone is trained.
        data: Training records with targets: rows in memory, a file, shipped facts such as ``capitals:train``, a task's
            folder, or questions. Without targets, the one column that the template does not read is the target.
        dev: Records for early stopping and for choosing the best epoch; by default a seeded share of ``data``.
        config: Hyperparameters; by default those of :class:`~ptuning.config.TrainConfig`.
        labels: Label words (verbalizer) for classification, as ``{"good": ["great", "fine"], "bad": "poor"}`` or as
            ``good=great,fine;bad=poor``; labels that are their own words as ``["good", "bad"]`` or ``good;bad``;
            ``auto`` for the targets that the data has. By default the task's.
        alias_label: Labels to count as others, as ``{"biling": "billing"}`` or ``["biling=billing"]``; ``case`` makes
            one of labels that differ in capitals and spaces only.
        strict: Whether possible mistakes in the data are errors.
        task: The task that ``data`` belongs to, or its name or file. It is saved with the prompt.
        calibrate: Whether to subtract from each label or choice the score that it gets for an empty record; by default
            as the task says.
        method: Kind of prompt made from the manual template (``prompt-tuning``, ``p-tuning-v2``, ...).
        manual: Manual template that the template is made from; its slots are placed where they pay.
        about: Noun that names the answer, with ``manual``; it becomes slots at the front.
        pattern: Number of the task's template, from 1.
        chat: Whether records are conversations, learned in the model's own chat template.
        system: System text that the slots of a chat start at.
        fields: New name -> name in the data.
        backbone: From :func:`ptuning.load_backbone`; it does not change.
        out: Folder for prompt, record, predictions and checkpoint; without it nothing is written.
        resume: Continue from the checkpoint in ``out``; a finished run is returned as it is.
        overwrite: Replace an earlier run in ``out``.
        report: Called with progress.
        should_stop: Called after every step, and after every pass that fills the KV cache.
        ceiling: Whether to measure the speed of a bare forward and backward pass as well.
        command: The command line, for the record.

    Raises:
        PTuningError: Of the stage at fault; before training starts, with nothing written.
        Interrupted: If ``should_stop`` returned true; a checkpoint was written.

    Example:
        >>> train(data="capitals:train", manual="The capital of [X] is [Y]", backbone=backbone)  # doctest: +SKIP
    """
    if data is None:
        raise ConfigError("there is no data to learn from (data)")
    if resume and overwrite:
        raise ConfigError("resume goes on with the earlier run that overwrite would replace; leave one out")
    spec = TrainSpec(
        template,
        data,
        dev,
        config,
        labels,
        alias_label,
        strict,
        task,
        calibrate,
        method,
        manual,
        about,
        pattern,
        chat,
        system,
        fields,
    )
    prepared = prepare(spec, backbone)
    run = TrainingRun(prepared, out=out, resume=resume, overwrite=overwrite, ceiling=ceiling, command=command)
    return run.train(report=report, should_stop=should_stop)


class TrainingRun:
    """A training run with its folder and its record; arguments as of :func:`train`.

    Attributes:
        record: What ``run.json`` says before training starts.
        identity: What must be equal for the run to be resumed.
        finished: The result of a finished run that is resumed, else None.

    Raises:
        PTuningError: If the folder cannot be used; nothing has been written then.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
        ceiling: bool = False,
        command: str | None = None,
    ) -> None:
        if resume and out is None:
            raise ConfigError("there is nothing to resume without the folder of the run (out)")
        if ceiling and prepared.backbone.shards is not None:
            raise ConfigError("the bare backbone is timed in one process; leave out ceiling, or shard")
        self.prepared, self.config, self.items = prepared, prepared.config, prepared.items
        self.record = _first_record(prepared, command)
        self.identity = identity_of_run(self.record)
        self.folder = Path(out) if out is not None else None
        self.finished: TrainResult | None = None
        self._resume, self._replaces, self._ceiling = resume, overwrite and not resume, ceiling
        self._seconds_before = 0.0  # of training, before this run was resumed
        self._best: tuple[int, Trainer] | None = None
        self._starts: dict[int, dict[str, Json]] = {}
        if self.folder is not None:
            found = check_folder(self.folder, self.identity, resume=resume, overwrite=overwrite)
            if found is not None:
                self.finished = TrainResult(Prompt.load(self.folder / PROMPT_FOLDER), found, self.folder)

    @with_gradients
    def train(
        self,
        *,
        report: OnProgress | None = None,
        should_stop: Callable[[], bool] | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> TrainResult:
        """Train every start, or what is left to train; arguments as of :func:`train` (``constants`` is the cache)."""
        if self.finished is not None:
            self.clear()
            return self.finished
        shared = contextlib.nullcontext(prefix_cache) if prefix_cache is not None else None
        share, disk = self.config.prefix_cache_share, self.config.prefix_cache_bytes
        cache = shared or PrefixCache(self.prepared.backbone, memory_share=share, disk_bytes=disk)
        with cache as kept:
            for number in range(self.config.num_restarts):
                trainer = self.trainer(number, checkpoint=self._checkpoint(number), prefix_cache=kept)
                if not number:
                    self.clear()
                if self._resume and trainer.load():
                    self._seconds_before += trainer.state.train_seconds
                told = named(report, f"start-{number}") if number else report
                trainer.fit(self.items["train"], self.items["dev"], report=told, should_stop=should_stop)
                self.add(number, trainer)
            return self.result()

    def trainer(
        self, number: int, *, checkpoint: Path | None = None, prefix_cache: PrefixCache | None = None
    ) -> Trainer:
        """Return the trainer of one of several starts, from 0; ``prefix_cache`` is for prompts that train together.

        Raises:
            FileError: If there is no room for the run's files.
        """
        found = Trainer(
            self.prepared.backbone,
            self.prepared.bound,
            config=self.config.adapted(seed=start_seed(self.config.seed, number)),
            checkpoint=checkpoint,
            identity=self.identity,
            judge=_judge(self.prepared, self.items["train"]),
            prefix_cache=prefix_cache,
        )
        if self.folder is not None and not number:
            check_room(self.folder, _needed_bytes(found))
        return found

    def clear(self) -> None:
        """Remove the run that this one replaces and half-written files, once it is certain that training starts."""
        wait_for_all()  # all have looked at the folder
        if self.folder is not None and this_writes():
            clear_folder(self.folder, replaces=self._replaces, finished=self.finished is not None)

    def _checkpoint(self, number: int) -> Path | None:
        return checkpoint_folder(self.folder, number) if self.folder is not None else None

    def add(self, number: int, trainer: Trainer) -> None:
        """Add a start that was trained. The best one on the development part is kept, the first of equal ones."""
        self._starts[number] = _start(trainer)
        if self._best is None or (trainer.rank, -number) > (self._best[1].rank, -self._best[0]):
            self._best = number, trainer

    @property
    def is_trained(self) -> bool:
        """Whether all starts were trained."""
        return len(self._starts) == self.config.num_restarts

    def result(self, *, more: Mapping[str, Json] | None = None) -> TrainResult:
        """Return the result, and write it to the folder, if there is one; ``more`` goes into the record."""
        assert self._best is not None, "nothing was trained"
        (_, best), prepared, record = self._best, self.prepared, dict(self.record)
        prompt = self.prompt(best)
        seconds = time.monotonic() - prepared.began + self._seconds_before
        dev_score = _dev_score(best, len(self.items["dev"]))
        record |= {**_outcome(best, seconds=seconds), "dev_score": dev_score.to_json(), **(more or {})}
        if self.config.num_restarts > 1:
            record["starts"] = [self._starts[number] for number in sorted(self._starts)]
        if best.learner.ranks.size > 1:
            record["data_ranks"] = best.learner.ranks.size
        if self._ceiling:
            record["ceiling_tokens_per_second"] = measure_ceiling(
                prepared.backbone, self.items["train"], batch_size=self.config.batch_size, slots=prepared.bound.slots
            )
        if self.folder is not None:
            _write(self.folder, prompt, record, prepared, best)
        return TrainResult(prompt, record, self.folder)

    def prompt(self, trainer: Trainer) -> Prompt:
        """Return the prompt that a trainer has learned."""
        prepared = self.prepared
        choices = [choice for item in self.items["train"] for choice in item.choices]
        chosen = _dev_score(trainer, len(self.items["dev"]))
        return Prompt(
            prepared.bound.template,  # without what this model cannot see
            trainer.best_vectors if prepared.template.has_slots else None,
            BackboneId.of(trainer.learner.frozen),
            label_words=prepared.answers.words,
            target_tokens=max(choice.own_tokens for choice in choices),
            max_length=prepared.config.max_length,
            multiline=prepared.bound.multiline,
            learned_to_stop=any(len(choice.target_ids) > choice.own_tokens for choice in choices),
            method=prepared.method,
            seed=trainer.config.seed,
            scored_on=len(self.items["dev"]),
            scores={prepared.answers.score_name: trainer.state.best_score, "loss": trainer.state.best_loss},
            intervals={prepared.answers.score_name: (chosen.low, chosen.high)},
            weights=trainer.learner.trained_weights(),
            task=prepared.task,
            calibrate=prepared.answers.scoring.calibrate,
            normalise=prepared.answers.scoring.normalise,
            fields=prepared.fields,
            merge=prepared.merge,
            deep=_saved_deep(trainer.best_deep, trainer.config),
        )


def _saved_deep(deep: DeepParams | None, config: TrainConfig) -> DeepParams | None:
    """Return what deep slots bring in the number format of their file."""
    return deep if deep is None or config.deep_dtype == "float32" else deep.rounded(torch.bfloat16)


def _judge(prepared: Prepared, learned_from: Sequence[ScoringRequest]) -> Judge | None:
    """Return what scores the texts that are written after an epoch; None if it is chosen by score or loss."""
    metric, seed = prepared.config.metric_for_best_model, prepared.config.seed
    if metric in (BY_SCORE, BY_LOSS):
        return None
    records = draw_records(prepared.parts["dev"].records, JUDGED_RECORDS, seed=seed)
    longest = max(choice.own_tokens for item in learned_from for choice in item.choices)
    return epoch_metric(prepared.bound, records, metric, max_tokens=longest + MORE_TOKENS)


def _recipe(prepared: Prepared) -> int:
    """Return the version of the training code: one more with long targets, whose stop tokens weigh more since."""
    long = any(stop_weight(one.own_tokens) > STOP_WEIGHT for item in prepared.items["train"] for one in item.choices)
    return recipe_of(prepared.template, prepared.config.encoder) + long


def _dev_score(trainer: Trainer, n: int) -> Score:
    """Return the chosen epoch's share of hits on the development part with its interval, as ``eval`` shows scores."""
    hits = round(trainer.state.best_score * n)
    return score([1.0] * hits + [0.0] * (n - hits))


def _needed_bytes(trainer: Trainer) -> int:
    """Return the bytes that a run needs on disk while it trains. A file is written before the old one is removed."""
    starts = trainer.config.num_restarts
    learner = trainer.learner
    weights = [*learner.encoder.parameters(), *(learner.deep_encoder.parameters() if learner.deep_encoder else ())]
    encoder = 4 * sum(int(weight.numel()) for weight in weights)
    backbone = 4 * sum(weight.numel() for weight in trainer.learner.weights.values())
    # Each start: the encoder with both moments, and the backbone's best weights. The start in training: the backbone's
    # weights with both moments, twice. In the end: the prompt's weights.
    return FILES_BYTES + starts * 8 * encoder + (starts + 1 + 2 * 3 + 1) * backbone


def _first_record(prepared: Prepared, command: str | None) -> dict[str, Json]:
    template, config, backbone, words = prepared.template, prepared.config, prepared.backbone, prepared.answers.words
    streams = ("slot starts", "encoder weights", "data order", "dropout")
    data: dict[str, Json] = {
        name: described(
            questions,
            kept=len(prepared.items[name]),
            dropped=len(questions) - len(prepared.items[name]),
            shortened=sum(any(example.shortened for example in item.inputs) for item in prepared.items[name]),
        )
        for name, questions in prepared.parts.items()
    }
    settings: dict[str, Json] = {
        "template": str(template),
        "label_words": words.to_json() if words else None,
        **{name: value for name, value in config.to_json().items() if acts_on(name, prepared.facts)},
        "dtype": short_name(backbone.dtype),
        "device": str(backbone.device),
    }
    task, scoring, has_choices = prepared.task, prepared.answers.scoring, prepared.answers.own_choices
    asked: dict[str, Json] = {}
    if task is not None or has_choices or scoring.calibrate:
        asked = {"task": task.to_json() if task else None, "choices": has_choices}
        settings |= {"normalise": scoring.normalise, "calibrate": scoring.calibrate}
    return {
        "format_version": FORMAT_VERSION,
        "command": command,
        "method": prepared.method,
        "train_backbone": config.train_backbone,
        "recipe": _recipe(prepared),
        "settings": settings,
        "labels": list(words.labels) if words else None,
        "fields": dict(prepared.fields),
        "merge": list(prepared.merge),
        "left_out": list(prepared.left_out),
        "seeds": {"seed": config.seed, **{stream: derived_seed(config.seed, stream) for stream in streams}},
        "versions": dict(versions()),
        "threads": torch.get_num_threads(),
        "backbone": backbone.to_json(),
        "data": {**data, "test": None},
        **asked,
    }


def _start(trainer: Trainer) -> dict[str, Json]:
    state = trainer.state
    return {
        "seed": trainer.config.seed,
        "dev_score": state.best_score,
        "dev_loss": state.best_loss,
        "chosen_epoch": state.chosen_epoch,
    }


def _outcome(trainer: Trainer, *, seconds: float) -> dict[str, Json]:
    state, learner = trainer.state, trainer.learner
    return {
        "trainable_parameters": learner.trainable_parameters,
        "frozen_parameters": 0 if learner.config.train_backbone == "full" else learner.frozen.parameters,
        "slots": learner.bound.slots,
        **({"deep": trainer.best_deep.to_json()} if trainer.best_deep is not None else {}),
        "start": dict(state.start),
        "history": [dict(epoch) for epoch in state.history],
        **({"lost": [[dict(epoch) for epoch in history] for history in state.lost]} if state.lost else {}),
        "choice_rule": trainer.choice_rule,
        "chosen_epoch": state.chosen_epoch,
        "stopped_early": len(state.history) < trainer.config.epochs,
        "seconds": seconds,
        "train_seconds": state.train_seconds,
        "tokens_per_second": state.train_tokens / state.train_seconds if state.train_seconds else None,
        "constant_part": dict(trainer.cached),
    }


def _write(folder: Path, prompt: Prompt, record: Mapping[str, Json], prepared: Prepared, best: Trainer) -> None:
    ranks = best.learner.ranks
    if ranks.writes:
        make_folder(folder)
        prompt.save(folder / PROMPT_FOLDER, overwrite=True)
    if not (ranks.writes or best.learner.frozen.shards is not None):  # a model that is spread runs in all processes
        wait_for_all()
        return
    dev, items = prepared.parts["dev"], prepared.items["dev"]
    backbone = best.learner.backbone
    found = evaluate(backbone, items, PromptBatch.of(best.best_vectors, best.best_deep), cache=best.learner.cache)
    # Labels and choices were chosen by scoring them. Other answers must be written.
    predictions = guessed(prompt, dev, found) or PromptModel(backbone).predict(dev, prompt)
    if ranks.writes:
        write_json_lines(folder / PREDICTIONS_FILE, prediction_rows(dev.records, predictions, found.hits))
        write_json(folder / RUN_FILE, record)
        remove(folder / CHECKPOINT_FOLDER, CHECKPOINT)
    wait_for_all()
