"""From the description of a training to what the trainer reads: checks, the bound template, items of both parts."""

import logging
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.trained_weights import with_head
from ptuning.config import BY_LOSS, BY_SCORE, TrainBackbone, TrainConfig, TrainingFacts, derived_seed, refuse_unused
from ptuning.data.answer_space import AnswerSpace
from ptuning.data.checks import merges, require_rows
from ptuning.data.conversations import system_text
from ptuning.data.questions import Questions, as_questions
from ptuning.data.sources import Source
from ptuning.data.splits import split_questions
from ptuning.data.task_files import TaskFile
from ptuning.engine.objective import ScoringRequest, build_requests, truncate_target, warn_truncated
from ptuning.engine.prefix_cache import MIN_PREFIX_TOKENS, cacheable_ids
from ptuning.engine.processes import processes
from ptuning.errors import ConfigError, RecordError, TemplateError, closest
from ptuning.metrics.generation import TEXT_METRICS, check_metrics
from ptuning.names import ALONG, LEARNED, MANUAL
from ptuning.prompt.prompt import as_template
from ptuning.records import TARGET_FIELD, Record, Records
from ptuning.template.chat import chat_template
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.examples import example_lines, manual_of, with_deep_examples
from ptuning.template.labels import PLAIN, LabelWords
from ptuning.template.language import Template
from ptuning.template.segments import FILLS_MASKS
from ptuning.training.spec import TrainSpec

logger = logging.getLogger(__name__)
Spec = TypeVar("Spec", bound=TrainSpec)

# Targets of so many tokens are learned whole, and longer ones as far as this share of the targets goes.
FEWEST_TARGET_TOKENS, MOST_TARGETS = 64, 0.99
# From so many tokens on, a record's fields are a text, and no longer a name or a question. Records that are counted.
LONG_FIELD_TOKENS = 32
COUNTED = 200


@dataclass(frozen=True)
class Prepared:
    """A training that was checked and may start, with the questions (``parts``) and items of ``train`` and ``dev``.

    Args:
        facts: Decide which settings act on this training.
        answers: Labels, choices or text.
        fields: Which fields of the training part had another name in its file, new name -> name in the file.
        merge: Labels that count as others.
        left_out: The rows that are not used, with the reason of each.
        method: What the method is called.
        began: When preparing began, by the monotonic clock.
    """

    template: Template
    bound: TokenizedTemplate
    backbone: Backbone
    config: TrainConfig
    facts: TrainingFacts
    answers: AnswerSpace
    task: TaskFile | None
    parts: Mapping[str, Questions]
    items: Mapping[str, Sequence[ScoringRequest]]
    fields: Mapping[str, str]
    merge: tuple[str, ...]
    left_out: tuple[str, ...]
    method: str
    began: float


