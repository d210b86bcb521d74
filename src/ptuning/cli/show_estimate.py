"""What `ptuning estimate` prints. Computes nothing, and loads nothing heavy."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer
from rich import box
from rich.table import Table

from ptuning.cli.terminal import duration, heading, line, results

if TYPE_CHECKING:
    from ptuning.training.estimate import Forecast


def forecast(found: Forecast, *, as_json: bool) -> None:
    """Print what a training run will take."""
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    memory, seconds = found.memory, found.seconds
    rows, tokens = found.longest_pass
    heading(
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
    results().print(table)
    if memory.on_disk:
        line(f"{_megabytes(memory.on_disk)} MB of the kept text do not fit and go to the disk, which takes longer")
    times = Table(box=box.SIMPLE_HEAD)
    times.add_column("time")
    times.add_column("", justify="right")
    times.add_row("preparing", duration(seconds.preparing + seconds.constant_part))
    times.add_row("training, per epoch", duration(seconds.epoch))
    scored = found.starts * (found.epochs + 1)
    times.add_row(f"scoring the development part, each of {scored} times", duration(seconds.dev))
    times.add_row("checkpoints", duration(seconds.saving))
    times.add_row("answers in the end", duration(seconds.answers))
    starts = f", {found.starts} starts" if found.starts > 1 else ""
    times.add_row(f"all of it: {found.epochs} epochs{starts}", duration(seconds.total), style="bold")
    results().print(times)
    line("at most: training stops early if nothing gets better. Nothing was trained or written")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f}"
