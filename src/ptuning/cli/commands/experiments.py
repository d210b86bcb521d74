"""The comparisons: `ptuning compare`, `lama`, `superglue`, and `report`."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ptuning.cli import inputs, options, signals, terminal
from ptuning.cli.comparisons import show_cell, show_estimates, show_jobs, show_part, show_results, shown
from ptuning.cli.options import (
    SETTINGS,
    AskedBackbone,
    EncoderOption,
    FieldOption,
    SetOption,
    StartsOption,
    fields_of,
)
from ptuning.cli.shares import Shares, shares_of
from ptuning.cli.templates import notice_line_breaks, template_and_manual, template_pair
from ptuning.errors import ConfigError
from ptuning.metrics.generation import TEXT_METRICS
from ptuning.names import CELLS_FOLDER
from ptuning.progress import each

if TYPE_CHECKING:
    from ptuning.config import Tune
    from ptuning.experiment.cells import CellResult
    from ptuning.experiment.lama import Targets
    from ptuning.experiment.plan import PlanOptions
    from ptuning.report.exports import Format
    from ptuning.report.results_file import Results

    # Loads the backbone and returns the plan. A command calls it last, once everything else has been read.
    GetPlan = Callable[[], PlanOptions]
else:
    # Typer evaluates annotations, and these types would import torch.
    GetPlan = Results = Any

LamaOption = Annotated[str, typer.Option(metavar="DIR", help="Facts: LAMA's release, or a file or folder a relation.")]
RelationsOption = Annotated[str, typer.Option(metavar="LIST|TYPE|all", help="As P36,P103, or 1-1, N-1, N-M.")]
ControlOption = Annotated[str | None, typer.Option(metavar="random-weights", help="The same on an untrained backbone.")]
TuneOption = Annotated[str, typer.Option(metavar="frozen|head|tuned|lora", help="What p-tuning trains besides slots.")]
VaryOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=V,V", help="As encoder=mlp,none: trained methods with these as well; repeatable."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="List the cells and estimate their time, run nothing.")]
LimitOption = Annotated[int | None, typer.Option(metavar="N", help="Facts per relation, at most.", min=3)]
PairFileOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="As --template, with line breaks as they are; without slots as --manual."),
]
FactFieldOption = Annotated[
    list[str] | None, typer.Option("--field", metavar="NEW=NAME", help="As sub_label=subject; repeatable.")
]
SizeOption = Annotated[int | None, typer.Option(metavar="N", help="Training records, at most: a seeded draw.", min=1)]
VocabularyOption = Annotated[str | None, typer.Option(metavar="FILE|objects", help="Closed set of answers.")]
MetricsOption = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help=f"For texts, with commas: {', '.join(TEXT_METRICS)}; the first one chooses.",
        autocompletion=options.among(*TEXT_METRICS),
    ),
]
ByOption = Annotated[
    str | None, typer.Option(metavar="FIELD", help="Scores by each value of a field of the records as well.")
]
SplitOption = Annotated[int, typer.Option(metavar="N", help="Seed of the split of relations in one file.")]


@contextmanager
@options.takes(shares=shares_of, backbone=options.backbone_options)
def _planned(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results; finished cells in it are kept.")],
    methods: Annotated[str | None, typer.Option(metavar="LIST|all", help="Methods, with commas between.")] = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Trainings with different seeds.", min=1)] = 1,
    tries: Annotated[int, typer.Option(metavar="N", help="Settings each trained method tries.", min=1)] = 1,
    starts: StartsOption = SETTINGS.starts,
    control: ControlOption = None,
    encoder: EncoderOption = SETTINGS.encoder,
    epochs: Annotated[int, typer.Option(metavar="N", help="Passes over the training part.")] = SETTINGS.epochs,
    seed: Annotated[int, typer.Option(metavar="N", help="The first seed.")] = SETTINGS.seed,
    set_: SetOption = None,
    vary: VaryOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results made with other settings.")] = False,
    dry_run: DryRunOption = False,
    log_to: options.LogOption = None,
    *,
    shares: Shares,
    backbone: AskedBackbone,
) -> Iterator[GetPlan]:
    """Turn the options that all comparisons share into a plan. Show progress and cells, and stop at a signal."""
    if control not in (None, "random-weights"):
        raise ConfigError(f"--control is random-weights, not '{control}'")
    config = options.config_of(set_, encoder=encoder, epochs=epochs, seed=seed, starts=starts)
    varied = options.varied_by(vary, config)
    part, crew = shares.own, shares.crew(backbone, dry_run=dry_run)
    with signals.stoppable(out, kept=out / CELLS_FOLDER if part else None) as (progress, should_stop):
        from ptuning.experiment.plan import Watch
        from ptuning.training.tracking import TrainingLog

        log = TrainingLog(log_to or (), shares.log_folder(out), together=True)
        clock = terminal.Clock()

        def on_cell(result: CellResult, number: int, total: int) -> None:
            show_cell(result, number, total, more="" if terminal.is_live() else f"; {clock.text}")

        def plan() -> PlanOptions:
            return {
                "out": out,
                "backbone": inputs.load(backbone),
                "methods": methods,
                "seeds": seeds,
                "tries": tries,
                "control": control is not None,
                "config": config,
                "vary": varied,
                "overwrite": overwrite,
                "dry_run": dry_run,
                "part": part,
                "workers": crew,
                "command": options.command_line(),
                "watch": Watch(
                    report=each(clock, shown(progress, crew), log),
                    should_stop=should_stop,
                    on_cell=on_cell,
                    on_jobs=show_jobs,
                    on_estimate=show_estimates,
                ),
            }

        with log:
            yield plan


def _comparison(**defaults: object) -> Callable[[Callable[..., Results]], Callable[..., None]]:
    """Return a decorator that adds the options of :func:`_planned`, with other defaults, and prints results."""

    def decorate(command: Callable[..., Results]) -> Callable[..., None]:
        own, shared = (dict(inspect.signature(one, eval_str=True).parameters) for one in (command, _planned))
        del own["plan"]
        shared = {name: one.replace(default=defaults.get(name, one.default)) for name, one in shared.items()}

        @functools.wraps(command)
        def run(**given: Any) -> None:
            asked = {name: given.pop(name) for name in shared}
            with _planned(**asked) as plan:
                found = command(**given, plan=plan)
            if asked["part"] is not None and not asked["dry_run"]:
                show_part(found, asked["part"])
            elif not asked["dry_run"]:
                show_results(found)
            if found.failed:
                raise typer.Exit(1)

        return options.signed(run, [*own.values(), *shared.values()])

    return decorate


@_comparison(out=Path("runs/compare"))
def compare(
    data: Annotated[str, typer.Option(metavar="TRAIN", help="Data file, or NAME:train of the shipped facts.")],
    plan: GetPlan,
    test: Annotated[
        str | None, typer.Option(metavar="TEST", help="Data to report on; it chooses nothing. Else a part of TRAIN.")
    ] = None,
    manual: Annotated[
        str | None, typer.Option(metavar="M", help='Manual template, as "The capital of [X] is [Y]".')
    ] = None,
    dev: Annotated[str | None, typer.Option(metavar="DEV", help="Data to choose by; else a part of TRAIN.")] = None,
    template: Annotated[str | None, typer.Option(metavar="T", help="Template to learn; else made of M.")] = None,
    template_file: PairFileOption = None,
    labels: options.LabelsOption = None,
    merge: options.MergeOption = None,
    strict: options.StrictOption = False,
    task: options.TaskOption = None,
    pattern: Annotated[int | None, typer.Option(metavar="N", help="Which template of the task, from 1.")] = None,
    vocabulary: VocabularyOption = None,
    train_size: SizeOption = None,
    metrics: MetricsOption = None,
    num_beams: options.BeamsOption = None,
    by: ByOption = None,
    gather: options.GatherOption = False,
    field: FieldOption = None,
) -> Results:
    """Compare methods on your own data: is a learned prompt worth it?

    With --metrics, or a task file that names metrics for texts, every method writes a text for each test record.

    Example: ptuning compare --data capitals:train --dev capitals:dev --test capitals:test
    --manual "The capital of [X] is [Y]" --out runs/capitals
    """
    file = inputs.task_of(task)
    template, manual = template_and_manual(template, manual, template_file, both=True)
    pair = template_pair(file, manual, template, pattern)
    sources = {"train": data, "dev": dev, "test": test}
    parts = inputs.read_parts(sources, field, file, reads=pair[0].fields)
    rows = inputs.looked_at(parts, labels, merge, file, reads=pair[0].fields, strict=strict)
    from ptuning.experiment.compare import compare_labelled as run

    planned = plan()
    for given in (manual, template):
        notice_line_breaks(given, planned["backbone"].tokenizer)
    return run(
        rows,
        manual=pair[0],
        template=pair[1],
        task=file,
        vocabulary=vocabulary,
        train_size=train_size,
        metrics=metrics,
        num_beams=1 if num_beams is None else num_beams,
        by=by,
        gather=gather,
        # It becomes a folder.
        name=re.sub(r"[^\w.+=-]+", "-", Path(data).stem.partition(":")[0]).strip("-.+=")[:100] or "task",
        **planned,
    )


@_comparison()
def lama(
    data: LamaOption,
    plan: GetPlan,
    relations: RelationsOption = "all",
    manual: Annotated[
        str | None, typer.Option(metavar="M", help="Manual template of relations that have none.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(metavar="T", help="One for all; else made of each manual one.")
    ] = None,
    template_file: PairFileOption = None,
    limit: LimitOption = None,
    train_size: SizeOption = None,
    targets: Annotated[
        str, typer.Option(metavar="token|any", help="Objects of one token, or of any length.")
    ] = "token",
    vocabulary: VocabularyOption = None,
    split_seed: SplitOption = 0,
    field: FactFieldOption = None,
) -> Results:
    """Run the paper's LAMA experiment: every method on every relation, with a report.

    Own facts: --data FILE --field sub_label=NAME --field obj_label=NAME --manual "[X] is in [Y]"; if FILE has several
    relations, --field predicate_id=NAME.

    Example: ptuning lama --data LAMA --relations P36,P103 --out runs/lama
    """
    if targets not in ("token", "any"):
        raise ConfigError(f"--targets is token or any, not '{targets}'")
    template, manual = template_and_manual(template, manual, template_file, both=True)
    from ptuning.experiment.lama import lama as run

    return run(
        data,
        relations=relations,
        manual=manual,
        template=template,
        limit=limit,
        train_size=train_size,
        targets=cast("Targets", targets),
        vocabulary=vocabulary,
        split_seed=split_seed,
        fields=fields_of(field),
        **plan(),
    )


@_comparison(seeds=3)
def superglue(
    data: Annotated[str, typer.Option(metavar="DIR", help="Folder with one folder per task: SuperGLUE, FewGLUE.")],
    plan: GetPlan,
    tasks: Annotated[str, typer.Option(metavar="LIST|all", help="As BoolQ,CB,COPA; or task files.")] = "all",
    few_shot: Annotated[
        int | None, typer.Option(metavar="K", help="Learn from K examples and choose by K others, drawn by seed.")
    ] = None,
    tune: TuneOption = SETTINGS.tune,
    pattern: Annotated[int, typer.Option(metavar="N", help="Which of a task's patterns.", min=1)] = 1,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Report on N rows: a seeded draw.", min=2)] = None,
    server: Annotated[bool, typer.Option("--server/--no-server", help="Answer the test split for the server.")] = True,
) -> Results:
    """Run the paper's SuperGLUE experiment: every method on every task, fully supervised or with a few examples.

    Example: ptuning superglue --data FewGLUE --tasks RTE,CB --methods majority,manual,p-tuning --out runs/few
    """
    from ptuning.experiment.superglue import superglue as run

    return run(
        data,
        tasks=tasks,
        few_shot=few_shot,
        pattern=pattern,
        limit=limit,
        tune=cast("Tune", tune),
        server=server,
        **plan(),
    )


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of results.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Of several folders: where the report goes [report, beside them]."),
    ] = None,
    latex: Annotated[bool, typer.Option("--latex", help="Every table as LaTeX, too, in tables/.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Every table as CSV, too, with unrounded numbers.")] = False,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Rebuild the tables, pictures and pages of results from their JSON alone; of several folders as one report.

    Example: ptuning report runs/lstm runs/mlp --out runs/encoders --latex
    """
    formats: list[Format] = [name for name, asked in (("latex", latex), ("csv", csv)) if asked]  # type: ignore[misc]
    with terminal.waiting("writing the report"):
        from ptuning.report.write import write_pages, write_report

        if len(folders) == 1 and out is None:
            page = write_report(folders[0], formats=formats)
        else:
            from ptuning.experiment.merge import merged

            results = merged(folders)
            beside = results.folder / "report"
            if beside.is_relative_to(Path.cwd()):
                beside = beside.relative_to(Path.cwd())
            page = write_pages(results, beside if out is None else out, formats=formats)
    terminal.line(str(page))
    if open_:
        typer.launch(str(page))
