"""What a method of the paper is: fits on a task's training and development parts, then answers records. Holds the list
of methods; knows none of them, and no benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.questions import Questions
from ptuning.data.task_files import TaskFile
from ptuning.errors import ConfigError, closest
from ptuning.files import Json
from ptuning.metrics import Answer
from ptuning.names import ALL_METHODS, RANDOM_WEIGHTS, is_folder_name
from ptuning.progress import OnProgress
from ptuning.records import Record
from ptuning.template.language import Template

if TYPE_CHECKING:
    from ptuning.training.spec import FleetPrompt


@dataclass(frozen=True)
class Task:
    """What a method may see of a task: everything but its test part.

    Args:
        name: Such as ``P36``.
        train: Questions to learn from; without choices of their own where an answer is any text or a label.
        dev: Questions to choose by.
        manual: The manual template.
        template: The template to learn.
        objects: The task's different answers, over all of its parts, in alphabetical order.
        vocabulary: The closed set of answers that every method is restricted to, or None.
        single_token: Whether every target is one token of the backbone, so that it is ranked among all of them.
        file: The task file, where there is one.
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

    @property
    def is_closed(self) -> bool:
        """Whether rows are answered with a label of the task file, or a choice of their own."""
        return self.file is not None and self.file.is_closed

    @property
    def is_written(self) -> bool:
        """Whether answers are whatever the backbone writes."""
        return not (self.single_token or self.is_closed)


@dataclass(frozen=True)
class Setup:
    """With what a method works.

    Args:
        backbone: The frozen backbone; a method leaves it as it is.
        config: Settings of training.
        seed: Of everything random in this fit.
        tries: How many settings a trained method tries; the one best on the development part is kept.
        folder: Where a method may keep files, such as its prompt; None for nowhere.
        report: Called with progress.
        should_stop: Asked now and then; training then raises :class:`ptuning.progress.Interrupted`.
    """

    backbone: Backbone
    config: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    tries: int = 1
    folder: Path | None = None
    report: OnProgress | None = None
    should_stop: Callable[[], bool] | None = None


@dataclass(frozen=True)
class Solution:
    """A fitted method.

    Args:
        answer: Questions -> one answer each. Targets are read for their rank only, and may be missing where the task
            comes from a task file.
        record: What it did, for ``run.json``: ``tried`` settings with their development scores, the ``chosen`` one.
    """

    answer: Callable[[Questions], list[Answer]]
    record: Mapping[str, Json] = field(default_factory=dict)

    @classmethod
    def of_ranking(cls, rank: Callable[[Record], Sequence[str]], **record: Json) -> Solution:
        """Return the solution of a method that gives each record a ranked list of texts."""
        return cls(lambda questions: [Answer.of_ranked(rank(row.record), row.right) for row in questions], record)


@dataclass(frozen=True)
class Method:
    """A way to solve a task.

    Args:
        name: As in ``p-tuning``.
        describe: What answers, in a few words.
        fit: Fits on a task's training and development parts.
        trained: Whether it trains weights, so that ``tries`` and the random-weights control apply.
        seeded: Whether its result depends on the seed; others run once.
        reads_train: Whether it looks at the training or development part; others run once wherever these are drawn by
            seed.
        passes: Cost in forward passes over (training, development) records, per epoch where it trains, for an estimate
            of time; None if it never runs the backbone.
        prompts: Gives the trainings that ``fit`` looks for in the setup's folder, each under its name, so that those of
            many tasks can be done together beforehand; None if there is nothing to share.
        tokens: The same where no passes over a record's own tokens tell it: a task, a setup and a number of test
            records -> tokens that are run for these and to choose on the development part.
    """

    name: str
    describe: str
    fit: Callable[[Task, Setup], Solution]
    trained: bool = False
    seeded: bool = False
    passes: tuple[float, float] | None = None
    reads_train: bool = True
    prompts: Callable[[Task, Setup], Sequence[FleetPrompt]] | None = None
    tokens: Callable[[Task, Setup, int], float] | None = None


class Methods(Mapping[str, Method]):
    """The known methods by name; :meth:`register` adds one of your own.

    Example:
        >>> @ptuning.methods.register("last-word", describe="the last word of the subject")   # doctest: +SKIP
        ... def last_word(task, setup):
        ...     return Solution.of_ranking(lambda record: [record["x"].split()[-1]])
    """

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}

    def register(
        self,
        name: str,
        *,
        describe: str,
        trained: bool = False,
        seeded: bool = False,
        passes: tuple[float, float] | None = None,
        reads_train: bool = True,
        prompts: Callable[[Task, Setup], Sequence[FleetPrompt]] | None = None,
        tokens: Callable[[Task, Setup, int], float] | None = None,
    ) -> Callable[[Callable[[Task, Setup], Solution]], Callable[[Task, Setup], Solution]]:
        """Return a decorator that adds a function as a method.

        Raises:
            ConfigError: If the name is taken, or is no plain name (it becomes a folder).
        """
        if name in self._methods or name == ALL_METHODS:
            raise ConfigError(f"there is a method '{name}' already; choose another name")
        if not is_folder_name(name):
            raise ConfigError(f"'{name}' is no name for a method; use letters, digits, '-' and '+'")

        def add(fit: Callable[[Task, Setup], Solution]) -> Callable[[Task, Setup], Solution]:
            self._methods[name] = Method(name, describe, fit, trained, seeded, passes, reads_train, prompts, tokens)
            return fit

        return add

    def find(self, name: str) -> Method:
        """Return a method; with ``@random-weights`` behind the name of a trained one, its control.

        Raises:
            ConfigError: If there is none of that name; names the closest one.
        """
        plain, sign, control = name.partition("@")
        if plain not in self._methods:
            raise ConfigError(f"unknown method '{plain}'.{closest(plain, self._methods)} Known: {', '.join(self)}")
        method = self._methods[plain]
        if not sign:
            return method
        if f"@{control}" != RANDOM_WEIGHTS or not method.trained:
            raise ConfigError(
                f"'{name}': only {RANDOM_WEIGHTS} may follow the name of a method, and only a trained one"
            )
        return replace(method, name=name, describe=f"{method.describe}; backbone with random weights", seeded=True)

    def __getitem__(self, name: str) -> Method:
        return self._methods[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)


METHODS = Methods()
