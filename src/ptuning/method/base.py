"""The input of a method (`Task`, `Setup`), its result (`Solution`), and the list of all methods (`Methods`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptuning.backbone.backbone import Backbone
from ptuning.config import (
    Setting,
    TrainBackbone,
    TrainConfig,
    TrainingFacts,
    acts_on,
    as_setting,
    setting_of,
)
from ptuning.data.answer_space import AnswerSpace
from ptuning.data.questions import Questions
from ptuning.data.task_files import TaskFile
from ptuning.errors import ConfigError, closest
from ptuning.files import Json
from ptuning.metrics import Answer
from ptuning.names import ALL_METHODS, RANDOM_WEIGHTS, is_folder_name
from ptuning.progress import Interrupted, OnProgress, Progress
from ptuning.records import Record
from ptuning.template.kinds import PromptKind
from ptuning.template.labels import LabelWords
from ptuning.template.language import Template, TextSlots

if TYPE_CHECKING:
    from ptuning.training.spec import FleetPrompt


# Common name of a method -> its name.
SHORT_NAMES: Mapping[str, str] = {"lora": "manual+lora"}


@dataclass(frozen=True)
class Task:
    """The parts of a task that a method may see: all but its test part.

    Args:
        name: Such as ``P36``.
        train: Questions to learn from.
        dev: Questions to choose settings by.
        manual: The manual template.
        template: The template to learn.
        objects: The different answers of all parts, in alphabetical order.
        vocabulary: A closed set of answers for every method, or None.
        single_token: Whether every target is one token of the backbone. Answers are then ranked among all tokens.
        file: The task file, if there is one.
        words: Label words where there is no task file, or others than its own.
        text_metrics: Metrics for the texts that are written; the first one chooses. None if answers are right or wrong.
        num_beams: Width of the beam search that writes answers; 1 is greedy decoding.
    """

    name: str
    train: Questions
    dev: Questions
    manual: Template
    template: Template
    objects: tuple[str, ...]
    vocabulary: tuple[str, ...] | None = None
    single_token: bool = False
    file: TaskFile | None = None
    words: LabelWords | None = None
    text_metrics: tuple[str, ...] = ()
    num_beams: int = 1

    @property
    def answer_space(self) -> AnswerSpace:
        """The set of its answers."""
        own = self.file.answer_space if self.file is not None else AnswerSpace()
        return own if self.words is None else replace(own, words=self.words)

    @property
    def is_written(self) -> bool:
        """Whether the backbone writes the answers freely."""
        return not (self.single_token or self.answer_space.is_closed)

    @property
    def scoring(self) -> dict[str, Json]:
        """The way generated answers are made and scored, as far as results depend on it."""
        scoring: dict[str, Json] = {"metric that chooses": self.text_metrics[0]} if self.text_metrics else {}
        return scoring | ({"num_beams": self.num_beams} if self.num_beams > 1 else {})


@dataclass(frozen=True)
class Setup:
    """Everything a method may use while it fits.

    Args:
        backbone: The frozen backbone. A method must not change it.
        config: Training settings.
        seed: Seed of everything random in this fit.
        tries: Number of settings (learning rates) to try; the best on the development part is kept.
        folder: Where a method may keep files, such as its prompt; None for nowhere.
        report: Called with progress.
        should_stop: Called regularly; if it returns true, training raises :class:`ptuning.progress.Interrupted`.
    """

    backbone: Backbone
    config: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    tries: int = 1
    folder: Path | None = None
    report: OnProgress | None = None
    should_stop: Callable[[], bool] | None = None

    def watched(self, now: Progress) -> None:
        """Report how far work is that leaves nothing half done; raises Interrupted if it is to stop."""
        if self.report is not None:
            self.report(now)
        if self.should_stop is not None and now.done < now.total and self.should_stop():
            raise Interrupted(f"stopped after {now.done} of {now.total} records")


@dataclass(frozen=True)
class Solution:
    """A fitted method.

    Args:
        answer: Returns one answer per question. Targets may be missing; they are read only to compute ranks.
        record: The entries of ``run.json``: the settings ``tried`` with their development scores, and the ``chosen``
            one.
    """

    answer: Callable[[Questions], list[Answer]]
    record: Mapping[str, Json] = field(default_factory=dict)

    @classmethod
    def of_ranking(cls, rank: Callable[[Record], Sequence[str]], **record: Json) -> Solution:
        """Return the solution of a method that ranks texts for each record, the best first."""
        return cls(lambda questions: [Answer.of_ranked(rank(row.record), row.right) for row in questions], record)


@dataclass(frozen=True)
class Method:
    """A way to solve a task.

    Args:
        name: Such as ``p-tuning``. It names folders.
        describe: How it answers, in a few words.
        fit: Fits on the training and development part of a task.
        trained: Whether it trains weights. Only then ``tries`` and the control with random weights apply.
        learns_slots: Whether it learns a prompt. Reports compare the first such method with the manual prompt.
        train_backbone: The part of the backbone that it trains; None if unknown. Methods that train less run first.
        seeded: Whether its result depends on the seed. Other methods run once.
        reads_train: Whether it reads the training or development part. If not, seeds that draw parts do not repeat it.
        reads_manual: Whether it reads the words of the manual template. If not, a relation need not have one.
        open_only: Whether it equals another method on tasks with labels or choices. SuperGLUE's ``all`` leaves it out.
        labels_only: Whether it is for labels only, of which not every task has some. ``all`` leaves it out.
        default_for: The comparisons (``compare``, ``lama``, ...) that run it if no methods are named.
        settings: Training settings in which it differs from the comparison's.
        kind: The kind of the prompt that it learns, whose settings are fixed; None for P-tuning and other methods.
        prompts: Returns the trainings whose results ``fit`` looks for in its folder, so that those of many tasks can be
            trained together beforehand.
    """

    name: str
    describe: str
    fit: Callable[[Task, Setup], Solution]
    trained: bool = False
    learns_slots: bool = False
    train_backbone: TrainBackbone | None = None
    seeded: bool = False
    reads_train: bool = True
    reads_manual: bool = True
    open_only: bool = False
    labels_only: bool = False
    default_for: tuple[str, ...] = ()
    settings: Mapping[str, Setting] = field(default_factory=dict)
    kind: PromptKind | None = None
    prompts: Callable[[Task, Setup], Sequence[FleetPrompt]] | None = None

    def depends_on(self, setting: str) -> bool:
        """Whether a training setting of the comparison changes its result."""
        if not self.trained or (self.kind is not None and setting in self.kind.settings):
            return False
        learns = deep = examples = self.learns_slots  # a learned template may have slots of any sort
        if self.kind is not None:
            deep, examples = self.kind.front.deep, isinstance(self.kind.front, TextSlots)
            learns = self.kind.learns_words or not deep
        facts = TrainingFacts(self.train_backbone, has_slots=learns, has_deep=deep, has_examples=examples)
        return acts_on(setting, facts)

    def varied(self, name: str, value: Setting) -> Method:
        """Return the method with another value of a setting; a ConfigError if it does not train with it."""
        if not self.depends_on(name):
            raise ConfigError(f"{self.name} does not depend on the setting '{name}'")
        setting = as_setting(name, value)
        return replace(
            self, name=f"{self.name} {setting}", describe=f"{self.describe}; {setting}", settings={name: value}
        )


class Methods(dict[str, Method]):
    """Methods by name, in the order of tables. :meth:`register` adds one of your own.

    Example:
        >>> @ptuning.methods.register("last-word", describe="the last word of the subject")   # doctest: +SKIP
        ... def last_word(task, setup):
        ...     return Solution.of_ranking(lambda record: [record["x"].split()[-1]])
    """

    def register(
        self, name: str, *, describe: str, **options: Any
    ) -> Callable[[Callable[[Task, Setup], Solution]], Callable[[Task, Setup], Solution]]:
        """Return a decorator that adds a function as a method. The arguments are those of :class:`Method`.

        Raises:
            ConfigError: If the name is taken, or cannot be the name of a folder.
        """
        if name in self or name == ALL_METHODS:
            raise ConfigError(f"there is a method '{name}' already; choose another name")
        if not is_folder_name(name):
            raise ConfigError(f"'{name}' is not a valid name for a method; use letters, digits, '-' and '+'")

        def add(fit: Callable[[Task, Setup], Solution]) -> Callable[[Task, Setup], Solution]:
            self[name] = Method(name, describe, fit, **options)
            return fit

        return add

    def find(self, name: str) -> Method:
        """Return a method by its name (or short name). ``NAME@random-weights`` returns the control of a trained
        method, and ``NAME SETTING=VALUE`` a trained method with another setting (:meth:`Method.varied`).

        Raises:
            ConfigError: If there is no such method; the message suggests the closest name.
        """
        called, sign, control = name.partition("@")
        plain, space, setting = called.partition(" ")
        if plain in SHORT_NAMES:
            return self.find(SHORT_NAMES[plain] + name.removeprefix(plain))
        if plain not in self:
            raise ConfigError(f"unknown method '{plain}'.{closest(plain, self)} Known: {', '.join(self)}")
        method = self[plain]
        if space:
            method = method.varied(*setting_of(setting))
        if not sign:
            return method
        if f"@{control}" != RANDOM_WEIGHTS or not method.trained:
            raise ConfigError(
                f"'{name}': only {RANDOM_WEIGHTS} may follow the name of a method, and only a trained one"
            )
        return replace(method, name=name, describe=f"{method.describe}; backbone with random weights", seeded=True)

    @property
    def every(self) -> list[str]:
        """The names of the methods that ``all`` means."""
        return [name for name, method in self.items() if not method.labels_only]

    def default_for(self, suite: str) -> list[str]:
        """Return the names of the methods that a comparison runs if none are named."""
        return [name for name, method in self.items() if suite in method.default_for]
