"""The command line: parsing and wiring. The only place that exits; ``show`` prints for it."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

import ptuning
from ptuning import defaults, show
from ptuning.config import TrainConfig, named_values, unknown_option
from ptuning.errors import ConfigError, FileError, PTuningError, RecordError

if TYPE_CHECKING:
    from ptuning.backbone import Backbone, Dtype
    from ptuning.measure import Report
    from ptuning.objective import Normalise
    from ptuning.prompt import Prompt
    from ptuning.records import Records

# Heavy modules (torch, transformers) are imported inside the commands: --help must not wait for them.

SIGNAL_EXIT = 128  # a shell's exit code for a signal is this plus its number: 130 for Ctrl-C
SETTINGS = TrainConfig()
# Records answered between two steps of the progress bar.
PREDICTED_ROWS = 64


class _Group(TyperGroup):
    """Ends Ctrl-C with a word and no traceback; what training does with it is in :func:`_training`."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            show.stopped("stopped", None, "")
            raise typer.Exit(SIGNAL_EXIT + signal.SIGINT) from None


class _Command(TyperCommand):
    """Names the closest option or setting to an unknown one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # The error's class lies in click, or in a copy of click inside of typer, depending on typer's release.
            name = getattr(error, "option_name", None)
            if name is None or not hasattr(error, "possibilities"):
                raise
            raise unknown_option(name, [known for one in self.params for known in one.opts]) from error


app = typer.Typer(
    cls=_Group,
    help="Learn a prompt for a frozen language model, see that it beats the sentence it started from, use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
template_app = typer.Typer(help="Look at how a template is filled.", no_args_is_help=True)
app.add_typer(template_app, name="template")

BackboneOption = Annotated[str | None, typer.Option(metavar="B", help="Known name, local folder or hub id.")]
DtypeOption = Annotated[str, typer.Option(metavar="D", help="auto, float32 or bfloat16.")]
DeviceOption = Annotated[str, typer.Option(metavar="D", help="auto, cpu, cuda, cuda:1, ...")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Use the prompt with another backbone of the same width.")]
FieldOption = Annotated[list[str] | None, typer.Option(metavar="NEW=NAME", help="Read field NAME as NEW; repeatable.")]
NormaliseOption = Annotated[str, typer.Option(metavar="sum|mean", help="Score of candidates of several tokens.")]
PromptArgument = Annotated[str, typer.Argument(metavar="PROMPT", help='Folder of a prompt, or "manual:TEMPLATE".')]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Other setting; repeatable.")]
CandidatesOption = Annotated[str | None, typer.Option(metavar="FILE|train", help="Closed set of answers to rank.")]


def main() -> None:
    """Run the command line; errors of the user end with exit code 2 and one message."""
    try:
        app(prog_name="ptuning")
    except PTuningError as error:
        _fail(str(error), error)
    except KeyboardInterrupt:
        show.stopped("stopped", None, "")
        sys.exit(SIGNAL_EXIT + signal.SIGINT)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, as in "| head"
        sys.exit(1)
    except OSError as error:
        # A file or a disk behind the output, in a place where no module expects trouble.
        _fail(f"{error}; check the path, its rights and the room on the disk", error)


def _fail(text: str, error: Exception) -> None:
    show.complain(text)
    logging.getLogger(__name__).debug("the error in full", exc_info=error)
    sys.exit(2)


@app.callback(invoke_without_command=True)
def common(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show notices, and errors in full.")] = False,
) -> None:
    """Options of every command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[show.LogHandler()])
    logging.getLogger("ptuning").setLevel(logging.DEBUG if verbose else logging.WARNING)
    if version:
        typer.echo(f"ptuning {ptuning.__version__}")
        raise typer.Exit


