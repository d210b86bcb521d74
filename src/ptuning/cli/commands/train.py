"""`ptuning train`: learn one prompt, or with --dry-run estimate what that takes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from rich import box
from rich.table import Table

from ptuning.cli import options, terminal
from ptuning.cli.inputs import load, notice_line_breaks, say_notes, text_or_file
from ptuning.cli.options import DATA, OUTPUT, SETTINGS, TEMPLATE, TRAINING, AskedBackbone, option
from ptuning.cli.signals import stoppable
from ptuning.config import TrainConfig
from ptuning.errors import ConfigError, closest
from ptuning.files import parse_toml, read_text, validate
from ptuning.names import LOG_FOLDER
from ptuning.progress import each
from ptuning.template.kinds import KINDS

if TYPE_CHECKING:
    from ptuning.files import Json
    from ptuning.training.estimate import Forecast
    from ptuning.training.run import TrainResult
    from ptuning.training.spec import TrainSpec

# Keys of a file of settings that only the command has.
LOG_TO, BACKBONE = "log_to", "backbone"


@options.takes(backbone=options.backbone_options)
def train(
    data: Annotated[
        str | None,
        option(
            metavar="TRAIN",
            panel=DATA,
            about="Training data: file, shipped NAME:train, or with --task a folder.",
            autocompletion=options.shipped_parts,
        ),
    ] = None,
    dev: Annotated[
        str | None, option(metavar="DEV", panel=DATA, about="Validation data [default: a 20 % split of TRAIN].")
    ] = None,
    task: options.TaskOption = None,
    field: options.FieldOption = None,
    template: Annotated[
        str | None, option(metavar="T|@FILE", panel=TEMPLATE, about='As "[P:The capital of] [X] [P:is] [Y]".')
    ] = None,
    manual: Annotated[
        str | None,
        option(metavar="M|@FILE", panel=TEMPLATE, about="Manual template; its words become slots where that pays."),
    ] = None,
    method: Annotated[
        str | None,
        option(
            metavar="NAME",
            panel=TEMPLATE,
            about=f"With --manual or --task, another kind of prompt: {', '.join(KINDS)}.",
            complete=tuple(KINDS),
        ),
    ] = None,
    chat: Annotated[
        bool, option("--chat", panel=TEMPLATE, about="Conversations, in the model's own chat template.")
    ] = False,
    labels: options.LabelsOption = None,
    train_backbone: Annotated[
        str | None,
        option(
            metavar="|".join(options.TRAIN_BACKBONE),
            panel=TRAINING,
            about="Weights trained besides the slots [default: none].",
            complete=options.TRAIN_BACKBONE,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        option(
            metavar="F",
            panel=TRAINING,
            about="Peak learning rate of the slots; of deep slots relative to the RMS "
            f"of each layer's activations [default: {SETTINGS.lr}, deep {SETTINGS.deep_lr}].",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        option(metavar="N", panel=TRAINING, about=f"Passes over TRAIN [default: {SETTINGS.epochs}]."),
    ] = None,
    batch_size: Annotated[
        int | None,
        option(metavar="N", panel=TRAINING, about=f"Records per step [default: {SETTINGS.batch_size}]."),
    ] = None,
    seed: Annotated[
        int | None, option(metavar="N", panel=TRAINING, about=f"Random seed [default: {SETTINGS.seed}].")
    ] = None,
    config: Annotated[
        Path | None,
        option(metavar="FILE", panel=TRAINING, about="TOML with settings and inputs by name; options come before it."),
    ] = None,
    set_: options.SetOption = None,
    out: Annotated[
        Path | None, option(metavar="DIR", panel=OUTPUT, about="Folder for the prompt and the record of the run.")
    ] = None,
    resume: Annotated[bool, option("--resume", panel=OUTPUT, about="Continue a stopped run.")] = False,
    overwrite: Annotated[bool, option("--overwrite", panel=OUTPUT, about="Replace an earlier run in DIR.")] = False,
    dry_run: Annotated[
        bool, option("--dry-run", panel=OUTPUT, about="Estimate memory and time from a few steps; write nothing.")
    ] = False,
    *,
    backbone: AskedBackbone,
) -> None:
    """Learn a prompt; DIR gets prompt/, run.json and predictions.jsonl.

    The backbone stays frozen; with --train-backbone head, a classification head is trained as well, with lora adapters
    on a copy of it, with full the whole copy.

    Example: ptuning train --data capitals:train --dev capitals:dev --manual "The capital of [X] is [Y]" --out capitals
    """
    given: dict[str, Any] = {"data": data, "dev": dev, "task": task, "method": method, "labels": labels}
    given |= {"template": text_or_file(template), "manual": text_or_file(manual), "chat": chat or None}
    given |= {"train_backbone": train_backbone, "lr": lr, "epochs": epochs, "batch_size": batch_size, "seed": seed}
    given |= {"fields": options.fields_of(field) or None}
    values = merged(config, set_, {name: value for name, value in given.items() if value is not None})
    log_to = values.pop(LOG_TO, None)
    backbone = replace(backbone, name=backbone.name or values.pop(BACKBONE, None))
    values.pop(BACKBONE, None)
    if out is None and not dry_run:
        raise ConfigError("name the folder of the prompt with --out DIR, or add --dry-run")
    if dry_run and (out is not None or resume or overwrite or log_to is not None):
        raise ConfigError("--dry-run writes nothing; leave out --out, --resume, --overwrite and log_to")
    if out is not None:
        from ptuning.names import RUN, check_writable

        check_resume(resume=resume, overwrite=overwrite)
        check_writable(out, RUN, overwrite=overwrite, resume=resume)
    with terminal.waiting("reading the data"):
        spec = spec_of(values, where=str(config) if config is not None else "").check()
    say_notes(spec.notes)
    say_notes([f"warning: {doubt}" for doubt in spec.checked.warnings] if spec.checked is not None else ())
    if dry_run:
        _estimate(spec, backbone)
        return
    from ptuning.training.tracking import TrainingLog

    assert out is not None
    log = TrainingLog(log_to or (), out / LOG_FOLDER, settings=spec.settings.to_json())
    loaded = load(backbone, spread=True)
    for pattern in (given["template"], given["manual"]):
        notice_line_breaks(pattern, loaded.tokenizer)
    with stoppable(out, again="--resume") as (report, should_stop), log:
        from ptuning.training.prepare import placed, prepare
        from ptuning.training.run import TrainingRun

        known, spec = spec.notes, placed(spec, loaded)
        say_notes([note for note in spec.notes if note not in known])
        log.settings["template"] = str(spec.template)
        if given["template"] is None:
            terminal.say(f"learned template: {spec.template}")
        command = options.command_line()
        run = TrainingRun(prepare(spec, loaded), out=out, resume=resume, overwrite=overwrite, command=command)
        result = run.train(report=each(report, log), should_stop=should_stop)
    show(result)


def check_resume(*, resume: bool, overwrite: bool) -> None:
    """Raise a ConfigError if an earlier run is both to be continued and to be replaced."""
    if resume and overwrite:
        raise ConfigError("--resume continues the earlier run that --overwrite replaces; leave one out")


def merged(config: Path | None, pairs: Sequence[str] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings and inputs by name: options and ``--set`` before those of the file ``config``. A ConfigError if
    one is given by its option and by ``--set``.
    """
    from ptuning.training.spec import TrainingInputs

    file: dict[str, Any] = {}
    if config is not None:
        file = validate(
            dict[str, Any], parse_toml(read_text(config, error=ConfigError), where=str(config), error=ConfigError).value
        )
    texts = {name for name, item in TrainingInputs.model_fields.items() if item.annotation in (str, str | None)}
    own = options.set_values(pairs, {*texts, LOG_TO, BACKBONE})
    twice = next((name for name in own if name in given), None)
    if twice is not None:
        raise ConfigError(f"'{twice}' is given twice, by its option and by --set")
    known = (*TrainingInputs.model_fields, *TrainConfig.model_fields, LOG_TO, BACKBONE)
    values = {**file, **own, **given}
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown setting '{name}'.{closest(name, known)} Known: {', '.join(known)}")
    return values


