"""Many prompts from data to files: a folder for each, as it would get alone, and ``fleet.json`` that lists them."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptuning.backbone.backbone import Backbone
from ptuning.config import refuse_unused
from ptuning.engine.processes import this_writes, wait_for_all
from ptuning.errors import ConfigError, PTuningError, TrainingError
from ptuning.files import Json, write_json
from ptuning.names import (
    CHECKPOINT,
    CHECKPOINT_FOLDER,
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
from ptuning.training.prepare import prepare
from ptuning.training.run import FORMAT_VERSION, TrainingRun, TrainResult, train_together
from ptuning.training.spec import FleetPrompt
from ptuning.workers.jobs import JOB_PROMPTS, Job, JobResult, JobRun, JobSet, WorkPart, job_lock, split_evenly
from ptuning.workers.pool import WorkerConfig, run_jobs


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
    """Results by name, in the order of the prompts, errors by name, and the content of ``fleet.json``."""

    results: Mapping[str, TrainResult]
    failed: Mapping[str, str]
    record: Mapping[str, Json]


def train_fleet(
    prompts: Sequence[FleetPrompt],
    *,
    backbone: Backbone,
    out: str | Path | None = None,
    at_once: int = JOB_PROMPTS,
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
        at_once: Maximum number of prompts that train at the same time.
        resume: Continue from the checkpoint in ``out``; finished prompts are not trained again.
        overwrite: Replace an earlier fleet in ``out``.
        report: Called with progress.
        should_stop: Called after every step.
        on_prompt: Called with each prompt that has ended.
        part: Train only this part of the fleets, such as ``1/4``, and write no ``fleet.json``. Parts may run at the
            same time; the whole with ``resume`` then collects all.
        workers: Train the fleets in several processes: their number on this machine (1 is none), or how to run them.
        command: The command line, for the record.

    Raises:
        PTuningError: Of the stage at fault; before training starts, with nothing written.
        Interrupted: If ``should_stop`` returned true; a checkpoint was written.
    """
    began, folder = time.monotonic(), Path(out) if out is not None else None
    part, pool = WorkPart.parse(part) if isinstance(part, str) else part, WorkerConfig.of(workers)
    if pool is not None and folder is None:
        raise ConfigError("workers need a folder for the prompts (out)")
    if pool is not None:
        pool.check()
    _check(prompts, folder, at_once=at_once, replaces=overwrite or part is not None, resume=resume)
    jobs = fleet_jobs(prompts, at_once=at_once)
    jobs = jobs if part is None else part.share(jobs)
    fleet = FleetJobs(prompts, folder, backbone, at_once=at_once, resume=resume, overwrite=overwrite, command=command)
    runs = fleet.runs = fleet.prepared(jobs)
    # Settings for all prompts must act on one of them.
    for name, run in runs.items() if part is None else ():
        given = next(prompt for prompt in prompts if prompt.name == name)
        own = set(run.config.model_fields_set).difference(given.common)
        refuse_unused(run.config, *(other.prepared.facts for other in runs.values()), common=own)
    wait_for_all()  # all have looked at the folder
    if folder is not None and part is None and this_writes():
        # Left by a killed process; and unless they resume, checkpoints of other fleets.
        layout = fleet_layout(())
        remove_stale(folder, replace(layout, folders={}))
        for entry in () if resume or not folder.is_dir() else sorted(folder.iterdir()):
            if layout.folder(entry.name) is not None:
                remove(entry, CHECKPOINT)
    if not resume:
        for run in runs.values():
            run.clear()
        for job in jobs if folder is not None and this_writes() else ():
            remove(fleet.out / str(job.checkpoint), CHECKPOINT)
    results, failed = dict[str, TrainResult](), dict[str, str]()
    for ended in run_jobs(fleet, JobRun(jobs, report, should_stop), pool):
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
        "prompts": [_row(name, results.get(name), failed.get(name)) for name in runs],
    }
    if folder is not None and part is None and this_writes():
        write_json(folder / FLEET_FILE, record)
    return FleetResult(results, failed, record)


