"""`ptuning compare`, with its suites `lama` and `superglue`, and `ptuning report`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptuning.cli import inputs, options, signals, terminal
from ptuning.cli.comparisons import show_cell, show_estimates, show_jobs, show_part, show_results, shown
from ptuning.cli.inputs import notice_line_breaks, text_or_file
from ptuning.cli.options import AskedBackbone, Shares, fields_of, named_values, setting_name, shares_of
from ptuning.config import setting_of
from ptuning.errors import ConfigError, closest
from ptuning.metrics.generation import TEXT_METRICS
from ptuning.names import CELLS_FOLDER
from ptuning.progress import each
from ptuning.training.spec import template_pair

if TYPE_CHECKING:
    from ptuning.experiment.cells import CellResult
    from ptuning.report.results_file import Results
    from ptuning.report.write import Format

# Comparison -> option -> the argument of its Python function. Other options cannot act there and are refused.
ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "compare": {
        name: name
        for name in (
            "test", "dev", "task", "manual", "template", "labels", "merge", "vocabulary", "train_size", "metrics", "by",
            "field", "num_beams", "gather", "strict", "pattern",
        )
    },
    "lama": {
        "task": "relations", "manual": "manual", "template": "template", "vocabulary": "vocabulary",
        "train_size": "train_size", "field": "fields", "limit": "limit", "targets": "targets",
        "split_seed": "split_seed",
    },
    "superglue": {"task": "tasks", "train_size": "few_shot", "pattern": "pattern", "limit": "limit"},
}  # fmt: skip
# Arguments that have no option of their own: --arg NAME=VALUE.
EXTRA = ("tries", "num_beams", "gather", "strict", "pattern", "limit", "targets", "split_seed")


@options.takes(shares=shares_of, backbone=options.backbone_options)
def compare(
    data: Annotated[str, typer.Option(metavar="TRAIN|DIR", help="Training data; the folder of a suite.")],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the results; finished cells in it are kept.")
    ] = Path("runs/compare"),
    suite: Annotated[
        str | None,
        typer.Option(metavar="lama|superglue", help="An experiment of the paper, on many tasks."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE|LIST",
            help="Task; of a suite several, as P36,P103 or 1-1, or BoolQ,CB.",
            autocompletion=options.shipped_tasks,
        ),
    ] = None,
    test: Annotated[str | None, typer.Option(metavar="TEST", help="Test data [a split of TRAIN].")] = None,
    dev: Annotated[str | None, typer.Option(metavar="DEV", help="Validation data [a split of TRAIN].")] = None,
    manual: Annotated[
        str | None,
        typer.Option(metavar="M|@FILE", help='Manual template, as "The capital of [X] is [Y]".'),
    ] = None,
    template: Annotated[
        str | None, typer.Option(metavar="T|@FILE", help="Template to learn [made of the manual one].")
    ] = None,
    labels: options.LabelsOption = None,
    merge: options.MergeOption = None,
    vocabulary: Annotated[str | None, typer.Option(metavar="FILE|objects", help="Closed set of answers.")] = None,
    train_size: Annotated[
        int | None, typer.Option(metavar="N", help="Number of training records, drawn by seed.", min=1)
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help=f"For generated texts: {', '.join(TEXT_METRICS)}; the first one chooses.",
            autocompletion=options.among(*TEXT_METRICS),
        ),
    ] = None,
    by: Annotated[str | None, typer.Option(metavar="FIELD", help="Scores by each value of a field, too.")] = None,
    field: options.FieldOption = None,
    arg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help=f"Other argument: {', '.join(EXTRA)}; repeatable."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(metavar="LIST|all", help="Methods; NAME@random-weights is the control of a trained one."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(metavar="N", help="Number of seeds [1; superglue: 3].", min=1)] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Passes over the training data.")] = None,
    set_: options.SetOption = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=V,V", help="As encoder=mlp,none: trained methods with these too; repeatable."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results made with other settings.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and their estimated time.")] = False,
    log_to: options.LogOption = None,
    *,
    shares: Shares,
    backbone: AskedBackbone,
) -> None:
    """Compare methods on your own data, or repeat an experiment of the paper: is a learned prompt worth it?

    Example: ptuning compare --data capitals:train --dev capitals:dev --test capitals:test
    --manual "The capital of [X] is [Y]" --out runs/capitals
    """
    given: dict[str, Any] = {
        "test": test, "dev": dev, "task": task, "manual": text_or_file(manual), "template": text_or_file(template),
        "labels": labels, "merge": merge, "vocabulary": vocabulary, "train_size": train_size, "metrics": metrics,
        "by": by, "field": field,
    }  # fmt: skip
    extra = _extra(arg or ())
    tries = extra.pop("tries", None)
    arguments = _arguments(suite or "compare", {name: value for name, value in given.items() if value} | extra)
    pairs = [*(set_ or ()), *([] if epochs is None else [f"epochs={epochs}"])]
    config = options.config_of(pairs)
    explicit = [setting_name(pair.partition("=")[0]) for pair in pairs]
    varied = options.varied_by(vary, config)
    start = _started(suite, data, arguments)
    part, workers = shares.own, shares.pool(backbone, dry_run=dry_run)
    with signals.stoppable(out, kept=out / CELLS_FOLDER if part else None) as (progress, should_stop):
        from ptuning.experiment.comparison import Watch
        from ptuning.training.tracking import TrainingLog

        log = TrainingLog(log_to or (), shares.log_folder(out), together=True)
        clock = terminal.Clock()

        def on_cell(result: CellResult, number: int, total: int) -> None:
            show_cell(result, number, total, more="" if terminal.is_live() else f"; {clock.text}")

        with log:
            results = start(
                out=out,
                backbone=inputs.load(backbone),
                methods=methods,
                seeds=seeds,
                tries=tries,
                config=config,
                explicit=explicit,
                vary=varied,
                overwrite=overwrite,
                dry_run=dry_run,
                part=part,
                workers=workers,
                command=options.command_line(),
                watch=Watch(
                    report=each(clock, shown(progress, workers), log),
                    should_stop=should_stop,
                    on_cell=on_cell,
                    on_jobs=show_jobs,
                    on_estimate=show_estimates,
                ),
            )
    if part is not None and not dry_run:
        show_part(results, str(part))
    elif not dry_run:
        show_results(results)
    if results.failed:
        raise typer.Exit(1)


def _extra(pairs: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Return the arguments of ``--arg NAME=VALUE``."""
    found = {}
    for name, text in named_values(pairs, expected="--arg NAME=VALUE, such as limit=100").items():
        plain = name.replace("-", "_")
        if plain not in EXTRA:
            raise ConfigError(f"unknown argument '{name}'.{closest(name, EXTRA)} Known: {', '.join(EXTRA)}")
        found[plain] = {"true": True, "false": False}.get(text, setting_of(f"{plain}={text}")[1])
    return found


