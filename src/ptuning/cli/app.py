"""The command line: the table of all commands, and how it ends on an error or a signal."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ptuning.backbone import sources
from ptuning.cli import demo, estimate, experiments, fleet, tasks, terminal, train
from ptuning.cli.inputs import data_of, data_to_answer, load, prompt_of, read_candidates, task_of
from ptuning.cli.options import (
    BackboneOption,
    CalibrateOption,
    CandidatesOption,
    Command,
    DeviceOption,
    DtypeOption,
    FieldOption,
    ForceOption,
    JsonOption,
    NormaliseOption,
    PromptArgument,
    TaskOption,
    WithoutOption,
    check_calibrate,
    normalise_of,
)
from ptuning.cli.signals import SIGNAL_EXIT
from ptuning.errors import ConfigError, PTuningError, RecordError
from ptuning.provenance import VERSION
from ptuning.template.segments import FILLS_MASKS

# Records answered between two steps of the progress bar.
PREDICTED_ROWS = 64


class _Group(TyperGroup):
    """Ends Ctrl-C with a word and no traceback; what training does with it is in :func:`stoppable`."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            terminal.stopped("stopped", None, "")
            raise typer.Exit(SIGNAL_EXIT + signal.SIGINT) from None


def main() -> None:
    """Run the command line; errors of the user end with exit code 2 and one message."""
    try:
        _app()(prog_name="ptuning")
    except PTuningError as error:
        _fail(str(error), error)
    except KeyboardInterrupt:
        terminal.stopped("stopped", None, "")
        sys.exit(SIGNAL_EXIT + signal.SIGINT)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, as in "| head"
        sys.exit(1)
    except OSError as error:
        # A file or a disk behind the output, in a place where no module expects trouble. What is still to be written
        # goes nowhere: Python would try once more at its end, and fail with a code of its own.
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


