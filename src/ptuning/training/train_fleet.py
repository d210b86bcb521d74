"""A fleet, from data to files: a folder for each prompt, as it would get alone, and ``fleet.json`` that lists them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptuning.backbone.backbone import Backbone
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.engine.processes import processes, this_writes, wait_for_all
from ptuning.errors import ConfigError, PTuningError
from ptuning.files import Json, write_json
from ptuning.names import (
    CHECKPOINT_FOLDER,
    FLEET_CHECKPOINT,
    FLEET_FILE,
    LOG_FOLDER,
    check_writable,
    fleet_layout,
    is_folder_name,
    remove,
    sweep,
)
from ptuning.progress import OnProgress
from ptuning.provenance import versions
from ptuning.training.fleet import AT_ONCE, Fleet, Member
from ptuning.training.prepare import prepare
from ptuning.training.run import FORMAT_VERSION, TrainingRun, TrainResult
from ptuning.training.spec import FleetPrompt
from ptuning.training.step import with_gradients
from ptuning.training.trainer import Trainer

# Between a prompt's name and the number of its start, if it has several starts.
START = "#"


def run_of(
    prompt: FleetPrompt,
    backbone: Backbone,
    *,
    out: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    command: str | None = None,
) -> TrainingRun:
    """Return the run of a prompt, checked; arguments as of :func:`ptuning.train`. An error names the prompt."""
    try:
        prepared = prepare(prompt, backbone)
        return TrainingRun(prepared, out=out, resume=resume, overwrite=overwrite, command=command)
    except PTuningError as error:
        raise type(error)(f"prompt '{prompt.name}': {error}") from error


@dataclass(frozen=True)
class FleetResult:
    """What a fleet leaves: results by name, in the order asked for, errors by name, and ``fleet.json``."""

    results: Mapping[str, TrainResult]
    failed: Mapping[str, str]
    record: Mapping[str, Json]


def train_fleet(
    prompts: Sequence[FleetPrompt],
    *,
    backbone: Backbone,
    out: str | Path | None = None,
    at_once: int = AT_ONCE,
    resume: bool = False,
    overwrite: bool = False,
    report: OnProgress | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_prompt: Callable[[str, TrainResult | PTuningError], None] | None = None,
    command: str | None = None,
) -> FleetResult:
    """Train many prompts together on one frozen backbone, with different data, templates, seeds, settings or encoders.

    Each prompt gets the result that it would get alone, up to rounding: prompts share passes, and nothing else.

    Args:
        prompts: The prompts, in the order in which they start.
        backbone: From :func:`ptuning.load_backbone`; it does not change.
        out: Folder with a folder for each prompt; without it nothing is written.
        at_once: Most prompts that train at the same time.
        resume: Continue from the checkpoint in ``out``; finished prompts are not trained again.
        overwrite: Replace an earlier fleet in ``out``.
        report: Called with progress.
        should_stop: Asked after every step.
        on_prompt: Called with each prompt that has ended.
        command: The command line, for the record.

    Raises:
        PTuningError: Of the stage at fault; before training starts, with nothing written.
        Interrupted: If ``should_stop`` returned true; a checkpoint was written.
    """
    began, folder = time.monotonic(), Path(out) if out is not None else None
    runs = _prepared(prompts, backbone, folder, resume=resume, overwrite=overwrite, command=command)
    wait_for_all()  # all have looked at the folder
    if folder is not None and this_writes():
        sweep(folder, fleet_layout(runs))
    results, failed = dict[str, TrainResult](), dict[str, str]()
    checkpoint = folder / CHECKPOINT_FOLDER if folder is not None else None
    ended = fleet_runs(
        runs, checkpoint=checkpoint, at_once=at_once, resume=resume, report=report, should_stop=should_stop
    )
    for name, outcome in ended:
        if isinstance(outcome, TrainResult):
            results[name] = outcome
        else:
            failed[name] = str(outcome)
        if on_prompt is not None:
            on_prompt(name, outcome)
    results = {name: results[name] for name in runs if name in results}
    record: dict[str, Json] = {
        "format_version": FORMAT_VERSION,
        "command": command,
        "versions": dict(versions()),
        "backbone": backbone.to_json(),
        "at_once": at_once,
        "seconds": time.monotonic() - began,
        "prompts": [_line(name, results.get(name), failed.get(name)) for name in runs],
    }
    if folder is not None and this_writes():
        write_json(folder / FLEET_FILE, record)
    return FleetResult(results, failed, record)


def _prepared(
    prompts: Sequence[FleetPrompt],
    backbone: Backbone,
    folder: Path | None,
    *,
    resume: bool,
    overwrite: bool,
    command: str | None,
) -> dict[str, TrainingRun]:
    """Return name -> run, all of them checked before anything is written."""
    if not prompts:
        raise ConfigError("the fleet has no prompts")
    names: list[str] = []
    for prompt in prompts:
        _check_name(prompt.name, names)
        names.append(prompt.name)
    if folder is not None:
        check_writable(folder, fleet_layout(names), overwrite=overwrite, resume=resume)
    runs: dict[str, TrainingRun] = {}
    for prompt in prompts:
        runs[prompt.name] = run_of(
            prompt,
            backbone,
            out=folder / prompt.name if folder is not None else None,
            resume=resume and folder is not None,
            overwrite=overwrite,
            command=command,
        )
    return runs


def can_train_together() -> bool:
    """Whether prompts can train together. Several processes share the rows of one prompt instead."""
    return bool(processes().num_processes == 1)


@with_gradients
def fleet_runs(
    runs: Mapping[str, TrainingRun],
    *,
    checkpoint: Path | None = None,
    at_once: int = AT_ONCE,
    resume: bool = False,
    report: OnProgress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[tuple[str, TrainResult | PTuningError]]:
    """Train runs together, and yield each one that has ended: its result, which was written, or its error. Runs that
    were finished before come first. Unless they ``resume``, an existing checkpoint is removed.

    Raises:
        ConfigError: If a run trains weights of the backbone.
        Interrupted: If ``should_stop`` returned true.
    """
    _check_frozen(runs)
    for run in runs.values():
        run.clear()
    if checkpoint is not None and not resume and this_writes():
        remove(checkpoint, FLEET_CHECKPOINT)
    owners = {_member_name(name, number): name for name, run in runs.items() for number in range(run.config.starts)}
    fleet = Fleet(
        next(iter(runs.values())).prepared.backbone,
        [_member(name, run, number) for name, run in runs.items() for number in range(run.config.starts)],
        at_once=at_once,
        memory_share=max(run.config.cache_memory for run in runs.values()),
        disk_bytes=max(run.config.prefix_cache_bytes for run in runs.values()),
        checkpoint=checkpoint,
        checkpoint_seconds=min(run.config.checkpoint_seconds for run in runs.values()),
    )
    done = fleet.resume() if resume else None
    for name, run in runs.items():
        # A checkpoint must list the prompt as done: which prompts train together decides rounding.
        if run.finished is not None and (done is None or _member_name(name, 0) in done):
            for member in (member for member, owner in owners.items() if owner == name):
                fleet.release(member)
            yield name, run.finished
    about: dict[str, Json] = {"fleet": {"prompts": len(runs), "at_once": at_once}}
    for member, outcome in fleet.run(report=report, should_stop=should_stop):
        name, run = owners[member], runs[owners[member]]
        if not isinstance(outcome, Trainer):
            yield name, outcome
            continue
        run.add(int(member.partition(START)[2] or 0), outcome)
        if run.is_trained:
            result = run.result(more=about)
            for each in (each for each, owner in owners.items() if owner == name):
                fleet.release(each)
            yield name, result


def _check_frozen(runs: Mapping[str, TrainingRun]) -> None:
    for name, run in runs.items():
        if run.config.tune != "frozen":
            raise ConfigError(
                f"prompt '{name}': tune is {run.config.tune}, and prompts of a fleet share one frozen backbone; train "
                "it alone"
            )


def _member_name(name: str, number: int) -> str:
    return f"{name}{START}{number}" if number else name


def _member(name: str, run: TrainingRun, number: int) -> Member:
    def make(prefix_cache: PrefixCache) -> Trainer:
        return run.trainer(number, prefix_cache=prefix_cache if run.config.cache_memory else None)

    return Member(_member_name(name, number), make, run.items["train"], run.items["dev"], run.config.epochs)


def _check_name(name: str, taken: Collection[str]) -> None:
    if name in taken:
        raise ConfigError(f"two prompts of the fleet are named '{name}'; give each a name of its own")
    if not is_folder_name(name) or name in (CHECKPOINT_FOLDER, LOG_FOLDER, FLEET_FILE):
        raise ConfigError(
            f"'{name}' is not a name for a prompt: it becomes a folder; use letters, digits and - _ . + ="
        )


def _line(name: str, result: TrainResult | None, error: str | None) -> dict[str, Json]:
    if result is None:
        return {"name": name, "status": "failed", "error": error}
    record = result.record
    return {
        "name": name,
        "status": "done",
        "run": name if result.folder is not None else None,
        "scores": dict(result.prompt.scores),
        "chosen_epoch": record["chosen_epoch"],
        "train_seconds": record["train_seconds"],
    }
