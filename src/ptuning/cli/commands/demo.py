"""`ptuning demo`: learn country -> capital and compare with the manual prompt."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ptuning.cli import terminal
from ptuning.cli.inputs import load
from ptuning.cli.options import AskedBackbone, SetOption, backbone_options, command_line, config_of, takes
from ptuning.cli.signals import stoppable

if TYPE_CHECKING:
    from ptuning.experiment.demo import DemoResult


@takes(backbone=backbone_options)
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the run is left.")] = Path("runs/demo"),
    set_: SetOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in DIR.")] = False,
    *,
    backbone: AskedBackbone,
) -> None:
    """Learn country -> capital and compare with the manual prompt: the main job, in about a minute.

    Example: ptuning demo
    """
    config = config_of(set_)
    loaded = load(backbone)
    with stoppable(out) as (report, should_stop):
        from ptuning.experiment.demo import run_demo

        result = run_demo(
            out,
            backbone=loaded,
            config=config,
            overwrite=overwrite,
            report=report,
            should_stop=should_stop,
            command=command_line(),
        )
    show(result)


def show(result: DemoResult) -> None:
    """Print what the demo found."""
    terminal.heading(f"country -> capital: exact match on {result.scores['manual'].n} test countries")
    table = terminal.table("method", "prompt", "exact match  [95 % interval]")
    for name, score in result.scores.items():
        style = terminal.mark(name == "p-tuning")
        table.add_row(name, escape(result.described[name]), escape(terminal.interval(score)), style=style)
    terminal.results().print(table)
    terminal.heading("five of them")
    shown = terminal.table("country", "capital", "manual prompt says", "learned prompt says")
    for answer in result.answers:
        texts = (answer.subject, answer.target, answer.before, answer.after)
        shown.add_row(*(escape(terminal.visible(text)) for text in texts))
    terminal.results().print(shown)
    terminal.line(f"prompt:  {result.prompt.slots} vectors, {result.size_bytes / 1000:.1f} KB")
    terminal.parameters(result.record)
    terminal.line(f"files:   {result.folder}  (prompt/, run.json, predictions.jsonl)")
    folder, subject = shlex.quote(str(result.folder)), shlex.quote(result.answers[0].subject)
    terminal.line(f"next:    {terminal.program()} predict {folder} {subject}")
