"""Training runs, from data to files: ``prompt/``, ``run.json`` and ``predictions.jsonl`` of each."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.number_format import short_name
from ptuning.config import BY_LOSS, BY_SCORE, TrainConfig, acts_on, derived_seed, start_seed
from ptuning.data.checks import Labels, Merge
from ptuning.data.sources import Source
from ptuning.data.splits import draw_records
from ptuning.data.task_files import TaskFile
from ptuning.engine.evaluate import evaluate, measure_ceiling
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.engine.processes import this_writes, wait_for_all
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import ConfigError, PTuningError
from ptuning.files import FileModel, Json, check_room, make_folder, read_json, validate, write_json, write_json_lines
from ptuning.names import (
    CHECKPOINT,
    CHECKPOINT_FOLDER,
    PREDICTIONS_FILE,
    PROMPT_FOLDER,
    RUN,
    RUN_FILE,
    check_writable,
    clear,
    remove,
    remove_stale,
)
from ptuning.progress import OnProgress
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.rows import MORE_TOKENS
from ptuning.prompt.score import epoch_metric, guessed, prediction_rows
from ptuning.prompt.storage import BackboneId
from ptuning.provenance import described, versions
from ptuning.statistics import Score, score
from ptuning.template.language import Template
from ptuning.training.checkpoint import check_identity, identity, read_checkpoint
from ptuning.training.optimizer import with_gradients
from ptuning.training.prepare import Prepared, prepare
from ptuning.training.spec import TrainSpec
from ptuning.training.trainer import Judge, Member, Trainer, TrainingLoop

FORMAT_VERSION = 1
# Development records that texts are generated for after each epoch: it takes longer than to score given ones.
JUDGED_RECORDS = 64
# Disk space for the prompt, the record and the predictions, besides the checkpoint.
FILES_BYTES = 5_000_000


@dataclass(frozen=True)
class TrainResult:
    """Result of a training run: the chosen prompt, the content of ``run.json``, and the folder, if there is one."""

    prompt: Prompt
    record: Mapping[str, Json]
    folder: Path | None


class _Epoch(FileModel):
    dev_loss: float
    dev_score: float


class _HistoryRow(_Epoch):
    epoch: int
    train_loss: float


class _Part(FileModel):
    rows: int
    name: str


class RunRecord(FileModel):
    """Keys of ``run.json`` that a resumed command reads from a finished run."""

    identity: dict[str, Any]
    start: _Epoch
    history: tuple[_HistoryRow, ...]
    chosen_epoch: int
    choice_rule: str
    dev_score: Score
    trainable_parameters: int
    frozen_parameters: int
    train_backbone: str
    train_seconds: float
    data: dict[str, _Part | None]


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
        template, data, dev, config, labels, alias_label, strict, task, calibrate, method, manual, about, pattern, chat,
        system, fields,
    )  # fmt: skip
    run = TrainingRun(
        prepare(spec, backbone), out=out, resume=resume, overwrite=overwrite, ceiling=ceiling, command=command
    )
    return run.train(report=report, should_stop=should_stop)


class TrainingRun:
    """A training run with its folder and its record; arguments as of :func:`train`.

    Attributes:
        record: Content of ``run.json`` before training starts.
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
        self.identity = cast("Mapping[str, Json]", self.record["identity"])
        self.folder = Path(out) if out is not None else None
        self.finished: TrainResult | None = None
        self._resume, self._replaces, self._ceiling = resume, overwrite and not resume, ceiling
        self._best: tuple[int, Trainer] | None = None
        self._seconds_before = 0.0
        self._starts: dict[int, dict[str, Json]] = {}
        if self.folder is not None and resume and (self.folder / RUN_FILE).is_file():
            record, where = read_json(self.folder / RUN_FILE), f"{self.folder / RUN_FILE} is damaged"
            saved = validate(RunRecord, record, where, advice="start again with overwrite")
            check_identity(self.identity, saved.identity, where=str(self.folder))
            self.finished = TrainResult(Prompt.load(self.folder / PROMPT_FOLDER), record, self.folder)
        elif self.folder is not None:
            check_writable(self.folder, RUN, overwrite=overwrite, resume=resume)

    def train(
        self,
        *,
        report: OnProgress | None = None,
        should_stop: Callable[[], bool] | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> TrainResult:
        """Train every restart, or what is left to train, one after another; arguments as of :func:`train`."""
        if self.finished is not None:
            self.clear()
            return self.finished
        outcomes = train_together(
            {"": self},
            checkpoint=self.folder / CHECKPOINT_FOLDER if self.folder is not None else None,
            at_once=1,
            resume=self._resume,
            report=report,
            should_stop=should_stop,
            prefix_cache=prefix_cache,
        )
        ((_, outcome),) = list(outcomes)
        if isinstance(outcome, PTuningError):
            raise outcome
        return outcome

    def trainer(
        self, number: int, *, prefix_cache: PrefixCache | None = None, checkpoint: Path | None = None
    ) -> Trainer:
        """Return the trainer of one of several restarts, from 0. A FileError if the disk is too small for the run."""
        trainer = Trainer(
            self.prepared.backbone,
            self.prepared.bound,
            config=self.config.adapted(seed=start_seed(self.config.seed, number)),
            checkpoint=checkpoint,
            identity=self.identity,
            judge=_judge(self.prepared),
            prefix_cache=prefix_cache,
            start=number,
        )
        if self.folder is not None and not number:
            learner = trainer.learner
            weights = sum(weight.numel() for weight in learner.weights.values())
            encoder = learner.trainable_parameters - weights
            # Each start: the encoder with both moments, and the backbone's best weights. The start in training: the
            # backbone's weights with both moments, twice, since a file is written before the old one is removed. In the
            # end: the prompt's weights.
            restarts = self.config.num_restarts
            needed = restarts * 8 * encoder + (restarts + 1 + 2 * 3 + 1) * weights
            check_room(self.folder, FILES_BYTES + 4 * needed)
        return trainer

    def begin(self, number: int, *, prefix_cache: PrefixCache, checkpoint: Path | None) -> Trainer:
        """Return the trainer of a restart, once training certainly starts: an earlier run is removed then."""
        own = prefix_cache if self.config.prefix_cache_share else None
        trainer = self.trainer(number, prefix_cache=own, checkpoint=checkpoint)
        if number == 0:
            self.clear()
        return trainer

    def clear(self) -> None:
        """Remove what killed processes left: half-written files, and the checkpoint of a finished run; and the earlier
        run, if it is to be replaced and it is certain that training starts.
        """
        wait_for_all()  # all have looked at the folder
        if self.folder is not None and this_writes():
            remove_stale(self.folder, RUN)
            if self._replaces:
                clear(self.folder, RUN)
            elif self.finished is not None:
                remove(self.folder / CHECKPOINT_FOLDER, CHECKPOINT)

    def add(self, number: int, trainer: Trainer) -> bool:
        """Add a restart that was trained; return whether all are. The best one on the development part is kept, the
        first of equal ones.
        """
        state = trainer.state
        self._starts[number] = {
            "seed": trainer.config.seed,
            "dev_score": state.best_score,
            "dev_loss": state.best_loss,
            "chosen_epoch": state.chosen_epoch,
        }
        self._seconds_before += trainer.seconds_before
        if self._best is None or (trainer.rank, -number) > (self._best[1].rank, -self._best[0]):
            self._best = number, trainer
        return len(self._starts) == self.config.num_restarts

    def result(self, *, more: Mapping[str, Json] | None = None) -> TrainResult:
        """Return the result, and write it to the folder, if there is one; ``more`` goes into the record."""
        assert self._best is not None, "nothing was trained"
        (_, best), prepared, record = self._best, self.prepared, dict(self.record)
        prompt, state, learner = self.prompt(best), best.state, best.learner
        record |= {
            "trainable_parameters": learner.trainable_parameters,
            "frozen_parameters": 0 if learner.config.train_backbone == "full" else learner.frozen.parameters,
            "slots": learner.bound.slots,
            **({"deep": best.best_deep.to_json()} if best.best_deep is not None else {}),
            "start": dict(state.start),
            "history": [dict(epoch) for epoch in state.history],
            **({"diverged": [[dict(row) for row in rows] for rows in state.diverged]} if state.diverged else {}),
            "choice_rule": best.choice_rule,
            "chosen_epoch": state.chosen_epoch,
            "stopped_early": len(state.history) < best.config.epochs,
            "seconds": time.monotonic() - prepared.began + self._seconds_before,
            "train_seconds": state.train_seconds,
            "tokens_per_second": state.train_tokens / state.train_seconds if state.train_seconds else None,
            "constant_part": dict(best.cached),
            "dev_score": self._dev_score(best).to_json(),
            **(more or {}),
        }
        if self.config.num_restarts > 1:
            record["starts"] = [self._starts[number] for number in sorted(self._starts)]
        if learner.ranks.size > 1:
            record["data_ranks"] = learner.ranks.size
        if self._ceiling:
            record["ceiling_tokens_per_second"] = measure_ceiling(
                prepared.backbone, self.items["train"], batch_size=self.config.batch_size, slots=prepared.bound.slots
            )
        if self.folder is not None:
            self._write(self.folder, prompt, record, best)
        return TrainResult(prompt, record, self.folder)

    def _write(self, folder: Path, prompt: Prompt, record: Mapping[str, Json], best: Trainer) -> None:
        learner = best.learner
        if learner.ranks.writes:
            make_folder(folder)
            prompt.save(folder / PROMPT_FOLDER, overwrite=True)
        if learner.ranks.writes or learner.frozen.shards is not None:  # a sharded model runs in all processes
            dev = self.prepared.parts["dev"]
            learned = PromptBatch.of(best.best_vectors, best.best_deep)
            evaluation = evaluate(learner.backbone, [self.items["dev"]], learned, cache=learner.cache)
            # Labels and choices were chosen by scoring them. Other answers must be generated.
            predictions = guessed(prompt, dev, evaluation) or PromptModel(learner.backbone).predict(dev, prompt)
            if learner.ranks.writes:
                rows = prediction_rows(dev.records, predictions, evaluation.hits)
                write_json_lines(folder / PREDICTIONS_FILE, rows)
                write_json(folder / RUN_FILE, record)
        wait_for_all()

    def prompt(self, trainer: Trainer) -> Prompt:
        """Return the prompt that a trainer has learned."""
        prepared, config, deep = self.prepared, trainer.config, trainer.best_deep
        choices = [choice for item in self.items["train"] for choice in item.choices]
        chosen = self._dev_score(trainer)
        if deep is not None and config.deep_dtype != "float32":
            deep = deep.rounded(torch.bfloat16)
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
            seed=config.seed,
            scored_on=len(self.items["dev"]),
            scores={prepared.answers.score_name: trainer.state.best_score, "loss": trainer.state.best_loss},
            intervals={prepared.answers.score_name: (chosen.low, chosen.high)},
            weights=trainer.learner.trained_weights(),
            task=prepared.task,
            calibrate=prepared.answers.scoring.calibrate,
            normalise=prepared.answers.scoring.normalise,
            fields=prepared.fields,
            merge=prepared.merge,
            deep=deep,
        )

    def _dev_score(self, trainer: Trainer) -> Score:
        """Return the chosen epoch's share of hits on the development part with its interval, as ``eval`` shows it."""
        count = len(self.items["dev"])
        hits = round(trainer.state.best_score * count)
        return score([1.0] * hits + [0.0] * (count - hits))


