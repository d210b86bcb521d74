"""`ptuning eval` and `inspect`: score a prompt, and look inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from rich.markup import escape
from rich.table import Table

from ptuning.cli import options, terminal
from ptuning.cli.commands.predict import check_force
from ptuning.cli.inputs import data_of, gathered_rows, labelled, load, prompt_of, read_candidates, task_of
from ptuning.cli.labels import show_errors, show_labels
from ptuning.cli.options import ANSWERS, DATA, OUTPUT, option
from ptuning.cli.outputs import check_file, write_scored
from ptuning.config import GenerationSettings
from ptuning.errors import ConfigError
from ptuning.metrics import called
from ptuning.metrics.generation import TEXT_METRICS, metrics_of
from ptuning.provenance import described

if TYPE_CHECKING:
    from ptuning.backbone.backbone import Backbone
    from ptuning.data.questions import Questions
    from ptuning.files import Json
    from ptuning.prompt.inspect import DeepView, Inspection, Neighbour
    from ptuning.prompt.prompt import Prompt
    from ptuning.prompt.score import Result
    from ptuning.records import Records

# Worst errors of labels, unless another number is asked for.
SHOWN_ERRORS = 10
METRICS_HELP = f"For texts, with commas: {', '.join(TEXT_METRICS)}."
# Neighbours of a slot on the terminal; JSON holds all.
SHOWN_NEIGHBOURS = 3


@options.takes(backbone=options.backbone_options)
def evaluate(
    prompt: options.PromptArgument,
    data: Annotated[str, option(metavar="FILE", panel=DATA, about="Records with targets.")],
    task: options.TaskOption = None,
    field: options.FieldOption = None,
    group_references: options.GatherOption = False,
    labels: options.LabelsOption = None,
    alias_label: options.MergeOption = None,
    candidates: options.CandidatesOption = None,
    calibrate: options.CalibrateOption = None,
    normalise: options.NormaliseOption = None,
    count_stop: options.CountStopOption = False,
    ablate: options.WithoutOption = None,
    force: options.ForceOption = False,
    metrics: Annotated[
        str | None,
        option(metavar="LIST", panel=ANSWERS, about=METRICS_HELP, complete=TEXT_METRICS),
    ] = None,
    max_new_tokens: options.LongestOption = None,
    num_beams: options.BeamsOption = None,
    errors: Annotated[
        int | None,
        option(metavar="N", panel=OUTPUT, about=f"Worst errors to show [default: {SHOWN_ERRORS} of labels].", min=0),
    ] = None,
    out: options.AnswersOption = None,
    overwrite: options.ReplaceOption = False,
    as_json: options.JsonOption = False,
    *,
    backbone: options.AskedBackbone,
) -> None:
    """Score a prompt on records, with 95 % intervals; labels with per-label scores and a confusion matrix.

    With --metrics, a text is generated for each record and compared with its references.

    Example: ptuning eval capitals --data capitals:test
    """
    from ptuning.records import require_fields

    chosen = prompt_of(prompt, task_of(task), ablate=ablate)
    check_force(chosen, force=force)
    own = chosen.task.text_metrics if chosen.task is not None and candidates is None else ()
    named = _metrics_of(metrics, own, max_new_tokens=max_new_tokens, num_beams=num_beams, candidates=candidates)
    check_file(out, overwrite=overwrite, data=data)
    rows = data_of(data, field, chosen.task, part="val", prompt=chosen)
    if candidates is not None:
        chosen.check_open()
    chosen, rows = labelled(chosen, rows, labels, alias_label)
    if group_references and chosen.answer_space.is_closed:
        raise ConfigError("--group-references is for generated answers, and the prompt chooses among labels")
    rows = gathered_rows(rows, chosen.task, group=group_references)
    if candidates is not None and labels is not None:
        chosen.check_open()
    records = rows.records
    require_fields(records, chosen.template.fields)
    how = options.scoring_of(
        chosen, normalise=normalise, calibrate=calibrate, count_stop=count_stop, candidates=candidates is not None
    )
    listed = read_candidates(candidates, prompt, data, field) if candidates is not None else None
    if named:
        from ptuning.prompt.score_generation import check_generation

        check_generation(chosen, rows, named)
    loaded = load(backbone, prompt=chosen)
    settings = GenerationSettings(max_new_tokens=max_new_tokens, num_beams=num_beams or 1)
    if not named:
        how |= {"candidates": listed, "with_rows": out is not None or bool(errors)}
    found = _scored(loaded, chosen, rows, named, settings=settings, force=force, how=how)
    if out is not None:
        write_scored(out, found.rows)
    most = SHOWN_ERRORS if errors is None and found.confusion is not None else errors or 0
    _show_scores(prompt, rows, found, records=records, fields=chosen.template.fields, errors=most, as_json=as_json)


def _metrics_of(
    metrics: str | None,
    own: Sequence[str],
    *,
    max_new_tokens: int | None,
    num_beams: int | None,
    candidates: str | None,
) -> list[str]:
    """Return the metrics for texts that are asked for, or the task's ``own``; none if answers are scored as ever."""
    if metrics is None and own:
        return [*own]
    if metrics is not None:
        if candidates is not None:
            raise ConfigError("--metrics is for texts that are written, and --candidates are ranked; leave one out")
        return metrics_of(metrics)
    for name, given in (("--max-new-tokens", max_new_tokens), ("--num-beams", num_beams)):
        if given is not None:
            raise ConfigError(f"{name} is for texts that --metrics scores; other answers are scored without writing")
    return []