def prepare(spec: TrainSpec, backbone: Backbone) -> Prepared:
    """Check a training and fill its template with all records.

    Raises:
        PTuningError: If anything cannot be used.
    """
    began = time.monotonic()
    spec = placed(checked(spec), backbone)
    config, task = spec.settings, spec.task_file
    if backbone.max_length is not None:
        config = config.adapted(max_length=min(config.max_length, backbone.max_length))
    if task is not None and task.text_metrics and "metric_for_best_model" not in config.model_fields_set:
        config = config.adapted(metric_for_best_model=task.text_metrics[0])
    assert spec.template is not None
    template = _trainable(as_template(spec.template), config, backbone)
    config = _with_deep_rate(config, template)
    words = LabelWords.of(spec.labels) if spec.labels is not None else None
    parts = {"train": _questions(spec.data)}
    if spec.dev is not None:
        dev = _questions(spec.dev)
        parts["dev"] = dev if task is None else task.to_score(dev)  # with several references, if it gathers them
    answers = _answers(words, parts["train"], task, calibrate=spec.calibrate, head=config.train_backbone == "head")
    if answers.head:
        seed = derived_seed(config.seed, "classification head")
        backbone = with_head(backbone, len(answers.labels), seed=seed, share=True)
    _check_choice(config, answers, parts.get("dev", parts["train"]))
    require_rows(parts)
    for questions in parts.values():
        answers.check(questions)
    shown = _examples(template, parts, answers, backbone, config)
    template = template if shown is None else shown.template
    bound = _bound(template, parts["train"], backbone, config)
    facts = TrainingFacts(
        config.train_backbone,
        has_slots=template.has_input_slots,
        has_deep=template.has_deep,
        has_block=bool(bound.layout.prefix.slots),
        has_examples=shown is not None,
        has_dev=spec.dev is not None,
        uses_cache=config.cache_memory > 0,
    )
    refuse_unused(config, facts, common=spec.common)
    if shown is not None:
        shown.check_length(bound)

    def items_of(questions: Questions) -> list[ScoringRequest]:
        items = build_requests(bound, questions, answers, with_stop=config.train_eos, cut=True)
        if shown is None or not config.leave_one_out or ("dev" in parts and questions is parts["dev"]):
            return items
        return shown.leave_out(items, questions, bound)

    items = {name: items_of(questions) for name, questions in parts.items()}
    fields = parts["train"].fields
    if spec.dev is None:
        # All records were read before the split, so that errors give the right number.
        requests = {id(row): item for row, item in zip(parts["train"], items["train"], strict=True)}
        kept, held_out = split_questions(parts["train"], fraction=config.dev_fraction, seed=config.seed)
        parts = {"train": kept, "dev": held_out}
        items = {name: [requests[id(row)] for row in rows] for name, rows in parts.items()}
        if task is not None and (dev := task.to_score(held_out)) is not held_out:
            items["dev"] = build_requests(bound, dev, answers, with_stop=config.train_eos, cut=True)
            parts["dev"] = dev
    learned = [row for row, item in zip(parts["train"], items["train"], strict=True) if item.distinguishable]
    if not (learned and any(item.distinguishable for item in items["dev"])):
        raise RecordError(
            f"the tokenizer knows no target of {parts['dev' if learned else 'train'].name}; give more records, or take "
            "another backbone"
        )
    if parts["train"].has_choices:
        items["train"] = items_of(answers.to_learn(Questions(learned, name=parts["train"].name), seed=config.seed))
    else:
        items["train"] = [item for item in items["train"] if item.distinguishable]
    if not answers.is_closed and backbone.kind not in FILLS_MASKS:
        items["train"] = _with_cut_targets(items["train"], parts["train"].name, config)
    for name, made in items.items():
        list(warn_truncated([made], parts[name].name, bound.max_length))
    left_out = tuple(spec.checked.left_out) if spec.checked is not None else ()
    merge, method = merges(spec.alias_label), spec.method or method_name(template, config.train_backbone)
    return Prepared(
        template, bound, backbone, config, facts, answers, task, parts, items, fields, merge, left_out, method, began
    )


def _questions(data: Source) -> Questions:
    assert not isinstance(data, str | Path)
    return as_questions(data)


def method_name(template: Template, train_backbone: TrainBackbone) -> str:
    """Return the name of the method that trains this template in this mode."""
    return (LEARNED if template.has_slots else MANUAL) + ALONG[train_backbone]


