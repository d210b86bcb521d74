"""The command line: the table of all commands, and how it ends on an error or a signal."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ptuning.cli import data, demo, estimate, experiments, fleet, prompts, tasks, terminal, train
from ptuning.cli.options import Command
from ptuning.cli.signals import SIGNAL_EXIT
from ptuning.errors import ConfigError, PTuningError
from ptuning.provenance import VERSION
from ptuning.records import check_text


class _Group(TyperGroup):
    """Ends at Ctrl-C with a message and no traceback. Training stops in :func:`ptuning.cli.signals.stoppable`."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            terminal.stopped("stopped", None, "")
            raise typer.Exit(SIGNAL_EXIT + signal.SIGINT) from None


def main() -> None:
    """Run the command line. An error of the user prints one message and exits with code 2."""
    try:
        for number, argument in enumerate(sys.argv[1:], start=1):
            check_text(argument, where="the command line", what=f"argument {number}", error=ConfigError)
        _app()(prog_name="ptuning")
    except PTuningError as error:
        _fail(str(error), error)
    except KeyboardInterrupt:
        terminal.stopped("stopped", None, "")
        sys.exit(SIGNAL_EXIT + signal.SIGINT)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone, as in "| head"
        sys.exit(1)
    except OSError as error:
        # Python would try to write the rest of the output once more at its end, and fail with another exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(f"{error}; check the path, its rights and the room on the disk", error)


def _fail(text: str, error: Exception) -> None:
    terminal.complain(text)
    logging.getLogger(__name__).debug("the error in full", exc_info=error)
    sys.exit(2)


def common(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show notices, and errors in full.")] = False,
) -> None:
    """Options of every command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[terminal.LogHandler()])
    logging.getLogger("ptuning").setLevel(logging.DEBUG if verbose else logging.WARNING)
    if version:
        typer.echo(f"ptuning {VERSION}")
        raise typer.Exit


# Every command, in the order of --help. Two words are a command of a group.
COMMANDS: Mapping[str, Callable[..., None]] = {
    "train": train.train,
    "eval": prompts.evaluate,
    "predict": prompts.predict,
    "inspect": prompts.inspect,
    "data": data.data,
    "backbones": data.backbones,
    "demo": demo.demo,
    "estimate": estimate.estimate,
    "fleet": fleet.fleet,
    "compare": experiments.compare,
    "lama": experiments.lama,
    "paraphrases": experiments.paraphrases,
    "superglue": experiments.superglue,
    "report": experiments.report,
    "template show": data.show_template,
    "task list": tasks.list_tasks,
    "task show": tasks.show_task,
    "task check": tasks.check_task,
}
GROUPS: Mapping[str, str] = {
    "template": "Look at how a template is filled.",
    "task": "Look at the shipped tasks, and check a task file.",
}


def _app() -> typer.Typer:
    app = typer.Typer(
        cls=_Group,
        help="Learn a prompt for a frozen language model, see that it beats the sentence it started from, use it.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(common)
    groups = {"": app}
    for name, about in GROUPS.items():
        groups[name] = typer.Typer(help=about, no_args_is_help=True)
        app.add_typer(groups[name], name=name)
    for words, command in COMMANDS.items():
        group, _, name = words.rpartition(" ")
        groups[group].command(name=name, cls=Command)(command)
    return app
