"""Options that several commands share, and reading settings and pairs from them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer
from typer.core import TyperCommand

from ptuning.backbone.sources import DEVICE_MAPS, DTYPES, KNOWN, QUANTIZE, SHARD, LoadOptions
from ptuning.cli import terminal
from ptuning.cli.help import print_help
from ptuning.cli.templates import template_and_manual
from ptuning.config import SETTING_ALIASES, Setting, TrainConfig, listed_names, setting_of
from ptuning.errors import ConfigError, closest
from ptuning.files import parse_json
from ptuning.names import LEARNED
from ptuning.template.kinds import KINDS, kind_of_prompt

if TYPE_CHECKING:
    from ptuning.prompt.prompt import Prompt
    from ptuning.template.labels import Normalise

# Heavy modules (torch, transformers) are imported inside the functions: --help must not wait for them.

SETTINGS = TrainConfig()
TUNES = ("frozen", "head", "tuned", "lora")
T = TypeVar("T")


class Command(TyperCommand):
    """A command whose help has its options in groups, and that names the closest option for an unknown one."""

    def format_help(self, ctx: Any, formatter: object) -> None:  # noqa: ARG002
        """Print the help."""
        print_help(self, ctx, {})

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse; for an unknown option raise an error that names the closest one."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # The error's class is in click, or in typer's copy of click, depending on typer's release.
            name = getattr(error, "option_name", None)
            if name is None or not hasattr(error, "possibilities"):
                raise
            raise unknown_option(name, [known for one in self.params for known in one.opts]) from error


def among(*words: str) -> Callable[[str], list[str]]:
    """Return what the shell's completion offers for an option; where nothing fits, it offers files."""

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


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Use the prompt with another backbone of the same width.")]
FieldOption = Annotated[list[str] | None, typer.Option(metavar="NEW=NAME", help="Read field NAME as NEW; repeatable.")]
GatherOption = Annotated[
    bool, typer.Option("--gather", help="Records that differ in their target alone are one, with several references.")
]
NormaliseOption = Annotated[
    str | None,
    typer.Option(metavar="sum|mean", help="Score of answers of several tokens.", autocompletion=among("sum", "mean")),
]
LabelsOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|LIST",
        help='As "billing;technical", "good=great,fine; bad=poor", or auto: those in the data.',
        autocompletion=among("auto"),
    ),
]
OwnLabelsOption = Annotated[
    str | None, typer.Option(metavar="LIST", help='As "billing;technical"; a learned prompt remembers its own.')
]
MergeOption = Annotated[
    list[str] | None,
    typer.Option(metavar="WRONG=RIGHT|case", help="Count a label as another; repeatable. case: capitals and spaces."),
]
StrictOption = Annotated[bool, typer.Option("--strict", help="What may be a mistake in the data is an error.")]
CalibrateOption = Annotated[
    bool | None, typer.Option("--calibrate/--no-calibrate", help="Take off what an empty record would score.")
]
TaskOption = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="A shipped task, or a task file.", autocompletion=shipped_tasks),
]
PromptArgument = Annotated[str, typer.Argument(metavar="PROMPT", help='Folder of a prompt, or "manual:TEMPLATE".')]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Other setting; repeatable.")]
WithoutOption = Annotated[
    str | None,
    typer.Option(metavar="slots|backbone", help="Leave a trained part out.", autocompletion=among("slots", "backbone")),
]
TemplateFileOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The template, with line breaks as they are; without slots as --manual."),
]
ChatOption = Annotated[bool, typer.Option("--chat", help="Conversations, in the model's own chat template.")]
SystemOption = Annotated[
    str | None, typer.Option(metavar="TEXT", help="With --chat: the system text that the slots start at.")
]
CandidatesOption = Annotated[str | None, typer.Option(metavar="FILE|train", help="Closed set of answers to rank.")]
CountStopOption = Annotated[bool, typer.Option("--count-stop", help="Score the end of each candidate, too.")]
AnswersOption = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Write answers to a file, .csv or .jsonl.")
]
ReplaceOption = Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")]
LongestOption = Annotated[int | None, typer.Option(metavar="N", help="Longest written answer.")]
BeamsOption = Annotated[int | None, typer.Option("--num-beams", "--beams", metavar="N", help="Width of a beam search.")]
MaxLengthOption = Annotated[int, typer.Option(metavar="N", help="Most tokens of a row; fields are cut to fit.", min=1)]
EncoderOption = Annotated[
    str,
    typer.Option(metavar="lstm|mlp|none", help="Prompt encoder.", autocompletion=among("lstm", "mlp", "none")),
]
TuneOption = Annotated[
    str, typer.Option(metavar="|".join(TUNES), help="What is trained besides.", autocompletion=among(*TUNES))
]
StartsOption = Annotated[int, typer.Option(metavar="K", help="Prompts from different draws; the best is kept.", min=1)]