def fleet_jobs(prompts: Sequence[FleetPrompt], *, at_once: int = JOB_PROMPTS) -> list[Job]:
    """Return the prompts, split into those that train together. It depends on the prompts and on ``at_once`` alone."""
    weights = [prompt.settings.num_restarts for prompt in prompts]
    names = [prompt.name for prompt in prompts]
    groups = split_evenly(names, weights, max(JOB_PROMPTS, at_once)) if prompts else []
    return [
        Job(f"fleet {number}", tuple(group), CHECKPOINT_FOLDER + (f"-{number}" if number > 1 else ""))
        for number, group in enumerate(groups, start=1)
    ]


class FleetJobs(JobSet["TrainResult | PTuningError"]):
    """The fleets of one call. A worker prepares the prompts itself (``runs`` is None there), and always resumes: what
    was to be replaced was removed before.
    """

    summary = FLEET_FILE
    forwards_progress = False

    def __init__(
        self,
        prompts: Sequence[FleetPrompt],
        folder: Path | None,
        backbone: Backbone,
        *,
        at_once: int,
        resume: bool,
        overwrite: bool,
        command: str | None,
    ) -> None:
        self.prompts, self.folder, self.out, self.backbone = prompts, folder, folder or Path(), backbone
        self.at_once, self.resume, self.overwrite, self.command = at_once, resume, overwrite, command
        self.runs: Mapping[str, TrainingRun] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "runs": None, "resume": True, "overwrite": False}

    def prepared(self, jobs: Sequence[Job]) -> dict[str, TrainingRun]:
        """Return name -> run of the prompts of jobs, all of them checked before anything is written."""
        names = {name for job in jobs for name in job.folders}
        runs = {}
        for prompt in (prompt for prompt in self.prompts if prompt.name in names):
            has_folder = self.folder is not None
            runs[prompt.name] = run_of(
                prompt,
                self.backbone,
                out=self.out / prompt.name if has_folder else None,
                resume=self.resume and has_folder,
                overwrite=self.overwrite,
                command=self.command,
            )
        for name, run in runs.items():
            if run.config.train_backbone != "none":
                raise ConfigError(
                    f"prompt '{name}': train_backbone is {run.config.train_backbone}, and prompts of a fleet share one "
                    "frozen backbone; train it alone"
                )
        return runs

    def run_job(self, job: Job, run: JobRun) -> Iterator[JobResult[TrainResult | PTuningError]]:
        """Train the prompts of a job together, or what is left of them, and yield each one that has ended."""
        in_worker = self.runs is None

        def waiting() -> None:
            if not in_worker:
                raise TrainingError(
                    f"another process trains prompts in {self.out}; wait for its end, and continue with resume"
                )
            run.check_stop()

        checkpoint = self.out / str(job.checkpoint) if self.folder is not None else None
        with job_lock(self.out, job, waiting) if self.folder is not None else contextlib.nullcontext():
            if in_worker:
                _check(self.prompts, self.out, at_once=self.at_once, replaces=True, resume=True)
            runs = self.runs or self.prepared([job])
            if checkpoint is not None and this_writes():
                remove_stale(checkpoint, CHECKPOINT)
            more: dict[str, Json] = {} if self.worker is None else {"worker": self.worker}
            for name, outcome in train_together(
                {name: runs[name] for name in job.folders},
                checkpoint=checkpoint,
                at_once=self.at_once,
                resume=self.resume,
                report=run.report,
                should_stop=run.should_stop,
                more=more | {"fleet": {"prompts": len(job.folders), "at_once": self.at_once}},
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


def _check(prompts: Sequence[FleetPrompt], folder: Path | None, *, at_once: int, replaces: bool, resume: bool) -> None:
    """Check names and the folder of a fleet; ``replaces``: whether anything of ours may be in the folder."""
    if not prompts:
        raise ConfigError("the fleet has no prompts")
    if at_once < 1:
        raise ConfigError(f"at_once is {at_once}; it must be 1 or more")
    names: list[str] = []
    for name in (prompt.name for prompt in prompts):
        if name in names:
            raise ConfigError(f"two prompts of the fleet are named '{name}'; give each a name of its own")
        if not is_folder_name(name) or name in (LOG_FOLDER, FLEET_FILE) or fleet_layout(()).folder(name) is not None:
            raise ConfigError(
                f"'{name}' is not a name for a prompt: it becomes a folder; use letters, digits and - _ . + ="
            )
        names.append(name)
    if folder is not None:
        check_writable(folder, fleet_layout(names), overwrite=replaces, resume=resume)


def _row(name: str, result: TrainResult | None, error: str | None) -> dict[str, Json]:
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
