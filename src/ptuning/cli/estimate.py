"""`ptuning estimate`: what a training run will take, and how that is printed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer
from rich import box
from rich.table import Table

from ptuning.cli import terminal
from ptuning.cli.inputs import load, training_spec
from ptuning.cli.options import Asked, BackboneOption, DeviceOption, DtypeOption, JsonOption, takes, training

if TYPE_CHECKING:
    from ptuning.training.estimate import Forecast


@takes(training)
def estimate(
    asked: Asked,
    as_json: JsonOption = False,
    backbone: BackboneOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Say what "ptuning train" with the same options will take: memory and time, from a few of its steps.

    Example: ptuning estimate --data capitals:train --dev capitals:dev --manual "The capital of [X] is [Y]"
    """
    spec = training_spec(asked)
    loaded = load(backbone, dtype=dtype, device=device)
    with terminal.bar() as report:
        from ptuning.training.estimate import estimate_spec

        found = estimate_spec(spec, loaded, report=report)
    show(found, as_json=as_json)


def show(found: Forecast, *, as_json: bool) -> None:
    """Print what a training run will take."""
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    memory, seconds = found.memory, found.seconds
    rows, tokens = found.longest_pass
    terminal.heading(
        f"{found.train_records} records, {found.steps} steps an epoch, the longest pass {rows} x {tokens} tokens; "
        f"{found.dev_records} records to choose by; {found.tune} on {found.device} in {found.dtype}"
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("memory")
    table.add_column("MB", justify="right")
    parts = {
        "backbone": memory.weights,
        "what is trained": memory.trained,
        "its gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations of the largest pass": memory.activations,
        "kept text in front of the slots": memory.constant_part,
        "the best of earlier starts": memory.other_starts,
        "process and allocator": memory.rest,
    }
    for name, size in parts.items():
        if size:
            table.add_row(name, _megabytes(size))
    table.add_row("training", _megabytes(memory.training), style="bold")
    table.add_row("peak, loading included", _megabytes(memory.peak), style="bold")
    terminal.results().print(table)
    if memory.on_disk:
        terminal.line(
            f"{_megabytes(memory.on_disk)} MB of the kept text do not fit and go to the disk, which takes longer"
        )
    times = Table(box=box.SIMPLE_HEAD)
    times.add_column("time")
    times.add_column("", justify="right")
    times.add_row("preparing", terminal.duration(seconds.preparing + seconds.constant_part))
    times.add_row("training, per epoch", terminal.duration(seconds.epoch))
    scored = found.starts * (found.epochs + 1)
    times.add_row(f"scoring the development part, each of {scored} times", terminal.duration(seconds.dev))
    times.add_row("checkpoints", terminal.duration(seconds.saving))
    times.add_row("answers in the end", terminal.duration(seconds.answers))
    starts = f", {found.starts} starts" if found.starts > 1 else ""
    times.add_row(f"all of it: {found.epochs} epochs{starts}", terminal.duration(seconds.total), style="bold")
    terminal.results().print(times)
    terminal.line("at most: training stops early if nothing gets better. Nothing was trained or written")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f}"
