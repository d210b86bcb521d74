"""The command that trains many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ptuning.cli import options, terminal
from ptuning.cli.options import BackboneOption, DeviceOption, DtypeOption
from ptuning.config import TrainConfig
from ptuning.errors import ConfigError, PTuningError

if TYPE_CHECKING:
    from ptuning.template.labels import LabelWords
    from ptuning.training.fleet_file import Entry, FleetFile
    from ptuning.training.train_fleet import FleetPrompt


def fleet(
    config: Annotated[Path, typer.Option(metavar="FILE", help="TOML that names the prompts: docs/fleets.md.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder with a folder for each prompt.")],
    at_once: Annotated[
        int | None, typer.Option(metavar="N", help="Prompts in training at the same time.", min=1)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stopped fleet was.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier fleet in DIR.")] = False,
    backbone: BackboneOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Learn many prompts at once on one frozen backbone: other data, templates, seeds or settings. Each is left as
    train would leave it, in a folder of its own.

    Example: ptuning fleet --config fleet.toml --out runs/fleet
    """
    from ptuning.files import check_free
    from ptuning.training.fleet_file import read_fleet

    asked = read_fleet(config)
    check_free(out, overwrite=overwrite or resume)
    prompts = read_prompts(asked)
    loaded = options.load(backbone or asked.backbone, dtype=dtype, device=device)
    with options.stoppable(out, again="--resume") as (report, should_stop):
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
            report=lambda now: report(now) if now.stage != "epoch" else None,
            should_stop=should_stop,
            on_prompt=terminal.fleet_prompt,
            command=options.command_line(),
        )
    terminal.fleet(found, out)
    if found.failed:
        raise typer.Exit(1)


def read_prompts(asked: FleetFile) -> list[FleetPrompt]:
    """Read the templates, settings and data that the prompts of a fleet name; a file that several name is read once.

    Raises:
        PTuningError: If one cannot be used; names the prompt.
    """
    read: dict[tuple[object, ...], Any] = {}
    found = []
    for entry in asked.entries:
        try:
            found.append(_prompt(entry, read))
        except PTuningError as error:
            raise type(error)(f"prompt '{entry.name}': {error}") from error
    return found


def _prompt(entry: Entry, read: dict[tuple[object, ...], Any]) -> FleetPrompt:
    from ptuning.training.train_fleet import FleetPrompt

    given = cast("dict[str, Any]", entry.inputs)
    config = TrainConfig.from_json(entry.settings)
    task = options.task_of(given.get("task"))
    template = options.template_of(
        task, *(given.get(name) for name in ("template", "manual", "about", "pattern")), option=""
    )
    renamed = [f"{new}={old}" for new, old in given.get("fields", {}).items()]

    def once(source: str, name: str, reader: Callable[[], Any]) -> Any:
        key = (source, tuple(renamed), given.get("task"), name)
        if key not in read:
            read[key] = reader()
        return read[key]

    def part(source: str, name: str) -> Any:
        return once(source, name, lambda: options.data_of(source, renamed, task, part=name))

    data = given["data"]
    dev = part(given["dev"], "dev") if "dev" in given else once(data, "beside", lambda: options.dev_part(data, task))
    return FleetPrompt(
        entry.name,
        template,
        part(data, "train"),
        dev=dev,
        config=config,
        labels=_labels(given.get("labels")),
        task=task,
        calibrate=given.get("calibrate"),
    )


def _labels(given: object) -> LabelWords | str | None:
    """Return label words from a text, or from a table of label -> word or words."""
    from ptuning.template.labels import LabelWords

    if not isinstance(given, dict):
        return cast("str | None", given)
    words: dict[str, tuple[str, ...]] = {}
    for label, listed in given.items():
        several = [listed] if isinstance(listed, str) else listed
        if not isinstance(several, list) or not all(isinstance(word, str) for word in several):
            raise ConfigError(f"labels.{label} is {listed!r}; it must be a word or a list of words")
        words[label] = tuple(several)
    return LabelWords(words)


COMMANDS: Sequence[Any] = (fleet,)
