"""`ptuning eval` and `inspect`: score a prompt, and look inside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from rich.markup import escape

from ptuning.cli import options, terminal
from ptuning.cli.inputs import (
    check_force,
    data_of,
    labelled,
    load,
    prompt_of,
    read_candidates,
    task_of,
)
from ptuning.cli.inputs import (
    group_references as grouped,
)
from ptuning.cli.labels import show_errors, show_labels
from ptuning.cli.options import ANSWERS, DATA, OUTPUT, option
from ptuning.cli.outputs import check_file, write_scored
from ptuning.config import GenerationSettings
from ptuning.errors import ConfigError
from ptuning.metrics import called
from ptuning.metrics.generation import TEXT_METRICS, metrics_of
from ptuning.provenance import described

if TYPE_CHECKING:
    from ptuning.data.questions import Questions
    from ptuning.files import Json
    from ptuning.prompt.inspect import Inspection, Neighbour
    from ptuning.prompt.prompt import Prompt
    from ptuning.prompt.score import Result

# Worst errors of labels, unless another number is asked for.
SHOWN_ERRORS = 10
# Neighbours of a slot on the terminal; JSON holds all.
SHOWN_NEIGHBOURS = 3


def evaluate(
    prompt: options.PromptArgument,
    data: Annotated[str, option("Records with targets.", DATA, metavar="FILE")],
    task: options.TaskOption = None,
    field: options.FieldOption = None,
    group_references: options.GroupOption = False,
    labels: options.LabelsOption = None,
    alias_label: options.AliasLabelOption = None,
    candidates: options.CandidatesOption = None,
    calibrate: options.CalibrateOption = None,
    normalise: options.NormaliseOption = None,
    count_stop: options.CountStopOption = False,
    ablate: options.AblateOption = None,
    force: options.ForceOption = False,
    metrics: Annotated[
        str | None,
        option(f"Of generated texts: {', '.join(TEXT_METRICS)}.", ANSWERS, metavar="LIST", complete=TEXT_METRICS),
    ] = None,
    max_new_tokens: options.MaxTokensOption = None,
    num_beams: options.BeamsOption = None,
    errors: Annotated[
        int | None, option(f"Worst errors to show [default: {SHOWN_ERRORS} of labels].", OUTPUT, metavar="N", min=0)
    ] = None,
    out: options.AnswersOption = None,
    overwrite: options.ReplaceOption = False,
    as_json: options.JsonOption = False,
    backbone: options.BackboneOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    model_arg: options.ModelArgOption = None,
) -> None:
    """Score a prompt on records, with 95 % intervals; labels with per-label scores and a confusion matrix.

    With --metrics, a text is generated for each record and compared with its references.

    Example: ptuning eval capitals --data capitals:test
    """
    choice = options.backbone_of(backbone, dtype, device, model_arg)
    chosen = prompt_of(prompt, task_of(task), ablate=ablate)
    check_force(chosen, force=force)
    if metrics is not None and candidates is not None:
        raise ConfigError("--metrics is for texts that are generated, and --candidates are ranked; leave one out")
    own = chosen.task.text_metrics if chosen.task is not None and candidates is None else ()
    names = [*own] if metrics is None else metrics_of(metrics)
    for name, given in (("--max-new-tokens", max_new_tokens), ("--num-beams", num_beams)):
        if given is not None and not names:
            raise ConfigError(f"{name} is for texts that --metrics scores; other answers are scored without writing")
    check_file(out, overwrite=overwrite, data=data)
    rows = data_of(data, field, chosen.task, part="val", prompt=chosen)
    if candidates is not None:
        chosen.check_open()
    chosen, rows = labelled(chosen, rows, labels, alias_label)
    if candidates is not None and labels is not None:
        chosen.check_open()
    if group_references and chosen.answer_space.is_closed:
        raise ConfigError("--group-references is for generated answers, and the prompt chooses among labels")
    rows = grouped(rows, chosen.task, group=group_references)
    from ptuning.prompt.predict import PromptModel
    from ptuning.prompt.rows import Answering
    from ptuning.prompt.score import check_generation, score_generation, score_prompt
    from ptuning.records import require_fields

    require_fields(rows.records, chosen.template.fields)
    how: dict[str, Any] = {"normalise": normalise, "calibrate": calibrate, "count_stop": count_stop}
    listed = read_candidates(candidates, prompt, data, field)
    Answering(candidates=listed, **how).check(chosen)
    if names:
        check_generation(chosen, rows, names)
    settings = GenerationSettings(max_new_tokens=max_new_tokens, num_beams=num_beams or 1)
    model = PromptModel(load(choice, prompt=chosen), force=force)
    with terminal.bar() as report:
        if names:
            result = score_generation(model, rows, chosen, names, settings=settings, report=report)
        else:
            with_rows = out is not None or bool(errors)
            result = score_prompt(model, rows, chosen, candidates=listed, with_rows=with_rows, report=report, **how)
    if out is not None:
        write_scored(out, result.rows)
    shown = SHOWN_ERRORS if errors is None and result.confusion is not None else errors or 0
    _show_scores(prompt, rows, result, fields=chosen.template.fields, errors=shown, as_json=as_json)


def _show_scores(
    name: str, data: Questions, result: Result, *, fields: Sequence[str], errors: int, as_json: bool
) -> None:
    records, worst = data.records, result.worst(errors)
    places = [records.place(number) for number in range(1, len(records) + 1)]
    if as_json:
        listed: list[Json] = [{"place": places[at], **result.rows[at]} for at in worst]
        more: dict[str, Json] = {"errors": listed} if result.rows else {}
        terminal.print_json({"prompt": name, "data": described(data), **result.to_json(), **more})
        return
    terminal.heading(f"{name} on {data.name}, n = {len(data)}")
    table = terminal.table("score", "value  [95 % interval]")
    for metric, score in result.scores.items():
        table.add_row(called(metric), escape(terminal.interval(score)))
    terminal.results().print(table)
    for metric, signature in result.signatures.items():
        terminal.line(f"{metric}: {signature}")
    terminal.line(f"loss {result.loss:.3f}")
    if result.missing:
        terminal.line(f"{result.missing} of {len(data)} targets are no candidates; they count as misses")
    if result.confusion is not None:
        show_labels(result.confusion)
    if errors:
        show_errors(result.rows, worst, places=places, fields=fields)


def inspect(
    prompt: options.PromptArgument,
    data: Annotated[str | None, option("Score the nearest tokens as well.", DATA, metavar="FILE")] = None,
    field: options.FieldOption = None,
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    backbone: options.BackboneOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    model_arg: options.ModelArgOption = None,
) -> None:
    """Look inside a prompt: the tokens nearest to each slot, and (with --data) whether they mean anything.

    Example: ptuning inspect capitals --data capitals:dev
    """
    choice = options.backbone_of(backbone, dtype, device, model_arg)
    chosen = prompt_of(prompt)
    check_force(chosen, force=force)
    if field and data is None:
        raise ConfigError("--field renames columns of --data; leave it out")
    rows = data_of(data, field, chosen.task, part="val", prompt=chosen) if data is not None else None
    loaded = load(choice, prompt=chosen)
    from ptuning.prompt.inspect import inspect_prompt

    with terminal.bar() as report:
        inspection = inspect_prompt(loaded, chosen, data=rows, force=force, report=report)
    if as_json:
        own = {"backbone": dict(chosen.backbone.to_json())} if chosen.backbone is not None else {}
        terminal.print_json({"template": str(chosen.template), **own, **inspection.to_json()})
        return
    _show_inspection(chosen, inspection)


def _show_inspection(prompt: Prompt, inspection: Inspection) -> None:
    console = terminal.results()
    terminal.heading(str(prompt.template))
    if prompt.backbone is not None:
        terminal.line(f"learned on {terminal.visible(prompt.backbone.described)}")
    if inspection.deep:
        table = terminal.table("deep slot", "started at", "position", "moved (mean over layers)", "most in layer")
        for index, deep in enumerate(inspection.deep):
            start = "no words" if deep.start is None else terminal.quoted(deep.start)
            position = "before the row" if deep.where == "front" else "in the row"
            moved, layer = ("-", "-") if deep.moved is None else (f"{deep.moved:.2f}", str(deep.largest))
            table.add_row(str(index), escape(start), position, moved, layer)
        console.print(table)
    if not inspection.slots:
        return
    table = terminal.table("slot", "started at", "norm", "nearest by cosine", "nearest by distance")
    for index, slot in enumerate(inspection.slots):
        start = "random" if slot.start is None else terminal.quoted(slot.start)
        near = _listed(slot.by_cosine), _listed(slot.by_distance)
        table.add_row(str(index), escape(start), f"{slot.norm:.2f}", *near)
    console.print(table)
    console.print(
        f"For scale: two tokens lie {inspection.token_distance:.2f} apart (median), a token and its nearest "
        f"{inspection.neighbour_distance:.2f}; a token's norm is {inspection.token_norm:.2f}."
    )
    if not inspection.scores:
        console.print("Before reading meaning into these tokens: --data FILE scores them in the slots' place.")
        return
    learned, nearest = inspection.scores["as learned"], inspection.scores["nearest tokens"]
    console.print(f"score of the slots as learned            {escape(terminal.interval(learned))}, n = {learned.n}")
    console.print(f"score with the nearest token in each     {escape(terminal.interval(nearest))}")
    if nearest.high < learned.value:
        console.print("The nearest tokens do not do what the slots do: read no meaning into them.")


def _listed(neighbours: Sequence[Neighbour]) -> str:
    """Return one neighbour per line: a table would break lines at the spaces that tokens begin with."""
    return escape(
        "\n".join(f"{terminal.quoted(near.token)} {near.value:.2f}" for near in neighbours[:SHOWN_NEIGHBOURS])
    )
