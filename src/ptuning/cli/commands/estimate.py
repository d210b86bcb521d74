"""`ptuning estimate`: what a training run will take, and how that is printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from ptuning.cli import terminal
from ptuning.cli.chat import completed
from ptuning.cli.inputs import load, training_spec
from ptuning.cli.options import AskedBackbone, JsonOption, TrainInputs, backbone_options, takes, training
from ptuning.cli.templates import placed

if TYPE_CHECKING:
    from ptuning.training.estimate import Forecast


@takes(asked=training, backbone=backbone_options)
def estimate(
    asked: TrainInputs,
    as_json: JsonOption = False,
    *,
    backbone: AskedBackbone,
) -> None:
    """Say what "ptuning train" with the same options will take: memory and time, from a few of its steps.

    Example: ptuning estimate --data capitals:train --dev capitals:dev --manual "The capital of [X] is [Y]"
    """
    asked = completed(asked)
    spec = training_spec(asked)
    loaded = load(backbone)
    spec = placed(spec, asked.inputs, loaded)
    with terminal.bar() as report:
        from ptuning.training.estimate import estimate_spec

        found = estimate_spec(spec, loaded, report=report)
    show(found, as_json=as_json)


def show(found: Forecast, *, as_json: bool) -> None:
    """Print what a training run will take."""
    if as_json:
        terminal.print_json(found.to_json())
        return
    memory, seconds = found.memory, found.seconds
    rows, tokens = found.longest_pass
    terminal.heading(
        f"{found.train_records} records, {found.steps} steps an epoch, the longest pass {rows} x {tokens} tokens; "
        f"{found.dev_records} records to choose by; {found.tune} on {found.device} in {found.dtype}"
    )
    if found.deep_in_front:
        terminal.line(
            f"{found.deep_in_front} deep slots in front are keys and values: they cost no token of a pass, and as they "
            "change, no text behind them is kept"
        )
    sizes = {
        "backbone": memory.weights,
        "what is trained": memory.trained,
        "its gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations of the largest pass": memory.activations,
        "kept text in front of the slots": memory.constant_part,
        "the best of earlier starts": memory.other_starts,
        "process and allocator": memory.rest,
    }
    sums = {"training": _megabytes(memory.training), "peak, loading included": _megabytes(memory.peak)}
    _table(("memory", "MB"), {name: _megabytes(size) for name, size in sizes.items() if size}, sums)
    if memory.on_disk:
        spilled = _megabytes(memory.on_disk)
        terminal.line(f"{spilled} MB of the kept text do not fit and go to the disk, which takes longer")
    scored, starts = found.starts * (found.epochs + 1), f", {found.starts} starts" if found.starts > 1 else ""
    times = {
        "preparing": seconds.preparing + seconds.constant_part,
        "training, per epoch": seconds.epoch,
        f"scoring the development part, each of {scored} times": seconds.dev,
        "checkpoints": seconds.saving,
        "answers in the end": seconds.answers,
    }
    total = {f"all of it: {found.epochs} epochs{starts}": terminal.duration(seconds.total)}
    _table(("time", ""), {name: terminal.duration(value) for name, value in times.items()}, total)
    terminal.line("at most: training stops early if nothing gets better. Nothing was trained or written")


def _table(columns: tuple[str, str], rows: Mapping[str, str], sums: Mapping[str, str]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(columns[0])
    table.add_column(columns[1], justify="right")
    for name, text in {**rows, **sums}.items():
        table.add_row(name, text, style="bold" if name in sums else "")
    terminal.results().print(table)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f}"