LogOption = Annotated[
    str | None,
    typer.Option(
        "--log-to",
        metavar="LIST",
        help="Numbers of each step for csv, tensorboard, wandb or mlflow; several with commas.",
        autocompletion=among("csv", "tensorboard", "wandb", "mlflow"),
    ),
]


@functools.cache
def _parameters(options: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(options, eval_str=True).parameters


def takes(**options: Callable[..., object]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Give a command the parameters of functions as options: ``takes(asked=training)`` makes what ``training`` returns
    the command's argument ``asked``. They stand where that argument stands, those without a default first.
    """

    def decorated(command: Callable[..., T]) -> Callable[..., T]:
        own = inspect.signature(command, eval_str=True).parameters
        shared = {argument: _parameters(collect) for argument, collect in options.items()}
        every = [one for name in own for one in (shared[name].values() if name in shared else [own[name]])]

        @functools.wraps(command)
        def run(**given: object) -> T:
            asked = {
                argument: options[argument](**{name: given.pop(name) for name in names})
                for argument, names in shared.items()
            }
            return command(**asked, **given)

        return signed(run, sorted(every, key=lambda one: one.default is not one.empty))

    return decorated


def signed(run: Callable[..., T], parameters: Sequence[inspect.Parameter]) -> Callable[..., T]:
    """Give a command the parameters that Typer makes its options of."""
    every = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in every}
    return run


# How a backbone is found and loaded.
BackboneOption = Annotated[
    str | None,
    typer.Option(metavar="B", help="Known name, folder, GGUF file or hub id.", autocompletion=among(*KNOWN)),
]
DtypeOption = Annotated[str, typer.Option(metavar="D", help=f"{', '.join(DTYPES)}.", autocompletion=among(*DTYPES))]
DeviceOption = Annotated[
    str,
    typer.Option(metavar="D", help="auto, cpu, cuda:1, mps, ...", autocompletion=among("auto", "cpu", "cuda", "mps")),
]
MapOption = Annotated[
    str | None,
    typer.Option(metavar="M", help="Layers over devices: auto, ... or JSON.", autocompletion=among(*DEVICE_MAPS)),
]
RevisionOption = Annotated[str | None, typer.Option(metavar="R", help="Branch, tag or commit on the hub.")]
AttentionOption = Annotated[
    str | None, typer.Option(metavar="A", help="sdpa, eager, ...", autocompletion=among("sdpa", "eager"))
]
QuantizeOption = Annotated[
    str | None,
    typer.Option(metavar="|".join(QUANTIZE), help="Fewer bits for the weights.", autocompletion=among(*QUANTIZE)),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(SHARD),
        help="A model that no device holds: over processes (tp, layers) or devices (map).",
        autocompletion=among(*SHARD),
    ),
]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the backbone.")]


@dataclass(frozen=True)
class AskedBackbone:
    """The backbone that a command line asks for: its name, if it gives one, and how it is loaded."""

    name: str | None
    options: LoadOptions


def backbone_options(
    backbone: BackboneOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    device_map: MapOption = None,
    revision: RevisionOption = None,
    attn_implementation: AttentionOption = None,
    trust_remote_code: TrustOption = False,
    quantize: QuantizeOption = None,
    shard: ShardOption = None,
) -> AskedBackbone:
    """Collect the options of a backbone; commands take them with :func:`takes`."""
    options = LoadOptions(
        dtype=dtype,
        device=device,
        device_map=_map_of(device_map),
        revision=revision,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        quantize=quantize,
        shard=shard,
    )
    return AskedBackbone(backbone, options)


@takes(asked=backbone_options)
def limited_backbone_options(
    max_length: Annotated[
        int | None, typer.Option(metavar="N", help="Most tokens of a row; fields are cut to fit.")
    ] = None,
    *,
    asked: AskedBackbone,
) -> AskedBackbone:
    """Collect the options of a backbone and the length of its rows, which trainings have among their settings."""
    return replace(asked, options=replace(asked.options, max_length=max_length))


def tokenizer_options(
    backbone: BackboneOption = None, revision: RevisionOption = None, trust_remote_code: TrustOption = False
) -> AskedBackbone:
    """Collect the options of a backbone of which only the tokenizer is read."""
    return AskedBackbone(backbone, LoadOptions(revision=revision, trust_remote_code=trust_remote_code))


def _map_of(text: str | None) -> str | dict[str, str | int] | None:
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"--device-map is not valid JSON: {error}") from error
    for name, place in found.items():
        if not isinstance(place, str | int) or isinstance(place, bool):
            raise ConfigError(f"--device-map: '{name}' must be a device such as cpu, disk or 0, and is {place!r}")
    return cast("dict[str, str | int]", found)


KindOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"With --manual, another kind of prompt: {', '.join(KINDS)}.",
        autocompletion=among(*KINDS),
    ),
]
KeepOption = Annotated[
    str,
    typer.Option(
        metavar="difference|whole",
        help="How tuned weights are saved.",
        autocompletion=among("difference", "whole"),
    ),
]


@dataclass(frozen=True)
class TrainInputs:
    """The inputs and settings of one training, before anything is read.

    ``inputs`` are ``data``, ``dev``, ``template``, ``manual``, ``about``, ``chat``, ``system``, ``task``, ``pattern``,
    ``labels``, ``merge``, ``strict``, ``calibrate`` and ``field``; one that is None or missing was not given.
    """

    inputs: Mapping[str, Any]
    config: TrainConfig


def training(
    data: Annotated[
        str,
        typer.Option(
            metavar="TRAIN",
            help="Data file, shipped NAME:train, or with --task a folder.",
            autocompletion=shipped_parts,
        ),
    ],
    template: Annotated[str | None, typer.Option(metavar="T", help='As "[P:The capital of] [X] [P:is] [Y]".')] = None,
    manual: Annotated[str | None, typer.Option(metavar="M", help="Make the template from this manual one.")] = None,
    template_file: TemplateFileOption = None,
    about: Annotated[str | None, typer.Option(metavar="WORDS", help="With --manual: what is asked for.")] = None,
    chat: ChatOption = False,
    system: SystemOption = None,
    task: TaskOption = None,
    pattern: Annotated[int | None, typer.Option(metavar="N", help="Which template of the task, from 1.")] = None,
    dev: Annotated[str | None, typer.Option(metavar="DEV", help="Data to choose by; else a part of TRAIN.")] = None,
    encoder: EncoderOption = SETTINGS.encoder,
    epochs: Annotated[int, typer.Option(metavar="N", help="Passes over TRAIN.")] = SETTINGS.epochs,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Records per pass.")] = SETTINGS.batch_size,
    max_length: MaxLengthOption = SETTINGS.max_length,
    lr: Annotated[float, typer.Option(metavar="F", help="Peak learning rate.")] = SETTINGS.lr,
    method: KindOption = None,
    examples: Annotated[int, typer.Option(metavar="N", help="Examples in [D:examples].")] = SETTINGS.examples,
    tune: TuneOption = SETTINGS.tune,
    backbone_lr: Annotated[float | None, typer.Option(metavar="F", help="Learning rate of what --tune adds.")] = None,
    keep: KeepOption = SETTINGS.keep,
    starts: StartsOption = SETTINGS.starts,
    cache_memory: Annotated[
        float, typer.Option(metavar="SHARE", help="Of the free memory, for what stands in front of slots.")
    ] = SETTINGS.cache_memory,
    cache_disk: Annotated[
        float, typer.Option(metavar="GB", help="Of the disk, for what has no room in that memory.")
    ] = SETTINGS.cache_disk,
    seed: Annotated[int, typer.Option(metavar="N", help="Of everything random.")] = SETTINGS.seed,
    labels: LabelsOption = None,
    merge: MergeOption = None,
    strict: StrictOption = False,
    calibrate: CalibrateOption = None,
    set_: SetOption = None,
    field: FieldOption = None,
) -> TrainInputs:
    """Collect the options of a training; commands take them with :func:`takes`."""
    chosen = {"encoder": encoder, "epochs": epochs, "batch_size": batch_size, "lr": lr, "starts": starts, "seed": seed}
    chosen |= {"max_length": max_length, "cache_memory": cache_memory, "cache_disk": cache_disk, "examples": examples}
    if method == LEARNED:
        method = None
    own = {} if method is None else kind_of_prompt(method).settings
    config = config_of(set_, own, **chosen, **tune_options(tune, backbone_lr, keep))
    template, manual = template_and_manual(template, manual, template_file, learns_words=tune in ("frozen", "head"))
    named: dict[str, object] = {"data": data, "dev": dev, "template": template, "manual": manual, "about": about}
    named |= {"task": task, "pattern": pattern, "labels": labels, "merge": merge, "strict": strict}
    named |= {"chat": chat, "system": system, "method": method}
    return TrainInputs({**named, "calibrate": calibrate, "field": field}, config)


def command_line() -> str:
    """Return the command line as it was given."""
    return f"ptuning {shlex.join(sys.argv[1:])}"


def config_of(
    pairs: Sequence[str] | None, instead: Mapping[str, object] = MappingProxyType({}), **options: object
) -> TrainConfig:
    """Return the settings from options and from ``--set``; the others have the defaults of ``TrainConfig``, or those
    that are given ``instead``.
    """
    given = named_values(pairs or (), expected="--set NAME=VALUE, such as patience=2")
    values: dict[str, Any] = {}
    for name, text in given.items():
        ours = setting_name(name)
        if ours in values:
            raise ConfigError(f"'{ours}' is given twice by --set")
        values[ours] = text
    for name, text in values.items():
        with contextlib.suppress(ValueError):
            values[name] = parse_json(text)
        if name in options and options[name] not in (getattr(SETTINGS, name), values[name]):
            raise ConfigError(f"'{name}' is given twice: {options[name]} by its option, and {text} by --set")
    plain = {name: one for name, one in instead.items() if options.get(name) in (None, getattr(SETTINGS, name))}
    return TrainConfig.from_json({**options, **plain, **values})


def varied_by(pairs: Sequence[str] | None, config: TrainConfig) -> dict[str, list[Setting]]:
    """Return setting -> its values, from ``--vary NAME=VALUE,VALUE``; a ConfigError for one that cannot be."""
    found: dict[str, list[Setting]] = {}
    for pair in pairs or ():
        ((name, texts),) = named_values([pair], expected="--vary NAME=VALUE,VALUE, such as encoder=mlp,none").items()
        ours = setting_name(name)
        values = [setting_of(f"{ours}={text}")[1] for text in listed_names(texts)]
        for value in values:
            config.with_settings({ours: value})
        found[ours] = list(dict.fromkeys((*found.get(ours, ()), *values)))
    return found


def setting_name(name: str) -> str:
    """Return what a setting is called here; another library's word for it is translated with a notice."""
    plain = name.replace("-", "_")
    ours = SETTING_ALIASES.get(plain, plain)
    if ours != plain:
        terminal.say(f"{plain} is called {ours} here")
    return ours


def tune_options(tune: str, backbone_lr: float | None, keep: str) -> dict[str, object]:
    """Return the settings of what is trained besides the slots; each way to train has its own learning rate."""
    if backbone_lr is None:
        return {"tune": tune, "keep": keep}
    if tune == "frozen":
        raise ConfigError("--backbone-lr goes with --tune head, tuned or lora: a frozen backbone learns nothing")
    rate = {"lora": "lora_lr", "head": "head_lr"}.get(tune, "backbone_lr")
    return {"tune": tune, "keep": keep, rate: backbone_lr}


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
    found = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if not (name.strip() and text.strip()):
            raise ConfigError(f"'{pair}' is not {expected}")
        found[name.strip()] = text.strip()
    return found


def unknown_option(name: str, options: Sequence[str]) -> ConfigError:
    """Return the error for an option that does not exist. If ``--set`` exists, settings are suggested, too."""
    dashed = [option for option in options if option.startswith("-")]
    settings = {f"--{field.name.replace('_', '-')}": field.name for field in dataclasses.fields(TrainConfig)}
    hint = closest(name, [*dashed, *settings] if "--set" in dashed else dashed)
    ours = SETTING_ALIASES.get(name.lstrip("-").replace("-", "_"))
    if ours is not None and "--set" in dashed:
        hint = f" Did you mean '--{ours.replace('_', '-')}'?"
    for option, setting in settings.items():
        if option not in dashed and f"'{option}'" in hint:
            hint = f" Did you mean --set {setting}=VALUE?"
    return ConfigError(f"unknown option '{name}'.{hint} Options: {', '.join(dashed)}")
