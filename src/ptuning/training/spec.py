"""Description of a training, for Python and the command line alike: data, template, labels and settings. No torch."""

from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import Self

from ptuning.config import TrainConfig
from ptuning.data.checks import Labels, Merge, Report, label_rows, merges
from ptuning.data.sources import NO_TEMPLATE, DataReader, Source, template_of_data
from ptuning.data.task_files import TaskFile, load_task
from ptuning.errors import ConfigError
from ptuning.files import FileModel
from ptuning.names import LEARNED
from ptuning.template.kinds import kind_of_prompt
from ptuning.template.language import Template

# Template of a chat until the backbone's chat template is known.
ANY_CHAT = Template.parse("[C] [Y]")


@dataclass(frozen=True)
class TrainSpec:
    """One training: the data, the template and the settings. The template is ``template``, or is made from ``manual``,
    the task or the model's chat template; without any of these it follows from the form of the data, if that is known.

    Args:
        template: A pattern such as ``[P:The capital of] [X] [P:is] [Y]``; without slots where the backbone is trained.
        data: Training records with targets: rows in memory, a file, shipped facts such as ``capitals:train``, a task's
            folder, or questions. Without targets, the one column that the template does not read is the target.
        dev: Records for early stopping and for choosing the best epoch; by default a seeded share of ``data``.
        config: Hyperparameters; by default those of :class:`~ptuning.config.TrainConfig`.
        labels: Label words (verbalizer) for classification, as ``{"good": ["great", "fine"], "bad": "poor"}`` or as
            ``good=great,fine;bad=poor``; labels that are their own words as ``["good", "bad"]`` or ``good;bad``;
            ``auto`` for the targets that the data has. By default the task's.
        alias_label: Labels to count as others, as ``{"biling": "billing"}`` or ``["biling=billing"]``; ``case`` makes
            one of labels that differ in capitals and spaces only.
        strict: Whether possible mistakes in the data are errors.
        task: The task that ``data`` belongs to, or its name or file. It is saved with the prompt.
        calibrate: Whether to subtract from each label or choice the score that it gets for an empty record; by default
            as the task says.
        method: Kind of prompt made from the manual template (``prompt-tuning``, ``p-tuning-v2``, ...); in a training
            that was checked, the name of the method in its record.
        manual: Manual template that the template is made from; its slots are placed where they pay.
        about: Noun that names the answer, with ``manual``; it becomes slots at the front.
        pattern: Number of the task's template, from 1.
        chat: Whether records are conversations, learned in the model's own chat template.
        system: System text that the slots of a chat start at.
        fields: New name -> name in the data.
        common: Settings that need not act on this training: those that a fleet has for all of its prompts.
        checked: Report in the data, once it was read (:meth:`check`).
        notes: Lines that a user should know about the data and the template.
    """

    template: str | Template | None
    data: Source
    dev: Source | None = None
    config: TrainConfig | None = None
    labels: Labels | None = None
    alias_label: Merge | None = None
    strict: bool = False
    task: TaskFile | str | None = None
    calibrate: bool | None = None
    method: str | None = None
    manual: str | None = None
    about: str | None = None
    pattern: int | None = None
    chat: bool = False
    system: str | None = None
    fields: Mapping[str, str] | None = None
    common: Collection[str] = ()
    checked: Report | None = None
    notes: tuple[str, ...] = ()

    @property
    def settings(self) -> TrainConfig:
        """The hyperparameters, defaults filled in."""
        return self.config or TrainConfig()

    @property
    def task_file(self) -> TaskFile | None:
        """The task, once the training was checked."""
        assert not isinstance(self.task, str | Path)
        return self.task

    def check(self, cache: MutableMapping[object, Any] | None = None) -> Self:
        """Return the training with its rows, label words and template, and the findings; itself if that was done
        before. ``cache`` holds data that several trainings share. Errors are those of the data, or a ConfigError.
        """
        if self.checked is not None:
            return self
        return replace(self, task=_task(self.task))._completed()._read({} if cache is None else cache)

    def _completed(self) -> Self:
        """Return the training with the template that follows from the form of its data, if it has none."""
        named = [name for name in ("template", "manual", "task") if getattr(self, name) is not None]
        more = [name for name in ("about", "pattern") if getattr(self, name) is not None]
        if self.chat and (named or more):
            raise ConfigError(f"chat makes the template of the model's chat template; leave {(*named, *more)[0]} out")
        if self.system is not None and not self.chat:
            raise ConfigError("system goes with chat; write the words into the template: [P:You are ...]")
        if self.system is not None and not self.system.strip():
            raise ConfigError("system is empty; leave it out for the chat template's own")
        if named or more or self.chat:
            return self
        form = template_of_data(self.data)
        if form.manual is None:
            return replace(self, chat=True)
        notes = (*self.notes, *([form.note] if form.note else []))
        return replace(self, manual=form.manual, fields={**form.fields, **(self.fields or {})}, notes=notes)

    def _read(self, cache: MutableMapping[object, Any]) -> Self:
        task, config = self.task_file, self.settings
        method = None if self.method == LEARNED else self.method
        if method is not None:
            kind = kind_of_prompt(method)
            if self.template is not None or self.chat or (self.manual is None and task is None):
                raise ConfigError(
                    "method makes its template from a manual one; give manual (or task), and neither template nor chat"
                )
            if self.about is not None:
                raise ConfigError(f"about is for the template of p-tuning; the method {method} has none; leave it out")
            template = kind.template(template_pair(task, self.manual, None, self.pattern)[0])
            own = {name: value for name, value in kind.settings.items() if name not in config.model_fields_set}
            config = config.adapted(**own)
        else:
            template = ANY_CHAT if self.chat else self._template(task)
        reader = DataReader(task, self.fields or {}, chat=self.chat, cache=cache)
        parts = reader.read_parts({"train": self.data, "dev": self.dev}, reads=template.fields)
        labels = self.labels if self.labels is not None or task is None else task.label_words
        if self.alias_label and labels is None:
            raise ConfigError("there are no labels, so none counts as another; give labels, or leave alias_label out")
        found = label_rows(parts, labels, fields=template.fields, merge=self.alias_label, strict=self.strict)
        return replace(
            self,
            template=template,
            data=found.parts["train"],
            dev=found.parts.get("dev"),
            config=config,
            labels=found.words,
            alias_label=merges(self.alias_label),
            method=method,
            checked=found.report,
            notes=(*self.notes, *reader.notes, *found.report.facts),
        )

    def _template(self, task: TaskFile | None) -> Template:
        given = (self.template is not None) + (self.manual is not None)
        if given > 1 or (given == 0 and task is None):
            raise ConfigError(NO_TEMPLATE)
        if self.about is not None and self.manual is None:
            raise ConfigError("about goes with manual")
        if self.pattern is not None and (task is None or given):
            raise ConfigError("pattern is the number of a task's template; it goes with task alone")
        if self.template is not None:
            return Template.parse(self.template) if isinstance(self.template, str) else self.template
        if self.manual is not None:
            return Template.from_manual(self.manual, about=self.about)
        assert task is not None
        return pattern_of(task.learned, task, 1 if self.pattern is None else self.pattern)


