"""From records to a job: which facts are kept, the pair of templates, and the task with its description."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

from ptuning.backbone.backbone import Backbone
from ptuning.data import checks
from ptuning.data.questions import Questions, as_questions
from ptuning.data.task_files import TaskFile
from ptuning.data.word_lists import read_words
from ptuning.errors import RecordError, TemplateError
from ptuning.experiment.cells import CellJob
from ptuning.files import Json
from ptuning.method.base import Task
from ptuning.method.tuned import bare
from ptuning.prompt.prompt import as_template
from ptuning.provenance import described
from ptuning.records import TARGET_FIELD, Record, Records
from ptuning.template.ambiguity import warn
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.labels import LabelWords
from ptuning.template.language import Template

# Records that are looked at together where one that is not kept ends the search.
AT_ONCE = 64
# The vocabulary that consists of all targets of the data.
OBJECTS: Literal["objects"] = "objects"
# A closed set of answers: a list of words, all targets of the data, or None for an open set.
Vocabulary = tuple[str, ...] | Literal["objects"] | None


class OneToken:
    """Whether records have a target of one known token in each of several templates, and one of ``words`` if given."""

    def __init__(
        self, backbone: Backbone, templates: Sequence[Template], *, words: Sequence[str] | None = None
    ) -> None:
        self._bound = [TokenizedTemplate(one, tokenizer=backbone.tokenizer, kind=backbone.kind) for one in templates]
        self._words = frozenset(words) if words is not None else None

    def every(self, records: Sequence[Record]) -> bool:
        """Whether all records are kept; those behind the first one that is not are not looked at."""
        return all(all(self(records[at : at + AT_ONCE])) for at in range(0, len(records), AT_ONCE))

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


def are_listed(records: Sequence[Record], words: Collection[str]) -> list[bool]:
    """Return for each record whether its target is in a list of words."""
    known = frozenset(words)
    return [row[TARGET_FIELD].strip() in known for row in records]


def read_vocabulary(vocabulary: str | Path | None) -> Vocabulary:
    """Return the words of a vocabulary file; ``objects`` and None stay as they are."""
    if vocabulary is None:
        return None
    return OBJECTS if vocabulary == OBJECTS else read_words(str(vocabulary))


def template_pair(
    manual: Template, template: str | Template | None, *, about: str | None = None
) -> tuple[Template, Template]:
    """Return the manual template and the template to learn. Without the latter, the manual one is turned into it.

    A TemplateError if the manual template has slots, or the template to learn has none.
    """
    if manual.has_slots:
        raise TemplateError(f"the manual template '{manual}' has slots; give it as the template to learn (--template)")
    learned = as_template(template) if template is not None else Template.from_manual(str(manual), about=about)
    if not learned.has_slots:
        raise TemplateError(f"the template '{learned}' has no slots, so there is nothing to learn; write [P:words]")
    return manual, learned


def check_known(job: CellJob, backbone: Backbone) -> None:
    """Warn about targets and fields of a job that the tokenizer does not know; an error as of
    :func:`ptuning.data.checks.check_known`, before anything runs.
    """
    task = job.task
    for template in (task.manual, task.template):
        bound = TokenizedTemplate(template, tokenizer=backbone.tokenizer, kind=backbone.kind)
        warn(checks.check_known(bound, task.answer_space, (task.train, task.dev, job.test)))


def fact_job(
    name: str,
    parts: Mapping[str, Records | Questions],
    pair: tuple[Template | None, Template],
    *,
    vocabulary: Vocabulary = None,
    single_token: bool = False,
    info: Mapping[str, Json],
    file: TaskFile | None = None,
    words: LabelWords | None = None,
    text_metrics: tuple[str, ...] = (),
    num_beams: int = 1,
    by: str | None = None,
) -> CellJob:
    """Return the job of a task with the ``parts`` ``train``, ``dev`` and ``test``, whose answers are text, labels with
    their ``words``, or as the task's ``file`` says.

    ``pair`` is the manual template, if any, and the one to learn; ``info`` is added to the task's description.
    ``text_metrics`` score texts that are written with ``num_beams`` beams, and ``by`` is a field that tells test
    records apart.
    """
    manual, learned = pair
    train, dev, test = (as_questions(parts[part]) for part in ("train", "dev", "test"))
    objects = tuple(sorted({row.record[TARGET_FIELD].strip() for rows in (train, dev, test) for row in rows}))
    closed = objects if vocabulary == OBJECTS else vocabulary
    asked = manual or bare(learned)
    task = Task(
        name, train, dev, asked, learned, objects, closed, single_token, file=file, words=words,
        text_metrics=text_metrics, num_beams=num_beams,
    )  # fmt: skip
    data: dict[str, Json] = {part: described(rows, kept=len(rows)) for part, rows in parts.items()}
    about: dict[str, Json] = {
        "manual": str(manual) if manual is not None else None,
        "template": str(learned),
        "data": data,
    }
    kind = info.get("type")
    return CellJob(task, test, {**about, **info}, kind if isinstance(kind, str) else None, by=by)
