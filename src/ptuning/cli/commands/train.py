"""`ptuning train`: learn one prompt, or with --dry-run estimate what that takes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from ptuning.cli import options, terminal
from ptuning.cli.inputs import load, notice_line_breaks, say_notes, text_or_file
from ptuning.cli.options import DATA, OUTPUT, TEMPLATE, TRAINING, option
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

SETTINGS = TrainConfig()
TRAIN_BACKBONE = ("none", "head", "full", "lora")
# Keys of a file of settings that only the command has.
LOG_TO, BACKBONE = "log_to", "backbone"


def train(
    data: Annotated[
        str | None,
        option(
            "Training data: file, shipped NAME:train, or with --task a folder.",
            DATA,
            metavar="TRAIN",
            autocompletion=options.shipped_parts,
        ),
    ] = None,
    dev: Annotated[str | None, option("Validation data [default: 20 % of TRAIN].", DATA, metavar="DEV")] = None,
    task: options.TaskOption = None,
    field: options.FieldOption = None,
    template: Annotated[
        str | None, option('As "[P:The capital of] [X] [P:is] [Y]".', TEMPLATE, metavar="T|@FILE")
    ] = None,
    manual: Annotated[
        str | None, option("Manual template, whose words become slots where that pays.", TEMPLATE, metavar="M|@FILE")
    ] = None,
    method: Annotated[
        str | None,
        option(f"Kind of prompt to make from it: {', '.join(KINDS)}.", TEMPLATE, metavar="NAME", complete=KINDS),
    ] = None,
    chat: Annotated[bool, option("Conversations, in the model's own chat template.", TEMPLATE, "--chat")] = False,
    labels: options.LabelsOption = None,
    train_backbone: Annotated[
        str | None,
        option(
            "Weights trained besides the slots [default: none].",
            TRAINING,
            metavar="|".join(TRAIN_BACKBONE),
            complete=TRAIN_BACKBONE,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        option(
            "Peak learning rate of the slots; of deep slots relative to the RMS of each layer's activations "
            f"[default: {SETTINGS.lr}, deep {SETTINGS.deep_lr}].",
            TRAINING,
            metavar="F",
        ),
    ] = None,
    epochs: Annotated[
        int | None, option(f"Passes over TRAIN [default: {SETTINGS.epochs}].", TRAINING, metavar="N")
    ] = None,
    batch_size: Annotated[
        int | None, option(f"Records per step [default: {SETTINGS.batch_size}].", TRAINING, metavar="N")
    ] = None,
    seed: Annotated[int | None, option(f"Random seed [default: {SETTINGS.seed}].", TRAINING, metavar="N")] = None,
    config: Annotated[
        Path | None,
        option("TOML with settings and inputs by name; options come before it.", TRAINING, metavar="FILE"),
    ] = None,
    set_: options.SetOption = None,
    out: Annotated[
        Path | None, option("Folder for the prompt and the record of the run.", OUTPUT, metavar="DIR")
    ] = None,
    resume: options.ResumeOption = False,
    overwrite: options.ReplaceOption = False,
    dry_run: Annotated[bool, option("Only estimate memory and time, from a few steps.", OUTPUT, "--dry-run")] = False,
    backbone: options.BackboneOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    model_arg: options.ModelArgOption = None,
) -> None:
    """Learn a prompt; DIR gets prompt/, run.json and predictions.jsonl.

    The backbone stays frozen; with --train-backbone head, a classification head is trained as well, with lora adapters
    on a copy of it, with full the whole copy.

    Example: ptuning train --data capitals:train --dev capitals:dev --manual "The capital of [X] is [Y]" --out capitals
    """
    given: dict[str, Any] = {
        "data": data, "dev": dev, "task": task, "fields": options.fields_of(field) or None,
        "template": text_or_file(template), "manual": text_or_file(manual), "method": method, "chat": chat or None,
        "labels": labels, "train_backbone": train_backbone, "lr": lr, "epochs": epochs, "batch_size": batch_size,
        "seed": seed, BACKBONE: backbone,
    }  # fmt: skip
    values = merged(config, set_, {name: value for name, value in given.items() if value is not None})
    log_to, name = values.pop(LOG_TO, None), values.pop(BACKBONE, None)
    choice = options.backbone_of(name, dtype, device, model_arg)
    if out is None and not dry_run:
        raise ConfigError("name the folder of the prompt with --out DIR, or add --dry-run")
    if dry_run and (out is not None or resume or overwrite or log_to is not None):
        raise ConfigError("--dry-run writes nothing; leave out --out, --resume, --overwrite and log_to")
    if out is not None:
        from ptuning.names import RUN, check_writable

        options.check_resume(resume=resume, overwrite=overwrite)
        check_writable(out, RUN, overwrite=overwrite, resume=resume)
    with terminal.waiting("reading the data"):
        spec = spec_of(values, where=str(config) if config is not None else "").check()
    say_notes(spec.notes)
    say_notes(f"warning: {doubt}" for doubt in (spec.checked.warnings if spec.checked is not None else ()))
    loaded = load(choice, spread=not dry_run)
    if out is None:
        from ptuning.training.estimate import estimate_spec

        with terminal.bar() as report:
            forecast = estimate_spec(spec, loaded, report=report)
        show_forecast(forecast)
        return
    from ptuning.training.prepare import placed, prepare
    from ptuning.training.run import TrainingRun
    from ptuning.training.tracking import TrainingLog

    for pattern in (given["template"], given["manual"]):
        notice_line_breaks(pattern, loaded.tokenizer)
    log = TrainingLog(log_to or (), out / LOG_FOLDER, settings=spec.settings.to_json())
    with stoppable(out, again="--resume") as (report, should_stop), log:
        known, spec = spec.notes, placed(spec, loaded)
        say_notes(note for note in spec.notes if note not in known)
        log.settings["template"] = str(spec.template)
        if given["template"] is None:
            terminal.say(f"learned template: {spec.template}")
        command = options.command_line()
        run = TrainingRun(prepare(spec, loaded), out=out, resume=resume, overwrite=overwrite, command=command)
        result = run.train(report=each(report, log), should_stop=should_stop)
    show(result)


def merged(config: Path | None, pairs: Sequence[str] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings and inputs by name: options and ``--set`` before those of the file ``config``. A ConfigError if
    one is given by its option and by ``--set``.
    """
    from ptuning.training.spec import TrainingInputs

    file: dict[str, Any] = {}
    if config is not None:
        text = read_text(config, error=ConfigError)
        file = validate(dict[str, Any], parse_toml(text, where=str(config), error=ConfigError))
    texts = {name for name, item in TrainingInputs.model_fields.items() if item.annotation in (str, str | None)}
    own = options.values_of(pairs, "--set", "patience=2", texts={*texts, LOG_TO, BACKBONE})
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