@dataclass(frozen=True)
class Shown:
    """The examples in place of ``[D:examples]``: the template with their words, the index of the piece that holds them,
    the records, and the text of each.
    """

    template: Template
    piece: int
    records: Sequence[Record]
    lines: Sequence[str]

    def check_length(self, bound: TokenizedTemplate) -> None:
        """Raise a ConfigError if the examples leave a row less than half of what it may take."""
        tokens = sum(map(len, bound.slots_of_lines(self.piece, self.lines)))
        room = bound.max_length // 2
        if tokens > room:
            count = len(self.lines)
            fitting = count * room // tokens
            fewer = f"take fewer (examples={fitting})" if fitting else "leave them out, as not even one fits"
            raise ConfigError(
                f"the {count} example{'s' * (count > 1)} of [D:examples] take {tokens:,} tokens, and at most half of a "
                f"row's {bound.max_length:,} (max_length, or what the model reads) is for them; {fewer}"
            )

    def leave_out(
        self, items: Sequence[ScoringRequest], questions: Questions, bound: TokenizedTemplate
    ) -> list[ScoringRequest]:
        """Return items of which those of a record that is among the examples do not read it there."""
        numbers = {tuple(sorted(record.items())): number for number, record in enumerate(self.records)}
        slots = bound.slots_of_lines(self.piece, self.lines)
        kept = []
        for item, question in zip(items, questions, strict=True):
            number = numbers.get(tuple(sorted(question.record.items())))
            if number is not None:
                inputs = []
                for row in item.inputs:
                    places = bound.layout.places(row.slot_positions)
                    inputs.append(replace(row, unread=tuple(places[slot] for slot in slots[number])))
                item = replace(item, inputs=tuple(inputs))
            kept.append(item)
        return kept


def _examples(
    template: Template, parts: Mapping[str, Questions], answers: AnswerSpace, backbone: Backbone, config: TrainConfig
) -> Shown | None:
    """Draw the examples of ``[D:examples]`` from the records that are learned from; None without that piece."""
    if template.examples is None:
        return None
    train = parts["train"]
    kept = train if "dev" in parts else split_questions(train, fraction=config.dev_fraction, seed=config.seed)[0]
    # As words of a template, a special token such as "[MASK]" would act as one.
    specials = backbone.tokenizer.special_ids
    plain = [row.record for row in kept if not any(token in text for text in row.record.values() for token in specials)]
    if len(plain) < config.examples:
        raise ConfigError(
            f"[D:examples] shows {config.examples} examples, and {train.name} has {len(plain)} records to learn from; "
            f"take fewer (examples={max(1, len(plain))}), or more records"
        )
    drawn = random.Random(f"examples {config.seed}").sample(plain, config.examples)
    spoken = [answers.verbalized(record) for record in drawn]
    lines = example_lines(manual_of(template), spoken, kind=backbone.kind)
    return Shown(with_deep_examples(template, lines), template.examples, drawn, lines)


def _tokens_of(train: Questions, bound: TokenizedTemplate, *, seed: int) -> Iterator[int]:
    """Yield tokens of the training records in a drawn order, from which deep slots without words start."""
    texts = [" ".join(record[name] for name in bound.template.fields if name in record) for record in train.records]
    ids = [token for text in bound.tokenizer.encode(texts[:COUNTED]) for token in text] or [0]
    chooser = random.Random(f"deep starts {seed}")
    while True:
        yield chooser.choice(ids)


def checked(spec: TrainSpec) -> TrainSpec:
    """Read and check the data, unless that was done before; log notes, and warn of possible mistakes."""
    if spec.checked is not None:
        return spec
    checked = spec.check()
    for note in checked.notes:
        logger.info("%s", note)
    for warning in checked.checked.warnings if checked.checked is not None else ():
        logger.warning("%s", warning)
    return checked


def placed(spec: Spec, backbone: Backbone) -> Spec:
    """Return a checked training with its final template: made from its manual one, with the slots where they pay, or
    from the backbone's chat template. Notes say where the slots are.
    """
    if spec.chat:
        questions = _questions(spec.data)
        system = system_text(questions) if spec.system is None else spec.system
        return replace(spec, template=chat_template(backbone.tokenizer, system), chat=False, system=None)
    if spec.manual is None or spec.method is not None:
        return replace(spec, manual=None)
    questions, task = _questions(spec.data), spec.task_file
    is_closed = spec.labels is not None or questions.has_choices or (task is not None and task.answer_space.is_closed)
    template, note = place_slots(
        spec.manual, questions.records, backbone, config=spec.settings, closed=is_closed, about=spec.about
    )
    return replace(spec, template=template, manual=None, about=None, notes=(*spec.notes, *filter(None, [note])))


