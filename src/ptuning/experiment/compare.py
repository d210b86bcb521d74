"""The comparison of methods on a user's own data."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptuning.backbone.backbone import Backbone
from ptuning.config import BY_SCORE, GenerationSettings, TrainConfig, listed_names
from ptuning.data.checks import Labelled, Labels, Merge, label_rows
from ptuning.data.questions import Questions, as_questions, with_references
from ptuning.data.splits import draw_questions, draw_records, split_questions
from ptuning.data.task_files import TaskFile
from ptuning.data.word_lists import read_words
from ptuning.errors import ConfigError, RecordError, TemplateError
from ptuning.experiment.cells import CellJob
from ptuning.experiment.comparison import Comparison
from ptuning.files import Json
from ptuning.method.registry import METHODS
from ptuning.method.tuned import bare
from ptuning.metrics.generation import check_metrics, measure_texts, metrics_of
from ptuning.names import ALL_METHODS
from ptuning.prompt.prompt import as_template
from ptuning.records import TARGET_FIELD, Record, Rows, references_of, require_fields
from ptuning.report.results_file import Results
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.language import Template
from ptuning.template.segments import FILLS_MASKS
from ptuning.training.prepare import place_slots

logger = logging.getLogger(__name__)

SUITE = "compare"
# Records that are looked at together where one that is not kept ends the search.
AT_ONCE = 64
# The vocabulary that consists of all targets of the data.
OBJECTS = "objects"


def compare(
    data: Rows | Questions | Labelled,
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
    metrics: Sequence[str] | str | None = None,
    num_beams: int = 1,
    by: str | None = None,
    gather: bool = False,
    **options: Any,
) -> Results:
    """Compare methods on your own data. Finished cells of an earlier run are not run again.

    Args:
        data: Records to learn from, or questions of a task; or all parts with their labels checked.
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
        metrics: Metrics for generated texts (:data:`ptuning.metrics.generation.TEXT_METRICS`), by default the task's;
            the first one chooses.
        num_beams: Width of the beam search that generates answers.
        by: A field of the test records: there are scores for each of its values as well.
        gather: Score records that differ in their target alone as one with several references.
        **options: ``out``, ``backbone``, ``methods`` and the others of
            :class:`ptuning.experiment.comparison.Comparison`.

    Returns all scores; the files are in ``out``. A PTuningError if the data or the settings cannot be used; nothing
    has been run then.
    """
    if not isinstance(data, Labelled):
        given = {"train": data, "dev": dev, "test": test}
        sources = {part: as_questions(rows) for part, rows in given.items() if rows is not None}
        words = labels if labels is not None or task is None else task.label_words
        data = label_rows(sources, words, fields=as_template(manual).fields, merge=merge, strict=strict)
        for warning in data.report.warnings:
            logger.warning("%s", warning)
    is_closed = data.words is not None or (task is not None and task.answer_space.is_closed)
    num_beams = GenerationSettings(num_beams=num_beams).num_beams
    if is_closed and vocabulary is not None:
        raise ConfigError("a vocabulary is for answers as text, not for labels or choices")
    if is_closed or vocabulary is not None:
        generated = {"metrics for texts": metrics, "gather": gather, "num_beams": num_beams > 1}
        for option, value in generated.items():
            if value:
                kind = "labels or choices" if is_closed else "of a vocabulary"
                raise ConfigError(f"{option} has no effect: the answers are {kind}, and not generated")
    scored_by: tuple[str, ...] = ()
    if not is_closed and vocabulary is None:
        scored_by = tuple(metrics_of(metrics)) if metrics is not None else task.text_metrics if task is not None else ()
        gather = gather or (task is not None and task.gather)
    if is_closed or scored_by:
        options["methods"] = unrestricted_methods(options.get("methods"), SUITE)
    config = options.get("config") or TrainConfig()
    if scored_by and config.metric_for_best_model == BY_SCORE:
        options["config"] = config.adapted(metric_for_best_model=scored_by[0])
    comparison = Comparison.of(SUITE, **options)
    backbone = comparison.backbone
    parts, how = _split(data.parts, comparison.config, train_size=train_size, grouped=task is not None)
    if gather:
        parts |= {part: with_references(parts[part]) for part in ("dev", "test")}
    if num_beams > 1 and backbone.kind in FILLS_MASKS:
        raise ConfigError("num_beams is for models that generate; this one fills masks, all at once")
    if by is not None:
        require_fields(parts["test"].records, [by])
    pair = template_pair(as_template(manual), template)
    notes: tuple[str, ...] = ()
    if template is None:
        records = parts["train"].records
        learned, note = place_slots(str(pair[0]), records, backbone, config=comparison.config, closed=is_closed)
        pair = pair[0], learned
        notes = (*filter(None, [note]), f"learned template: {learned}")
    info: dict[str, Json] = {"label": None, "type": None, "rows": sum(map(len, parts.values())), "dropped": {}}
    info["split"] = how
    answers: Sequence[str] | str | None = None
    single = False
    if scored_by:
        info |= {"text_metrics": list(scored_by), "signatures": _signatures(parts["test"], scored_by)}
    elif is_closed:
        info |= {"labels": list(data.words.labels) if data.words is not None else None}
        info |= {"left_out": list(data.report.left_out)} if data.report.left_out else {}
    else:
        single = all(one_token(backbone, [*pair, bare(pair[0])], part.records) for part in parts.values())
        if single and num_beams > 1:
            raise ConfigError("num_beams has no effect: every answer is one token, so that all tokens are ranked")
        answers = read_vocabulary(vocabulary)
        for part, questions in parts.items():
            missing = are_listed(questions.records, answers).count(False) if isinstance(answers, tuple) else 0
            if missing:
                text = "%d of %d %s targets are not in %s: never right"
                logger.warning(text, missing, len(questions), part, vocabulary)
    job = CellJob.of(
        name, parts, pair, info=info, vocabulary=answers, by=by, single_token=single, file=task,
        words=data.words if task is None or data.words != task.label_words else None,
        text_metrics=scored_by, num_beams=num_beams,
    )  # fmt: skip
    settings: dict[str, Json] = {"vocabulary": str(vocabulary) if vocabulary else None, "train_size": train_size}
    settings |= {"by": by} if by is not None else {}
    settings |= {"num_beams": num_beams} if num_beams > 1 else {}
    return comparison.run([replace(job, notes=notes)], settings=settings)


def unrestricted_methods(methods: Sequence[str] | str | None, suite: str) -> list[str]:
    """Return names of methods; by default, and for all, without the one that chooses among the task's objects, where
    these are the labels or whole texts.
    """
    names = METHODS.default_for(suite) if methods is None else listed_names(methods)
    if names == [ALL_METHODS]:
        names = METHODS.every
    elif methods is not None:
        return names
    return [name for name in names if not METHODS.find(name).open_only]


def _split(
    given: Mapping[str, Questions], config: TrainConfig, *, train_size: int | None, grouped: bool
) -> tuple[dict[str, Questions], str]:
    """Return the parts train, dev and test, and how they were made. The development part that is set aside is that of
    a training with the same data and seed.
    """
    parts, share, how = dict(given), f"{config.dev_fraction:.0%}", []
    ways = {
        "dev": f"{share} of the training part set aside to choose by, seed {config.seed}",
        "test": f"{share} of the rest set aside to report on",
    }
    for part in [part for part in ways if part not in parts]:
        parts["train"], parts[part] = split_questions(parts["train"], fraction=config.dev_fraction, seed=config.seed)
        how.append(ways[part])
    if train_size is not None:
        train = parts["train"]
        fewer = draw_records(train.records, train_size, seed=config.seed)
        parts["train"] = draw_questions(train, train_size, seed=config.seed) if grouped else as_questions(fewer)
    return {part: parts[part] for part in ("train", "dev", "test")}, "; ".join(how) or "the parts given"


def _signatures(test: Questions, metrics: Sequence[str]) -> dict[str, Json]:
    """Return score -> what must be equal for it to be compared with other figures. An error if one has no extra."""
    records = test.records
    check_metrics(metrics, records)
    measured = measure_texts([references_of(record)[0] for record in records], records, metrics)
    return {name: scores.signature for name, scores in measured.items() if scores.signature is not None}


def template_pair(
    manual: Template, template: str | Template | None, *, about: str | None = None
) -> tuple[Template, Template]:
    """Return the manual template and the template to learn. Without the latter, the manual one is turned into it.

    A TemplateError if the manual template has slots, or the template to learn has none.
    """
    if manual.has_slots:
        raise TemplateError(f"the manual template '{manual}' has slots; give it as the template to learn")
    learned = as_template(template) if template is not None else Template.from_manual(str(manual), about=about)
    if not learned.has_slots:
        raise TemplateError(f"the template '{learned}' has no slots, so there is nothing to learn; write [P:words]")
    return manual, learned


def read_vocabulary(vocabulary: str | Path | None) -> tuple[str, ...] | str | None:
    """Return the words of a vocabulary file; ``objects`` and None stay as they are."""
    if vocabulary is None or vocabulary == OBJECTS:
        return None if vocabulary is None else OBJECTS
    return read_words(str(vocabulary))


def are_listed(records: Sequence[Record], words: Collection[str]) -> list[bool]:
    """Return for each record whether its target is in a list of words."""
    known = frozenset(words)
    return [row[TARGET_FIELD].strip() in known for row in records]


def one_token(backbone: Backbone, templates: Sequence[Template], records: Sequence[Record]) -> bool:
    """Whether all records have a target of one token; those after the first one that has not are not looked at."""
    keeps = OneToken(backbone, templates)
    return all(all(keeps(records[at : at + AT_ONCE])) for at in range(0, len(records), AT_ONCE))


class OneToken:
    """Whether records have a target of one known token in each of several templates, and one of ``words`` if given."""

    def __init__(
        self, backbone: Backbone, templates: Sequence[Template], *, words: Sequence[str] | None = None
    ) -> None:
        self._bound = [
            TokenizedTemplate(template, tokenizer=backbone.tokenizer, kind=backbone.kind) for template in templates
        ]
        self._words = frozenset(words) if words is not None else None

    def __call__(self, records: Sequence[Record]) -> list[bool]:
        """Return for each record whether it is kept."""
        keep = [True] * len(records) if self._words is None else are_listed(records, self._words)
        for bound in self._bound if records else ():
            for number, record in enumerate(records, start=1):
                bound.check_fields(record, where=f"record {number}")
            try:
                examples = bound.examples(records)
            except (RecordError, TemplateError):
                if len(records) == 1:
                    return [False]  # it has no target, or does not fit
                middle = len(records) // 2
                return [*self(records[:middle]), *self(records[middle:])]
            keep = [
                kept and example.own_tokens == 1 and example.known for kept, example in zip(keep, examples, strict=True)
            ]
        return keep