@with_gradients
def train_together(
    runs: Mapping[str, TrainingRun],
    *,
    checkpoint: Path | None = None,
    at_once: int,
    resume: bool = False,
    report: OnProgress | None = None,
    should_stop: Callable[[], bool] | None = None,
    prefix_cache: PrefixCache | None = None,
    more: Mapping[str, Json] | None = None,
) -> Iterator[tuple[str, TrainResult | PTuningError]]:
    """Train runs on one backbone, ``at_once`` of their restarts at a time, and yield each one that has ended: its
    result, which was written, or its error. Runs that were finished before come first. Unless they ``resume``, an
    existing checkpoint is removed. Records get ``more``.

    Raises:
        Interrupted: If ``should_stop`` returned true.
    """
    backbone = next(iter(runs.values())).prepared.backbone
    resumed = read_checkpoint(checkpoint) if checkpoint is not None and resume else None
    wait_for_all()  # all have read it
    share = max(run.config.prefix_cache_share for run in runs.values())
    disk = max(run.config.prefix_cache_bytes for run in runs.values())
    with contextlib.ExitStack() as stack:
        cache = prefix_cache or stack.enter_context(PrefixCache(backbone, memory_share=share, disk_bytes=disk))
        owners: dict[str, tuple[str, int]] = {}
        members: list[Member] = []
        for name, run in runs.items():
            for number in range(run.config.num_restarts):
                # A restart is a folder in the log of its prompt.
                member = "/".join(filter(None, (name, f"start-{number}" if number else "")))
                owners[member] = name, number
                make = functools.partial(run.begin, number, prefix_cache=cache, checkpoint=checkpoint)
                members.append(Member(member, make, run.items["train"], run.items["dev"], run.config.epochs))
        loop = TrainingLoop(members, prefix_cache=cache, at_once=at_once, checkpoint=checkpoint, resumed=resumed)
        for name, run in runs.items():
            # A checkpoint must list the prompt as done: which prompts train together decides rounding.
            if run.finished is not None and (resumed is None or name in loop.finished):
                run.clear()
                for member in (member for member, owner in owners.items() if owner[0] == name):
                    loop.release(member)
                yield name, run.finished
        if checkpoint is not None and not resume and this_writes():
            remove(checkpoint, CHECKPOINT)
        for member, outcome in loop.run(report=report, should_stop=should_stop):
            name, number = owners[member]
            if not isinstance(outcome, Trainer):
                yield name, outcome
            elif runs[name].add(number, outcome):
                result = runs[name].result(more=more)
                for each in (each for each, owner in owners.items() if owner[0] == name):
                    loop.release(each)
                yield name, result
        if checkpoint is not None and this_writes():
            remove(checkpoint, CHECKPOINT)


def _judge(prepared: Prepared) -> Judge | None:
    """Return the generation metric that chooses the epoch; None if it is chosen by score or loss."""
    metric, seed = prepared.config.metric_for_best_model, prepared.config.seed
    if metric in (BY_SCORE, BY_LOSS):
        return None
    records = draw_records(prepared.parts["dev"].records, JUDGED_RECORDS, seed=seed)
    longest = max(choice.own_tokens for item in prepared.items["train"] for choice in item.choices)
    return epoch_metric(prepared.bound, records, metric, max_tokens=longest + MORE_TOKENS)


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
        "identity": identity(
            settings,
            {name: questions.sha256 for name, questions in prepared.parts.items()},
            fingerprint=backbone.fingerprint,
            task_file=task.text if task is not None else None,
        ),
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