@app.command(cls=_Command)
def train(
    data: Annotated[str, typer.Option(metavar="TRAIN", help="Data file, or NAME:train of the shipped facts.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the prompt and the record of the run.")],
    template: Annotated[str | None, typer.Option(metavar="T", help='As "[P:The capital of] [X] [P:is] [Y]".')] = None,
    manual: Annotated[str | None, typer.Option(metavar="M", help="Make the template from this manual one.")] = None,
    about: Annotated[str | None, typer.Option(metavar="WORDS", help="With --manual: what is asked for.")] = None,
    dev: Annotated[str | None, typer.Option(metavar="DEV", help="Data to choose by; else a part of TRAIN.")] = None,
    backbone: BackboneOption = None,
    encoder: Annotated[str, typer.Option(metavar="lstm|mlp|none", help="Prompt encoder.")] = SETTINGS.encoder,
    epochs: Annotated[int, typer.Option(metavar="N", help="Passes over TRAIN.")] = SETTINGS.epochs,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Records per step.")] = SETTINGS.batch_size,
    lr: Annotated[float, typer.Option(metavar="F", help="Peak learning rate.")] = SETTINGS.lr,
    seed: Annotated[int, typer.Option(metavar="N", help="Of everything random.")] = SETTINGS.seed,
    labels: Annotated[str | None, typer.Option(metavar="WORDS", help='As "good=great,fine; bad=poor".')] = None,
    set_: SetOption = None,
    field: FieldOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stopped run was.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in DIR.")] = False,
    measure_ceiling: Annotated[bool, typer.Option("--measure-ceiling", help="Time the bare backbone too.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Learn a prompt. The backbone stays frozen; DIR gets prompt/, run.json and predictions.jsonl.

    Example: ptuning train --data capitals:train --dev capitals:dev --manual "The capital of [X] is [Y]" --out capitals
    """
    from ptuning.files import check_free
    from ptuning.template import Template

    config = _config(set_, encoder=encoder, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
    if (template is None) == (manual is None):
        raise ConfigError("give either --template, or --manual to have one made from a manual template")
    if about is not None and manual is None:
        raise ConfigError("--about goes with --manual")
    parsed = Template.parse(template) if template is not None else Template.from_manual(manual or "", about=about)
    check_free(out, overwrite=overwrite or resume)
    rows = _records(data, field)
    dev_rows = _records(dev, field) if dev is not None else None
    if manual is not None:
        show.say(f"learned template: {parsed}")
    loaded = _load(backbone, dtype=dtype, device=device)
    with _training(out, again="--resume") as (report, should_stop):
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
            command=_command(),
        )
    show.training(result)


@app.command(name="eval", cls=_Command)
def evaluate(
    prompt: PromptArgument,
    data: Annotated[str, typer.Option(metavar="FILE", help="Records with targets.")],
    candidates: CandidatesOption = None,
    normalise: NormaliseOption = "sum",
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
    from ptuning.records import require_targets

    chosen = _prompt(prompt)
    if chosen.label_words is not None and candidates is not None:
        raise ConfigError("the prompt has label words, which are all its answers; leave --candidates out")
    how = _normalise(normalise, closed=candidates is not None)
    rows = _records(data, field)
    require_targets(rows)
    listed = _candidates(candidates, prompt, data, field) if candidates is not None else None
    loaded = _load(backbone, dtype=dtype, device=device, prompt=chosen)
    from ptuning.evaluate import score_prompt
    from ptuning.predict import PromptModel

    with show.bar() as report:
        model = PromptModel(loaded, force=force)
        found = score_prompt(model, rows, chosen, candidates=listed, normalise=how, report=report)
    show.evaluation(prompt, rows, found, as_json=as_json)


@app.command(cls=_Command)
def predict(
    prompt: PromptArgument,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Value of the template's one field.")] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE|-", help="Records; - reads JSONL from the input.")] = None,
    candidates: CandidatesOption = None,
    top_k: Annotated[int, typer.Option(metavar="N", help="How many answers to show.", min=1)] = 1,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Longest written answer.", min=1)] = None,
    normalise: NormaliseOption = "sum",
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
    closed = candidates is not None or chosen.label_words is not None
    if max_tokens is not None and closed:
        raise ConfigError("--max-tokens is for answers that are written, not for candidates or label words")
    how = _normalise(normalise, closed=closed)
    rows = _records_to_answer(chosen, text, data, field)
    listed = _candidates(candidates, prompt, data, field) if candidates is not None else None
    loaded = _load(backbone, dtype=dtype, device=device, prompt=chosen)
    from ptuning.measure import Progress
    from ptuning.predict import PromptModel

    model, found = PromptModel(loaded, force=force), []
    with show.bar() as report:
        for at in range(0, len(rows), PREDICTED_ROWS):
            part = rows[at : at + PREDICTED_ROWS]
            found += model.predict(part, chosen, listed, top_k=top_k, max_tokens=max_tokens, normalise=how)
            report(Progress("predict", len(found), len(rows), rows.name))
    show.predictions(rows, found, as_json=as_json, masked=loaded.kind == "masked")


@app.command(cls=_Command)
def inspect(
    prompt: PromptArgument,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Score the nearest tokens as well.")] = None,
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
    chosen = _prompt(prompt)
    rows = _records(data, field) if data is not None else None
    loaded = _load(backbone, dtype=dtype, device=device, prompt=chosen)
    from ptuning.inspection import inspect_prompt

    with show.bar() as report:
        found = inspect_prompt(loaded, chosen, data=rows, force=force, report=report)
    show.inspection(chosen, found, as_json=as_json)


@template_app.command(name="show", cls=_Command)
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
    row = {name: name for name in parsed.fields}
    if record is not None:
        rows = read_rows(record.replace("\n", " ").encode(), name="--record")
        if len(rows) != 1:
            raise RecordError('--record takes one JSON object, such as {"x": "Kenya", "y": "Nairobi"}')
        row = dict(rows[0])
    name = backbone if backbone is not None else defaults.BACKBONE
    with show.loading(name):
        from ptuning.backbone import load_tokenizer
        from ptuning.fill import BoundTemplate

        tokenizer, kind = load_tokenizer(name)
    show.template(BoundTemplate(parsed, tokenizer=tokenizer, kind=kind).describe(row), tokenizer, as_json=as_json)


@app.command(cls=_Command)
def data(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Which facts to print.")] = None,
    split: Annotated[str, typer.Option(metavar="train|dev|test", help="Which part.")] = "train",
) -> None:
    """List the shipped facts, or print a part of them as JSONL. NAME:split works wherever a data file does.

    Example: ptuning data capitals --split test
    """
    from ptuning.records import load_records, shipped_facts

    if name is None:
        show.facts(shipped_facts())
        return
    for row in load_records(name if ":" in name else f"{name}:{split}"):
        typer.echo(json.dumps(dict(row), ensure_ascii=False))


@app.command(cls=_Command)
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the run is left.")] = Path("runs/demo"),
    set_: SetOption = None,
    backbone: BackboneOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Learn country -> capital and compare with the manual prompt: the main job, in about a minute.

    Example: ptuning demo
    """
    config = _config(set_)
    loaded = _load(backbone, dtype=dtype, device=device)
    with _training(out) as (report, should_stop):
        from ptuning.demo import run_demo

        result = run_demo(
            out, backbone=loaded, config=config, report=report, should_stop=should_stop, command=_command()
        )
    show.demo(result)


def _command(program: str = "ptuning") -> str:
    """Return the command line as it was given."""
    return f"{program} {shlex.join(sys.argv[1:])}"


def _config(pairs: Sequence[str] | None, **options: object) -> TrainConfig:
    """Return the settings given; those not given keep the default of ``TrainConfig``."""
    given = named_values(pairs or (), expected="--set NAME=VALUE, such as patience=2")
    values: dict[str, Any] = {name.replace("-", "_"): text for name, text in given.items()}
    for name, text in values.items():
        with contextlib.suppress(ValueError):
            values[name] = json.loads(text)
        if name in options and options[name] not in (getattr(SETTINGS, name), values[name]):
            raise ConfigError(f"'{name}' is given twice: {options[name]} by its option, and {text} by --set")
    return TrainConfig.from_json({**options, **values})


def _fields(pairs: Sequence[str] | None) -> dict[str, str]:
    return named_values(pairs or (), expected="--field NEW=NAME, such as y=answer")


def _normalise(value: str, *, closed: bool) -> Normalise:
    if value not in ("sum", "mean"):
        raise ConfigError(f"--normalise is sum or mean, not '{value}'")
    if value != "sum" and not closed:
        raise ConfigError("--normalise goes with a closed set of answers: --candidates, or in predict label words")
    return cast("Normalise", value)


def _records(source: str, field: Sequence[str] | None) -> Records:
    from ptuning.records import load_records

    with show.waiting(f"reading {source}"):
        return load_records(source, fields=_fields(field))


def _prompt(source: str) -> Prompt:
    with show.waiting("starting"):
        from ptuning.prompt import Prompt

    if source.startswith("manual:"):
        return Prompt.manual(source.removeprefix("manual:").lstrip())
    return Prompt.load(source)


def _records_to_answer(prompt: Prompt, text: str | None, data: str | None, field: Sequence[str] | None) -> Records:
    from ptuning.records import Records, read_rows

    if (text is None) == (data is None):
        raise ConfigError("give either a TEXT or --data (a file, or - for JSONL on the standard input)")
    if data == "-":
        rows = read_rows(sys.stdin.buffer.read(), name="standard input", fields=_fields(field))
        if not rows:
            raise RecordError("the standard input holds no records; it needs one JSON object per line")
        return Records(rows, name="standard input")
    if data is not None:
        return _records(data, field)
    fields = prompt.template.fields
    if len(fields) != 1:
        raise ConfigError(f"a TEXT fills one field, and the template reads {', '.join(fields) or 'none'}; use --data")
    return Records([{fields[0]: text or ""}], name="the command line")


def _candidates(source: str, prompt: str, data: str | None, field: Sequence[str] | None) -> list[str]:
    """Read candidates: a text file with one per line, the targets of a data file, or those of the training part."""
    from ptuning.evaluate import candidates_of
    from ptuning.files import read_bytes
    from ptuning.records import TARGET_FIELD, load_records

    if source == "train" and not Path(source).exists():
        source = _training_part(prompt, data)
    if Path(source).suffix.lower() == ".txt":
        try:
            lines = read_bytes(Path(source)).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise FileError(f"{source} is no UTF-8 text ({error.reason}); save it as UTF-8") from error
        found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    else:
        # Other fields may well be missing beside the answers.
        fields = {new: old for new, old in _fields(field).items() if new == TARGET_FIELD}
        found = candidates_of(load_records(source, fields=fields))
    if not found:
        raise FileError(f"{source} holds no candidates; give a .txt with one per line, or data with {TARGET_FIELD}")
    return found


def _training_part(prompt: str, data: str | None) -> str:
    """Return the name of the data that a prompt was trained on, or of the training part of shipped facts."""
    from ptuning.files import read_json

    folders = () if prompt.startswith("manual:") else (Path(prompt), Path(prompt).parent)
    record = next((folder / "run.json" for folder in folders if (folder / "run.json").is_file()), None)
    if record is not None:
        parts = cast("dict[str, dict[str, str]]", read_json(record)["data"])
        return parts["train"]["name"].split(" (without the ")[0]
    if data is not None and ":" in data and not Path(data).exists():
        return data.partition(":")[0] + ":train"
    raise ConfigError("--candidates train needs the prompt's run.json, or shipped facts as --data; name a file instead")


def _load(name: str | None, *, dtype: str, device: str, prompt: Prompt | None = None) -> Backbone:
    """Load the backbone that is asked for, the prompt's own, or the default."""
    own = prompt.backbone.name if prompt is not None and prompt.backbone is not None else defaults.BACKBONE
    chosen = name if name is not None else own
    with show.loading(chosen):
        from ptuning.backbone import load_backbone

        return load_backbone(chosen, dtype=cast("Dtype", dtype), device=device)


@contextlib.contextmanager
def _training(out: Path, *, again: str = "") -> Iterator[tuple[Report, Callable[[], bool]]]:
    """Show progress; turn Ctrl-C or a termination into a checkpoint and a word on how to go on (``again``)."""
    from ptuning.runs import CHECKPOINT_FOLDER, RUN_FILE
    from ptuning.trainer import Interrupted

    asked: list[int] = []
    # Said by a thread: the signal may come in the middle of drawing the progress bar.
    word = Thread(target=show.say, args=("stopping after this step; once more to stop at once",))

    def note(number: int, _: object) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt
        word.start()

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with show.bar() as report:
            yield report, lambda: bool(asked)
    except (Interrupted, KeyboardInterrupt) as error:
        if word.ident is not None:
            word.join()
        command = _command(show.program()) + (f" {again}" if again and again not in sys.argv else "")
        kept = next((out / name for name in (CHECKPOINT_FOLDER, RUN_FILE) if (out / name).exists()), None)
        show.stopped(str(error) or "stopped at once", kept, command)
        raise typer.Exit(SIGNAL_EXIT + asked[0]) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
