"""The command line: parsing and wiring. The only place that prints or exits."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import ptuning
from ptuning import defaults
from ptuning.config import TrainConfig
from ptuning.errors import ConfigError, FileError, PTuningError, RecordError

if TYPE_CHECKING:
    from ptuning.backbone import Backbone, Dtype
    from ptuning.prompt import Prompt
    from ptuning.records import Records
    from ptuning.trainer import Progress, Report

# Heavy modules (torch, transformers) are imported inside the commands: --help must not wait for them.

app = typer.Typer(
    help="Learn a prompt for a frozen language model, see that it beats the sentence it started from, use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
template_app = typer.Typer(help="Look at templates.", no_args_is_help=True)
app.add_typer(template_app, name="template")

INTERRUPTED_EXIT = 130
SETTINGS = TrainConfig()

BackboneOption = Annotated[
    str | None, typer.Option("--backbone", metavar="B", help="Known name, local folder or hub id.", show_default=False)
]
DtypeOption = Annotated[str, typer.Option(metavar="D", help="auto, float32 or bfloat16.")]
DeviceOption = Annotated[str, typer.Option(metavar="D", help="auto, cpu, cuda, cuda:1, ...")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Use the prompt with another backbone of the same width.")]
FieldOption = Annotated[
    list[str] | None,
    typer.Option("--field", metavar="NEW=NAME", help="Use the data's field NAME as NEW, such as y=answer. Repeatable."),
]
PromptArgument = Annotated[str, typer.Argument(metavar="PROMPT", help='Folder of a prompt, or "manual:TEMPLATE".')]


def main() -> None:
    """Run the command line; errors of the user end with exit code 2 and one message."""
    try:
        app(prog_name="ptuning")
    except PTuningError as error:
        _complain(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        _complain("interrupted; nothing was written")
        sys.exit(INTERRUPTED_EXIT)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, as in "| head"
        sys.exit(1)


@app.callback(invoke_without_command=True)
def common(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show notices too, not only warnings.")] = False,
) -> None:
    """Options of every command."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("ptuning").setLevel(logging.INFO if verbose else logging.WARNING)
    if version:
        typer.echo(f"ptuning {ptuning.__version__}")
        raise typer.Exit


