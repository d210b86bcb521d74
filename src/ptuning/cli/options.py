"""Options that several commands share, and reading settings and pairs from them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer
from rich.markup import escape
from typer.core import TyperCommand

from ptuning.backbone.sources import DEVICE_MAPS, DTYPES, KNOWN, QUANTIZE, SHARD, LoadOptions
from ptuning.cli import terminal
from ptuning.config import SETTING_ALIASES, GenerationSettings, Setting, TrainConfig, listed_names, setting_of
from ptuning.errors import ConfigError, closest
from ptuning.files import parse_json
from ptuning.names import LOG_FOLDER

if TYPE_CHECKING:
    from ptuning.prompt.prompt import Prompt
    from ptuning.template.labels import Normalise
    from ptuning.workers.jobs import WorkPart
    from ptuning.workers.pool import WorkerConfig

# Heavy modules (torch, transformers) are imported inside the functions: --help must not wait for them.

SETTINGS = TrainConfig()
TRAIN_BACKBONE = ("none", "head", "full", "lora")
# Titles of the groups of options in --help.
DATA, TEMPLATE, TRAINING = "Data", "Template and labels", "Training"
ANSWERS, OUTPUT, BACKBONE = "Answers", "Output", "Backbone"
T = TypeVar("T")


class Command(TyperCommand):
    """A command that names the closest option, or the setting, for an unknown option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse; for an unknown option raise an error that names the closest one."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # The error's class is in click, or in typer's copy of click, depending on typer's release.
            name = getattr(error, "option_name", None)
            if name is None or not hasattr(error, "possibilities"):
                raise
            raise unknown_option(name, [known for param in self.params for known in param.opts]) from error


def option(*names: str, about: str, panel: str, complete: Sequence[str] = (), **more: Any) -> Any:
    """Return an option with its help, the title it is listed under, and words for the shell's completion."""
    words: dict[str, Any] = {"autocompletion": among(*complete)} if complete else {}
    make: Any = typer.Option
    return make(*names, help=escape(about), rich_help_panel=panel, **words, **more)