@dataclass(frozen=True)
class _Named:
    name: str


@dataclass(frozen=True)
class FleetPrompt(TrainSpec, _Named):
    """One prompt of a fleet: a name, which becomes its folder, and the arguments of :class:`TrainSpec`."""


def _task(task: TaskFile | str | Path | None) -> TaskFile | None:
    return load_task(task) if isinstance(task, str | Path) else task


def pattern_of(templates: tuple[Template, ...], task: TaskFile, number: int) -> Template:
    """Return a task's template by its number, from 1."""
    if not 1 <= number <= len(templates):
        raise ConfigError(f"the task {task.name} has the patterns 1 to {len(templates)}, not {number}")
    return templates[number - 1]


def template_pair(
    task: TaskFile | None, manual: str | None, template: str | None, pattern: int | None
) -> tuple[Template, Template | None]:
    """Return the manual template of a comparison and the one to learn, if it is given or the task's."""
    if pattern is not None and (task is None or manual is not None):
        raise ConfigError("pattern is the number of a task's template; it goes with a task, and without manual")
    learned = Template.parse(template) if template is not None else None
    if manual is not None:
        return Template.parse(manual), learned
    if task is None:
        raise ConfigError("give the manual template, or a task")
    number = 1 if pattern is None else pattern
    return pattern_of(task.manual, task, number), learned or pattern_of(task.learned, task, number)


class TrainingInputs(FileModel, extra="forbid"):
    """Arguments of :class:`TrainSpec` as a file of settings names them; those that are missing were not given."""

    data: str | None = None
    dev: str | None = None
    template: str | None = None
    manual: str | None = None
    about: str | None = None
    pattern: int | None = None
    method: str | None = None
    chat: bool = False
    system: str | None = None
    task: str | None = None
    labels: str | dict[str, str | tuple[str, ...]] | None = None
    alias_label: str | tuple[str, ...] | dict[str, str] | None = None
    strict: bool = False
    calibrate: bool | None = None
    fields: dict[str, str] | None = None

    def spec(self, config: TrainConfig) -> TrainSpec:
        """Return the training with settings; a ConfigError without data."""
        if self.data is None:
            raise ConfigError("there is no data to learn from (data)")
        return TrainSpec(**{"template": None, **dict(self), "config": config})
