"""`ptuning train`: learn one prompt."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich import box
from rich.table import Table

from ptuning.cli import terminal
from ptuning.cli.chat import completed
from ptuning.cli.inputs import load, training_spec
from ptuning.cli.options import (
    AskedBackbone,
    JsonOption,
    LogOption,
    TrainInputs,
    backbone_options,
    command_line,
    takes,
    training,
)
from ptuning.cli.signals import stoppable
from ptuning.cli.templates import placed
from ptuning.names import LOG_FOLDER, PROMPT_FOLDER
from ptuning.progress import each

if TYPE_CHECKING:
    from ptuning.files import Json
    from ptuning.training.run import TrainResult


@takes(asked=training, backbone=backbone_options)
def train(
    asked: TrainInputs,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the prompt and the record of the run.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stopped run was.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in DIR.")] = False,
    measure_ceiling: Annotated[bool, typer.Option("--measure-ceiling", help="Time the bare backbone too.")] = False,
    log_to: LogOption = None,
    as_json: JsonOption = False,
    *,
    backbone: AskedBackbone,
) -> None:
    """Learn a prompt; DIR gets prompt/, run.json and predictions.jsonl.

    The backbone stays frozen; with --tune head a classification head is trained along, with lora adapters on a copy of
    it, with tuned all of the copy.

    Example: ptuning train --data capitals:train --dev capitals:dev --manual "The capital of [X] is [Y]" --out capitals
    """
    from ptuning.names import RUN, check_writable
    from ptuning.training.tracking import TrainingLog

    check_writable(out, RUN, overwrite=overwrite, resume=resume)
    asked = completed(asked)
    spec = training_spec(asked)
    log = TrainingLog(log_to or (), out / LOG_FOLDER, settings=spec.settings.to_json())
    loaded = load(backbone, spread=True)
    spec = placed(spec, asked.inputs, loaded)
    log.settings["template"] = str(spec.template)
    if asked.inputs["template"] is None:
        terminal.say(f"learned template: {spec.template}")
    with stoppable(out, again="--resume") as (report, should_stop), log:
        from ptuning.training.prepare import prepare
        from ptuning.training.run import TrainingRun

        prepared = prepare(spec, loaded)
        run = TrainingRun(
            prepared, out=out, resume=resume, overwrite=overwrite, ceiling=measure_ceiling, command=command_line()
        )
        result = run.train(report=each(report, log), should_stop=should_stop)
    if as_json:
        terminal.print_json({"prompt": str(out / PROMPT_FOLDER), **result.record})
    else:
        show(result)


def show(result: TrainResult) -> None:
    """Print what a training run left."""
    record, console = result.record, terminal.results()
    history = cast("Sequence[Mapping[str, float]]", record["history"])
    start = cast("Mapping[str, float]", record["start"])
    dev = cast("Mapping[str, Mapping[str, Json]]", record["data"])["dev"]
    chosen = cast("int", record["chosen_epoch"])
    terminal.heading(f"development part: {dev['rows']} records of {dev['name']}")
    table = Table(box=box.SIMPLE_HEAD)
    # A metric of written texts that chooses the epoch stands beside the score.
    scores = dict.fromkeys(("dev_loss", "dev_score", *(name for name in start if name.startswith("dev_"))))
    for name in ("epoch", "train loss", *(one.replace("_", " ") for one in scores)):
        table.add_column(name, justify="right")
    for row in (start, *history):
        epoch = int(row.get("epoch", 0))
        table.add_row(
            str(epoch) if epoch else "start",
            f"{row['train_loss']:.3f}" if epoch else "",
            *(f"{row[name]:.3f}" for name in scores),
            style=terminal.mark(epoch == chosen),
        )
    console.print(table)
    console.print(f"chosen:  {'the start' if chosen == 0 else f'epoch {chosen}'} ({record['choice_rule']})")
    if isinstance(best := record.get("dev_score"), Mapping):  # a run that was finished by an older version has none
        value, low, high = (cast("float", best[name]) for name in ("value", "low", "high"))
        terminal.line(f"dev score {value:.3f} [{low:.3f}, {high:.3f}], n = {best['n']}")
    terminal.parameters(record)
    if record.get("ceiling_tokens_per_second"):
        speed, ceiling = cast("float", record["tokens_per_second"]), cast("float", record["ceiling_tokens_per_second"])
        console.print(f"speed:   {speed:.0f} tokens/s, {speed / ceiling:.0%} of the bare backbone's {ceiling:.0f}")
    terminal.line(f"prompt:  {result.folder}/prompt")
    terminal.line(f"record:  {result.folder}/run.json, and predictions.jsonl on the development part")
    terminal.line(f"next:    {terminal.program()} eval {shlex.quote(str(result.folder))} --data FILE")
