"""`ptuning eval`, `predict` and `inspect`: score a prompt, answer with it, and look inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ptuning.cli import options, terminal
from ptuning.cli.inputs import data_of, data_to_answer, labelled, load, prompt_of, read_candidates, task_of
from ptuning.config import GenerationSettings
from ptuning.errors import ConfigError
from ptuning.metrics import called
from ptuning.provenance import described
from ptuning.template.segments import FILLS_MASKS

if TYPE_CHECKING:
    from ptuning.data.questions import Questions
    from ptuning.prompt.inspect import Inspection, Neighbour
    from ptuning.prompt.predict import Prediction
    from ptuning.prompt.prompt import Prompt
    from ptuning.prompt.score import Result
    from ptuning.records import Records

# Number of records that are answered between two steps of the progress bar.
PREDICTED_ROWS = 64
# Neighbours of a slot on the terminal; JSON holds all.
SHOWN_NEIGHBOURS = 3


@options.takes(backbone=options.backbone_options)
def evaluate(
    prompt: options.PromptArgument,
    data: Annotated[str, typer.Option(metavar="FILE", help="Records with targets.")],
    candidates: options.CandidatesOption = None,
    task: options.TaskOption = None,
    calibrate: options.CalibrateOption = None,
    normalise: options.NormaliseOption = None,
    count_stop: options.CountStopOption = False,
    field: options.FieldOption = None,
    labels: options.LabelsOption = None,
    merge: options.MergeOption = None,
    without: options.WithoutOption = None,
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    *,
    backbone: options.AskedBackbone,
) -> None:
    """Score a prompt on records, with 95 % intervals.

    Example: ptuning eval capitals --data capitals:test
    """
    chosen = prompt_of(prompt, task_of(task), without=without)
    rows = data_of(data, field, chosen.task, part="val", prompt=chosen)
    chosen, rows = labelled(chosen, rows, labels, merge)
    if candidates is not None:
        chosen.check_open()
    how = options.scoring_of(
        chosen, normalise=normalise, calibrate=calibrate, count_stop=count_stop, candidates=candidates is not None
    )
    listed = read_candidates(candidates, prompt, data, field) if candidates is not None else None
    loaded = load(backbone, prompt=chosen)
    from ptuning.prompt.predict import PromptModel
    from ptuning.prompt.score import score_prompt

    with terminal.bar() as report:
        model = PromptModel(loaded, force=force)
        found = score_prompt(model, rows, chosen, candidates=listed, report=report, **how)
    _show_scores(prompt, rows, found, as_json=as_json)


@options.takes(writing=options.writing, backbone=options.backbone_options)
def predict(
    prompt: options.PromptArgument,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Value of the template's one field.")] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE|-", help="Records; - reads JSONL from the input.")] = None,
    candidates: options.CandidatesOption = None,
    top_k: Annotated[int, typer.Option(metavar="N", help="How many answers to show.", min=1)] = 1,
    stream: Annotated[bool, typer.Option("--stream", help="Show answers as they are written.")] = False,
    task: options.TaskOption = None,
    calibrate: options.CalibrateOption = None,
    normalise: options.NormaliseOption = None,
    count_stop: options.CountStopOption = False,
    field: options.FieldOption = None,
    without: options.WithoutOption = None,
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    *,
    writing: GenerationSettings,
    backbone: options.AskedBackbone,
) -> None:
    """Answer a text or records; with --json one object per line.

    Example: ptuning predict capitals Kenya
    """
    from ptuning.data.questions import Questions, as_questions

    chosen = prompt_of(prompt, task_of(task), without=without)
    closed = candidates is not None or chosen.answer_space.is_closed
    how = options.scoring_of(
        chosen, normalise=normalise, calibrate=calibrate, count_stop=count_stop, candidates=candidates is not None
    )
    if closed and (writing.changed or stream):
        name = "stream" if stream else writing.changed[0]
        raise ConfigError(f"{name} is for answers that are written, not for candidates or label words")
    if stream and (as_json or top_k > 1):
        raise ConfigError(f"--stream shows one answer as text; leave {'--json' if as_json else '--top-k'} out")
    rows = as_questions(data_to_answer(chosen, text, data, field))
    listed = read_candidates(candidates, prompt, data, field) if candidates is not None else None
    loaded = load(backbone, prompt=chosen)
    from ptuning.progress import Progress
    from ptuning.prompt.predict import PromptModel

    model, found = PromptModel(loaded, force=force), []
    if stream:
        for record in rows.records:
            for piece in model.stream(record, chosen, generation=writing):
                typer.echo(terminal.visible(piece), nl=False)
            typer.echo()
        return
    with terminal.bar() as report:
        for at in range(0, len(rows), PREDICTED_ROWS):
            part = Questions(rows[at : at + PREDICTED_ROWS])
            found += model.predict(part, chosen, listed, top_k=top_k, generation=writing, **how)
            report(Progress("predict", len(found), len(rows), rows.name))
    if loaded.kind not in FILLS_MASKS:
        found = [replace(one, tokens=None) for one in found]  # only a model that fills masks chooses a length
    _show_predictions(rows.records, found, as_json=as_json)


@options.takes(backbone=options.backbone_options)
def inspect(
    prompt: options.PromptArgument,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Score the nearest tokens as well.")] = None,
    field: options.FieldOption = None,
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    *,
    backbone: options.AskedBackbone,
) -> None:
    """Look inside a prompt: the tokens nearest to each slot, and (with --data) whether they mean anything.

    Example: ptuning inspect capitals --data capitals:dev
    """
    chosen = prompt_of(prompt)
    rows = data_of(data, field, chosen.task, part="val", prompt=chosen) if data is not None else None
    loaded = load(backbone, prompt=chosen)
    from ptuning.prompt.inspect import inspect_prompt

    with terminal.bar() as report:
        found = inspect_prompt(loaded, chosen, data=rows, force=force, report=report)
    _show_inspection(chosen, found, as_json=as_json)


def _show_scores(name: str, data: Records | Questions, found: Result, *, as_json: bool) -> None:
    if as_json:
        terminal.print_json({"prompt": name, "data": described(data), **found.to_json()})
        return
    terminal.heading(f"{name} on {data.name}, n = {len(data)}")
    table = terminal.table("score", "value  [95 % interval]")
    for metric, score in found.scores.items():
        table.add_row(called(metric), escape(terminal.interval(score)))
    terminal.results().print(table)
    terminal.line(f"loss {found.loss:.3f}")
    if found.missing:
        terminal.line(f"{found.missing} of {len(data)} targets are no candidates; they count as misses")


def _show_predictions(data: Records, found: Sequence[Prediction], *, as_json: bool) -> None:
    for record, prediction in zip(data, found, strict=True):
        if as_json:
            terminal.print_json({"record": dict(record), **prediction.to_json()}, indent=None)
        elif len(prediction.candidates) > 1:
            typer.echo("\t".join(f"{terminal.visible(one.text)} ({one.log_prob:.2f})" for one in prediction.candidates))
        elif prediction.tokens is not None:
            count = f"{prediction.tokens} token{'s' * (prediction.tokens != 1)}"
            typer.echo(f"{terminal.visible(prediction.text)}\t({count})")
        else:
            typer.echo(terminal.visible(prediction.text))


def _show_inspection(prompt: Prompt, found: Inspection, *, as_json: bool) -> None:
    if as_json:
        own = {"backbone": dict(prompt.backbone.to_json())} if prompt.backbone is not None else {}
        terminal.print_json({"template": str(prompt.template), **own, **found.to_json()})
        return
    terminal.heading(str(prompt.template))
    if prompt.backbone is not None:
        terminal.line(f"learned on {terminal.visible(prompt.backbone.described)}")
    table = terminal.table("slot", "started at", "norm", "nearest by cosine", "nearest by distance")
    for index, view in enumerate(found.slots):
        start = "random" if view.start is None else terminal.quoted(view.start)
        table.add_row(str(index), escape(start), f"{view.norm:.2f}", _listed(view.by_cosine), _listed(view.by_distance))
    console = terminal.results()
    console.print(table)
    console.print(
        f"For scale: two tokens lie {found.token_distance:.2f} apart (median), a token and its nearest "
        f"{found.neighbour_distance:.2f}; a token's norm is {found.token_norm:.2f}."
    )
    if not found.scores:
        console.print("Before reading meaning into these tokens: --data FILE scores them in the slots' place.")
        return
    learned, nearest = found.scores["as learned"], found.scores["nearest tokens"]
    console.print(f"score of the slots as learned            {escape(terminal.interval(learned))}, n = {learned.n}")
    console.print(f"score with the nearest token in each     {escape(terminal.interval(nearest))}")
    if nearest.high < learned.value:
        console.print("The nearest tokens do not do what the slots do: read no meaning into them.")


def _listed(neighbours: Sequence[Neighbour]) -> str:
    """Return one neighbour per line: a table would break lines at the spaces that tokens begin with."""
    return escape("\n".join(f"{terminal.quoted(one.token)} {one.value:.2f}" for one in neighbours[:SHOWN_NEIGHBOURS]))