def _scored(
    backbone: Backbone,
    prompt: Prompt,
    rows: Questions,
    metrics: Sequence[str],
    *,
    settings: GenerationSettings,
    force: bool,
    how: Mapping[str, Any],
) -> Result:
    """Score a prompt: the texts that it writes by ``metrics``, if some are asked of texts, else its answers."""
    from ptuning.prompt.predict import PromptModel
    from ptuning.prompt.score import score_prompt
    from ptuning.prompt.score_generation import score_generation

    with terminal.bar() as report:
        model = PromptModel(backbone, force=force)
        if metrics:
            return score_generation(model, rows, prompt, metrics, settings=settings, report=report)
        return score_prompt(model, rows, prompt, report=report, **how)


@options.takes(backbone=options.backbone_options)
def inspect(
    prompt: options.PromptArgument,
    data: Annotated[str | None, option(metavar="FILE", panel=DATA, about="Score the nearest tokens as well.")] = None,
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
    check_force(chosen, force=force)
    if field and data is None:
        raise ConfigError("--field renames columns of --data; leave it out")
    rows = data_of(data, field, chosen.task, part="val", prompt=chosen) if data is not None else None
    loaded = load(backbone, prompt=chosen)
    from ptuning.prompt.inspect import inspect_prompt

    with terminal.bar() as report:
        found = inspect_prompt(loaded, chosen, data=rows, force=force, report=report)
    _show_inspection(chosen, found, as_json=as_json)


def _show_scores(
    name: str,
    data: Records | Questions,
    found: Result,
    *,
    records: Records,
    fields: Sequence[str],
    errors: int,
    as_json: bool,
) -> None:
    worst, places = found.worst(errors), [records.place(number) for number in range(1, len(records) + 1)]
    if as_json:
        listed: list[Json] = [{"place": places[at], **found.rows[at]} for at in worst]
        more: dict[str, Json] = {"errors": listed} if found.rows else {}
        terminal.print_json({"prompt": name, "data": described(data), **found.to_json(), **more})
        return
    terminal.heading(f"{name} on {data.name}, n = {len(data)}")
    table = terminal.table("score", "value  [95 % interval]")
    for metric, score in found.scores.items():
        table.add_row(called(metric), escape(terminal.interval(score)))
    terminal.results().print(table)
    for metric, signature in found.signatures.items():
        terminal.line(f"{metric}: {signature}")
    terminal.line(f"loss {found.loss:.3f}")
    if found.missing:
        terminal.line(f"{found.missing} of {len(data)} targets are no candidates; they count as misses")
    if found.confusion is not None:
        show_labels(found.confusion)
    if errors:
        show_errors(found.rows, worst, places=places, fields=fields)


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
    if found.deep:
        console.print(_deep_table(found.deep))
    if not found.slots:
        return
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


def _deep_table(views: Sequence[DeepView]) -> Table:
    """Return the table of deep slots: how far each moved in the layers, and in which the most."""
    table = terminal.table("deep slot", "started at", "stands", "moved (mean over layers)", "most in layer")
    for index, view in enumerate(views):
        start = "no words" if view.start is None else terminal.quoted(view.start)
        stands = "in front" if view.where == "front" else "in the row"
        moved, layer = ("-", "-") if view.moved is None else (f"{view.moved:.2f}", str(view.largest))
        table.add_row(str(index), escape(start), stands, moved, layer)
    return table


def _listed(neighbours: Sequence[Neighbour]) -> str:
    """Return one neighbour per line: a table would break lines at the spaces that tokens begin with."""
    return escape("\n".join(f"{terminal.quoted(one.token)} {one.value:.2f}" for one in neighbours[:SHOWN_NEIGHBOURS]))
