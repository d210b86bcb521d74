"""`ptuning predict`: answer a text, records, or what is typed on a terminal."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptuning.cli import options, terminal
from ptuning.cli.inputs import (
    data_to_answer,
    load,
    prompt_of,
    read_candidates,
    task_of,
    with_labels,
)
from ptuning.cli.outputs import Take, answer_columns, answers_to, check_file, show_answer
from ptuning.cli.signals import SIGNAL_EXIT
from ptuning.cli.writing import writing as writing_options
from ptuning.config import GenerationSettings
from ptuning.errors import ConfigError, PTuningError
from ptuning.template.language import CONVERSATION_FIELD
from ptuning.template.segments import FILLS_MASKS

if TYPE_CHECKING:
    from ptuning.data.questions import Questions
    from ptuning.prompt.asked import ToAnswer
    from ptuning.prompt.prediction import Prediction
    from ptuning.prompt.prompt import Prompt
    from ptuning.records import Record

# Number of records that are answered between two steps of the progress bar.
PREDICTED_ROWS = 64
# Warnings of records without a text that are shown one by one.
SHOWN_WARNINGS = 5

Answer = Callable[["Questions"], "list[Prediction]"]
Show = Callable[["ToAnswer"], str]  # prints answers, and returns the last one


@options.takes(writing=writing_options, backbone=options.limited_backbone_options)
def predict(
    prompt: options.PromptArgument,
    text: Annotated[
        str | None, typer.Argument(metavar="[TEXT|-]", help="Value of the template's one field; - reads the input.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE|-", help="CSV, JSONL, ... or .txt with a text per line; - reads the input."),
    ] = None,
    candidates: options.CandidatesOption = None,
    top_k: Annotated[int, typer.Option(metavar="N", help="How many answers to show.", min=1)] = 1,
    min_probability: Annotated[
        float | None, typer.Option(metavar="P", help="Abstain where no label or choice is as likely.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Show answers as they are written.")] = False,
    task: options.TaskOption = None,
    labels: options.OwnLabelsOption = None,
    calibrate: options.CalibrateOption = None,
    normalise: options.NormaliseOption = None,
    count_stop: options.CountStopOption = False,
    field: options.FieldOption = None,
    without: options.WithoutOption = None,
    force: options.ForceOption = False,
    out: options.AnswersOption = None,
    overwrite: options.ReplaceOption = False,
    as_json: options.JsonOption = False,
    *,
    writing: GenerationSettings,
    backbone: options.AskedBackbone,
) -> None:
    """Answer a text or records, or with neither what is typed on a terminal; the backbone is loaded once.

    With --json there is one object per line, with the probabilities of all labels. A CSV has the columns of the data.

    Example: ptuning predict capitals Kenya
    """
    chosen = with_labels(prompt_of(prompt, task_of(task), without=without), labels)
    among, least = candidates is not None, min_probability
    how = options.scoring_of(
        chosen, normalise=normalise, calibrate=calibrate, count_stop=count_stop, candidates=among, min_probability=least
    )
    changed = ["stream"] * stream or writing.changed
    if changed and (among or chosen.answer_space.is_closed):
        raise ConfigError(f"{changed[0]} is for answers that are written, not for candidates or label words")
    _check_output(out, overwrite=overwrite, data=data, top_k=top_k, as_json=as_json, stream=stream)
    given = _given(chosen, text, data, field, out=out)
    listed = read_candidates(candidates, prompt, data, field) if candidates is not None else None
    loaded = load(backbone, prompt=chosen)
    from ptuning.prompt.predict import PromptModel
    from ptuning.template.ambiguity import check_fields, warn

    model = PromptModel(loaded, force=force)
    if given is not None:
        warn(check_fields(loaded.tokenizer, given.questions.records, chosen.template.fields))

    def answer(part: Questions) -> list[Prediction]:
        found = model.predict(part, chosen, listed, top_k=top_k, generation=writing, min_probability=least, **how)
        # Only a model that fills masks chooses a length.
        return found if loaded.kind in FILLS_MASKS else [replace(one, tokens=None) for one in found]

    show = _shown(answer, out, as_json=as_json, min_probability=least if given is not None else None)
    if stream:
        show = _streamed(lambda record: model.stream(record, chosen, generation=writing))
    show(given) if given is not None else _converse(chosen, show)


def _check_output(
    out: Path | None, *, overwrite: bool, data: str | None, top_k: int, as_json: bool, stream: bool
) -> None:
    shown = {"--json": as_json, "--top-k": top_k > 1}
    if stream:
        shown["--out"] = out is not None
        for name in (name for name, is_given in shown.items() if is_given):
            raise ConfigError(f"--stream shows one answer as text; leave {name} out")
    check_file(out, overwrite=overwrite, data=data)
    if out is None:
        return
    if as_json:
        raise ConfigError("--json prints answers, and --out FILE writes them instead; leave one out")
    if top_k > 1 and out.suffix.lower() == ".csv":
        raise ConfigError("a CSV has one answer for each row; leave --top-k out, or let --out end in .jsonl")


def _given(
    prompt: Prompt, text: str | None, data: str | None, field: Sequence[str] | None, *, out: Path | None
) -> ToAnswer | None:
    """Read what to answer, and warn of records without a text; None if it will be typed."""
    if text is None and data is None and terminal.is_interactive():
        from ptuning.prompt.asked import typed_fields

        if out is not None:
            raise ConfigError("--out is for answers to --data (a file, or - for the standard input)")
        if not typed_fields(prompt):
            raise ConfigError("the template reads no field, so there is nothing to type; use --data")
        return None
    given = data_to_answer(prompt, text, data, field)
    if out is not None:
        answer_columns(out, given.raw)  # an error about them comes before the backbone is loaded
    fields = prompt.template.fields
    empty = given.empty_fields(fields)
    for where, name in empty[:SHOWN_WARNINGS]:
        what = "the text" if len(fields) == 1 else f"the field '{name}'"
        terminal.say(f"warning: {where}: {what} is empty, so the answer says nothing of it")
    if len(empty) > SHOWN_WARNINGS:
        terminal.say(f"warning: so are {len(empty) - SHOWN_WARNINGS} more of {len(given.questions)}")
    return given


def _streamed(pieces: Callable[[Record], Iterator[str]]) -> Show:
    """Return what prints answers piece by piece."""

    def show(asked: ToAnswer) -> str:
        told: list[str] = []
        for record in asked.questions.records:
            told.clear()
            for piece in pieces(record):
                typer.echo(terminal.visible(piece), nl=False)
                told.append(piece)
            typer.echo()
        return "".join(told)

    return show


def _shown(answer: Answer, out: Path | None, *, as_json: bool, min_probability: float | None) -> Show:
    """Return what prints or writes answers as they are made, and says how many were held back."""

    def show(asked: ToAnswer) -> str:
        total, (held, last) = len(asked.questions), _answer_all(asked, answer, out, as_json=as_json)
        if out is not None:
            terminal.say(f"{total} answer{'s' * (total != 1)} written to {out}")
        if min_probability is not None:
            terminal.say(f"{held} of {total} abstained: no answer was as likely as {min_probability:g}")
        return last

    return show


def _answer_all(asked: ToAnswer, answer: Answer, out: Path | None, *, as_json: bool) -> tuple[int, str]:
    """Print or write answers as they are made, and return how many were held back, and the last one. A bar would stand
    between them.
    """
    from ptuning.data.questions import Questions
    from ptuning.progress import Progress

    total, held, last = len(asked.questions), 0, ""
    with contextlib.ExitStack() as stack:
        take: Take = lambda _, record, found: show_answer(record, found, as_json=as_json)  # noqa: E731
        if out is not None:
            take = stack.enter_context(answers_to(out, asked.raw))
        beside_bar = out is not None or not terminal.results().is_terminal
        report = stack.enter_context(terminal.bar()) if beside_bar else None
        for at in range(0, total, PREDICTED_ROWS):
            part = Questions(asked.questions[at : at + PREDICTED_ROWS])
            found = answer(part)
            for (_, row), one, prediction in zip(asked.rows[at:], part, found, strict=False):
                take(row, one.record, prediction)
                held += prediction.abstained
                last = prediction.text
            if report is not None:
                report(Progress("predict", at + len(part), total, asked.questions.name))
    return held, last


def _converse(prompt: Prompt, reply: Show) -> None:
    """Answer what is typed until an empty line or the end of the input. An error ends nothing. A chat goes on: what
    was said before is read as well.
    """
    from ptuning.prompt.asked import ToAnswer, typed_fields
    from ptuning.template.messages import ASSISTANT, ChatMessage, read_messages

    fields, said = typed_fields(prompt), list[ChatMessage]()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited and called again
    terminal.say("an empty line or Ctrl-D ends")
    try:
        for texts in _typed(fields):
            try:
                asked = ToAnswer.typed(prompt, texts, where="the text", before=said)
                answer = reply(asked)
                if prompt.template.has_conversation and answer:
                    turns = read_messages(asked.questions[0].record[CONVERSATION_FIELD])
                    said = [*turns, ChatMessage(ASSISTANT, answer)]
            except PTuningError as error:
                terminal.complain(str(error))
    except KeyboardInterrupt:
        terminal.say("")
        raise typer.Exit(SIGNAL_EXIT + signal.SIGINT) from None


def _typed(fields: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the texts of a record's fields, asked for one after the other, until the first of them is empty."""
    while True:
        texts: dict[str, str] = {}
        for name in fields:
            try:
                texts[name] = terminal.ask("> " if len(fields) == 1 else f"{name}> ")
            except EOFError:
                terminal.say("")
                return
            if not texts[fields[0]].strip():
                return
        yield texts
