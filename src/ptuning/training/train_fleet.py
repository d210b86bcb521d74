"""A fleet, from data to files: a folder for each prompt, as it would get alone, and ``fleet.json`` that lists them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptuning.backbone.backbone import Backbone
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.engine.processes import processes, this_writes, wait_for_all
from ptuning.errors import ConfigError, PTuningError, TrainingError
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
    remove_stale,
)
from ptuning.progress import OnProgress, Progress
from ptuning.provenance import versions
from ptuning.training.fleet import AT_ONCE, Fleet, Member
from ptuning.training.optimizer import with_gradients
from ptuning.training.prepare import prepare
from ptuning.training.run import FORMAT_VERSION, TrainingRun, TrainResult
from ptuning.training.spec import FleetPrompt
from ptuning.training.trainer import Trainer
from ptuning.workers.jobs import JOB_PROMPTS, Job, JobResult, JobRun, JobSet, WorkPart, job_lock, split_evenly
from ptuning.workers.pool import WorkerConfig, run_jobs

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
    part: WorkPart | str | None = None,
    workers: WorkerConfig | int | None = None,
    command: str | None = None,
) -> FleetResult:
    """Train many prompts together on one frozen backbone, with different data, templates, seeds, settings or encoders.

    Each prompt gets the result that it would get alone, up to rounding: prompts share passes, and nothing else. More
    than 16 (or ``at_once``) are cut into several fleets of about equal size, one after another.

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
        part: Train only this part of the fleets, such as ``1/4``, and write no ``fleet.json``. Parts may run at the
            same time; the whole with ``resume`` then collects all.
        workers: Train the fleets in several processes; a number stands for so many on this machine, and 1 for none.
        command: The command line, for the record.

    Raises:
        PTuningError: Of the stage at fault; before training starts, with nothing written.
        Interrupted: If ``should_stop`` returned true; a checkpoint was written.
    """
    began, folder = time.monotonic(), Path(out) if out is not None else None
    part, config = WorkPart.parse(part) if isinstance(part, str) else part, WorkerConfig.of(workers)
    if config is not None:
        config.check()
    jobs = fleet_jobs(prompts, at_once=at_once)
    jobs = jobs if part is None else part.share(jobs)
    replaces = overwrite or part is not None  # other parts write into the folder, too
    runs = _prepared(
        prompts, jobs, backbone, folder, command=command, resume=resume, overwrite=overwrite, replaces=replaces
    )
    _check_frozen(runs)
    wait_for_all()  # all have looked at the folder
    if folder is not None and part is None and this_writes():
        _tidy(folder, resume=resume)
    results, failed = dict[str, TrainResult](), dict[str, str]()
    if config is not None and folder is None:
        raise ConfigError("workers need a folder for the prompts (out)")
    if config is not None and not resume:
        for run in runs.values():
            run.clear()
        for job in jobs:
            remove(Path(out or "") / str(job.checkpoint), FLEET_CHECKPOINT)
    fleet = FleetJobs(prompts, folder, backbone, at_once, command, resume, runs)
    for ended in run_jobs(fleet, JobRun(jobs, report, should_stop), config):
        name, outcome = ended.folder, ended.value
        assert outcome is not None
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
    if folder is not None and part is None and this_writes():
        write_json(folder / FLEET_FILE, record)
    return FleetResult(results, failed, record)


def _tidy(folder: Path, *, resume: bool) -> None:
    """Remove what a killed process left beside the prompts, and unless they ``resume``, checkpoints of other fleets."""
    layout = fleet_layout(())
    remove_stale(folder, replace(layout, folders={}))
    for entry in () if resume or not folder.is_dir() else sorted(folder.iterdir()):
        if layout.folder(entry.name) is not None:
            remove(entry, FLEET_CHECKPOINT)


def fleet_jobs(prompts: Sequence[FleetPrompt], *, at_once: int = AT_ONCE) -> list[Job]:
    """Return the prompts, split into what trains together. It depends on the prompts and on ``at_once`` alone."""
    weights = [prompt.settings.num_restarts for prompt in prompts]
    names = [prompt.name for prompt in prompts]
    groups = split_evenly(names, weights, max(JOB_PROMPTS, at_once)) if prompts else []
    return [
        Job(f"fleet {number}", tuple(group), CHECKPOINT_FOLDER + (f"-{number}" if number > 1 else ""))
        for number, group in enumerate(groups, start=1)
    ]


class FleetJobs(JobSet["TrainResult | PTuningError"]):
    """The fleets of one call. A worker prepares the prompts itself, and always resumes: what was to be replaced was
    removed before.
    """

    summary = FLEET_FILE
    forwards_progress = False

    def __init__(
        self,
        prompts: Sequence[FleetPrompt],
        out: Path | None,
        backbone: Backbone,
        at_once: int,
        command: str | None,
        resume: bool,
        runs: Mapping[str, TrainingRun],
    ) -> None:
        self.prompts = prompts
        self.folder = out
        self.out = out or Path()
        self.backbone = backbone
        self.at_once = at_once
        self.command = command
        self.resume = resume
        self.runs: Mapping[str, TrainingRun] | None = runs

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "runs": None, "resume": True}

    def run_job(self, job: Job, run: JobRun) -> Iterator[JobResult[TrainResult | PTuningError]]:
        """Train the prompts of a job together, or what is left of them, and yield each one that has ended."""
        in_worker = self.runs is None

        def waiting() -> None:
            if not in_worker:
                raise TrainingError(
                    f"another process trains prompts in {self.out}; wait for its end, and go on with --resume"
                )
            run.check_stop()

        checkpoint = self.out / str(job.checkpoint) if self.folder is not None else None
        with job_lock(self.out, job, waiting) if self.folder is not None else contextlib.nullcontext():
            runs = self.runs or _prepared(
                self.prompts, [job], self.backbone, self.out, command=self.command, resume=True, replaces=True
            )
            if checkpoint is not None and this_writes():
                remove_stale(checkpoint, FLEET_CHECKPOINT)
            for name, outcome in fleet_runs(
                {name: runs[name] for name in job.folders},
                checkpoint=checkpoint,
                at_once=self.at_once,
                resume=self.resume,
                report=run.report,
                should_stop=run.should_stop,
                more={"worker": self.worker} if self.worker is not None else None,
            ):
                error = str(outcome) if isinstance(outcome, PTuningError) else None
                yield JobResult(name, error, value=outcome)

    def load(self, folder: str) -> TrainResult | None:
        """Return the result of a prompt that was finished before."""
        return self.runs[folder].finished if self.runs is not None else None

    def collect(self, result: JobResult[Any]) -> TrainResult | PTuningError:
        """Return the result of a prompt that a worker has trained."""
        if result.error is not None:
            return TrainingError(result.error)
        prompt = next(prompt for prompt in self.prompts if prompt.name == result.folder)
        folder = self.out / result.folder
        trained = run_of(prompt, self.backbone, out=folder, resume=True).finished
        return trained or TrainingError(f"the files in {folder} cannot be read")

    def report_status(self, run: JobRun, status: str) -> None:
        """Report what the workers do just now."""
        if run.report is not None:
            note = f"{len(run.done)} of {run.total} prompts done; {status}"
            run.report(Progress("train", len(run.done), run.total, note))


def _prepared(
    prompts: Sequence[FleetPrompt],
    jobs: Sequence[Job],
    backbone: Backbone,
    folder: Path | None,
    *,
    command: str | None,
    resume: bool,
    overwrite: bool = False,
    replaces: bool = False,
) -> dict[str, TrainingRun]:
    """Return name -> run of the prompts of jobs, all of them checked before anything is written; ``replaces`` says
    whether anything of ours may be in the folder.
    """
    if not prompts:
        raise ConfigError("the fleet has no prompts")
    names: list[str] = []
    for prompt in prompts:
        _check_name(prompt.name, names)
        names.append(prompt.name)
    if folder is not None:
        check_writable(folder, fleet_layout(names), overwrite=replaces, resume=resume)
    runs: dict[str, TrainingRun] = {}
    names_of_jobs = {name for job in jobs for name in job.folders}
    for prompt in (prompt for prompt in prompts if prompt.name in names_of_jobs):
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
    more: Mapping[str, Json] | None = None,
) -> Iterator[tuple[str, TrainResult | PTuningError]]:
    """Train runs together, and yield each one that has ended: its result, which was written, or its error. Runs that
    were finished before come first. Unless they ``resume``, an existing checkpoint is removed. Records get ``more``.

    Raises:
        ConfigError: If a run trains weights of the backbone.
        Interrupted: If ``should_stop`` returned true.
    """
    _check_frozen(runs)
    for run in runs.values():
        run.clear()
    if checkpoint is not None and not resume and this_writes():
        remove(checkpoint, FLEET_CHECKPOINT)
    owners = {
        _member_name(name, number): name for name, run in runs.items() for number in range(run.config.num_restarts)
    }
    fleet = Fleet(
        next(iter(runs.values())).prepared.backbone,
        [_member(name, run, number) for name, run in runs.items() for number in range(run.config.num_restarts)],
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
    about: dict[str, Json] = {"fleet": {"prompts": len(runs), "at_once": at_once}, **(more or {})}
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
        if run.config.train_backbone != "none":
            raise ConfigError(
                f"prompt '{name}': train_backbone is {run.config.train_backbone}, and prompts of a fleet share one "
                "frozen backbone; train it alone"
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
    if not is_folder_name(name) or name in (LOG_FOLDER, FLEET_FILE) or fleet_layout(()).folder(name) is not None:
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
