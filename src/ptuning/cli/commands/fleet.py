"""`ptuning fleet`: learn many prompts at once."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.markup import escape

from ptuning.cli import inputs, options, signals, terminal
from ptuning.cli.options import OUTPUT, TRAINING, Shares, option
from ptuning.errors import ConfigError, PTuningError
from ptuning.progress import each

if TYPE_CHECKING:
    from ptuning.backbone.backbone import Backbone
    from ptuning.files import Json
    from ptuning.training.fleet import FleetResult
    from ptuning.training.run import TrainResult
    from ptuning.training.spec import FleetPrompt
    from ptuning.workers.jobs import WorkPart

# A line about the slots of each of dozens of templates would bury all others.
SHOWN_NOTES = 3


def fleet(
    config: Annotated[Path, option("TOML with the prompts (docs/scale.md).", TRAINING, metavar="FILE")],
    out: Annotated[Path, option("Folder with a folder for each prompt.", OUTPUT, metavar="DIR")],
    at_once: Annotated[int | None, option("Prompts that train at the same time.", TRAINING, metavar="N", min=1)] = None,
    part: options.PartOption = None,
    workers: options.WorkersOption = None,
    ray: options.RayOption = None,
    gpus_per_worker: options.GpusOption = None,
    resume: options.ResumeOption = False,
    overwrite: options.ReplaceOption = False,
    log_to: options.LogOption = None,
    backbone: options.BackboneOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    model_arg: options.ModelArgOption = None,
) -> None:
    """Learn many prompts at once on one frozen backbone: other data, templates, seeds or settings. Each is left as
    train would leave it, in a folder of its own.

    Example: ptuning fleet --config fleet.toml --out runs/fleet
    """
    from ptuning.names import check_writable, fleet_layout
    from ptuning.training.fleet_file import read_fleet
    from ptuning.training.tracking import TrainingLog

    options.check_resume(resume=resume, overwrite=overwrite)
    file = read_fleet(config)
    choice = options.backbone_of(backbone or file.backbone, dtype, device, model_arg)
    shares = Shares.of(part, workers, ray, gpus_per_worker, backbone=choice)
    layout = fleet_layout(prompt.name for prompt in file.prompts)
    check_writable(out, layout, overwrite=overwrite or part is not None, resume=resume)
    if log_to is not None and workers is not None:
        raise ConfigError("--log-to logs trainings of this process; leave out --workers and --ray")
    prompts = read_prompts(file.prompts)
    log = TrainingLog(log_to or (), shares.log_folder(out), together=True)
    loaded = inputs.load(choice, spread=True)
    prompts = place_all(prompts, loaded)
    with signals.stoppable(out, again="--resume") as (report, should_stop), log:
        from ptuning.training.fleet import train_fleet
        from ptuning.workers.jobs import JOB_PROMPTS

        result = train_fleet(
            prompts,
            backbone=loaded,
            out=out,
            at_once=at_once or file.at_once or JOB_PROMPTS,
            resume=resume,
            overwrite=overwrite,
            # A line per epoch of dozens of trainings would bury the line per prompt.
            report=each(lambda now: report(now) if now.stage != "epoch" else None, log),
            should_stop=should_stop,
            on_prompt=show_prompt,
            part=shares.part,
            workers=shares.workers,
            command=options.command_line(),
        )
    show(result, out, shares.part)
    if result.failed:
        raise typer.Exit(1)


def read_prompts(unread: Sequence[FleetPrompt]) -> list[FleetPrompt]:
    """Read the data of a fleet's prompts, each file once; an error names the prompt."""
    cache: dict[object, Any] = {}
    prompts, notes = [], []
    for prompt in unread:
        try:
            prompt = prompt.check(cache)
        except PTuningError as error:
            raise type(error)(f"prompt '{prompt.name}': {error}") from error
        doubts = prompt.checked.warnings if prompt.checked is not None else ()
        notes += [*prompt.notes, *(f"warning: {doubt}" for doubt in doubts)]
        prompts.append(prompt)
    inputs.say_notes(notes)
    return prompts


def place_all(prompts: Sequence[FleetPrompt], backbone: Backbone) -> list[FleetPrompt]:
    """Return the prompts with their slots where they pay, and print where the first few are."""
    from ptuning.training.prepare import placed

    final = [placed(prompt, backbone) for prompt in prompts]
    notes: dict[str, list[str]] = {}
    for before, after in zip(prompts, final, strict=True):
        for note in after.notes[len(before.notes) :]:
            notes.setdefault(note, []).append(after.name)
    for note, (first, *others) in itertools.islice(notes.items(), SHOWN_NOTES):
        terminal.say(f"{first}{f' and {len(others)} more' * bool(others)}: {note}")
    return final


def show_prompt(name: str, outcome: TrainResult | Exception) -> None:
    """Print a prompt of a fleet that has ended."""
    if isinstance(outcome, Exception):
        terminal.say(f"{name}: failed: {outcome}")
        return
    score, rows, chosen = _scored(outcome)
    terminal.say(f"{name}: dev score {score}, n = {rows}, {chosen}")


def show(fleet_result: FleetResult, out: Path, part: WorkPart | None = None) -> None:
    """Print what a fleet left, or a part of it."""
    table = terminal.table("prompt", "start", "dev score", "n", "chosen", numbers=True)
    for name, result in fleet_result.results.items():
        start = cast("Mapping[str, float]", result.record["start"])
        table.add_row(escape(name), f"{start['dev_score']:.3f}", *_scored(result))
    for name, error in fleet_result.failed.items():
        table.add_row(escape(name), "", "", "", escape(f"failed: {error}"))
    terminal.results().print(table)
    listed = "" if part is not None else f"; {out}/fleet.json names them all"
    terminal.line(f"prompts: {out}/NAME, each with prompt/, run.json and predictions.jsonl{listed}")
    if part is not None:
        terminal.line(f"part {part}; after all parts, the same command with --resume instead of --part collects them")
    for name in itertools.islice(fleet_result.results, 1):
        terminal.line(f"next:    {terminal.program()} eval {shlex.quote(str(out / name))} --data FILE")


def _scored(result: TrainResult) -> tuple[str, str, str]:
    """Return a prompt's development score, its number of records, and the epoch that was chosen."""
    score = next(value for name, value in result.prompt.scores.items() if name != "loss")
    rows = cast("Mapping[str, Mapping[str, Json]]", result.record["data"])["dev"]["rows"]
    chosen = cast("int", result.record["chosen_epoch"])
    return f"{score:.3f}", str(rows), f"epoch {chosen}" if chosen else "the start"