def _with_deep_rate(config: TrainConfig, template: Template) -> TrainConfig:
    """Return the settings, with a given ``lr`` as the rate of deep slots where these alone are trained."""
    given = config.model_fields_set
    if "lr" not in given or template.has_input_slots or not template.has_deep:
        return config
    if "deep_lr" in given:
        raise ConfigError("lr and deep_lr are both given, and only deep slots are trained; leave one out")
    config = config.adapted(deep_lr=config.lr, lr=TrainConfig().lr)
    config.model_fields_set.discard("lr")
    return config


def place_slots(
    manual: str,
    records: Records,
    backbone: Backbone,
    *,
    config: TrainConfig,
    closed: bool,
    about: str | None = None,
) -> tuple[Template, str]:
    """Return a learned template made from a manual one, and a note on the place of its slots: with a ``closed`` set of
    answers or long fields, after the text, if that is then computed once for all epochs.

    A TemplateError if the manual template is malformed, or a record does not fit. Source: docs/decisions.md, decision
    38.
    """
    both = Template.from_manual(manual, about=about)
    some = [record for record in records if all(name in record for name in both.fields)]
    some = some[:: max(1, len(some) // COUNTED)][:COUNTED]
    is_kept = bool(config.prefix_cache_share) and backbone.keeps_prefixes
    if not (some and is_kept and (closed or _field_tokens(both, some, backbone) >= LONG_FIELD_TOKENS)):
        return both, ""
    read = _read_tokens(both, some, backbone, config)
    front = f"slots come before the text, so a training pass reads all of it, {read:.0f} tokens a record"
    try:
        after = Template.from_manual(manual, after=True)
    except TemplateError:
        return both, f"{front}; of words between the last field and [Y], it would read those alone"
    fewer = _read_tokens(after, some, backbone, config)
    if read - fewer < MIN_PREFIX_TOKENS:
        return both, ""  # nothing is cached, or hardly anything
    times = f"{read / fewer:.1f} times as many (counted on {len(some)} records)"
    if about is not None and about.strip():
        return both, f"{front}; without 'about' it would read {fewer:.0f}, and now reads {times}"
    return after, (
        f"slots come after the text: it is read once, and each training pass reads {fewer:.0f} tokens a record; with "
        f"slots before it as well it would read {read:.0f}, {times}: template '{both}'"
    )


def _field_tokens(template: Template, records: Sequence[Record], backbone: Backbone) -> float:
    """Return the mean number of tokens of a record's fields; their bytes, where these are few: tokens are no more."""
    texts = [record[name] for record in records for name in template.fields]
    size = sum(len(text.encode()) for text in texts)
    if size >= LONG_FIELD_TOKENS * len(records):
        size = sum(map(len, backbone.tokenizer.encode(texts)))
    return size / len(records)


def _read_tokens(template: Template, records: Sequence[Record], backbone: Backbone, config: TrainConfig) -> float:
    """Return the mean number of tokens that a training pass reads of a record, its target left out: those from the
    first slot on if what stands in front is worth keeping, as :meth:`PrefixCache.pays` says.
    """
    seen, _ = template.without_tail()
    bound = TokenizedTemplate(seen, tokenizer=backbone.tokenizer, kind=backbone.kind, max_length=config.max_length)
    filled = bound.contexts(records)
    every, cached = (sum(map(len, rows)) for rows in ([row.token_ids for row in filled], map(cacheable_ids, filled)))
    return (every - cached if cached >= MIN_PREFIX_TOKENS * len(filled) else every) / len(filled)


def _trainable(template: Template, config: TrainConfig, backbone: Backbone) -> Template:
    if not template.has_slots and config.train_backbone == "none":
        raise TemplateError(
            f"the template '{template}' has no slots, so there is nothing to learn; write words as [P:words] to "
            "start from them, let a manual template do it, or train the backbone (train_backbone=head, full or lora)"
        )
    processes()  # says so, if what a launcher left does not fit
    if template.has_slots or config.train_backbone == "lora":
        _ = backbone.passes_gradients  # says so, if it does not
    return template


def _bound(template: Template, train: Questions, backbone: Backbone, config: TrainConfig) -> TokenizedTemplate:
    """Bind the template to the backbone, and check that the model sees its slots."""
    multiline = any("\n" in record[TARGET_FIELD] for record in train.records)
    bound = TokenizedTemplate(
        template,
        tokenizer=backbone.tokenizer,
        kind=backbone.kind,
        multiline=multiline,
        max_length=config.max_length,
        block=backbone.reads_blocks if template.has_deep else False,
    )
    if bound.layout.offset_slots:
        _ = backbone.deep  # says so, if the layers of the model take no vectors
    if template.has_slots and not (bound.slots or bound.layout.prefix.length):
        raise TemplateError(
            f"all slots of '{template}' come after [Y], where a model that reads from left to right does not see "
            "them; move them in front of it"
        )
    return bound.starting(bound.layout.filled_up(_tokens_of(train, bound, seed=config.seed)))


def _check_choice(config: TrainConfig, answers: AnswerSpace, dev: Questions) -> None:
    """Raise a ConfigError if epochs cannot be chosen by what is asked for."""
    metric = config.metric_for_best_model
    if metric in (BY_SCORE, BY_LOSS):
        return
    if metric not in TEXT_METRICS:
        known = (BY_SCORE, BY_LOSS, *TEXT_METRICS)
        raise ConfigError(
            f"metric_for_best_model is '{metric}', which is no metric.{closest(metric, known)} "
            f"Known: {', '.join(known)}"
        )
    if answers.is_closed:
        raise ConfigError(
            f"metric_for_best_model is '{metric}', a metric for texts that are written, and the answers "
            f"are {answers.described}; choose by score or loss"
        )
    check_metrics([metric], dev.records)


def _with_cut_targets(items: Sequence[ScoringRequest], name: str, config: TrainConfig) -> list[ScoringRequest]:
    """Cut targets to learn that are longer than the setting says, and say how many."""
    lengths = sorted(item.choices[0].own_tokens for item in items)
    most = config.max_target_tokens or max(FEWEST_TARGET_TOKENS, lengths[math.ceil(MOST_TARGETS * len(lengths)) - 1])
    longer = sum(length > most for length in lengths)
    if not longer:
        return list(items)
    how = "max_target_tokens" if config.max_target_tokens else "99 in 100 have no more; max_target_tokens allows others"
    logger.warning(
        "%d of %d targets of %s are longer than %d tokens (%s): their beginnings are learned, without an end",
        longer, len(items), name, most, how,
    )  # fmt: skip
    return [truncate_target(item, most) for item in items]


def _answers(
    words: LabelWords | None, train: Questions, task: TaskFile | None, *, calibrate: bool | None, head: bool
) -> AnswerSpace:
    """Return what rows are answered with; scored as the task says, unless asked otherwise."""
    scoring = task.answer_space.scoring if task is not None else PLAIN
    if head and words is None:
        raise ConfigError(
            "a classification head (train_backbone head) chooses among labels, and there are none "
            "here; name them (labels), or train without it"
        )
    if head and calibrate:
        raise ConfigError(
            "calibration is for words of labels, and a classification head (train_backbone head) has none"
        )
    answers = AnswerSpace(words, train.has_choices, scoring, head).scored(calibrate=False if head else calibrate)
    if calibrate and not answers.is_closed:
        raise ConfigError("calibration is for label words and choices; a target that is written has none to compare")
    return answers
