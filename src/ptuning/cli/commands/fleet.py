"""`ptuning fleet`: learn many prompts at once."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from ptuning.cli import inputs, options, signals, terminal
from ptuning.cli.chat import check_chat
from ptuning.cli.options import AskedBackbone
from ptuning.cli.shares import Shares, shares_of
from ptuning.cli.templates import placed
from ptuning.config import TrainConfig
from ptuning.errors import PTuningError
from ptuning.progress import each

if TYPE_CHECKING:
    from ptuning.backbone.backbone import Backbone
    from ptuning.files import Json
    from ptuning.training.fleet_file import FleetEntry, FleetFile
    from ptuning.training.run import TrainResult
    from ptuning.training.spec import FleetPrompt
    from ptuning.training.train_fleet import FleetResult
    from ptuning.workers.units import WorkPart

# A line about the slots of each of dozens of templates would bury all others.
SHOWN_PLACES = 3


@options.takes(shares=shares_of, backbone=options.backbone_options)
def fleet(
    config: Annotated[Path, typer.Option(metavar="FILE", help="TOML that names the prompts: docs/fleets.md.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder with a folder for each prompt.")],
    at_once: Annotated[
        int | None, typer.Option(metavar="N", help="Prompts in training at the same time.", min=1)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stopped fleet was.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier fleet in DIR.")] = False,
    log_to: options.LogOption = None,
    *,
    shares: Shares,
    backbone: AskedBackbone,
) -> None:
    """Learn many prompts at once on one frozen backbone: other data, templates, seeds or settings. Each is left as
    train would leave it, in a folder of its own.

    Example: ptuning fleet --config fleet.toml --out runs/fleet
    """
    from ptuning.names import check_writable, fleet_layout
    from ptuning.training.fleet_file import read_fleet
    from ptuning.training.tracking import TrainingLog

    asked = read_fleet(config)
    part, crew = shares.own, shares.crew(backbone)
    layout = fleet_layout(one.name for one in asked.entries)
    check_writable(out, layout, overwrite=overwrite or part is not None, resume=resume)
    prompts = read_prompts(asked)
    log = TrainingLog(log_to or (), shares.log_folder(out), together=True)
    loaded = inputs.load(replace(backbone, name=backbone.name or asked.backbone), spread=True)
    prompts = place_all(prompts, asked.entries, loaded)
    with signals.stoppable(out, again="--resume") as (report, should_stop), log:
        from ptuning.training.fleet import AT_ONCE
        from ptuning.training.train_fleet import train_fleet

        found = train_fleet(
            prompts,
            backbone=loaded,
            out=out,
            at_once=at_once or asked.at_once or AT_ONCE,
            resume=resume,
            overwrite=overwrite,
            # A line per epoch of dozens of trainings would bury the line per prompt.
            report=each(lambda now: report(now) if now.stage != "epoch" else None, log),
            should_stop=should_stop,
            on_prompt=show_prompt,
            part=part,
            workers=crew,
            command=options.command_line(),
        )
    show(found, out, part)
    if found.failed:
        raise typer.Exit(1)


def read_prompts(asked: FleetFile) -> list[FleetPrompt]:
    """Read what the prompts of a fleet name, each file once; an error names the prompt."""
    read: dict[tuple[object, ...], Any] = {}
    found = []
    for entry in asked.entries:
        try:
            found.append(_prompt(entry, read))
        except PTuningError as error:
            raise type(error)(f"prompt '{entry.name}': {error}") from error
    return found


def _prompt(entry: FleetEntry, read: dict[tuple[object, ...], Any]) -> FleetPrompt:
    from ptuning.training.spec import FleetPrompt

    given = cast("dict[str, Any]", entry.inputs)
    renamed = [f"{new}={old}" for new, old in given.get("fields", {}).items()]
    asked = options.TrainInputs({**given, "field": renamed}, TrainConfig.from_json(entry.settings))
    check_chat(given, option="")

    def once(part: tuple[str, str], reader: Callable[[], Any]) -> Any:
        key = (*part, tuple(renamed), given.get("task"))
        if key not in read:
            read[key] = reader()
        return read[key]

    return FleetPrompt(entry.name, **vars(inputs.training_spec(asked, option="", once=once)))


def place_all(prompts: Sequence[FleetPrompt], entries: Sequence[FleetEntry], backbone: Backbone) -> list[FleetPrompt]:
    """Return the prompts with their slots where they pay, and say where that is: once for each template and its data,
    and for the first few of these.
    """
    told: dict[str, list[str]] = {}
    found = []
    for prompt, entry in zip(prompts, entries, strict=True):
        texts: list[str] = []
        found.append(placed(prompt, entry.inputs, backbone, say=texts.append))
        for text in texts:
            told.setdefault(text, []).append(prompt.name)
    for text, (first, *others) in itertools.islice(told.items(), SHOWN_PLACES):
        terminal.say(f"{first}{f' and {len(others)} more' * bool(others)}: {text}")
    return found


def show_prompt(name: str, outcome: TrainResult | Exception) -> None:
    """Print a prompt of a fleet that has ended."""
    if isinstance(outcome, Exception):
        terminal.say(f"{name}: failed: {outcome}")
        return
    score, rows, chosen = _line(outcome)
    terminal.say(f"{name}: dev score {score}, n = {rows}, {chosen}")


def show(found: FleetResult, out: Path, part: WorkPart | None = None) -> None:
    """Print what a fleet left, or a part of it."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("prompt", "start", "dev score", "n", "chosen"):
        table.add_column(name, justify="left" if name in ("prompt", "chosen") else "right")
    for name, result in found.results.items():
        start = cast("Mapping[str, float]", result.record["start"])
        table.add_row(escape(name), f"{start['dev_score']:.3f}", *_line(result))
    for name, error in found.failed.items():
        table.add_row(escape(name), "", "", "", escape(f"failed: {error}"))
    terminal.results().print(table)
    listed = "" if part is not None else f"; {out}/fleet.json names them all"
    terminal.line(f"prompts: {out}/NAME, each with prompt/, run.json and predictions.jsonl{listed}")
    if part is not None:
        terminal.line(f"part {part}; after all parts, the same command with --resume instead of --part collects them")
    if found.results:
        terminal.line(
            f"next:    {terminal.program()} eval {shlex.quote(str(out / next(iter(found.results))))} --data FILE"
        )


def _line(result: TrainResult) -> tuple[str, str, str]:
    """Return a prompt's development score, the number of records behind it, and what was chosen."""
    score = next(value for name, value in result.prompt.scores.items() if name != "loss")
    rows = cast("Mapping[str, Mapping[str, Json]]", result.record["data"])["dev"]["rows"]
    chosen = cast("int", result.record["chosen_epoch"])
    return f"{score:.3f}", str(rows), f"epoch {chosen}" if chosen else "the start"