def evaluate(
    prompt: PromptArgument,
    data: Annotated[str, typer.Option(metavar="FILE", help="Records with targets.")],
    candidates: CandidatesOption = None,
    task: TaskOption = None,
    calibrate: CalibrateOption = None,
    normalise: NormaliseOption = None,
    backbone: BackboneOption = None,
    field: FieldOption = None,
    without: WithoutOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Score a prompt on records, with 95 % intervals.

    Example: ptuning eval capitals --data capitals:test
    """
    from ptuning.data.questions import as_questions
    from ptuning.records import require_targets

    chosen = prompt_of(prompt, task_of(task), without=without)
    if candidates is not None:
        chosen.check_open()
    check_calibrate(calibrate, chosen, candidates=candidates is not None)
    how = normalise_of(normalise, closed=chosen.answer_space.is_closed or candidates is not None)
    rows = data_of(data, field, chosen.task, part="val")
    require_targets(as_questions(rows).records)
    listed = read_candidates(candidates, prompt, data, field) if candidates is not None else None
    loaded = load(backbone, dtype=dtype, device=device, prompt=chosen)
    from ptuning.prompt.predict import PromptModel
    from ptuning.prompt.score import score_prompt

    with terminal.bar() as report:
        model = PromptModel(loaded, force=force)
        found = score_prompt(model, rows, chosen, candidates=listed, normalise=how, calibrate=calibrate, report=report)
    terminal.evaluation(prompt, rows, found, as_json=as_json)


def predict(
    prompt: PromptArgument,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Value of the template's one field.")] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE|-", help="Records; - reads JSONL from the input.")] = None,
    candidates: CandidatesOption = None,
    top_k: Annotated[int, typer.Option(metavar="N", help="How many answers to show.", min=1)] = 1,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Longest written answer.", min=1)] = None,
    task: TaskOption = None,
    calibrate: CalibrateOption = None,
    normalise: NormaliseOption = None,
    backbone: BackboneOption = None,
    field: FieldOption = None,
    without: WithoutOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Answer a text or records; with --json one object per line.

    Example: ptuning predict capitals Kenya
    """
    from ptuning.data.questions import Questions, as_questions

    chosen = prompt_of(prompt, task_of(task), without=without)
    closed = candidates is not None or chosen.answer_space.is_closed
    check_calibrate(calibrate, chosen, candidates=candidates is not None)
    if max_tokens is not None and closed:
        raise ConfigError("--max-tokens is for answers that are written, not for candidates or label words")
    how = normalise_of(normalise, closed=closed)
    rows = as_questions(data_to_answer(chosen, text, data, field))
    listed = read_candidates(candidates, prompt, data, field) if candidates is not None else None
    loaded = load(backbone, dtype=dtype, device=device, prompt=chosen)
    from ptuning.progress import Progress
    from ptuning.prompt.predict import PromptModel

    model, found = PromptModel(loaded, force=force), []
    with terminal.bar() as report:
        for at in range(0, len(rows), PREDICTED_ROWS):
            part = Questions(rows[at : at + PREDICTED_ROWS])
            found += model.predict(
                part, chosen, listed, top_k=top_k, max_tokens=max_tokens, normalise=how, calibrate=calibrate
            )
            report(Progress("predict", len(found), len(rows), rows.name))
    terminal.predictions(rows.records, found, as_json=as_json, masked=loaded.kind in FILLS_MASKS)


def inspect(
    prompt: PromptArgument,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Score the nearest tokens as well.")] = None,
    backbone: BackboneOption = None,
    field: FieldOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Look inside a prompt: the tokens nearest to each slot, and (with --data) whether they mean anything.

    Example: ptuning inspect capitals --data capitals:dev
    """
    chosen = prompt_of(prompt)
    rows = data_of(data, field, chosen.task, part="val") if data is not None else None
    loaded = load(backbone, dtype=dtype, device=device, prompt=chosen)
    from ptuning.prompt.inspect import inspect_prompt

    with terminal.bar() as report:
        found = inspect_prompt(loaded, chosen, data=rows, force=force, report=report)
    terminal.inspection(chosen, found, as_json=as_json)


def show_template(
    template: Annotated[str, typer.Argument(metavar="TEMPLATE")],
    backbone: BackboneOption = None,
    record: Annotated[str | None, typer.Option(metavar="JSON", help='As {"x": "Kenya", "y": "Nairobi"}.')] = None,
    as_json: JsonOption = False,
) -> None:
    """Show each position of a filled template: slot, literal, field or target, with its token.

    Example: ptuning template show "[P:The capital of] [X] [P:is] [Y]" --record '{"x": "Kenya", "y": "Nairobi"}'
    """
    from ptuning.data.reading import read_rows
    from ptuning.template.language import Template

    parsed = Template.parse(template)
    row = {name: name for name in parsed.fields}
    if record is not None:
        rows = read_rows(record.replace("\n", " ").encode(), name="--record")
        if len(rows) != 1:
            raise RecordError('--record takes one JSON object, such as {"x": "Kenya", "y": "Nairobi"}')
        row = dict(rows[0])
    name = backbone if backbone is not None else sources.BACKBONE
    with terminal.loading(name):
        from ptuning.backbone.loading import load_tokenizer
        from ptuning.template.fill import BoundTemplate

        tokenizer, kind = load_tokenizer(name)
    terminal.template(BoundTemplate(parsed, tokenizer=tokenizer, kind=kind).describe(row), tokenizer, as_json=as_json)


def data(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Which facts to print.")] = None,
    split: Annotated[str, typer.Option(metavar="train|dev|test", help="Which part.")] = "train",
) -> None:
    """List the shipped facts, or print a part of them as JSONL. NAME:split works wherever a data file does.

    Example: ptuning data capitals --split test
    """
    from ptuning.data.reading import load_records, shipped_facts

    if name is None:
        terminal.facts(shipped_facts())
        return
    for row in load_records(name if ":" in name else f"{name}:{split}"):
        typer.echo(json.dumps(dict(row), ensure_ascii=False))


def backbones(as_json: JsonOption = False) -> None:
    """List the families of language models, what each supports, and what is tested. No model is loaded.

    Example: ptuning backbones --json
    """
    from ptuning.backbone.families import families

    terminal.backbones(families(), as_json=as_json)


# Every command, in the order of --help. Two words are a command of a group.
COMMANDS: Mapping[str, Callable[..., None]] = {
    "train": train.train,
    "eval": evaluate,
    "predict": predict,
    "inspect": inspect,
    "data": data,
    "backbones": backbones,
    "demo": demo.demo,
    "estimate": estimate.estimate,
    "fleet": fleet.fleet,
    "compare": experiments.compare,
    "lama": experiments.lama,
    "paraphrases": experiments.paraphrases,
    "superglue": experiments.superglue,
    "report": experiments.report,
    "template show": show_template,
    "task list": tasks.list_tasks,
    "task show": tasks.show_task,
    "task check": tasks.check_task,
}
GROUPS: Mapping[str, str] = {
    "template": "Look at how a template is filled.",
    "task": "Look at the shipped tasks, and check a task file.",
}


def _app() -> typer.Typer:
    """Return the command line with all its commands."""
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
