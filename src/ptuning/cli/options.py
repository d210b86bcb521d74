"""Options that several commands share, and the values that are read from them."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ptuning.backbone.sources import DEVICE_MAPS, DTYPES, KNOWN, QUANTIZE, SHARD, LoadOptions
from ptuning.config import TrainConfig
from ptuning.errors import ConfigError, closest
from ptuning.files import parse_json, validate
from ptuning.names import LOG_FOLDER

if TYPE_CHECKING:
    from ptuning.workers.jobs import WorkPart
    from ptuning.workers.pool import WorkerConfig

# Heavy modules (torch, transformers) are imported inside the functions: --help must not wait for them.

# Sections of the options in --help.
DATA, TEMPLATE, TRAINING = "Data", "Template and labels", "Training"
ANSWERS, OUTPUT, BACKBONE = "Answers", "Output", "Backbone"


def option(about: str, panel: str, *names: str, complete: Iterable[str] = (), **more: Any) -> Any:
    """Return an option: its help, the section it is listed in, its name where that is not its parameter's, and words
    for the shell's completion.
    """
    if complete:
        more["autocompletion"] = among(complete)
    return typer.Option(*names, help=escape(about), rich_help_panel=panel, **more)


def among(words: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a shell completion with these words; where nothing fits, the shell offers files."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def shipped_parts(incomplete: str) -> list[str]:
    """Return the parts of the shipped facts that begin like this, such as ``capitals:train``."""
    from ptuning.data.reading import SPLITS, shipped_names

    return among(f"{name}:{part}" for name in shipped_names() for part in SPLITS)(incomplete)


def shipped_tasks(incomplete: str) -> list[str]:
    """Return the names of shipped tasks that begin like this."""
    from ptuning.data.task_files import shipped_names

    return among(shipped_names())(incomplete)


PromptArgument = Annotated[str, typer.Argument(metavar="PROMPT", help='Folder of a prompt, or "manual:TEMPLATE".')]
TaskOption = Annotated[
    str | None, option("Shipped task or task file.", DATA, metavar="NAME|FILE", autocompletion=shipped_tasks)
]
FieldOption = Annotated[
    list[str] | None, option("Read column NAME as field NEW; repeatable.", DATA, metavar="NEW=NAME")
]
GroupOption = Annotated[
    bool, option("Make records that differ only in the target one record.", DATA, "--group-references")
]
LabelsOption = Annotated[
    str | None,
    option('As "billing;technical" or "good=great,fine; bad=poor".', TEMPLATE, metavar="auto|LIST", complete=["auto"]),
]
AliasLabelOption = Annotated[
    list[str] | None,
    option(
        "Count a label as another one; case: ignore capitals and spaces. Repeatable.",
        TEMPLATE,
        metavar="WRONG=RIGHT|case",
    ),
]
CandidatesOption = Annotated[str | None, option("Closed set of answers to rank.", ANSWERS, metavar="FILE|train")]
NormaliseOption = Annotated[
    str | None,
    option("Sum or mean of token log-probabilities.", ANSWERS, metavar="sum|mean", complete=["sum", "mean"]),
]
CalibrateOption = Annotated[
    bool | None,
    option("Contextual calibration: subtract the scores of an empty input.", ANSWERS, "--calibrate/--no-calibrate"),
]
CountStopOption = Annotated[
    bool, option("Score the end-of-sequence token of each candidate, too.", ANSWERS, "--count-stop")
]
AblateOption = Annotated[
    str | None,
    option("Leave out a trained part.", ANSWERS, metavar="slots|backbone", complete=["slots", "backbone"]),
]
ForceOption = Annotated[bool, option("Use a prompt with another backbone of the same width.", ANSWERS, "--force")]
MaxTokensOption = Annotated[int | None, option("Maximum length of a generated answer.", ANSWERS, metavar="N")]
BeamsOption = Annotated[int | None, option("Width of a beam search.", ANSWERS, metavar="N")]
AnswersOption = Annotated[Path | None, option("Write the answers to a .csv or .jsonl file.", OUTPUT, metavar="FILE")]
ReplaceOption = Annotated[bool, option("Replace the output of an earlier run.", OUTPUT, "--overwrite")]
ResumeOption = Annotated[bool, option("Continue a stopped run.", OUTPUT, "--resume")]
JsonOption = Annotated[bool, option("Print JSON instead of tables.", OUTPUT, "--json")]
LOGS = ("csv", "tensorboard", "wandb", "mlflow")
LogOption = Annotated[str | None, option(f"Log each step to {', '.join(LOGS)}.", OUTPUT, metavar="LIST", complete=LOGS)]
SetOption = Annotated[
    list[str] | None,
    option("Any other setting (docs/train.md); repeatable.", TRAINING, "--set", metavar="NAME=VALUE"),
]
PartOption = Annotated[str | None, option("Do only the K-th of N parts.", TRAINING, metavar="K/N")]
WorkersOption = Annotated[
    int | None, option("Processes, each with a backbone; needs ptuning[ray].", TRAINING, metavar="N", min=1)
]
RayOption = Annotated[str | None, option("Ray cluster of the workers.", TRAINING, metavar="HOST:PORT|auto")]
GpusOption = Annotated[float | None, option("As 0.25: four workers on a GPU.", TRAINING, metavar="F")]
BackboneOption = Annotated[
    str | None, option("Known name, folder, GGUF file or hub id.", BACKBONE, metavar="B", complete=KNOWN)
]
DtypeOption = Annotated[str, option(f"{', '.join(DTYPES)}.", BACKBONE, metavar="D", complete=DTYPES)]
DEVICES = ("auto", "cpu", "cuda", "mps")
DeviceOption = Annotated[str, option("auto, cpu, cuda:1, mps, ...", BACKBONE, metavar="D", complete=DEVICES)]
# Fields of LoadOptions that have no option of their own: --model-arg K=V; those of the first line are texts.
MODEL_TEXTS = ("revision", "attn_implementation", "quantize", "shard")
MODEL_ARGS = (*MODEL_TEXTS, "device_map", "trust_remote_code", "max_length")
CHOICES = {"quantize": QUANTIZE, "shard": SHARD, "device_map": DEVICE_MAPS, "trust_remote_code": ("true",)}
ModelArgOption = Annotated[
    list[str] | None,
    option(
        f"Other loading option: {', '.join(MODEL_ARGS)}; repeatable.",
        BACKBONE,
        metavar="K=V",
        complete=[f"{name}={word}" for name in MODEL_ARGS for word in CHOICES.get(name, ("",))],
    ),
]


@dataclass(frozen=True)
class BackboneChoice:
    """The backbone that was named, if any, and how to load it."""

    name: str | None
    options: LoadOptions


def backbone_of(
    name: str | None,
    dtype: str = "auto",
    device: str = "auto",
    model_arg: Sequence[str] | None = None,
    *,
    known: Sequence[str] = MODEL_ARGS,
) -> BackboneChoice:
    """Return the backbone that options name."""
    values = values_of(model_arg, "--model-arg", "quantize=int8", texts=MODEL_TEXTS, known=known)
    values |= {"dtype": dtype, "device": device}
    return BackboneChoice(name, validate(LoadOptions, values, "--model-arg", error=ConfigError))


def tokenizer_of(name: str | None, model_arg: Sequence[str] | None) -> BackboneChoice:
    """Return the backbone whose tokenizer alone is loaded."""
    return backbone_of(name, model_arg=model_arg, known=("revision", "trust_remote_code"))


@dataclass(frozen=True)
class Shares:
    """The division of a command's jobs: the ``part`` to do (all by default) and the workers."""

    part: WorkPart | None
    workers: WorkerConfig | None

    @classmethod
    def of(
        cls,
        part: str | None,
        workers: int | None,
        ray: str | None,
        gpus: float | None,
        *,
        backbone: BackboneChoice,
        dry_run: bool = False,
    ) -> Shares:
        """Read options; an error if there cannot be such workers, before a backbone is loaded for them."""
        from ptuning.workers.jobs import WorkPart

        own = None if part is None else WorkPart.parse(part)
        if ray is None and workers in (None, 1):
            if gpus is not None:
                raise ConfigError("--gpus-per-worker goes with --workers or --ray")
            return cls(own, None)
        from ptuning.workers.pool import SHARDED, WorkerConfig

        if backbone.options.shard in ("tp", "layers"):
            raise ConfigError(SHARDED)
        config = WorkerConfig(workers, ray, gpus, backbone.options)
        if not dry_run:
            config.check()
        return cls(own, config)

    def log_folder(self, out: Path) -> Path:
        """Return the folder of logs: each part has its own, since several may be written at once."""
        return out / LOG_FOLDER / (f"part-{self.part}".replace("/", "-of-") if self.part is not None else "")


