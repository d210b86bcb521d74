"""Methods that train: P-tuning, fine-tuning, LoRA, and P-tuning together with either. Each tries the same number of
learning rates.
"""

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from ptuning.config import TrainBackbone
from ptuning.data.checks import Report
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.errors import ConfigError
from ptuning.files import Json
from ptuning.method.base import Method, Setup, Solution, Task
from ptuning.method.classification_head import HeadModel
from ptuning.method.untrained import answering
from ptuning.names import ALONG, LEARNED, MANUAL, RUN, remove
from ptuning.progress import named
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.template.kinds import KINDS, PromptKind
from ptuning.template.language import Field, Literal, Piece, Target, Template
from ptuning.training.prepare import prepare
from ptuning.training.run import TrainingRun
from ptuning.training.spec import FleetPrompt

# Factors of the configured learning rate, in the order they are tried; a single try takes the first.
# Source: docs/decisions.md, decision 14 (what was tried).
TRIED_FACTORS = (1.0, 2.0, 0.5, 4.0, 0.25)
# Number of evaluations in a row with the same guess for every row that causes a warning.
STUCK_EVALUATIONS = 3
# The setting that holds the learning rate to try.
RATES: Mapping[TrainBackbone, str] = {"none": "lr", "head": "lr", "full": "backbone_lr", "lora": "lora_lr"}


def bare(manual: Template) -> Template:
    """Return a manual template without its words: only its fields and its target.

    Example:
        >>> str(bare(Template.parse("The capital of [X] is [Y] .")))
        '[X] [Y]'
    """
    pieces: list[Piece] = []
    for name in manual.fields:
        keep = any(isinstance(piece, Field) and piece.name == name and piece.keep for piece in manual.pieces)
        pieces += [Field(name, keep), Literal(" ")]
    return Template((*pieces, Target()))


def tried_factors(tries: int) -> Sequence[float]:
    """Return the factors of the learning rate for a number of tries.

    Raises:
        ConfigError: If ``tries`` is below 1 or above the number of factors.
    """
    if not 1 <= tries <= len(TRIED_FACTORS):
        raise ConfigError(f"tries is {tries}; it must be a whole number from 1 to {len(TRIED_FACTORS)}")
    return TRIED_FACTORS[:tries]


def _tried(
    task: Task, setup: Setup, template: Template, *, train_backbone: TrainBackbone, kind: PromptKind | None = None
) -> list[FleetPrompt]:
    """Return one training per tried learning rate, named after the folder of its files."""
    setting = _rate(train_backbone, template)
    config = setup.config if kind is None else setup.config.with_settings(kind.settings)
    # Without slots, further starts would differ in the order of the data only.
    restarts = config.num_restarts if template.has_slots else 1
    same = config.adapted(
        seed=setup.seed, train_backbone=train_backbone, save_weights="difference", num_restarts=restarts
    ).as_defaults()
    rates = [getattr(config, setting) * factor for factor in tried_factors(setup.tries)]
    return [
        FleetPrompt(
            f"try-{number}",
            template,
            task.train,
            task.dev,
            config=same.adapted(**{setting: rate}),
            labels=task.answer_space.words,
            task=task.file,
            checked=Report(),  # of all methods' rows, before the comparison
            method=None if kind is None else kind.name + ALONG[train_backbone],
        )
        for number, rate in enumerate(rates, start=1)
    ]


def _rate(train_backbone: TrainBackbone, template: Template) -> str:
    """Return the setting that holds the learning rate to try."""
    return "deep_lr" if train_backbone in ("none", "head") and template.has_deep else RATES[train_backbone]


def _learn(task: Task, setup: Setup, prompts: Sequence[FleetPrompt], *, train_backbone: TrainBackbone) -> Solution:
    """Train with each learning rate, as ``ptuning train`` does, and answer with the one best on the development part.
    Only files that hold all weights of a backbone are removed.
    """
    setting = _rate(train_backbone, cast("Template", prompts[0].template))
    records, tried = list[Mapping[str, Json]](), list[dict[str, Json]]()
    with contextlib.ExitStack() as temporary:
        share = setup.config.adapted(train_backbone=train_backbone).prefix_cache_share
        cache = PrefixCache(setup.backbone, memory_share=share, disk_bytes=setup.config.prefix_cache_bytes)
        prefix_cache = temporary.enter_context(cache)
        # Results go to disk, because keeping several tuned backbones in memory would limit their size.
        folder = setup.folder or Path(temporary.enter_context(tempfile.TemporaryDirectory(prefix="ptuning-")))
        for prompt in prompts:
            result = TrainingRun(prepare(prompt, setup.backbone), out=folder / prompt.name, resume=True).train(
                report=named(setup.report, prompt.name), should_stop=setup.should_stop, prefix_cache=prefix_cache
            )
            records.append(result.record)
            score, loss = (result.prompt.scores[name] for name in (task.answer_space.score_name, "loss"))
            if task.text_metrics:  # the first one in the chosen epoch
                epochs = _evaluations(result.record)
                score = epochs[cast("int", result.record["chosen_epoch"])].get(f"dev_{task.text_metrics[0]}", score)
            rate = getattr(prompt.settings, setting)
            tried.append({"settings": {setting: rate}, "dev_score": score, "dev_loss": loss})
            del result  # frees its weights before the next copy of the backbone is made
        best = _best(tried)
        chosen = Prompt.load(folder / prompts[best].name)
        model = PromptModel(setup.backbone).for_prompt(chosen)
        for prompt in prompts if train_backbone == "full" else ():
            remove(folder / prompt.name, RUN)
    return answering(task, setup, model, chosen, closed=task.vocabulary, **_noted(tried, records[best]))


