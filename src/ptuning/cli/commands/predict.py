"""`ptuning predict`: answer a text, records, or lines typed on a terminal."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptuning.cli import options, terminal
from ptuning.cli.inputs import check_force, data_to_answer, load, prompt_of, read_candidates, task_of, with_labels
from ptuning.cli.options import ANSWERS, DATA, option
from ptuning.cli.outputs import answer_columns, answer_row, check_file, is_table, kept_rows, show_answer
from ptuning.cli.signals import SIGNAL_EXIT, stoppable
from ptuning.config import GenerationSettings
from ptuning.errors import ConfigError, PTuningError
from ptuning.progress import Interrupted, OnProgress, Progress
from ptuning.template.language import CONVERSATION_FIELD

if TYPE_CHECKING:
    from ptuning.data.questions import Questions
    from ptuning.files import Json
    from ptuning.prompt.inputs import InferenceInputs
    from ptuning.prompt.prediction import Prediction
    from ptuning.prompt.prompt import Prompt

# Number of records that are answered between two steps of the progress bar.
PREDICTED_ROWS = 64
# Warnings of records without a text that are shown one by one.
SHOWN_WARNINGS = 5

Answer = Callable[["Questions"], "list[Prediction]"]


def predict(
    prompt: options.PromptArgument,
    text: Annotated[
        str | None, typer.Argument(metavar="[TEXT|-]", help="Value of the template's one field; - reads the input.")
    ] = None,
    data: Annotated[
        str | None,
        option(
            "CSV, JSONL, ... or .txt with a text per line; - reads the input.",
            DATA,
            metavar="FILE|-",
            autocompletion=options.shipped_parts,
        ),
    ] = None,
    task: options.TaskOption = None,
    field: options.FieldOption = None,
    labels: options.LabelsOption = None,
    candidates: options.CandidatesOption = None,
    num_answers: Annotated[int, option("Number of answers to show.", ANSWERS, metavar="N", min=1)] = 1,
    min_probability: Annotated[
        float | None, option("Abstain where no label or choice is as likely.", ANSWERS, metavar="P")
    ] = None,
    calibrate: options.CalibrateOption = None,
    normalise: options.NormaliseOption = None,
    count_stop: options.CountStopOption = False,
    ablate: options.AblateOption = None,
    force: options.ForceOption = False,
    stream: Annotated[bool, option("Show answers as they are generated.", ANSWERS, "--stream")] = False,
    max_new_tokens: options.MaxTokensOption = None,
    num_beams: options.BeamsOption = None,
    length_penalty: Annotated[float | None, option("Above 0 favours long beams.", ANSWERS, metavar="F")] = None,
    do_sample: Annotated[bool | None, option("Sample each token.", ANSWERS, "--do-sample")] = None,
    temperature: Annotated[
        float | None, option("Below 1 samples likely tokens more often.", ANSWERS, metavar="F")
    ] = None,
    top_k: Annotated[int | None, option("Sample among the N likeliest tokens.", ANSWERS, metavar="N")] = None,
    top_p: Annotated[
        float | None, option("Sample among the likeliest tokens that sum to F.", ANSWERS, metavar="F")
    ] = None,
    repetition_penalty: Annotated[float | None, option("Above 1 avoids repetitions.", ANSWERS, metavar="F")] = None,
    stop: Annotated[list[str] | None, option("End an answer here; repeatable.", ANSWERS, metavar="TEXT")] = None,
    seed: Annotated[int | None, option("Random seed of sampling.", ANSWERS, metavar="N")] = None,
    out: options.AnswersOption = None,
    resume: options.ResumeOption = False,
    overwrite: options.ReplaceOption = False,
    as_json: options.JsonOption = False,
    backbone: options.BackboneOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    model_arg: options.ModelArgOption = None,
) -> None:
    """Answer a text or records, or with neither what is typed on a terminal.

    With --json there is one object per line, with the probabilities of all labels. A CSV has the columns of the data.
    Answers in FILE are kept as they are made, and a run that was stopped continues with --resume.

    Example: ptuning predict capitals Kenya
    """
    decoding = {
        "max_new_tokens": max_new_tokens, "num_beams": num_beams, "length_penalty": length_penalty,
        "do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "repetition_penalty": repetition_penalty, "stop_strings": stop, "seed": seed,
    }  # fmt: skip
    generation = GenerationSettings.from_json({name: value for name, value in decoding.items() if value is not None})
    choice = options.backbone_of(backbone, dtype, device, model_arg)
    chosen = with_labels(prompt_of(prompt, task_of(task), ablate=ablate), labels)
    check_force(chosen, force=force)
    is_closed = candidates is not None or chosen.answer_space.is_closed
    for name in ["stream"] * stream + generation.changed if is_closed else ():
        raise ConfigError(f"{name} is for answers that are generated, not for candidates or label words")
    shown = {"--json": as_json, "--num-answers": num_answers > 1, "--out": out is not None}
    for name in (name for name, is_given in shown.items() if is_given and stream):
        raise ConfigError(f"--stream shows one answer as text; leave {name} out")
    if out is not None and as_json:
        raise ConfigError("--json prints answers, and --out FILE writes them instead; leave one out")
    if out is not None and is_table(out) and num_answers > 1:
        raise ConfigError("a CSV has one answer for each row; leave --num-answers out, or let --out end in .jsonl")
    if resume and (out is None or overwrite):
        raise ConfigError("--resume continues a stopped file of answers (--out), which --overwrite replaces")
    check_file(out, overwrite=overwrite or resume, data=data)
    from ptuning.prompt.predict import PromptModel
    from ptuning.prompt.rows import Answering
    from ptuning.template.ambiguity import check_fields, warn

    how: dict[str, Any] = {
        "candidates": read_candidates(candidates, prompt, data, field), "top_k": num_answers, "generation": generation,
        "normalise": normalise, "calibrate": calibrate, "count_stop": count_stop, "min_probability": min_probability,
    }  # fmt: skip
    answering = Answering(**how)
    answering.check(chosen)
    given = _given(chosen, text, data, field, out=out)
    if out is not None and resume and out.exists():
        terminal.say(f"{out} is finished already; replace it with --overwrite")
        return
    model = PromptModel(load(choice, prompt=chosen), force=force)

    def answer(rows: Questions) -> list[Prediction]:
        return model.predict(rows, chosen, **how)

    def show(inputs: InferenceInputs) -> tuple[int, str]:
        if not stream:
            return _print_answers(inputs, answer, as_json=as_json)
        pieces: list[str] = []
        for record in inputs.questions.records:
            pieces.clear()
            for piece in model.stream(record, chosen, generation=generation):
                typer.echo(terminal.visible(piece), nl=False)
                pieces.append(piece)
            typer.echo()
        return 0, "".join(pieces)

    if given is None:
        _converse(chosen, lambda inputs: show(inputs)[1])
        return
    warn(check_fields(model.backbone.tokenizer, given.questions.records, chosen.template.fields))
    if out is None:
        abstained = show(given)[0]
    else:
        from ptuning.prompt.score import answers_identity

        identity = answers_identity(chosen, given.questions, answering, model.backbone)
        abstained = _write_answers(given, answer, out, identity, resume=resume, overwrite=overwrite)
    if min_probability is not None:
        total = len(given.questions)
        terminal.say(f"{abstained} of {total} abstained: no answer was as likely as {min_probability:g}")


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
    empty = given.empty_fields(prompt.template.fields)
    for where, name in empty[:SHOWN_WARNINGS]:
        terminal.say(f"warning: {where}: the field '{name}' is empty, so the prediction is meaningless")
    if len(empty) > SHOWN_WARNINGS:
        terminal.say(f"warning: so are {len(empty) - SHOWN_WARNINGS} more of {len(given.questions)}")
    return given


def _print_answers(inputs: InferenceInputs, answer: Answer, *, as_json: bool) -> tuple[int, str]:
    """Print answers as they are made; return how many abstained, and the last one."""
    from ptuning.data.questions import Questions

    total, abstained, last = len(inputs.questions), 0, ""
    with contextlib.ExitStack() as stack:
        report: OnProgress = lambda _: None  # noqa: E731
        if not terminal.results().is_terminal:  # where a bar would stand between answers
            report = stack.enter_context(terminal.bar())
        for at in range(0, total, PREDICTED_ROWS):
            part = Questions(inputs.questions[at : at + PREDICTED_ROWS])
            for question, prediction in zip(part, answer(part), strict=True):
                show_answer(question.record, prediction, as_json=as_json)
                abstained, last = abstained + prediction.abstained, prediction.text
            report(Progress("predict", at + len(part), total, inputs.questions.name))
    return abstained, last


def _write_answers(
    inputs: InferenceInputs, answer: Answer, out: Path, identity: dict[str, Json], *, resume: bool, overwrite: bool
) -> int:
    """Write answers into a file, kept as they are made; return how many abstained."""
    from ptuning.data.questions import Questions

    total, abstained, truncated = len(inputs.questions), 0, 0
    with kept_rows(out, identity, resume=resume, overwrite=overwrite) as kept:
        if kept.done:
            terminal.say(f"{kept.done} of {total} answers are there already")
        with stoppable(out, again="--resume", kept=kept.path) as (report, should_stop):
            for at in range(kept.done, total, PREDICTED_ROWS):
                part = Questions(inputs.questions[at : at + PREDICTED_ROWS])
                predictions = answer(part)
                abstained += sum(each.abstained for each in predictions)
                truncated += sum(each.stopped == "length" for each in predictions)
                rows = zip(inputs.rows[at:], part, predictions, strict=False)
                kept.write(answer_row(out, row, question.record, each) for (_, row), question, each in rows)
                done = at + len(part)
                report(Progress("predict", done, total, inputs.questions.name))
                if should_stop() and done < total:
                    raise Interrupted(f"stopped after {done} of {total} answers")
        raw = inputs.raw
        kept.finish(answer_columns(out, raw), raw.delimiter if raw.format == "csv" and raw.delimiter else ",")
    terminal.say(f"{total} answer{'s' * (total != 1)} written to {out}")
    if truncated:
        terminal.say(f"warning: {truncated} of {total} reached --max-new-tokens and may be truncated")
    return abstained


def _converse(prompt: Prompt, reply: Callable[[InferenceInputs], str]) -> None:
    """Answer what is typed until an empty line or the end of the input; after an error, too. In a conversation, earlier
    turns are read as well.
    """
    from ptuning.prompt.inputs import InferenceInputs, typed_fields
    from ptuning.template.messages import ASSISTANT, ChatMessage, read_messages

    turns: list[ChatMessage] = []
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited and called again
    terminal.say("an empty line or Ctrl-D ends")
    try:
        for texts in _typed(typed_fields(prompt)):
            try:
                inputs = InferenceInputs.typed(prompt, texts, where="the text", before=turns)
                answer = reply(inputs)
                if prompt.template.has_conversation and answer:
                    before = read_messages(inputs.questions[0].record[CONVERSATION_FIELD])
                    turns = [*before, ChatMessage(ASSISTANT, answer)]
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
