"""`ptuning demo`: learn country -> capital and compare with the manual prompt."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape

from ptuning.cli import options, terminal
from ptuning.cli.inputs import load
from ptuning.cli.options import OUTPUT, option
from ptuning.cli.signals import stoppable

if TYPE_CHECKING:
    from ptuning.experiment.demo import DemoResult


def demo(
    out: Annotated[Path, option("Folder of the run.", OUTPUT, metavar="DIR")] = Path("runs/demo"),
    overwrite: options.ReplaceOption = False,
    set_: options.SetOption = None,
    backbone: options.BackboneOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    model_arg: options.ModelArgOption = None,
) -> None:
    """Learn country -> capital and compare with the manual prompt: the main job, in about a minute.

    Example: ptuning demo
    """
    config = options.config_of(set_)
    loaded = load(options.backbone_of(backbone, dtype, device, model_arg))
    with stoppable(out) as (report, should_stop):
        from ptuning.experiment.demo import run_demo

        result = run_demo(
            out,
            backbone=loaded,
            config=config,
            overwrite=overwrite,
            report=report,
            should_stop=should_stop,
            command=options.command_line(),
        )
    show(result)


def show(result: DemoResult) -> None:
    """Print the scores and some answers of the demo."""
    terminal.heading(f"country -> capital: exact match on {result.scores['manual'].n} test countries")
    table = terminal.table("method", "prompt", "exact match  [95 % interval]")
    for name, score in result.scores.items():
        style = terminal.mark(name == "p-tuning")
        table.add_row(name, escape(result.described[name]), escape(terminal.interval(score)), style=style)
    terminal.results().print(table)
    terminal.heading("five of them")
    table = terminal.table("country", "capital", "manual prompt says", "learned prompt says")
    for answer in result.answers:
        table.add_row(*map(escape, (answer.subject, answer.target, answer.before, answer.after)))
    terminal.results().print(table)
    terminal.line(f"prompt:  {result.prompt.slots} vectors, {result.size_bytes / 1000:.1f} KB")
    terminal.parameters(result.record)
    terminal.line(f"files:   {result.folder}  (prompt/, run.json, predictions.jsonl)")
    folder, subject = shlex.quote(str(result.folder)), shlex.quote(result.answers[0].subject)
    terminal.line(f"next:    {terminal.program()} predict {folder} {subject}")