@app.command()
def train(
    data: Annotated[str, typer.Option(metavar="TRAIN", help="Data file, or NAME:train of the shipped facts.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the prompt and the record of the run.")],
    template: Annotated[str | None, typer.Option(metavar="T", help='As "[P:The capital of] [X] [P:is] [Y]".')] = None,
    manual: Annotated[str | None, typer.Option(metavar="M", help="Make the template from this manual one.")] = None,
    about: Annotated[str | None, typer.Option(metavar="WORDS", help="With --manual: what is asked for.")] = None,
    dev: Annotated[str | None, typer.Option(metavar="DEV", help="Data to choose by; else a part of TRAIN.")] = None,
    backbone: BackboneOption = None,
    encoder: Annotated[str, typer.Option(metavar="lstm|mlp|none")] = SETTINGS.encoder,
    epochs: Annotated[int, typer.Option(metavar="N")] = SETTINGS.epochs,
    batch_size: Annotated[int, typer.Option(metavar="N")] = SETTINGS.batch_size,
    lr: Annotated[float, typer.Option(metavar="F", help="Peak learning rate.")] = SETTINGS.lr,
    seed: Annotated[int, typer.Option(metavar="N")] = SETTINGS.seed,
    labels: Annotated[
        str | None, typer.Option(metavar="WORDS", help='"positive=great,good;negative=terrible".')
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other setting.")] = None,
    field: FieldOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in DIR.")] = False,
    measure_ceiling: Annotated[bool, typer.Option("--measure-ceiling", help="Time the bare backbone too.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Learn a prompt. The backbone stays frozen; DIR gets prompt/, run.json and predictions.jsonl.

    Example: ptuning train --data capitals:train --dev capitals:dev --manual "The capital of [X] is [Y]" --out capitals
    """
    from ptuning.files import check_free
    from ptuning.records import load_records
    from ptuning.template import Template

    config = _config(set_, encoder=encoder, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
    if (template is None) == (manual is None):
        raise ConfigError("give either --template, or --manual to have one made from a manual template")
    if about is not None and manual is None:
        raise ConfigError("--about goes with --manual")
    parsed = Template.parse(template) if template else Template.from_manual(manual or "", about=about)
    check_free(out, overwrite=overwrite or resume)
    rows = load_records(data, fields=_fields(field))
    dev_rows = load_records(dev, fields=_fields(field)) if dev else None
    if manual is not None:
        _say(f"learned template: [bold]{_plain(str(parsed))}[/]")
    loaded = _load(backbone, dtype=dtype, device=device)
    command = shlex.join(["ptuning", *sys.argv[1:]])
    with _training(command, out) as (report, should_stop):
        from ptuning.runs import train as run

        result = run(
            parsed,
            rows,
            backbone=loaded,
            dev=dev_rows,
            config=config,
            labels=labels,
            out=out,
            resume=resume,
            overwrite=overwrite,
            report=report,
            should_stop=should_stop,
            ceiling=measure_ceiling,
            command=command,
        )
    from ptuning import show

    show.training(result)


@app.command(name="eval")
def evaluate(
    prompt: PromptArgument,
    data: Annotated[str, typer.Option(metavar="FILE", help="Records with targets.")],
    candidates: Annotated[str | None, typer.Option(metavar="FILE|train", help="Rank these answers as well.")] = None,
    normalise: Annotated[str, typer.Option(metavar="sum|mean", help="Score of candidates of several tokens.")] = "sum",
    backbone: BackboneOption = None,
    field: FieldOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Score a prompt on records, with 95 % intervals.

    Example: ptuning eval capitals --data capitals:test
    """
    from ptuning.records import load_records, require_targets

    chosen = _prompt(prompt)
    rows = load_records(data, fields=_fields(field))
    require_targets(rows)
    listed = _candidates(candidates, prompt, data) if candidates else None
    loaded = _load(backbone, dtype=dtype, device=device, prompt=chosen)
    from ptuning import show
    from ptuning.evaluate import score_prompt
    from ptuning.predict import PromptModel

    with _bar() as report:
        found = score_prompt(
            PromptModel(loaded, force=force),
            rows,
            chosen,
            candidates=listed,
            normalise=_normalise(normalise),
            report=report,
        )
    show.evaluation(prompt, rows, found, as_json=as_json)


@app.command()
def predict(
    prompt: PromptArgument,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Value of the template's one field.")] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE|-", help="Records; - reads JSONL from the input.")] = None,
    candidates: Annotated[str | None, typer.Option(metavar="FILE", help="Choose among these answers.")] = None,
    top_k: Annotated[int, typer.Option(metavar="N", help="How many answers to show.", min=1)] = 1,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Longest written answer.", min=1)] = None,
    normalise: Annotated[str, typer.Option(metavar="sum|mean", help="Score of candidates of several tokens.")] = "sum",
    backbone: BackboneOption = None,
    field: FieldOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Answer a text or records; with --json one object per line.

    Example: ptuning predict capitals Kenya
    """
    chosen = _prompt(prompt)
    rows = _records_to_answer(chosen, text, data, field)
    listed = _candidates(candidates, prompt, data) if candidates else None
    loaded = _load(backbone, dtype=dtype, device=device, prompt=chosen)
    from ptuning import show
    from ptuning.predict import PromptModel

    found = PromptModel(loaded, force=force).predict(
        rows, chosen, listed, top_k=top_k, max_tokens=max_tokens, normalise=_normalise(normalise)
    )
    show.predictions(rows, found, as_json=as_json, masked=loaded.kind == "masked")


@app.command()
def inspect(
    prompt: PromptArgument,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Score the nearest tokens in the slots' place.")
    ] = None,
    backbone: BackboneOption = None,
    field: FieldOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Look inside a prompt: the tokens nearest to each slot, and (with --data) whether they mean anything.

    Example: ptuning inspect capitals --data capitals:dev
    """
    from ptuning.records import load_records

    chosen = _prompt(prompt)
    rows = load_records(data, fields=_fields(field)) if data else None
    loaded = _load(backbone, dtype=dtype, device=device, prompt=chosen)
    from ptuning import show
    from ptuning.inspection import inspect_prompt

    with _bar() as report:
        found = inspect_prompt(loaded, chosen, data=rows, force=force, report=report)
    show.inspection(chosen, found, as_json=as_json)


@template_app.command(name="show")
def show_template(
    template: Annotated[str, typer.Argument(metavar="TEMPLATE")],
    backbone: BackboneOption = None,
    record: Annotated[str | None, typer.Option(metavar="JSON", help='As {"x": "Kenya", "y": "Nairobi"}.')] = None,
    as_json: JsonOption = False,
) -> None:
    """Show each position of a filled template: slot, literal, field or target, with its token.

    Example: ptuning template show "[P:The capital of] [X] [P:is] [Y]" --record '{"x": "Kenya", "y": "Nairobi"}'
    """
    from ptuning.records import read_rows
    from ptuning.template import Template

    parsed = Template.parse(template)
    if record is not None:
        row = dict(next(iter(read_rows(record.replace("\n", " ").encode(), name="--record")), {}))
    else:
        row = {name: name for name in parsed.fields}
    from ptuning import show
    from ptuning.backbone import load_tokenizer
    from ptuning.fill import BoundTemplate

    with _waiting(backbone or defaults.BACKBONE):
        tokenizer, kind = load_tokenizer(backbone or defaults.BACKBONE)
    bound = BoundTemplate(parsed, tokenizer=tokenizer, kind=kind)
    show.template(bound.describe(row), tokenizer, as_json=as_json)


@app.command()
def data(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Which facts to print.")] = None,
    split: Annotated[str, typer.Option(metavar="train|dev|test", help="Which part.")] = "train",
) -> None:
    """List the shipped facts, or print a part of them as JSONL. NAME:split works wherever a data file does.

    Example: ptuning data capitals --split test
    """
    from ptuning import show
    from ptuning.records import load_records, shipped_facts

    if name is None:
        show.facts(shipped_facts())
        return
    for row in load_records(name if ":" in name else f"{name}:{split}"):
        typer.echo(json.dumps(dict(row), ensure_ascii=False))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the run is left.")] = Path("runs/demo"),
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any setting.")] = None,
    backbone: BackboneOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Learn country -> capital and compare with the manual prompt: the main job, in about a minute.

    Example: ptuning demo
    """
    config = _config(set_)
    loaded = _load(backbone, dtype=dtype, device=device)
    command = shlex.join(["ptuning", *sys.argv[1:]])
    with _training(command, out) as (report, should_stop):
        from ptuning.demo import run_demo

        result = run_demo(out, backbone=loaded, config=config, report=report, should_stop=should_stop, command=command)
    from ptuning import show

    show.demo(result)


def _config(pairs: Sequence[str] | None, **named: object) -> TrainConfig:
    """Return the settings given; those not given keep the default of ``TrainConfig``."""
    values = dict(named)
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set takes NAME=VALUE, not '{pair}'")
        try:
            values[name.strip().replace("-", "_")] = json.loads(text)
        except ValueError:
            values[name.strip().replace("-", "_")] = text.strip()
    return TrainConfig.from_json(values)


def _fields(pairs: Sequence[str] | None) -> dict[str, str]:
    found = {}
    for pair in pairs or ():
        new, equals, old = pair.partition("=")
        if not (equals and new.strip() and old.strip()):
            raise ConfigError(f"--field takes NEW=NAME, such as y=answer, not '{pair}'")
        found[new.strip()] = old.strip()
    return found


def _normalise(value: str) -> Any:
    if value not in ("sum", "mean"):
        raise ConfigError(f"--normalise is sum or mean, not '{value}'")
    return value


def _prompt(source: str) -> Prompt:
    from ptuning.prompt import Prompt

    if source.startswith("manual:"):
        return Prompt.manual(source.removeprefix("manual:").lstrip())
    return Prompt.load(source)


def _records_to_answer(prompt: Prompt, text: str | None, data: str | None, field: Sequence[str] | None) -> Records:
    from ptuning.records import Records, load_records, read_rows

    if (text is None) == (data is None):
        raise ConfigError("give either a TEXT or --data (a file, or - for JSONL on the standard input)")
    if data == "-":
        rows = read_rows(sys.stdin.buffer.read(), name="standard input", fields=_fields(field))
        if not rows:
            raise RecordError("the standard input holds no records; it needs one JSON object per line")
        return Records(rows, name="standard input")
    if data is not None:
        return load_records(data, fields=_fields(field))
    fields = prompt.template.fields
    if len(fields) != 1:
        raise ConfigError(
            f"the template reads {len(fields)} fields ({', '.join(fields) or 'none'}), and a TEXT can fill "
            "one; give records with --data"
        )
    return Records([{fields[0]: text or ""}], name="the command line")


def _candidates(source: str, prompt: str, data: str | None) -> list[str]:
    """Read candidates: a text file with one per line, the targets of a data file, or those of the training part."""
    from ptuning.evaluate import candidates_of
    from ptuning.files import read_bytes, read_json
    from ptuning.records import load_records

    if source == "train" and not Path(source).exists():
        record = next(
            (
                folder / "run.json"
                for folder in (Path(prompt), Path(prompt).parent)
                if not prompt.startswith("manual:") and (folder / "run.json").is_file()
            ),
            None,
        )
        if record is not None:
            parts = cast("dict[str, dict[str, str]]", read_json(record)["data"])
            source = parts["train"]["name"].split(" (without the ")[0]
        elif data is not None and ":" in data and not Path(data).exists():
            source = data.partition(":")[0] + ":train"
        else:
            raise ConfigError(
                "--candidates train needs the run.json beside the prompt, or shipped facts as --data; name "
                "a file with the candidates instead"
            )
    if source.endswith(".txt"):
        lines = read_bytes(Path(source)).decode("utf-8-sig", errors="replace").splitlines()
        return list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    found = candidates_of(load_records(source))
    if not found:
        raise FileError(f"{source} holds no candidates; its records need a field 'y'")
    return found


def _load(name: str | None, *, dtype: str, device: str, prompt: Prompt | None = None) -> Backbone:
    """Load the backbone that is asked for, the prompt's own, or the default."""
    owner = prompt.backbone.name if prompt is not None and prompt.backbone is not None else defaults.BACKBONE
    chosen = name or owner
    with _waiting(chosen):
        from ptuning.backbone import load_backbone

        return load_backbone(chosen, dtype=cast("Dtype", dtype), device=device)


@contextmanager
def _waiting(name: str) -> Iterator[None]:
    from rich.console import Console

    console = Console(stderr=True)
    text = f"loading {name}"
    if name in defaults.KNOWN and not defaults.is_cached(name):
        text = f"converting {name} for the first time, about 20 seconds"
        if not console.is_terminal:
            console.print(text)
    with console.status(text):
        yield


@contextmanager
def _bar() -> Iterator[Report]:
    """Show progress on the error stream: a bar on a terminal, a line per epoch anywhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def report(progress: Progress) -> None:
            if progress.stage == "epoch":
                console.print(f"epoch {progress.done}/{progress.total}: {progress.note}", highlight=False)
                return
            if progress.stage not in tasks:
                tasks[progress.stage] = bar.add_task(progress.stage, total=progress.total, note="")
            bar.update(tasks[progress.stage], completed=progress.done, total=progress.total, note=progress.note)

        yield report


@contextmanager
def _training(command: str, out: Path) -> Iterator[tuple[Report, Callable[[], bool]]]:
    """Show progress, and turn Ctrl-C or a termination into a checkpoint and a word on how to go on."""
    from ptuning.trainer import Interrupted

    asked: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        _say("stopping after this step; once more to stop at once")

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _bar() as report:
            yield report, lambda: bool(asked)
    except Interrupted as error:
        again = command if command.startswith("ptuning demo") or "--resume" in command else f"{command} --resume"
        _complain(f"{error}. The checkpoint is in {out}; go on with:\n  {again}")
        raise typer.Exit(INTERRUPTED_EXIT) from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False).print(text)


def _complain(text: str) -> None:
    """Print an error as plain text: a caret must stay under its column, and brackets are no markup."""
    typer.echo(f"error: {text}", err=True)
