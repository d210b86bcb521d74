"""The command line: the table of all commands, and how it ends on an error or a signal."""

import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console
from typer.core import TyperGroup

from ptuning.cli import terminal
from ptuning.cli.commands import compare, data, demo, doctor, exchange, fleet, predict, prompts, serve, tasks, train
from ptuning.cli.signals import SIGNAL_EXIT
from ptuning.errors import ConfigError, PTuningError
from ptuning.provenance import VERSION, versions
from ptuning.records import check_text

# The number of the signal that ends a program whose output nobody reads on, as in "| head"; Windows has no name for it.
SIGPIPE = 13
# What transformers imports if it is installed, and logs about kernels that the machine does not have.
NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes")
EXIT_CODES = (
    "Exit codes: 0 success; 1 some cells of a comparison, prompts of a fleet or checks of doctor failed; 2 error; "
    "130 stopped by Ctrl-C, 143 by SIGTERM (the same command continues)."
)
LEARN, COMPARE, LOOK = "Learn a prompt and use it", "Compare methods", "Look first"
# Section of --help -> its commands, in order. Two words are a command of a group.
COMMANDS: Mapping[str, Mapping[str, Callable[..., None]]] = {
    LEARN: {
        "train": train.train,
        "eval": prompts.evaluate,
        "predict": predict.predict,
        "serve": serve.serve,
        "inspect": prompts.inspect,
        "export": exchange.export,
        "import": exchange.import_prompt,
        "fleet": fleet.fleet,
        "demo": demo.demo,
    },
    COMPARE: {"compare": compare.compare, "report": compare.report},
    LOOK: {
        "data": data.data,
        "backbones": data.backbones,
        "doctor": doctor.doctor,
        "template show": data.show_template,
        "task list": tasks.list_tasks,
        "task show": tasks.show_task,
        "task check": tasks.check_task,
    },
}
GROUPS: Mapping[str, str] = {
    "template": "Look at how a template is filled.",
    "task": "Look at the shipped tasks, and check a task file.",
}


def main() -> None:
    """Run the command line. An error of the user prints one message and exits with code 2."""
    _prepare_streams()
    try:
        _run()
    except BrokenPipeError:  # of the error stream, too
        _drop(sys.stdout, sys.stderr)
        sys.exit(SIGNAL_EXIT + SIGPIPE)


def _run() -> None:
    try:
        for number, argument in enumerate(sys.argv[1:], start=1):
            check_text(argument, where="the command line", what=f"argument {number}", error=ConfigError)
        try:
            program()(prog_name="ptuning")
        finally:
            sys.stdout.flush()
    except PTuningError as error:
        _fail(str(error), error)
    except KeyboardInterrupt:
        terminal.say("stopped; nothing was written")
        sys.exit(SIGNAL_EXIT + signal.SIGINT)
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop(sys.stdout)
        _fail(f"{error}; check the path, permissions and free disk space", error)


class _Program(TyperGroup):
    """Ends at Ctrl-C with a message and no traceback, and without one where nobody reads on. Training stops in
    :func:`ptuning.cli.signals.stoppable`.
    """

    def make_context(self, *args: Any, **more: Any) -> Any:
        """Read the options; ``--help`` and completion print here."""
        with _ended():
            return super().make_context(*args, **more)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with _ended():
            return super().invoke(ctx)


@contextlib.contextmanager
def _ended() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        terminal.say("stopped; nothing was written")
        raise typer.Exit(SIGNAL_EXIT + signal.SIGINT) from None
    except BrokenPipeError:
        _drop(sys.stdout, sys.stderr)
        raise typer.Exit(SIGNAL_EXIT + SIGPIPE) from None


def _prepare_streams() -> None:
    """Let the outputs escape what their encoding cannot show, and take what is written to a closed one."""
    Console.on_broken_pipe = _raise_broken_pipe  # type: ignore[method-assign,assignment]  # of --help, which typer prints
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # until the end of the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if _rank():  # the first of several processes prints for all
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _raise_broken_pipe(_: Console) -> NoReturn:
    """Leave the exit code to :func:`main` when nobody reads on; rich would end with code 1."""
    raise BrokenPipeError


def _rank() -> int:
    """Return the number of this process among those that a launcher started for one command."""
    several, rank = os.environ.get("WORLD_SIZE", "1") != "1", os.environ.get("RANK", "0")
    return int(rank) if several and rank.isdecimal() else 0


def _drop(*streams: TextIO) -> None:
    """Drop what outputs still hold: Python would write it once more at its end, and end with another exit code."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(text: str, error: Exception) -> None:
    terminal.complain(text)
    if _rank():
        print(f"process {_rank()}: error: {text}", file=sys.__stderr__)
    logging.getLogger(__name__).debug("the error in full", exc_info=error)
    sys.exit(2)


def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave; with -v also those of torch and others.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show notices, and errors in full.")] = False,
) -> None:
    """Options of every command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[terminal.LogHandler()])
    logging.getLogger("ptuning").setLevel(logging.DEBUG if verbose else logging.WARNING)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if version:
        listed = versions() if verbose else {"ptuning": VERSION}
        typer.echo("\n".join(f"{name} {number}" for name, number in listed.items()))
        raise typer.Exit


@cache
def program() -> Any:
    """Return the command of all commands; made once in a process, since that takes longer than many a command."""
    app = typer.Typer(
        cls=_Program,
        help="Learn a prompt for a frozen language model, see that it beats the sentence it started from, use it.",
        epilog=EXIT_CODES,
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(common)
    groups = {"": app}
    for name, about in GROUPS.items():
        groups[name] = typer.Typer(help=about, no_args_is_help=True)
        app.add_typer(groups[name], name=name, rich_help_panel=LOOK)
    for title, commands in COMMANDS.items():
        for words, command in commands.items():
            group, _, name = words.rpartition(" ")
            groups[group].command(name=name, rich_help_panel=None if group else title)(command)
    return typer.main.get_command(app)