def spec_of(values: Mapping[str, Any], *, where: str) -> TrainSpec:
    """Return the training that settings and inputs by name describe."""
    from ptuning.training.spec import TrainingInputs

    settings = {name: value for name, value in values.items() if name in TrainConfig.model_fields}
    inputs = {name: value for name, value in values.items() if name not in settings}
    return validate(TrainingInputs, inputs, where, error=ConfigError).spec(TrainConfig.from_json(settings))


def _estimate(spec: TrainSpec, backbone: AskedBackbone) -> None:
    loaded = load(backbone)
    with terminal.bar() as report:
        from ptuning.training.estimate import estimate_spec

        forecast = estimate_spec(spec, loaded, report=report)
    show_forecast(forecast)


def show(result: TrainResult) -> None:
    """Print what a training run left."""
    record, console = result.record, terminal.results()
    history = cast("Sequence[Mapping[str, float]]", record["history"])
    start = cast("Mapping[str, float]", record["start"])
    dev = cast("Mapping[str, Mapping[str, Json]]", record["data"])["dev"]
    chosen = cast("int", record["chosen_epoch"])
    terminal.heading(f"development part: {dev['rows']} records of {dev['name']}")
    table = Table(box=box.SIMPLE_HEAD)
    # A metric of written texts that chooses the epoch stands beside the score.
    scores = dict.fromkeys(("dev_loss", "dev_score", *(name for name in start if name.startswith("dev_"))))
    for name in ("epoch", "train loss", *(one.replace("_", " ") for one in scores)):
        table.add_column(name, justify="right")
    for row in (start, *history):
        epoch = int(row.get("epoch", 0))
        table.add_row(
            str(epoch) if epoch else "start",
            f"{row['train_loss']:.3f}" if epoch else "",
            *(f"{row[name]:.3f}" for name in scores),
            style=terminal.mark(epoch == chosen),
        )
    console.print(table)
    console.print(f"chosen:  {'the start' if chosen == 0 else f'epoch {chosen}'} ({record['choice_rule']})")
    if isinstance(best := record.get("dev_score"), Mapping):  # a run that was finished by an older version has none
        value, low, high = (cast("float", best[name]) for name in ("value", "low", "high"))
        terminal.line(f"dev score {value:.3f} [{low:.3f}, {high:.3f}], n = {best['n']}")
    terminal.parameters(record)
    if record.get("ceiling_tokens_per_second"):
        speed, ceiling = cast("float", record["tokens_per_second"]), cast("float", record["ceiling_tokens_per_second"])
        console.print(f"speed:   {speed:.0f} tokens/s, {speed / ceiling:.0%} of the bare backbone's {ceiling:.0f}")
    terminal.line(f"prompt:  {result.folder}/prompt")
    terminal.line(f"record:  {result.folder}/run.json, and predictions.jsonl on the development part")
    terminal.line(f"next:    {terminal.program()} eval {shlex.quote(str(result.folder))} --data FILE")


