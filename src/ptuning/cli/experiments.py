"""The commands that compare: compare, lama, paraphrases, superglue, report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ptuning.cli import inputs, options, show_experiments, signals, terminal
from ptuning.cli.options import (
    SETTINGS,
    BackboneOption,
    DeviceOption,
    DtypeOption,
    EncoderOption,
    FieldOption,
    SetOption,
    StartsOption,
)
from ptuning.errors import ConfigError

if TYPE_CHECKING:
    from ptuning.config import Tune
    from ptuning.experiment.lama import Targets
    from ptuning.report.results_file import Results

OutOption = Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results; finished cells in it are kept.")]
LamaOption = Annotated[str, typer.Option(metavar="DIR", help="LAMA's facts in any of the layouts they come in.")]
RelationsOption = Annotated[str, typer.Option(metavar="LIST|TYPE|all", help="As P36,P103, or 1-1, N-1, N-M.")]
MethodsOption = Annotated[str | None, typer.Option(metavar="LIST|all", help="Methods, with commas between.")]
SeedsOption = Annotated[int, typer.Option(metavar="N", help="Trainings with different seeds.", min=1)]
TriesOption = Annotated[int, typer.Option(metavar="N", help="Settings each trained method tries.", min=1)]
TuneOption = Annotated[str, typer.Option(metavar="frozen|tuned|lora", help="What p-tuning trains besides its prompt.")]
ControlOption = Annotated[str | None, typer.Option(metavar="random-weights", help="The same on an untrained backbone.")]
LimitOption = Annotated[int | None, typer.Option(metavar="N", help="Facts per relation, at most.", min=3)]
SizeOption = Annotated[int | None, typer.Option(metavar="N", help="Training records, at most: a seeded draw.", min=1)]
VocabularyOption = Annotated[str | None, typer.Option(metavar="FILE|objects", help="Closed set of answers.")]
EpochsOption = Annotated[int, typer.Option(metavar="N", help="Passes over the training part.")]
SeedOption = Annotated[int, typer.Option(metavar="N", help="The first seed.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace results made with other settings.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the cells and an estimate of time, run nothing.")]
SplitOption = Annotated[int, typer.Option(metavar="N", help="Seed of the split of relations in one file.")]


def compare(
    data: Annotated[str, typer.Option(metavar="TRAIN", help="Data file, or NAME:train of the shipped facts.")],
    test: Annotated[str, typer.Option(metavar="TEST", help="Data to report on; it chooses nothing.")],
    manual: Annotated[str, typer.Option(metavar="M", help='Manual template, as "The capital of [X] is [Y]".')],
    out: OutOption,
    dev: Annotated[str | None, typer.Option(metavar="DEV", help="Data to choose by; else a part of TRAIN.")] = None,
    template: Annotated[str | None, typer.Option(metavar="T", help="Template to learn; else made of M.")] = None,
    methods: MethodsOption = None,
    seeds: SeedsOption = 1,
    tries: TriesOption = 1,
    starts: StartsOption = SETTINGS.starts,
    control: ControlOption = None,
    vocabulary: VocabularyOption = None,
    train_size: SizeOption = None,
    encoder: EncoderOption = SETTINGS.encoder,
    epochs: EpochsOption = SETTINGS.epochs,
    seed: SeedOption = SETTINGS.seed,
    set_: SetOption = None,
    field: FieldOption = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    backbone: BackboneOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Compare methods on your own data: is a learned prompt worth it?

    Example: ptuning compare --data capitals:train --dev capitals:dev --test capitals:test
    --manual "The capital of [X] is [Y]" --out runs/capitals
    """
    config = options.config_of(set_, encoder=encoder, epochs=epochs, seed=seed, starts=starts)
    train_rows, test_rows = inputs.records_of(data, field), inputs.records_of(test, field)
    dev_rows = inputs.records_of(dev, field) if dev is not None else None
    with _watching(out, control=control, methods=methods, dry_run=dry_run) as common:
        from ptuning.experiment.compare import compare as run

        found = run(
            train_rows,
            test=test_rows,
            dev=dev_rows,
            manual=manual,
            template=template,
            vocabulary=vocabulary,
            train_size=train_size,
            name=Path(data).stem.partition(":")[0] or "task",  # it becomes a folder
            backbone=inputs.load(backbone, dtype=dtype, device=device),
            out=out,
            seeds=seeds,
            tries=tries,
            config=config,
            overwrite=overwrite,
            **common,
        )
    _show(found, dry_run=dry_run)


