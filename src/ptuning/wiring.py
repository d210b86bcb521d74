"""What the commands share: their options, reading what they name, and training that a signal can stop. Exits as the
command line does.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperCommand

from ptuning import defaults, show
from ptuning.config import TrainConfig, named_values, unknown_option
from ptuning.errors import ConfigError, FileError, RecordError

if TYPE_CHECKING:
    from ptuning.backbone import Backbone, Dtype
    from ptuning.labels import Normalise
    from ptuning.measure import Report
    from ptuning.prompt import Prompt
    from ptuning.records import Records

# Heavy modules (torch, transformers) are imported inside the functions: --help must not wait for them.

SIGNAL_EXIT = 128  # a shell's exit code for a signal is this plus its number: 130 for Ctrl-C
SETTINGS = TrainConfig()


class Command(TyperCommand):
    """Names the closest option or setting to an unknown one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, and turn an unknown option into an error that says what was meant."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # The error's class lies in click, or in a copy of click inside of typer, depending on typer's release.
            name = getattr(error, "option_name", None)
            if name is None or not hasattr(error, "possibilities"):
                raise
            raise unknown_option(name, [known for one in self.params for known in one.opts]) from error


BackboneOption = Annotated[str | None, typer.Option(metavar="B", help="Known name, local folder or hub id.")]
DtypeOption = Annotated[str, typer.Option(metavar="D", help="auto, float32 or bfloat16.")]
DeviceOption = Annotated[str, typer.Option(metavar="D", help="auto, cpu, cuda, cuda:1, ...")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Use the prompt with another backbone of the same width.")]
FieldOption = Annotated[list[str] | None, typer.Option(metavar="NEW=NAME", help="Read field NAME as NEW; repeatable.")]
NormaliseOption = Annotated[str, typer.Option(metavar="sum|mean", help="Score of candidates of several tokens.")]
PromptArgument = Annotated[str, typer.Argument(metavar="PROMPT", help='Folder of a prompt, or "manual:TEMPLATE".')]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Other setting; repeatable.")]
WithoutOption = Annotated[str | None, typer.Option(metavar="slots|backbone", help="Leave a trained part out.")]
CandidatesOption = Annotated[str | None, typer.Option(metavar="FILE|train", help="Closed set of answers to rank.")]


def command_line(program: str = "ptuning") -> str:
    """Return the command line as it was given."""
    return f"{program} {shlex.join(sys.argv[1:])}"


def config_of(pairs: Sequence[str] | None, **options: object) -> TrainConfig:
    """Return the settings given; those not given keep the default of ``TrainConfig``."""
    given = named_values(pairs or (), expected="--set NAME=VALUE, such as patience=2")
    values: dict[str, Any] = {name.replace("-", "_"): text for name, text in given.items()}
    for name, text in values.items():
        with contextlib.suppress(ValueError):
            values[name] = json.loads(text)
        if name in options and options[name] not in (getattr(SETTINGS, name), values[name]):
            raise ConfigError(f"'{name}' is given twice: {options[name]} by its option, and {text} by --set")
    return TrainConfig.from_json({**options, **values})


def tune_options(tune: str, backbone_lr: float | None, keep: str) -> dict[str, object]:
    """Return the settings of what is trained besides the slots; each way to train has a learning rate of its own."""
    if backbone_lr is None:
        return {"tune": tune, "keep": keep}
    if tune == "frozen":
        raise ConfigError("--backbone-lr goes with --tune tuned or lora: a frozen backbone learns nothing")
    return {"tune": tune, "keep": keep, "lora_lr" if tune == "lora" else "backbone_lr": backbone_lr}


def fields_of(pairs: Sequence[str] | None) -> dict[str, str]:
    """Return new name -> name in the file."""
    return named_values(pairs or (), expected="--field NEW=NAME, such as y=answer")


def normalise_of(value: str, *, closed: bool) -> Normalise:
    """Return how candidates are scored; it goes with a closed set of answers only."""
    if value not in ("sum", "mean"):
        raise ConfigError(f"--normalise is sum or mean, not '{value}'")
    if value != "sum" and not closed:
        raise ConfigError("--normalise goes with a closed set of answers: --candidates, or in predict label words")
    return cast("Normalise", value)


def records_of(source: str, field: Sequence[str] | None) -> Records:
    """Read a data file or shipped facts."""
    from ptuning.records import load_records

    with show.waiting(f"reading {source}"):
        return load_records(source, fields=fields_of(field))


def prompt_of(source: str, *, without: str | None = None) -> Prompt:
    """Load a prompt, or make a manual one of ``manual:TEMPLATE``; leave out a part of it if asked to."""
    with show.waiting("starting"):
        from ptuning.prompt import Prompt

    if source.startswith("manual:"):
        found = Prompt.manual(source.removeprefix("manual:").lstrip())
    else:
        found = Prompt.load(source)
    return found if without is None else found.without(without)


def records_to_answer(prompt: Prompt, text: str | None, data: str | None, field: Sequence[str] | None) -> Records:
    """Read the records to answer: a text, a file, or the standard input."""
    from ptuning.records import Records, read_rows

    if (text is None) == (data is None):
        raise ConfigError("give either a TEXT or --data (a file, or - for JSONL on the standard input)")
    if data == "-":
        rows = read_rows(sys.stdin.buffer.read(), name="standard input", fields=fields_of(field))
        if not rows:
            raise RecordError("the standard input holds no records; it needs one JSON object per line")
        return Records(rows, name="standard input")
    if data is not None:
        return records_of(data, field)
    fields = prompt.template.fields
    if len(fields) != 1:
        raise ConfigError(f"a TEXT fills one field, and the template reads {', '.join(fields) or 'none'}; use --data")
    return Records([{fields[0]: text or ""}], name="the command line")


def read_candidates(source: str, prompt: str, data: str | None, field: Sequence[str] | None) -> list[str]:
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
        fields = {new: old for new, old in fields_of(field).items() if new == TARGET_FIELD}
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


def load(name: str | None, *, dtype: str, device: str, prompt: Prompt | None = None) -> Backbone:
    """Load the backbone that is asked for, the prompt's own, or the default."""
    own = prompt.backbone.name if prompt is not None and prompt.backbone is not None else defaults.BACKBONE
    chosen = name if name is not None else own
    with show.loading(chosen):
        from ptuning.backbone import load_backbone

        return load_backbone(chosen, dtype=cast("Dtype", dtype), device=device)


@contextlib.contextmanager
def stoppable(out: Path, *, again: str = "") -> Iterator[tuple[Report, Callable[[], bool]]]:
    """Show progress; turn Ctrl-C or a termination into a checkpoint and a word on how to go on (``again``)."""
    from ptuning.results import RESULTS_FILE
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
        command = command_line(show.program()) + (f" {again}" if again and again not in sys.argv else "")
        kept = next((out / name for name in (CHECKPOINT_FOLDER, RUN_FILE, RESULTS_FILE) if (out / name).exists()), None)
        show.stopped(str(error) or "stopped at once", kept, command)
        raise typer.Exit(SIGNAL_EXIT + asked[0]) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
