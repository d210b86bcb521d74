"""The errors of the package: one base class and one subclass per stage. Knows no other module."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PTuningError(Exception):
    """Base of every error that a user of ptuning can cause and mend.

    The message says what is wrong, with which value, where, and what to do. The command line prints it on one
    screen without a traceback and ends with exit code 2.
    """


class FileError(PTuningError):
    """A file or folder cannot be read or written: missing, in the way, cut off, or no room on disk."""


class RecordError(PTuningError):
    """A data file or a record in it is not what the work needs."""


class TemplateError(PTuningError):
    """A template is malformed, or does not fit the record or the context.

    Args:
        message: What is wrong and what to do.
        pattern: The template as written; shown with a caret where ``column`` is given.
        column: Zero-based column of the problem in ``pattern``.
    """

    def __init__(self, message: str, *, pattern: str | None = None, column: int | None = None) -> None:
        self.pattern = pattern
        self.column = column
        if pattern is not None and column is not None:
            # A pattern may hold line breaks; the caret must stand under the right character of one line.
            shown = pattern.replace("\n", "\u23ce").replace("\t", " ")
            message = f"{message}\n  {shown}\n  {' ' * column}^ column {column + 1}"
        super().__init__(message)


class LabelWordError(PTuningError):
    """Label words are malformed, collide, or are unknown to the tokenizer."""


class TaskError(PTuningError):
    """A task file is malformed, or a row of a file is not what its task needs."""


class BackboneError(PTuningError):
    """A backbone cannot be found, loaded or used."""


class PromptError(PTuningError):
    """A prompt's files are damaged, or the prompt belongs to another backbone."""


class ConfigError(PTuningError):
    """A setting is unknown or out of range."""


class TrainingError(PTuningError):
    """A training run cannot start, go on or be resumed."""


def closest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name nearest to ``name``, or an empty string.

    Args:
        name: What the user wrote.
        known: What could have been meant.
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""