def _arguments(suite: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a comparison's function; a ConfigError for one that it does not have."""
    if suite not in ARGUMENTS:
        raise ConfigError(f"--suite is lama or superglue, not '{suite}'")
    known = ARGUMENTS[suite]
    for name in given:
        if name not in known:
            where = "--suite" if suite == "compare" else f"--suite {suite}"
            has = "goes with" if suite == "compare" else "has no effect with"
            option = f"--arg {name}" if name in EXTRA else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} {has} {where}")
    arguments = {known[name]: value for name, value in given.items()}
    if "fields" in arguments:
        arguments["fields"] = fields_of(arguments["fields"])
    return arguments


def _started(suite: str | None, data: str, arguments: dict[str, Any]) -> Callable[..., Results]:
    """Return a comparison that only needs its plan; own data are read and checked first."""
    if suite == "lama":
        from ptuning.experiment.suites import lama

        return functools.partial(lama, data, **arguments)
    if suite == "superglue":
        from ptuning.experiment.suites import superglue

        return functools.partial(superglue, data, **arguments)
    file = inputs.task_of(arguments.get("task"))
    manual, template = arguments.get("manual"), arguments.get("template")
    pair = template_pair(file, manual, template, arguments.pop("pattern", None))
    sources = {"train": data, "dev": arguments.pop("dev", None), "test": arguments.pop("test", None)}
    parts = inputs.read_parts(sources, arguments.pop("field", None), file, reads=pair[0].fields)
    labels, merge, strict = (arguments.pop(name, None) for name in ("labels", "merge", "strict"))
    rows = inputs.looked_at(parts, labels, merge, file, reads=pair[0].fields, strict=bool(strict))
    from ptuning.experiment.compare import compare as compare_own

    # The name becomes a folder.
    name = re.sub(r"[^\w.+=-]+", "-", Path(data).stem.partition(":")[0]).strip("-.+=")[:100] or "task"
    arguments |= {"manual": pair[0], "template": pair[1], "task": file, "name": name}

    def run(**plan: Any) -> Results:
        for text in (manual, template):
            notice_line_breaks(text, plan["backbone"].tokenizer)
        return compare_own(rows, **arguments, **plan)

    return run


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of results.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Of several folders: where the report goes [report, next to them]."),
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
        from ptuning.report.write import write_report

        if len(folders) == 1 and out is None:
            page = write_report(folders[0], formats=formats)
        else:
            from ptuning.experiment.results import merged

            results = merged(folders)
            place = results.folder / "report"
            if place.is_relative_to(Path.cwd()):
                place = place.relative_to(Path.cwd())
            page = write_report(results, place if out is None else out, formats=formats)
    terminal.line(str(page))
    if open_:
        typer.launch(str(page))