def among(*words: str) -> Callable[[str], list[str]]:
    """Return a shell completion with these words; where nothing fits, the shell offers files."""

    def offered(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return offered


def shipped_parts(incomplete: str) -> list[str]:
    """Return the parts of the shipped facts that begin so, such as ``capitals:train``."""
    from ptuning.data.reading import SPLITS, shipped_names

    return among(*(f"{name}:{part}" for name in shipped_names() for part in SPLITS))(incomplete)


def shipped_tasks(incomplete: str) -> list[str]:
    """Return the names of shipped tasks that begin so."""
    from ptuning.data.task_files import shipped_names

    return among(*shipped_names())(incomplete)


PromptArgument = Annotated[str, typer.Argument(metavar="PROMPT", help='Folder of a prompt, or "manual:TEMPLATE".')]
FieldOption = Annotated[
    list[str] | None, option(metavar="NEW=NAME", panel=DATA, about="Read column NAME as field NEW; repeatable.")
]
TaskOption = Annotated[
    str | None,
    option(metavar="NAME|FILE", panel=DATA, about="Shipped task or task file.", autocompletion=shipped_tasks),
]
GatherOption = Annotated[
    bool,
    option("--group-references", panel=DATA, about="Treat records that differ only in the target as one record with "
           "several references."),
]  # fmt: skip
StrictOption = Annotated[bool, option("--strict", panel=DATA, about="Treat data warnings as errors.")]
LabelsOption = Annotated[
    str | None,
    option(
        metavar="auto|LIST",
        panel=TEMPLATE,
        about='Labels, as "billing;technical" or "good=great,fine; bad=poor"; auto takes the targets of the data.',
        complete=("auto",),
    ),
]
OwnLabelsOption = Annotated[
    str | None,
    option(metavar="LIST", panel=TEMPLATE, about='Labels, as "billing;technical" [default: those of the prompt].'),
]
MergeOption = Annotated[
    list[str] | None,
    option(
        "--alias-label",
        metavar="WRONG=RIGHT|case",
        panel=TEMPLATE,
        about="Count a label as another one; repeatable. case: ignore capitals and spaces.",
    ),
]
ForceOption = Annotated[
    bool, option("--force", panel=ANSWERS, about="Use the prompt with another backbone of the same width.")
]
NormaliseOption = Annotated[
    str | None,
    option(
        metavar="sum|mean",
        panel=ANSWERS,
        about="Sum or mean of token log-probabilities (length normalization).",
        complete=("sum", "mean"),
    ),
]
CalibrateOption = Annotated[
    bool | None,
    option(
        "--calibrate/--no-calibrate",
        panel=ANSWERS,
        about="Contextual calibration: subtract the scores of an empty input.",
    ),
]
WithoutOption = Annotated[
    str | None,
    option(
        "--ablate",
        metavar="slots|backbone",
        panel=ANSWERS,
        about="Leave a trained part of the prompt out.",
        complete=("slots", "backbone"),
    ),
]
CandidatesOption = Annotated[
    str | None, option(metavar="FILE|train", panel=ANSWERS, about="Closed set of answers to rank.")
]
CountStopOption = Annotated[
    bool, option("--count-stop", panel=ANSWERS, about="Include the end-of-sequence token in each candidate's score.")
]
LongestOption = Annotated[
    int | None, option(metavar="N", panel=ANSWERS, about="Maximum number of tokens of a generated answer.")
]
BeamsOption = Annotated[int | None, option("--num-beams", metavar="N", panel=ANSWERS, about="Width of a beam search.")]
JsonOption = Annotated[bool, option("--json", panel=OUTPUT, about="Print JSON instead of tables.")]
AnswersOption = Annotated[
    Path | None, option("--out", metavar="FILE", panel=OUTPUT, about="Write answers to a file, .csv or .jsonl.")
]
ReplaceOption = Annotated[bool, option("--overwrite", panel=OUTPUT, about="Replace FILE.")]
LogOption = Annotated[
    str | None,
    option(
        "--log-to",
        metavar="LIST",
        panel=OUTPUT,
        about="Log metrics of each step to csv, tensorboard, wandb or mlflow; separated by commas.",
        complete=("csv", "tensorboard", "wandb", "mlflow"),
    ),
]
TemplateFileOption = Annotated[
    Path | None, option(metavar="FILE", panel=TEMPLATE, about="Read the template from a file, line breaks included.")
]
SetOption = Annotated[
    list[str] | None,
    option("--set", metavar="NAME=VALUE", panel=TRAINING, about="Any other setting (docs/train.md); repeatable."),
]
EncoderOption = Annotated[
    str,
    option(metavar="lstm|mlp|none", panel=TRAINING, about="Prompt encoder.", complete=("lstm", "mlp", "none")),
]
NumRestartsOption = Annotated[
    int, option(metavar="K", panel=TRAINING, about="Prompts from different random states; the best is kept.", min=1)
]


@functools.cache
def _parameters(options: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(options, eval_str=True).parameters


def takes(**options: Callable[..., object]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Give a command the parameters of functions as options: ``takes(backbone=backbone_options)`` passes the result of
    ``backbone_options`` as the command's argument ``backbone``.
    """

    def decorated(command: Callable[..., T]) -> Callable[..., T]:
        own = inspect.signature(command, eval_str=True).parameters
        shared = {argument: _parameters(collect) for argument, collect in options.items()}
        every = [param for name in own for param in (shared[name].values() if name in shared else [own[name]])]

        @functools.wraps(command)
        def run(**given: object) -> T:
            collected = {
                argument: options[argument](**{name: given.pop(name) for name in names})
                for argument, names in shared.items()
            }
            return command(**collected, **given)

        return signed(run, sorted(every, key=lambda param: param.default is not param.empty))

    return decorated


def signed(run: Callable[..., T], parameters: Sequence[inspect.Parameter]) -> Callable[..., T]:
    """Give a command the parameters that Typer makes its options of."""
    every = [param.replace(kind=inspect.Parameter.KEYWORD_ONLY) for param in parameters]
    run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    run.__annotations__ = {param.name: param.annotation for param in every}
    return run


BackboneOption = Annotated[
    str | None,
    option(metavar="B", panel=BACKBONE, about="Known name, folder, GGUF file or hub id.", complete=KNOWN),
]
ModelArgOption = Annotated[
    list[str] | None,
    option(
        "--model-arg",
        metavar="K=V",
        panel=BACKBONE,
        about="Other loading option: device_map, revision, attn_implementation, trust_remote_code, quantize, shard, "
        "max_length; repeatable.",
        complete=(
            *(f"quantize={kind}" for kind in QUANTIZE),
            *(f"shard={kind}" for kind in SHARD),
            *(f"device_map={kind}" for kind in DEVICE_MAPS),
            "revision=",
            "attn_implementation=",
            "trust_remote_code=true",
            "max_length=",
        ),
    ),
]
# Names of --model-arg -> how their values are read.
MODEL_ARGS: Mapping[str, Callable[[str], object]] = {
    "device_map": lambda text: parse_json(text) if text.startswith("{") else text,
    "revision": str,
    "attn_implementation": str,
    "trust_remote_code": lambda text: {"true": True, "false": False}[text.lower()],
    "quantize": str,
    "shard": str,
    "max_length": int,
}


@dataclass(frozen=True)
class AskedBackbone:
    """Backbone named on the command line, if any, and how it is loaded."""

    name: str | None
    options: LoadOptions


def backbone_options(
    backbone: BackboneOption = None,
    dtype: Annotated[str, option(metavar="D", panel=BACKBONE, about=f"{', '.join(DTYPES)}.", complete=DTYPES)] = "auto",
    device: Annotated[
        str,
        option(
            metavar="D", panel=BACKBONE, about="auto, cpu, cuda:1, mps, ...", complete=("auto", "cpu", "cuda", "mps")
        ),
    ] = "auto",
    model_arg: ModelArgOption = None,
) -> AskedBackbone:
    """Collect the options of a backbone; commands take them with :func:`takes`."""
    return AskedBackbone(backbone, LoadOptions(dtype=dtype, device=device, **_model_args(model_arg, MODEL_ARGS)))


def tokenizer_options(backbone: BackboneOption = None, model_arg: ModelArgOption = None) -> AskedBackbone:
    """Collect the options of a backbone whose tokenizer alone is loaded."""
    return AskedBackbone(backbone, LoadOptions(**_model_args(model_arg, ("revision", "trust_remote_code"))))


def _model_args(pairs: Sequence[str] | None, known: Iterable[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, text in named_values(pairs or (), expected="--model-arg K=V, such as quantize=int8").items():
        if name not in known:
            raise ConfigError(f"--model-arg {name}: unknown here.{closest(name, known)} Known: {', '.join(known)}")
        try:
            values[name] = MODEL_ARGS[name](text)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"--model-arg {name}: '{text}' is no value for it ({error})") from error
    for module, place in values.get("device_map", {}).items() if isinstance(values.get("device_map"), dict) else ():
        if not isinstance(place, str | int) or isinstance(place, bool):
            raise ConfigError(f"--model-arg device_map: '{module}' must be a device such as cpu or 0, not {place!r}")
    return values


def generation_options(
    max_new_tokens: LongestOption = None,
    num_beams: BeamsOption = None,
    length_penalty: Annotated[
        float | None, option(metavar="F", panel=ANSWERS, about="Above 0 favours long beams.")
    ] = None,
    do_sample: Annotated[bool | None, option("--do-sample", panel=ANSWERS, about="Sample each token.")] = None,
    temperature: Annotated[
        float | None, option(metavar="F", panel=ANSWERS, about="Below 1 samples likely tokens more often.")
    ] = None,
    top_k: Annotated[
        int | None, option(metavar="N", panel=ANSWERS, about="Sample among the N likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float | None, option(metavar="F", panel=ANSWERS, about="Sample among the likeliest tokens that sum to F.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, option(metavar="F", panel=ANSWERS, about="Above 1 avoids repetitions.")
    ] = None,
    stop: Annotated[list[str] | None, option(metavar="TEXT", panel=ANSWERS, about="End an answer; repeatable.")] = None,
    seed: Annotated[int | None, option(metavar="N", panel=ANSWERS, about="Random seed of sampling.")] = None,
) -> GenerationSettings:
    """Collect settings of generation; those that are not given have the defaults of ``GenerationSettings``."""
    given = {**locals(), "stop_strings": stop}
    del given["stop"]
    return GenerationSettings.of({name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Shares:
    """How a command is divided: ``--part``, and the workers that do it."""

    part: str | None = None
    workers: int | None = None
    address: str | None = None
    gpus: float | None = None

    @property
    def own(self) -> WorkPart | None:
        """The part to do; None for all of it. A ConfigError if it is not K/N."""
        from ptuning.workers.jobs import WorkPart

        return None if self.part is None else WorkPart.parse(self.part)

    def pool(self, backbone: AskedBackbone, *, dry_run: bool = False) -> WorkerConfig | None:
        """Return the workers, None for none; an error if there cannot be such, before a backbone is loaded for them.
        A ``dry_run`` starts none.
        """
        if self.address is None and self.workers in (None, 1):
            if self.gpus is not None:
                raise ConfigError("--gpus-per-worker goes with --workers or --ray")
            return None
        from ptuning.workers.pool import SHARDED, WorkerConfig

        if backbone.options.shard in ("tp", "layers"):
            raise ConfigError(SHARDED)
        workers = WorkerConfig(self.workers, self.address, self.gpus, backbone.options)
        if not dry_run:
            workers.check()
        return workers

    def log_folder(self, out: Path) -> Path:
        """Return the folder of logs: each part has its own, since several may be written at once."""
        return out / LOG_FOLDER / (f"part-{self.own}".replace("/", "-of-") if self.own is not None else "")


def shares_of(
    part: Annotated[
        str | None,
        option(metavar="K/N", panel=TRAINING, about="Do only the K-th of N parts; without it, parts are collected."),
    ] = None,
    workers: Annotated[
        int | None,
        option(metavar="N", panel=TRAINING, about="Processes with a backbone each; needs ptuning[ray].", min=1),
    ] = None,
    ray: Annotated[
        str | None,
        option(metavar="HOST:PORT|auto", panel=TRAINING, about="Ray cluster of the workers.", complete=("auto",)),
    ] = None,
    gpus_per_worker: Annotated[
        float | None, option(metavar="F", panel=TRAINING, about="Such as 0.25: four workers on a GPU.")
    ] = None,
) -> Shares:
    """Collect how a command is divided; commands take it with :func:`takes`."""
    return Shares(part, workers, ray, gpus_per_worker)


def command_line() -> str:
    """Return the command line as it was given."""
    return f"ptuning {shlex.join(sys.argv[1:])}"


def set_values(pairs: Sequence[str] | None, texts: Iterable[str] = ()) -> dict[str, Any]:
    """Return name -> value from ``--set``; values are JSON or else text, and those of ``texts`` are text always."""
    values: dict[str, Any] = {}
    for name, text in named_values(pairs or (), expected="--set NAME=VALUE, such as patience=2").items():
        ours = setting_name(name)
        if ours in values:
            raise ConfigError(f"'{ours}' is given twice by --set")
        values[ours] = text
        if ours not in texts:
            with contextlib.suppress(ValueError):
                values[ours] = parse_json(text)
    return values


def config_of(pairs: Sequence[str] | None, **options: object) -> TrainConfig:
    """Return the settings from options and from ``--set``; the others have the defaults of ``TrainConfig``."""
    values = set_values(pairs)
    for name, value in values.items():
        if name in options and options[name] not in (getattr(SETTINGS, name), value):
            raise ConfigError(f"'{name}' is given twice: {options[name]} by its option, and {value} by --set")
    return TrainConfig.from_json({**options, **values})


def varied_by(pairs: Sequence[str] | None, config: TrainConfig) -> dict[str, list[Setting]]:
    """Return setting -> its values, from ``--vary NAME=VALUE,VALUE``; a ConfigError for one that cannot be."""
    varied: dict[str, list[Setting]] = {}
    for pair in pairs or ():
        ((name, texts),) = named_values([pair], expected="--vary NAME=VALUE,VALUE, such as encoder=mlp,none").items()
        ours = setting_name(name)
        values = [setting_of(f"{ours}={text}")[1] for text in listed_names(texts)]
        for value in values:
            config.with_settings({ours: value})
        varied[ours] = list(dict.fromkeys((*varied.get(ours, ()), *values)))
    return varied


def setting_name(name: str) -> str:
    """Return the name of a setting here; another library's word for it is translated with a notice."""
    plain = name.replace("-", "_")
    ours = SETTING_ALIASES.get(plain, plain)
    if ours != plain:
        terminal.say(f"{plain} is called {ours} here")
    return ours


def fields_of(pairs: Sequence[str] | None) -> dict[str, str]:
    """Return new name -> name in the file."""
    return named_values(pairs or (), expected="--field NEW=NAME, such as y=answer")


def scoring_of(
    prompt: Prompt,
    *,
    normalise: str | None,
    calibrate: bool | None,
    count_stop: bool,
    candidates: bool,
    min_probability: float | None = None,
) -> dict[str, Any]:
    """Return how answers are scored, as ``PromptModel.predict`` takes it. Raises ConfigError as that does, before
    anything is loaded.
    """
    prompt.answer_space.scored(
        normalise=cast("Normalise | None", normalise), calibrate=calibrate, candidates=candidates
    )
    prompt.answer_space.check_threshold(min_probability, candidates=candidates)
    if count_stop:
        prompt.check_stop_counts(candidates=candidates)
    return {"normalise": normalise, "calibrate": calibrate, "count_stop": count_stop}


def named_values(pairs: Iterable[str], *, expected: str) -> dict[str, str]:
    """Read texts of the form ``NAME=VALUE``; an error says what was ``expected``."""
    values = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if not (name.strip() and text.strip()):
            raise ConfigError(f"'{pair}' is not {expected}")
        values[name.strip()] = text.strip()
    return values


def unknown_option(name: str, options: Sequence[str]) -> ConfigError:
    """Return the error for an option that does not exist. If ``--set`` exists, settings are suggested, too."""
    dashed = [known for known in options if known.startswith("-")]
    settings = {f"--{setting.replace('_', '-')}": setting for setting in TrainConfig.model_fields}
    hint = closest(name, [*dashed, *settings] if "--set" in dashed else dashed)
    ours = SETTING_ALIASES.get(name.lstrip("-").replace("-", "_"))
    if ours is not None and "--set" in dashed:
        hint = f" Did you mean '--{ours.replace('_', '-')}'?"
    for dash, setting in settings.items():
        if dash not in dashed and f"'{dash}'" in hint:
            hint = f" Did you mean --set {setting}=VALUE?"
    if "--model-arg" in dashed and (arg := name.lstrip("-").replace("-", "_")) in MODEL_ARGS:
        hint = f" Did you mean --model-arg {arg}=VALUE?"
    return ConfigError(f"unknown option '{name}'.{hint} Options: {', '.join(dashed)}")
