"""`ptuning predict`: answer a text, records, or lines typed on a terminal."""

from __future__ import annotations

import contextlib
import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptuning.cli import options, terminal
from ptuning.cli.inputs import data_to_answer, data_to_write, load, prompt_of, read_candidates, task_of, with_labels
from ptuning.cli.options import ANSWERS, DATA, OUTPUT, option
from ptuning.cli.outputs import (
    Take,
    answer_columns,
    answers_to,
    check_file,
    is_finished,
    is_table,
    kept_lines,
    show_answer,
)
from ptuning.cli.signals import SIGNAL_EXIT, stoppable
from ptuning.config import GenerationSettings
from ptuning.errors import ConfigError, FileError, PTuningError
from ptuning.progress import Interrupted
from ptuning.records import plain
from ptuning.template.language import CONVERSATION_FIELD
from ptuning.template.segments import FILLS_MASKS

if TYPE_CHECKING:
    from ptuning.data.questions import Questions
    from ptuning.prompt.inputs import InferenceInputs
    from ptuning.prompt.prediction import Prediction
    from ptuning.prompt.prompt import Prompt
    from ptuning.records import Record

# Number of records that are answered between two steps of the progress bar.
PREDICTED_ROWS = 64
# Warnings of records without a text that are shown one by one.
SHOWN_WARNINGS = 5

Answer = Callable[["Questions"], "list[Prediction]"]
Show = Callable[["InferenceInputs"], str]  # prints answers, and returns the last one


@options.takes(generation=options.generation_options, backbone=options.backbone_options)
def predict(
    prompt: options.PromptArgument,
    text: Annotated[
        str | None, typer.Argument(metavar="[TEXT|-]", help="Value of the template's one field; - reads the input.")
    ] = None,
    data: Annotated[
        str | None,
        option(
            metavar="FILE|-",
            panel=DATA,
            about="CSV, JSONL, ... or .txt with a text per line; - reads the input.",
            autocompletion=options.shipped_parts,
        ),
    ] = None,
    task: options.TaskOption = None,
    field: options.FieldOption = None,
    group_references: options.GatherOption = False,
    labels: options.OwnLabelsOption = None,
    candidates: options.CandidatesOption = None,
    num_answers: Annotated[int, option(metavar="N", panel=ANSWERS, about="Number of answers to show.", min=1)] = 1,
    min_probability: Annotated[
        float | None, option(metavar="P", panel=ANSWERS, about="Abstain where no label or choice is as likely.")
    ] = None,
    stream: Annotated[bool, option("--stream", panel=ANSWERS, about="Show answers as they are generated.")] = False,
    calibrate: options.CalibrateOption = None,
    normalise: options.NormaliseOption = None,
    count_stop: options.CountStopOption = False,
    ablate: options.WithoutOption = None,
    force: options.ForceOption = False,
    out: options.AnswersOption = None,
    resume: Annotated[
        bool, option("--resume", panel=OUTPUT, about="Continue a stopped file of generated answers.")
    ] = False,
    overwrite: options.ReplaceOption = False,
    as_json: options.JsonOption = False,
    *,
    generation: GenerationSettings,
    backbone: options.AskedBackbone,
) -> None:
    """Answer a text or records, or with neither what is typed on a terminal; the backbone is loaded once.

    With --json there is one object per line, with the probabilities of all labels. A CSV has the columns of the data.
    Generated answers in a .jsonl FILE are kept as they are finished, with targets and how each ended: a run that was
    stopped continues with --resume.

    Example: ptuning predict capitals Kenya
    """
    chosen = with_labels(prompt_of(prompt, task_of(task), ablate=ablate), labels)
    check_force(chosen, force=force)
    among, least = candidates is not None, min_probability
    how = options.scoring_of(
        chosen, normalise=normalise, calibrate=calibrate, count_stop=count_stop, candidates=among, min_probability=least
    )
    is_written = not (among or chosen.answer_space.is_closed)
    changed = ["stream"] * stream or generation.changed
    if changed and not is_written:
        raise ConfigError(f"{changed[0]} is for answers that are generated, not for candidates or label words")
    _check_output(
        out, overwrite=overwrite, resume=resume, data=data, num_answers=num_answers, as_json=as_json, stream=stream
    )
    keeps_lines = is_written and out is not None and not is_table(out) and num_answers == 1 and data is not None
    for name, is_given in (("--resume", resume), ("--group-references", group_references)):
        if is_given and not keeps_lines:
            raise ConfigError(f"{name} is for generated answers to --data in a .jsonl file (--out)")
    if keeps_lines:
        assert out is not None
        assert data is not None
        questions = data_to_write(chosen, data, field, group=group_references)
        _write_lines(chosen, questions, out, generation, backbone, resume=resume, overwrite=overwrite, force=force)
        return
    given = _given(chosen, text, data, field, out=out)
    listed = read_candidates(candidates, prompt, data, field) if candidates is not None else None
    loaded = load(backbone, prompt=chosen)
    from ptuning.prompt.predict import PromptModel
    from ptuning.template.ambiguity import check_fields, warn

    model = PromptModel(loaded, force=force)
    if given is not None:
        warn(check_fields(loaded.tokenizer, given.questions.records, chosen.template.fields))

    def answer(part: Questions) -> list[Prediction]:
        predictions = model.predict(
            part, chosen, listed, top_k=num_answers, generation=generation, min_probability=least, **how
        )
        # Only a model that fills masks chooses a length.
        return predictions if loaded.kind in FILLS_MASKS else [replace(each, tokens=None) for each in predictions]

    show = _shown(answer, out, as_json=as_json, min_probability=least if given is not None else None)
    if stream:
        show = _streamed(lambda record: model.stream(record, chosen, generation=generation))
    show(given) if given is not None else _converse(chosen, show)


