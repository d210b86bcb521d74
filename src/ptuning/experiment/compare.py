"""The comparison of methods on a user's own data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from typing_extensions import Unpack

from ptuning.backbone.backbone import Backbone
from ptuning.config import BY_SCORE, GenerationSettings, TrainConfig, listed_names
from ptuning.data.checks import Labelled, Labels, Merge, label_rows
from ptuning.data.questions import Questions, as_questions, with_references
from ptuning.data.splits import draw_questions, draw_records, split_questions
from ptuning.data.task_files import TaskFile
from ptuning.errors import ConfigError
from ptuning.experiment.jobs import OneToken, Vocabulary, are_listed, fact_job, read_vocabulary, template_pair
from ptuning.experiment.plan import Plan, PlanOptions, run_jobs
from ptuning.files import Json
from ptuning.method.registry import METHODS
from ptuning.method.tuned import bare
from ptuning.metrics.generation import check_metrics, measure_texts, metrics_of
from ptuning.names import ALL_METHODS
from ptuning.prompt.prompt import as_template
from ptuning.records import Rows, references_of, require_fields
from ptuning.report.results_file import Results
from ptuning.template.labels import LabelWords
from ptuning.template.language import Template
from ptuning.template.segments import FILLS_MASKS
from ptuning.training.prepare import place_slots

logger = logging.getLogger(__name__)

SUITE = "compare"


class CompareOptions(PlanOptions, total=False):
    """The keyword arguments of a comparison on one's own data, beside those of every comparison.

    ``metrics`` are for generated texts (:data:`ptuning.metrics.generation.TEXT_METRICS`), by default the task's;
    the first one chooses. Every method writes with ``num_beams`` beams. ``by`` is a field of the test records: scores
    are told for each of its values as well. ``gather`` says that records that differ in their target alone are one
    with several references, where they are scored.
    """

    metrics: Sequence[str] | str | None
    num_beams: int
    by: str | None
    gather: bool


def compare(
    data: Rows | Questions,
    *,
    manual: str | Template,
    test: Rows | Questions | None = None,
    template: str | Template | None = None,
    dev: Rows | Questions | None = None,
    labels: Labels | None = None,
    merge: Merge | None = None,
    strict: bool = False,
    task: TaskFile | None = None,
    vocabulary: str | Path | None = None,
    train_size: int | None = None,
    name: str = "task",
    **options: Unpack[CompareOptions],
) -> Results:
    """Compare methods on your own data. Finished cells of an earlier run are not run again.

    Args:
        data: Records to learn from, or questions of a task.
        manual: A manual template.
        test: Records to report on. Nothing is chosen by them. Without, a share of ``data`` is set aside.
        template: The template to learn; by default made from the manual one.
        dev: Records to choose settings by; without them a seeded share of ``data`` is set aside, the same one as
            :func:`ptuning.train` takes.
        labels: Labels to choose among, as in :func:`ptuning.train`; ``auto`` for the targets of the data.
        merge: Labels to count as others, as in :func:`ptuning.train`.
        strict: Whether what may be a mistake in the data is an error.
        task: The task that the rows belong to.
        vocabulary: A closed set of answers: ``objects`` (all targets of the data), or a file.
        train_size: Learn from a seeded draw of this many records.
        name: Name of the task.
        **options: Those of :class:`CompareOptions`, and ``out``, ``backbone``, ``methods`` and the others of
            :class:`ptuning.experiment.plan.Plan`.

    Returns all scores; the files are in ``out``. A PTuningError if the data or the settings cannot be used; nothing
    has been run then.
    """
    given = {"train": data, "dev": dev, "test": test}
    parts = {part: as_questions(rows) for part, rows in given.items() if rows is not None}
    words = labels if labels is not None or task is None else task.label_words
    found = label_rows(parts, words, fields=as_template(manual).fields, merge=merge, strict=strict)
    for warning in found.report.warnings:
        logger.warning("%s", warning)
    return compare_labelled(
        found,
        manual=manual,
        template=template,
        task=task,
        vocabulary=vocabulary,
        train_size=train_size,
        name=name,
        **options,
    )


def compare_labelled(
    rows: Labelled,
    *,
    manual: str | Template,
    template: str | Template | None = None,
    task: TaskFile | None = None,
    vocabulary: str | Path | None = None,
    train_size: int | None = None,
    name: str = "task",
    **options: Unpack[CompareOptions],
) -> Results:
    """Compare methods on rows that were looked at, as :func:`compare` does."""
    words = rows.words
    scored = ScoredBy.of(options, task, words=words, vocabulary=vocabulary)
    if scored.is_closed or scored.metrics:
        options["methods"] = unrestricted_methods(options.get("methods"))
    config = options.get("config") or TrainConfig()
    if scored.metrics and config.metric_for_best_model == BY_SCORE:
        options["config"] = config.adapted(metric_for_best_model=scored.metrics[0])
    plan = Plan.of(SUITE, **without_scoring(options))
    parts, how = _parted(rows.parts, plan, train_size=train_size, grouped=task is not None)
    if scored.gather:
        parts |= {part: with_references(parts[part]) for part in ("dev", "test")}
    if scored.num_beams > 1:
        _check_beams(plan.backbone)
    if scored.by is not None:
        require_fields(parts["test"].records, [scored.by])
    pair = template_pair(as_template(manual), template)
    notes: tuple[str, ...] = ()
    if template is None:
        records, closed = parts["train"].records, scored.is_closed
        found = place_slots(str(pair[0]), records, plan.backbone, config=plan.config, closed=closed)
        pair = pair[0], found.template
        notes = (*filter(None, [found.told]), f"learned template: {found.template}")
    info: dict[str, Json] = {"label": None, "type": None, "rows": sum(map(len, parts.values())), "dropped": {}}
    info["split"] = how
    listed: Vocabulary = None
    single = False
    if scored.metrics:
        info |= {"text_metrics": list(scored.metrics), "signatures": _signatures(parts["test"], scored.metrics)}
    elif scored.is_closed:
        info |= {"labels": list(words.labels) if words is not None else None}
        info |= {"left_out": list(rows.report.left_out)} if rows.report.left_out else {}
    else:
        one_token = OneToken(plan.backbone, [*pair, bare(pair[0])])
        single = all(one_token.every(part.records) for part in parts.values())
        if single and scored.num_beams > 1:
            raise ConfigError(
                "beams (num_beams) are for texts that are written, and here every answer is one token, so that all "
                "tokens are ranked; leave them out, or name --metrics"
            )
        listed = _listed(vocabulary, parts)
    own = words if task is None or words != task.label_words else None
    job = fact_job(
        name, parts, pair, vocabulary=listed, single_token=single, info=info, file=task, words=own,
        text_metrics=scored.metrics, num_beams=scored.num_beams, by=scored.by,
    )  # fmt: skip
    settings: dict[str, Json] = {"vocabulary": str(vocabulary) if vocabulary else None, "train_size": train_size}
    settings |= {"by": scored.by} if scored.by is not None else {}
    settings |= {"num_beams": scored.num_beams} if scored.num_beams > 1 else {}
    return run_jobs([replace(job, notes=notes)], plan=plan, settings=settings)


@dataclass(frozen=True)
class ScoredBy:
    """How the test part is scored: :class:`CompareOptions`, filled in by the task and checked against the answers."""

    is_closed: bool
    metrics: tuple[str, ...] = ()
    num_beams: int = 1
    by: str | None = None
    gather: bool = False

    @classmethod
    def of(
        cls,
        asked: CompareOptions,
        task: TaskFile | None,
        *,
        words: LabelWords | None,
        vocabulary: str | Path | None,
    ) -> ScoredBy:
        """Return how answers are scored; a ConfigError if it does not fit what they are."""
        is_closed = words is not None or (task is not None and task.answer_space.is_closed)
        named, gather = asked.get("metrics"), asked.get("gather", False)
        beams = GenerationSettings(num_beams=asked.get("num_beams", 1)).num_beams
        if is_closed and vocabulary is not None:
            raise ConfigError("a vocabulary (--vocabulary) is for answers as text; labels and choices are all there is")
        if is_closed or vocabulary is not None:
            for option, given in (
                ("metrics for texts (--metrics)", named),
                ("references (gather)", gather),
                ("beams (num_beams)", beams > 1),
            ):
                if given:
                    answers = "labels or choices" if is_closed else "of a vocabulary"
                    raise ConfigError(f"{option} are for answers that are written, and those here are {answers}")
            return cls(is_closed, by=asked.get("by"))
        own = task.text_metrics if task is not None else ()
        metrics = own if named is None else tuple(metrics_of(named))
        return cls(False, metrics, beams, asked.get("by"), gather or (task is not None and task.gather))


def without_scoring(options: CompareOptions) -> PlanOptions:
    """Return the options that every comparison has."""
    own = ("metrics", "num_beams", "by", "gather")
    return cast("PlanOptions", {name: value for name, value in options.items() if name not in own})


def _check_beams(backbone: Backbone) -> None:
    if backbone.kind in FILLS_MASKS:
        raise ConfigError("beams (num_beams) are for models that write; this one fills masks, all at once")


def _listed(vocabulary: str | Path | None, parts: Mapping[str, Questions]) -> Vocabulary:
    """Return a closed set of answers, if there is one, and warn about targets that it lacks."""
    closed = read_vocabulary(vocabulary)
    for part, questions in parts.items() if isinstance(closed, tuple) else ():
        missing = are_listed(questions.records, closed or ()).count(False)
        if missing:
            text = "%d of %d %s targets are not in %s: never right"
            logger.warning(text, missing, len(questions), part, vocabulary)
    return closed


def _signatures(test: Questions, metrics: Sequence[str]) -> dict[str, Json]:
    """Return score -> what must be equal for it to be compared with other figures. An error if one has no extra."""
    records = test.records
    check_metrics(metrics, records)
    found = measure_texts([references_of(record)[0] for record in records], records, metrics)
    return {name: one.signature for name, one in found.items() if one.signature is not None}


def unrestricted_methods(methods: Sequence[str] | str | None) -> list[str]:
    """Return names of methods; by default, and for all, without the one that chooses among the task's objects: these
    are the labels then, or whole texts.
    """
    asked = METHODS.default_for(SUITE) if methods is None else listed_names(methods)
    if methods is None or asked == [ALL_METHODS]:
        names = METHODS.every if asked == [ALL_METHODS] else asked
        return [name for name in names if not METHODS.find(name).open_only]
    return asked


def _parted(
    given: dict[str, Questions], plan: Plan, *, train_size: int | None, grouped: bool
) -> tuple[dict[str, Questions], str]:
    """Return the parts train, dev and test, and how they were made. The development part that is set aside is that of
    a training with the same data and seed.
    """
    parts, config, how = dict(given), plan.config, []
    if "dev" not in parts:
        parts["train"], parts["dev"] = split_questions(parts["train"], fraction=config.dev_fraction, seed=config.seed)
        how.append(f"{config.dev_fraction:.0%} of the training part set aside to choose by, seed {config.seed}")
    if "test" not in parts:
        parts["train"], parts["test"] = split_questions(parts["train"], fraction=config.dev_fraction, seed=config.seed)
        how.append(f"{config.dev_fraction:.0%} of the rest set aside to report on")
    if train_size is not None:
        train = parts["train"]
        fewer = draw_records(train.records, train_size, seed=config.seed)
        parts["train"] = draw_questions(train, train_size, seed=config.seed) if grouped else as_questions(fewer)
    return {part: parts[part] for part in ("train", "dev", "test")}, "; ".join(how) or "the parts given"