def check_resume(*, resume: bool, overwrite: bool) -> None:
    """Raise a ConfigError if an earlier run is both to be continued and to be replaced."""
    if resume and overwrite:
        raise ConfigError("--resume continues the earlier run that --overwrite replaces; leave one out")


def command_line() -> str:
    """Return the command line as it was given."""
    return f"ptuning {shlex.join(sys.argv[1:])}"


def pairs_of(pairs: Iterable[str] | None, name: str, example: str) -> dict[str, str]:
    """Read an option of the form ``NAME=VALUE``."""
    values = {}
    for pair in pairs or ():
        key, _, text = pair.partition("=")
        if not (key.strip() and text.strip()):
            raise ConfigError(f"'{pair}' is not {name} NAME=VALUE, such as {example}")
        values[key.strip()] = text.strip()
    return values


def fields_of(pairs: Iterable[str] | None) -> dict[str, str]:
    """Return new name -> name in the data, from ``--field``."""
    return pairs_of(pairs, "--field", "y=answer")


def values_of(
    pairs: Sequence[str] | None,
    name: str,
    example: str,
    *,
    texts: Collection[str] = (),
    known: Collection[str] | None = None,
) -> dict[str, Any]:
    """Read an option of the form ``NAME=VALUE``: values are JSON, or else text; those of ``texts`` are always text. A
    ConfigError for one that is given twice, or is not ``known``.
    """
    values: dict[str, Any] = {}
    for pair in pairs or ():
        ((key, text),) = pairs_of([pair], name, example).items()
        key = key.replace("-", "_")
        if key in values:
            raise ConfigError(f"'{key}' is given twice by {name}")
        if known is not None and key not in known:
            raise ConfigError(f"{name} {key}: unknown.{closest(key, known)} Known: {', '.join(known)}")
        values[key] = text
        if key not in texts:
            with contextlib.suppress(ValueError):
                values[key] = parse_json(text)
    return values


def config_of(pairs: Sequence[str] | None, **options: object) -> TrainConfig:
    """Return the settings of ``--set`` and of options that are not None; a ConfigError for one that is given twice."""
    given = {name: value for name, value in options.items() if value is not None}
    values = values_of(pairs, "--set", "patience=2")
    twice = next((name for name in values if name in given), None)
    if twice is not None:
        raise ConfigError(f"'{twice}' is given twice, by its option and by --set")
    return TrainConfig.from_json({**values, **given})