def show_forecast(found: Forecast) -> None:
    """Print the memory and time that a training will take."""
    memory, seconds = found.memory, found.seconds
    rows, tokens = found.longest_pass
    terminal.heading(
        f"{found.train_records} records, {found.steps} steps an epoch, the longest pass {rows} x {tokens} tokens; "
        f"{found.dev_records} records to choose by; {found.train_backbone} on {found.device} in {found.dtype}"
    )
    if found.deep_in_front:
        terminal.line(
            f"{found.deep_in_front} deep slots in front are keys and values: they cost no token of a pass, and as they "
            "change, no text behind them is kept"
        )
    sizes = {
        "backbone": memory["weights"],
        "what is trained": memory["trained"],
        "its gradients": memory["gradients"],
        "optimizer": memory["optimizer"],
        "activations of the largest pass": memory["activations"],
        "kept text in front of the slots": memory["constant_part"],
        "the best of earlier starts": memory["other_starts"],
        "process and allocator": memory["rest"],
    }
    sums = {"training": _megabytes(memory["training"]), "peak, loading included": _megabytes(memory["peak"])}
    _table(("memory", "MB"), {name: _megabytes(size) for name, size in sizes.items() if size}, sums)
    if memory["on_disk"]:
        spilled = _megabytes(memory["on_disk"])
        terminal.line(f"{spilled} MB of the kept text do not fit and go to the disk, which takes longer")
    scored, starts = found.starts * (found.epochs + 1), f", {found.starts} starts" if found.starts > 1 else ""
    times = {
        "preparing": seconds["preparing"] + seconds["constant_part"],
        "training, per epoch": seconds["epoch"],
        f"scoring the development part, each of {scored} times": seconds["dev"],
        "checkpoints": seconds["saving"],
        "answers in the end": seconds["answers"],
    }
    total = {f"all of it: {found.epochs} epochs{starts}": terminal.duration(seconds["total"])}
    _table(("time", ""), {name: terminal.duration(value) for name, value in times.items()}, total)
    terminal.line("at most: training stops early if nothing gets better. Nothing was trained or written")


def _table(columns: tuple[str, str], rows: Mapping[str, str], sums: Mapping[str, str]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(columns[0])
    table.add_column(columns[1], justify="right")
    for name, text in {**rows, **sums}.items():
        table.add_row(name, text, style="bold" if name in sums else "")
    terminal.results().print(table)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f}"