def _fine_tune(task: Task, setup: Setup) -> Solution:
    """Train all weights on the fields and the target alone; with a classification head for labels and choices."""
    if not task.answer_space.is_closed:
        prompts = _tried(task, setup, bare(task.manual), train_backbone="full")
        return _learn(task, setup, prompts, train_backbone="full")
    tried: list[dict[str, Json]] = []
    best: HeadModel | None = None
    for number, factor in enumerate(tried_factors(setup.tries), start=1):
        rate = setup.config.backbone_lr * factor
        watched = replace(setup, report=named(setup.report, f"try-{number}"))
        model = HeadModel(task, watched, setup.config.adapted(seed=setup.seed, train_backbone="full", backbone_lr=rate))
        tried.append({"settings": {"backbone_lr": rate}, "dev_score": model.score, "dev_loss": model.loss})
        if _best(tried) == len(tried) - 1:
            best = model
        del model  # keeps at most two copies of the backbone in memory
    assert best is not None
    return Solution(best.answer, {**_noted(tried, best.record), "prompt": str(best.bound.template)})


def _noted(tried: Sequence[dict[str, Json]], record: Mapping[str, Json]) -> dict[str, Json]:
    """Return the record of a cell: what was tried, and the history of the best training, and a warning if stuck."""
    kept: dict[str, Json] = {"tried": list(tried), "chosen": tried[_best(tried)]}
    kept |= {name: record[name] for name in ("start", "history", "chosen_epoch", "trainable_parameters")}
    text = stuck(_evaluations(record))
    return {**kept, **({"warnings": [text]} if text else {})}


def stuck(evaluations: Sequence[Mapping[str, float]]) -> str | None:
    """Return a warning if several evaluations in a row (of the start, then of each epoch) guessed the same class for
    every row of the development part, and not every row has that class.
    """
    longest = run = 0
    for evaluation in evaluations:
        run = run + 1 if evaluation.get("guessed_classes") == 1 and evaluation["dev_score"] < 1 else 0
        longest = max(longest, run)
    if longest < STUCK_EVALUATIONS:
        return None
    return f"{longest} evaluations in a row guessed one class for every row of the development part"


def _evaluations(record: Mapping[str, Json]) -> list[Mapping[str, float]]:
    """Return the evaluations of a training: that of the start, then one for each epoch."""
    return cast("list[Mapping[str, float]]", [record["start"], *cast("list[Json]", record["history"])])


def _best(tried: Sequence[dict[str, Json]]) -> int:
    """Return the index of the highest development score; on a tie of the lowest loss, then of the earliest try."""
    keys = [(cast("float", setting["dev_score"]), -cast("float", setting["dev_loss"])) for setting in tried]
    return keys.index(max(keys))


def _trained(
    train_backbone: TrainBackbone,
    describe: str,
    *,
    learns_slots: bool = True,
    kind: PromptKind | None = None,
    default_for: tuple[str, ...] = (),
) -> Method:
    """Return the method that trains on a task's learned template (``learns_slots``) or on its manual one, or that
    learns a prompt of another ``kind``.
    """

    def prompts(task: Task, setup: Setup) -> list[FleetPrompt]:
        template = task.template if learns_slots else task.manual
        if kind is not None:
            template = kind.template(task.manual, task.template)
        return _tried(task, setup, template, train_backbone=train_backbone, kind=kind)

    def fit(task: Task, setup: Setup) -> Solution:
        return _learn(task, setup, prompts(task, setup), train_backbone=train_backbone)

    name = kind.name if kind is not None else LEARNED if learns_slots else MANUAL
    return Method(
        name + ALONG[train_backbone],
        describe,
        fit,
        trained=True,
        learns_slots=learns_slots,
        train_backbone=train_backbone,
        seeded=True,
        reads_manual=not (learns_slots and (kind is None or kind.learns_words)),
        labels_only=train_backbone == "head",
        default_for=default_for,
        kind=kind,
        prompts=prompts if train_backbone == "none" else None,
    )


# In the order of tables. Sources: Liu et al. (2021), section 3 (P-tuning), 4.1 (FT, MP+FT), 4.2 (all weights trained
# together with the prompt, and FT with a head); Hu et al. (2021), section 4 (LoRA).
TUNED = (
    _trained("none", "the learned prompt, backbone frozen", default_for=("compare", "lama", "superglue")),
    Method(
        "fine-tuning",
        "subject and target only, all weights trained (FT)",
        _fine_tune,
        trained=True,
        train_backbone="full",
        seeded=True,
        reads_manual=False,
        default_for=("superglue",),
    ),
    _trained("full", "the manual prompt, all weights trained (MP+FT)", learns_slots=False, default_for=("superglue",)),
    _trained("full", "the learned prompt, all weights trained along"),
    _trained("lora", "the manual prompt, adapters trained (LoRA)", learns_slots=False),
    _trained("lora", "the learned prompt, adapters trained along"),
    *(_trained("none", f"{kind.describe}, backbone frozen", kind=kind) for kind in KINDS.values()),
    _trained("head", "the learned prompt with a classification head, backbone frozen"),
    _trained(
        "head",
        f"{KINDS['p-tuning-v2'].describe}, backbone frozen, classification head",
        kind=KINDS["p-tuning-v2"],
    ),
)
