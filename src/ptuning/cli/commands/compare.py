"""`ptuning compare`, with its suites `lama` and `superglue`, and `ptuning report`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptuning.cli import inputs, options, signals, terminal
from ptuning.cli.comparisons import show_cell, show_estimates, show_jobs, show_part, show_results
from ptuning.cli.inputs import notice_line_breaks, text_or_file
from ptuning.cli.options import DATA, OUTPUT, TEMPLATE, TRAINING, Shares, fields_of, option, pairs_of, values_of
from ptuning.config import listed_names, setting_of
from ptuning.errors import ConfigError
from ptuning.metrics.generation import TEXT_METRICS
from ptuning.names import CELLS_FOLDER
from ptuning.progress import each
from ptuning.training.spec import template_pair

if TYPE_CHECKING:
    from ptuning.experiment.cells import CellResult
    from ptuning.progress import OnProgress, Progress
    from ptuning.report.results_file import Results
    from ptuning.report.write import Format

# Suite -> option -> the argument of its Python function. Other options cannot act there and are refused.
SUITES: Mapping[str, Mapping[str, str]] = {
    "lama": {
        "task": "relations", "manual": "manual", "template": "template", "vocabulary": "vocabulary",
        "train_size": "train_size", "fields": "fields", "limit": "limit", "targets": "targets",
        "split_seed": "split_seed",
    },
    "superglue": {"task": "tasks", "train_size": "few_shot", "pattern": "pattern", "limit": "limit"},
}  # fmt: skip
# Arguments that have no option of their own: --arg NAME=VALUE; and those that only suites have.
ARGS = ("tries", "num_beams", "gather", "strict", "pattern", "limit", "targets", "split_seed")
ONLY_SUITES = ("limit", "targets", "split_seed")


def compare(
    data: Annotated[str, option("Training data; the folder of a suite.", DATA, metavar="TRAIN|DIR")],
    suite: Annotated[
        str | None,
        option("An experiment of the paper, on many tasks.", DATA, metavar="|".join(SUITES), complete=SUITES),
    ] = None,
    task: Annotated[
        str | None,
        option(
            "Task; of a suite several, as P36,P103 or 1-1, or BoolQ,CB.",
            DATA,
            metavar="NAME|FILE|LIST",
            autocompletion=options.shipped_tasks,
        ),
    ] = None,
    test: Annotated[str | None, option("Test data [default: a split of TRAIN].", DATA, metavar="TEST")] = None,
    dev: Annotated[str | None, option("Validation data [default: a split of TRAIN].", DATA, metavar="DEV")] = None,
    train_size: Annotated[
        int | None, option("Number of training records, drawn by seed.", DATA, metavar="N", min=1)
    ] = None,
    field: options.FieldOption = None,
    by: Annotated[str | None, option("Scores by each value of a field, too.", DATA, metavar="FIELD")] = None,
    manual: Annotated[
        str | None, option('Manual template, as "The capital of [X] is [Y]".', TEMPLATE, metavar="M|@FILE")
    ] = None,
    template: Annotated[
        str | None, option("Template to learn [default: made of M].", TEMPLATE, metavar="T|@FILE")
    ] = None,
    labels: options.LabelsOption = None,
    alias_label: options.AliasLabelOption = None,
    vocabulary: Annotated[str | None, option("Closed set of answers.", TEMPLATE, metavar="FILE|objects")] = None,
    metrics: Annotated[
        str | None,
        option(
            f"For generated texts: {', '.join(TEXT_METRICS)}; the first one chooses.",
            TEMPLATE,
            metavar="LIST",
            complete=TEXT_METRICS,
        ),
    ] = None,
    methods: Annotated[
        str | None,
        option("Methods; NAME@random-weights is the control of a trained one.", TRAINING, metavar="LIST|all"),
    ] = None,
    seeds: Annotated[int | None, option("Number of seeds [1; superglue: 3].", TRAINING, metavar="N", min=1)] = None,
    epochs: Annotated[int | None, option("Passes over the training data.", TRAINING, metavar="N")] = None,
    set_: options.SetOption = None,
    vary: Annotated[
        list[str] | None,
        option("As encoder=mlp,none: trained methods with these too; repeatable.", TRAINING, metavar="NAME=V,V"),
    ] = None,
    arg: Annotated[
        list[str] | None, option(f"Other argument: {', '.join(ARGS)}; repeatable.", TRAINING, metavar="NAME=VALUE")
    ] = None,
    part: options.PartOption = None,
    workers: options.WorkersOption = None,
    ray: options.RayOption = None,
    gpus_per_worker: options.GpusOption = None,
    out: Annotated[Path, option("Folder of the results; finished cells in it are kept.", OUTPUT, metavar="DIR")] = Path(
        "runs/compare"
    ),
    overwrite: options.ReplaceOption = False,
    dry_run: Annotated[bool, option("List the cells and their estimated time.", OUTPUT, "--dry-run")] = False,
    log_to: options.LogOption = None,
    backbone: options.BackboneOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    model_arg: options.ModelArgOption = None,
) -> None:
    """Compare methods on your own data, or repeat an experiment of the paper: is a learned prompt worth it?

    Example: ptuning compare --data capitals:train --dev capitals:dev --test capitals:test
    --manual "The capital of [X] is [Y]" --out runs/capitals
    """
    choice = options.backbone_of(backbone, dtype, device, model_arg)
    arguments: dict[str, Any] = {
        "task": task, "test": test, "dev": dev, "train_size": train_size, "fields": fields_of(field), "by": by,
        "manual": text_or_file(manual), "template": text_or_file(template), "labels": labels,
        "alias_label": alias_label, "vocabulary": vocabulary, "metrics": metrics,
    }  # fmt: skip
    extra = values_of(arg, "--arg", "limit=100", known=ARGS)
    tries = extra.pop("tries", None)
    arguments = {name: value for name, value in arguments.items() if value} | extra
    config = options.config_of(set_, epochs=epochs)
    varied = {
        name.replace("-", "_"): [setting_of(f"{name}={value}")[1] for value in listed_names(values)]
        for name, values in pairs_of(vary, "--vary", "encoder=mlp,none").items()
    }
    start = _own_data(data, arguments) if suite is None else _suite(suite, data, arguments)
    shares = Shares.of(part, workers, ray, gpus_per_worker, backbone=choice, dry_run=dry_run)
    with signals.stoppable(out, kept=out / CELLS_FOLDER if part else None) as (report, should_stop):
        from ptuning.experiment.comparison import Watch
        from ptuning.training.tracking import TrainingLog

        log = TrainingLog(log_to or (), shares.log_folder(out), together=True)
        clock = terminal.Clock()

        def on_cell(result: CellResult, number: int, total: int) -> None:
            show_cell(result, number, total, more="" if terminal.is_live() else f"; {clock.text}")

        with log:
            results = start(
                out=out,
                backbone=inputs.load(choice),
                methods=methods,
                seeds=seeds,
                tries=tries,
                config=config,
                explicit=config.model_fields_set,
                vary=varied,
                overwrite=overwrite,
                dry_run=dry_run,
                part=shares.part,
                workers=shares.workers,
                command=options.command_line(),
                watch=Watch(
                    report=each(clock, _shown(report, together=shares.workers is not None), log),
                    should_stop=should_stop,
                    on_cell=on_cell,
                    on_jobs=show_jobs,
                    on_estimate=show_estimates,
                ),
            )
    if part is not None and not dry_run:
        show_part(results, part)
    elif not dry_run:
        show_results(results)
    if results.failed:
        raise typer.Exit(1)


def _shown(report: OnProgress, *, together: bool) -> OnProgress:
    """Leave out lines per epoch, which would bury those per cell, and bars of trainings that run ``together``."""

    def show(now: Progress) -> None:
        if now.stage == "suite" if together else now.stage != "epoch":
            report(now)

    return show


def _suite(suite: str, data: str, given: Mapping[str, Any]) -> Callable[..., Results]:
    """Return a suite that only needs its plan; a ConfigError for an argument that it does not have."""
    if suite not in SUITES:
        raise ConfigError(f"--suite is {' or '.join(SUITES)}, not '{suite}'")
    for name in given:
        if name not in SUITES[suite]:
            shown = f"--arg {name}" if name in ARGS else f"--{name.removesuffix('s' * (name == 'fields'))}"
            raise ConfigError(f"{shown.replace('_', '-')} has no effect with --suite {suite}")
    from ptuning.experiment.suites import lama, superglue

    arguments: dict[str, Any] = {SUITES[suite][name]: value for name, value in given.items()}
    return functools.partial(lama if suite == "lama" else superglue, data, **arguments)


def _own_data(data: str, arguments: dict[str, Any]) -> Callable[..., Results]:
    """Return a comparison that only needs its plan; the data are read and checked first."""
    from ptuning.data.checks import label_rows
    from ptuning.data.sources import DataReader

    for name in arguments:
        if name in ONLY_SUITES:
            raise ConfigError(f"--arg {name} goes with --suite")
    manual, template = arguments.get("manual"), arguments.get("template")
    task = inputs.task_of(arguments.pop("task", None))
    pair = template_pair(task, manual, template, arguments.pop("pattern", None))
    reader = DataReader(task, arguments.pop("fields", {}))
    sources = {"train": data, "dev": arguments.pop("dev", None), "test": arguments.pop("test", None)}
    parts = reader.read_parts(sources, reads=pair[0].fields)
    inputs.say_notes(reader.notes)
    labels, merge, strict = (arguments.pop(name, None) for name in ("labels", "alias_label", "strict"))
    known = task.label_words if task is not None else None
    rows = label_rows(parts, labels, fields=pair[0].fields, known=known, merge=merge, strict=bool(strict))
    inputs.show_findings(rows.report)
    from ptuning.experiment.compare import compare as compare_own

    # The name becomes a folder.
    name = re.sub(r"[^\w.+=-]+", "-", Path(data).stem.partition(":")[0]).strip("-.+=")[:100] or "task"
    arguments |= {"manual": pair[0], "template": pair[1], "task": task, "name": name}

    def run(**plan: Any) -> Results:
        for text in (manual, template):
            notice_line_breaks(text, plan["backbone"].tokenizer)
        return compare_own(rows, **arguments, **plan)

    return run


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of results.")],
    out: Annotated[
        Path | None, option("Of several folders: where the report goes [report, next to them].", OUTPUT, metavar="DIR")
    ] = None,
    latex: Annotated[bool, option("Every table as LaTeX, too, in tables/.", OUTPUT, "--latex")] = False,
    csv: Annotated[bool, option("Every table as CSV, too, with unrounded numbers.", OUTPUT, "--csv")] = False,
    open_: Annotated[bool, option("Open the page in the browser.", OUTPUT, "--open")] = False,
) -> None:
    """Rebuild the tables, pictures and pages of results from their JSON alone; of several folders as one report.

    Example: ptuning report runs/lstm runs/mlp --out runs/encoders --latex
    """
    formats: list[Format] = [*(("latex",) if latex else ()), *(("csv",) if csv else ())]
    with terminal.waiting("writing the report"):
        from ptuning.report.write import write_report

        if len(folders) == 1 and out is None:
            page = write_report(folders[0], formats=formats)
        else:
            from ptuning.experiment.results import merged

            results = merged(folders)
            place = results.folder / "report" if out is None else out
            if place.is_relative_to(Path.cwd()):
                place = place.relative_to(Path.cwd())
            page = write_report(results, place, formats=formats)
    terminal.line(str(page))
    if open_:
        typer.launch(str(page))