def show(result: TrainResult) -> None:
    """Print what a training run left."""
    record, console = result.record, terminal.results()
    history = cast("Sequence[Mapping[str, float]]", record["history"])
    start = cast("Mapping[str, float]", record["start"])
    dev = cast("Mapping[str, Mapping[str, Json]]", record["data"])["dev"]
    chosen = cast("int", record["chosen_epoch"])
    terminal.heading(f"development part: {dev['rows']} records of {dev['name']}")
    # A metric of generated texts that chooses the epoch is shown next to the score.
    scores = dict.fromkeys(("dev_loss", "dev_score", *(name for name in start if name.startswith("dev_"))))
    table = terminal.table("epoch", "train loss", *(name.replace("_", " ") for name in scores), numbers=True)
    for row in (start, *history):
        epoch = int(row.get("epoch", 0))
        names = (str(epoch), f"{row['train_loss']:.3f}") if epoch else ("start", "")
        table.add_row(*names, *(f"{row[name]:.3f}" for name in scores), style=terminal.mark(epoch == chosen))
    console.print(table)
    console.print(f"chosen:  {'the start' if chosen == 0 else f'epoch {chosen}'} ({record['choice_rule']})")
    best = cast("Mapping[str, float]", record["dev_score"])
    terminal.line(f"dev score {best['value']:.3f} [{best['low']:.3f}, {best['high']:.3f}], n = {best['n']}")
    terminal.parameters(record)
    if record.get("ceiling_tokens_per_second"):
        speed, ceiling = cast("float", record["tokens_per_second"]), cast("float", record["ceiling_tokens_per_second"])
        console.print(f"speed:   {speed:.0f} tokens/s, {speed / ceiling:.0%} of the bare backbone's {ceiling:.0f}")
    terminal.line(f"prompt:  {result.folder}/prompt")
    terminal.line(f"record:  {result.folder}/run.json, and predictions.jsonl on the development part")
    terminal.line(f"next:    {terminal.program()} eval {shlex.quote(str(result.folder))} --data FILE")


def show_forecast(forecast: Forecast) -> None:
    """Print the memory and time that a training will take."""
    memory, seconds, (rows, tokens) = forecast.memory, forecast.seconds, forecast.longest_pass
    terminal.heading(
        f"{forecast.train_records} records, {forecast.steps} steps an epoch, longest pass {rows} x {tokens} tokens, "
        f"{forecast.dev_records} validation records, on {forecast.device} in {forecast.dtype}"
    )
    sizes = {
        "backbone": memory["weights"],
        "trained parameters": memory["trained"],
        "their gradients": memory["gradients"],
        "optimizer": memory["optimizer"],
        "activations of the largest pass": memory["activations"],
        "prefix cache": memory["constant_part"],
        "the best of earlier restarts": memory["other_starts"],
        "process and allocator": memory["rest"],
        "training": memory["training"],
        "peak, loading included": memory["peak"],
        "prefix cache on disk": memory["on_disk"],
    }
    table = terminal.table("memory", "MB", numbers=True)
    for name, size in sizes.items():
        if size:
            table.add_row(name, f"{size / 1e6:,.0f}")
    terminal.results().print(table)
    times = {
        "preparing": seconds["preparing"] + seconds["constant_part"],
        "training, per epoch": seconds["epoch"],
        f"scoring the development part, each of {forecast.starts * (forecast.epochs + 1)} times": seconds["dev"],
        "checkpoints": seconds["saving"],
        "answers in the end": seconds["answers"],
        f"total: {forecast.epochs} epochs, {forecast.starts} start{'s' * (forecast.starts > 1)}": seconds["total"],
    }
    table = terminal.table("time", "", numbers=True)
    for name, value in times.items():
        table.add_row(name, terminal.duration(value))
    terminal.results().print(table)
    terminal.line("at most: training stops early if nothing gets better. Nothing was trained or written")