def lama(
    data: LamaOption,
    out: OutOption,
    relations: RelationsOption = "all",
    methods: MethodsOption = None,
    seeds: SeedsOption = 1,
    tries: TriesOption = 1,
    starts: StartsOption = SETTINGS.starts,
    control: ControlOption = None,
    template: Annotated[
        str | None, typer.Option(metavar="T", help="One for all; else made of each manual one.")
    ] = None,
    limit: LimitOption = None,
    train_size: SizeOption = None,
    targets: Annotated[
        str, typer.Option(metavar="token|any", help="Objects of one token, or of any length.")
    ] = "token",
    vocabulary: VocabularyOption = None,
    encoder: EncoderOption = SETTINGS.encoder,
    epochs: EpochsOption = SETTINGS.epochs,
    seed: SeedOption = SETTINGS.seed,
    split_seed: SplitOption = 0,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    backbone: BackboneOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Run the paper's LAMA experiment: every method on every relation, with a report.

    Example: ptuning lama --data LAMA --relations P36,P103 --out runs/lama
    """
    if targets not in ("token", "any"):
        raise ConfigError(f"--targets is token or any, not '{targets}'")
    config = options.config_of(set_, encoder=encoder, epochs=epochs, seed=seed, starts=starts)
    with _watching(out, control=control, methods=methods, dry_run=dry_run) as common:
        from ptuning.experiment.lama import lama as run

        found = run(
            data,
            relations=relations,
            template=template,
            limit=limit,
            train_size=train_size,
            targets=cast("Targets", targets),
            vocabulary=vocabulary,
            split_seed=split_seed,
            backbone=inputs.load(backbone, dtype=dtype, device=device),
            out=out,
            seeds=seeds,
            tries=tries,
            config=config,
            overwrite=overwrite,
            **common,
        )
    _show(found, dry_run=dry_run)


def paraphrases(
    data: LamaOption,
    out: OutOption,
    relations: RelationsOption = "all",
    wordings: Annotated[int | None, typer.Option(metavar="N", help="Wordings per relation, at most.", min=2)] = None,
    methods: MethodsOption = None,
    seeds: SeedsOption = 1,
    tries: TriesOption = 1,
    starts: StartsOption = SETTINGS.starts,
    limit: LimitOption = None,
    encoder: EncoderOption = SETTINGS.encoder,
    epochs: EpochsOption = SETTINGS.epochs,
    seed: SeedOption = SETTINGS.seed,
    split_seed: SplitOption = 0,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    backbone: BackboneOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Measure how much the wording of a prompt matters, before and after it is learned from.

    Example: ptuning paraphrases --data LAMA --relations P36 --out runs/wordings
    """
    config = options.config_of(set_, encoder=encoder, epochs=epochs, seed=seed, starts=starts)
    with _watching(out, control=None, methods=methods, dry_run=dry_run) as common:
        from ptuning.experiment.paraphrases import paraphrases as run

        found = run(
            data,
            relations=relations,
            wordings=wordings,
            limit=limit,
            split_seed=split_seed,
            backbone=inputs.load(backbone, dtype=dtype, device=device),
            out=out,
            seeds=seeds,
            tries=tries,
            config=config,
            overwrite=overwrite,
            **{name: value for name, value in common.items() if name != "control"},
        )
    _show(found, dry_run=dry_run)


def superglue(
    data: Annotated[str, typer.Option(metavar="DIR", help="Folder with one folder per task: SuperGLUE, FewGLUE.")],
    out: OutOption,
    tasks: Annotated[str, typer.Option(metavar="LIST|all", help="As BoolQ,CB,COPA; or task files.")] = "all",
    methods: MethodsOption = None,
    few_shot: Annotated[
        int | None, typer.Option(metavar="[K]", help="Learn from K examples and choose by K (32), drawn by seed.")
    ] = None,
    seeds: SeedsOption = 3,
    tries: TriesOption = 1,
    starts: StartsOption = SETTINGS.starts,
    tune: TuneOption = SETTINGS.tune,
    pattern: Annotated[int, typer.Option(metavar="N", help="Which of a task's patterns.", min=1)] = 1,
    control: ControlOption = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Report on N rows: a seeded draw.", min=2)] = None,
    server: Annotated[bool, typer.Option("--server/--no-server", help="Answer the test split for the server.")] = True,
    encoder: EncoderOption = SETTINGS.encoder,
    epochs: EpochsOption = SETTINGS.epochs,
    seed: SeedOption = SETTINGS.seed,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    backbone: BackboneOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Run the paper's SuperGLUE experiment: every method on every task, fully supervised or with a few examples.

    Example: ptuning superglue --data FewGLUE --tasks RTE,CB --methods majority,manual,p-tuning --out runs/few
    """
    config = options.config_of(set_, encoder=encoder, epochs=epochs, seed=seed, starts=starts)
    with _watching(out, control=control, methods=methods, dry_run=dry_run) as common:
        from ptuning.experiment.superglue import superglue as run

        found = run(
            data,
            tasks=tasks,
            few_shot=few_shot,
            pattern=pattern,
            limit=limit,
            tune=cast("Tune", tune),
            server=server,
            backbone=inputs.load(backbone, dtype=dtype, device=device),
            out=out,
            seeds=seeds,
            tries=tries,
            config=config,
            overwrite=overwrite,
            **common,
        )
    _show(found, dry_run=dry_run)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of results.")],
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Rebuild the tables, pictures and pages of results from their JSON alone.

    Example: ptuning report runs/lama --open
    """
    with terminal.waiting("writing the report"):
        from ptuning.report.write import write_report

        page = write_report(folder)
    typer.echo(str(page))
    if open_:
        typer.launch(str(page))


@contextmanager
def _watching(out: Path, *, control: str | None, methods: str | None, dry_run: bool) -> Iterator[dict[str, Any]]:
    """Show progress and results cell by cell, stop at a signal; yield the arguments that all comparisons take."""
    if control not in (None, "random-weights"):
        raise ConfigError(f"--control is random-weights, not '{control}'")
    with signals.stoppable(out) as (progress, should_stop):
        from ptuning.experiment.plan import Watch

        common: dict[str, Any] = {
            "control": control is not None,
            "dry_run": dry_run,
            "command": options.command_line(),
            "watch": Watch(
                # A line per epoch of dozens of trainings would bury the line per cell.
                report=lambda now: progress(now) if now.stage != "epoch" else None,
                should_stop=should_stop,
                on_cell=show_experiments.cell,
                on_estimate=show_experiments.estimates,
            ),
        }
        if methods is not None:
            common["methods"] = methods
        yield common


def _show(found: Results, *, dry_run: bool) -> None:
    if dry_run:
        return
    show_experiments.results(found)
    if found.failed:
        raise typer.Exit(1)