def check_force(prompt: Prompt, *, force: bool) -> None:
    """Raise a ConfigError if a prompt that fits any backbone is forced on one."""
    if force and prompt.backbone is None:
        raise ConfigError("--force is for prompts learned on another backbone; this one fits any, so leave it out")


def _write_lines(
    prompt: Prompt,
    questions: Questions,
    out: Path,
    generation: GenerationSettings,
    backbone: options.AskedBackbone,
    *,
    resume: bool,
    overwrite: bool,
    force: bool,
) -> None:
    """Generate a text for each record, one line each, kept as they are finished."""
    from ptuning.prompt.score import check_generates, generate_parts
    from ptuning.prompt.score_generation import generation_identity, text_row

    check_generates(prompt)
    if resume and is_finished(out):
        _check_finished(out, questions)
        terminal.say(f"{out} is finished already; --overwrite generates it anew")
        return
    loaded = load(backbone, prompt=prompt)
    from ptuning.prompt.predict import PromptModel

    identity = generation_identity(prompt, questions, generation, loaded)
    with kept_lines(out, identity, resume=resume, overwrite=overwrite) as kept:
        if kept.done:
            terminal.say(f"{kept.done} of {len(questions)} texts are there already")
        with stoppable(out, again="--resume", kept=kept.path) as (report, should_stop):
            model, done = PromptModel(loaded, force=force), kept.done
            for part in generate_parts(model, questions, prompt, settings=generation, done=done, report=report):
                records = [question.record for question in questions[done : done + len(part)]]
                kept.write([text_row(record, text) for record, text in zip(records, part, strict=True)])
                done += len(part)
                if should_stop() and done < len(questions):
                    raise Interrupted(f"stopped after {done} of {len(questions)} texts")
        kept.finish()
    with out.open(encoding="utf-8") as lines:
        ends = Counter(str(json.loads(line)["stopped"]) for line in lines)
    total = sum(ends.values())
    terminal.say(f"{total} answer{'s' * (total != 1)} written to {out}")
    if ends["length"]:
        terminal.say(f"warning: {ends['length']} of {total} hit --max-new-tokens and may be truncated")


def _check_finished(out: Path, questions: Questions) -> None:
    """Raise a FileError if a finished file is not about these records."""
    records = [plain(question.record) for question in questions]
    try:
        with out.open(encoding="utf-8") as lines:
            is_same = [json.loads(line)["record"] for line in lines] == records
    except (ValueError, TypeError, KeyError):
        is_same = False
    if not is_same:
        raise FileError(
            f"{out} is there, and its records are not those of {questions.name}; use --overwrite, or name another --out"
        )


def _check_output(
    out: Path | None,
    *,
    overwrite: bool,
    resume: bool,
    data: str | None,
    num_answers: int,
    as_json: bool,
    stream: bool,
) -> None:
    if stream:
        shown = {"--json": as_json, "--num-answers": num_answers > 1, "--out": out is not None}
        for name in (name for name, is_given in shown.items() if is_given):
            raise ConfigError(f"--stream shows one answer as text; leave {name} out")
    if resume and overwrite:
        raise ConfigError("--resume continues the file that --overwrite replaces; leave one out")
    check_file(out, overwrite=overwrite or (resume and out is not None), data=data)
    if out is None:
        return
    if as_json:
        raise ConfigError("--json prints answers, and --out FILE writes them instead; leave one out")
    if num_answers > 1 and out.suffix.lower() == ".csv":
        raise ConfigError("a CSV has one answer for each row; leave --num-answers out, or let --out end in .jsonl")


def _given(
    prompt: Prompt, text: str | None, data: str | None, field: Sequence[str] | None, *, out: Path | None
) -> InferenceInputs | None:
    """Read what to answer, and warn of records without a text; None if it will be typed."""
    if text is None and data is None and terminal.is_interactive():
        from ptuning.prompt.inputs import typed_fields

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
        terminal.say(f"warning: {where}: {what} is empty, so the prediction is meaningless")
    if len(empty) > SHOWN_WARNINGS:
        terminal.say(f"warning: so are {len(empty) - SHOWN_WARNINGS} more of {len(given.questions)}")
    return given


def _streamed(pieces: Callable[[Record], Iterator[str]]) -> Show:
    """Return what prints answers piece by piece."""

    def show(asked: InferenceInputs) -> str:
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

    def show(asked: InferenceInputs) -> str:
        total, (held, last) = len(asked.questions), _answer_all(asked, answer, out, as_json=as_json)
        if out is not None:
            terminal.say(f"{total} answer{'s' * (total != 1)} written to {out}")
        if min_probability is not None:
            terminal.say(f"{held} of {total} abstained: no answer was as likely as {min_probability:g}")
        return last

    return show


def _answer_all(asked: InferenceInputs, answer: Answer, out: Path | None, *, as_json: bool) -> tuple[int, str]:
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
    from ptuning.prompt.inputs import InferenceInputs, typed_fields
    from ptuning.template.messages import ASSISTANT, ChatMessage, read_messages

    fields, said = typed_fields(prompt), list[ChatMessage]()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited and called again
    terminal.say("an empty line or Ctrl-D ends")
    try:
        for texts in _typed(fields):
            try:
                asked = InferenceInputs.typed(prompt, texts, where="the text", before=said)
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
