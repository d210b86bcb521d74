"""The errors of the package, one subclass of PTuningError for each thing that can be wrong."""

import difflib
from collections.abc import Iterable

# Number of characters that a template's error shows on either side of the fault.
SHOWN_AROUND = 200
SHOWN_CHARACTERS = 60  # of a wrong value in a message
SHOWN_LINE = 200  # of a template, which may hold many examples


class PTuningError(Exception):
    """Base of every error that a user can cause and fix. The command line prints it and ends with exit code 2."""


class FileError(PTuningError):
    """A file or folder cannot be read or written: it is missing, taken or cut off, or the disk is full."""


class RecordError(PTuningError):
    """A data file, or a record in it, cannot be used."""


class TemplateError(PTuningError):
    """A template is malformed, or does not fit a record or the backbone's context. The message shows ``pattern``, or of
    a long one the part around ``column``, with a caret there; the column is zero-based.
    """

    def __init__(self, message: str, *, pattern: str | None = None, column: int | None = None) -> None:
        self.pattern = pattern
        self.column = column
        if pattern is not None and column is not None:
            # The caret needs a single line that can be printed: no line breaks, no half characters, no book.
            start = max(0, column - SHOWN_AROUND)
            part = pattern[start : column + SHOWN_AROUND].replace("\n", "\u23ce").replace("\t", " ")
            shown = f"{'...' * (start > 0)}{part.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')}"
            message = f"{message}\n  {shown}\n  {' ' * (column - start + 3 * (start > 0))}^ column {column + 1}"
        super().__init__(message)


class LabelWordError(PTuningError):
    """Label words are malformed, collide, or are unknown to the tokenizer."""


class TaskError(PTuningError):
    """A task file is malformed, or there is no such task."""


class BackboneError(PTuningError):
    """A backbone cannot be found, loaded or used."""


class PromptError(PTuningError):
    """A prompt's files are damaged, or the prompt belongs to another backbone."""


class ConfigError(PTuningError):
    """A setting is unknown or out of range."""


class TrainingError(PTuningError):
    """A training run cannot start, go on or be resumed."""


class WorkerError(PTuningError):
    """Workers cannot be started or reached, or cannot do the work: no engine, no room, another version or backbone."""


class ExchangeError(PTuningError):
    """A prompt cannot be written in the form of another program, or read from it, or is not the same there."""


def shown(value: object) -> str:
    """Return a value of any kind as a message shows it: cut to a line, its type alone if it is too long to write."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists inside of each other
        return type(value).__name__
    return cut(text)


def cut(text: str, most: int = SHOWN_CHARACTERS) -> str:
    """Return a text of at most ``most`` characters; one that goes on ends with three dots."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def in_a_line(text: str, most: int = SHOWN_LINE) -> str:
    """Return a text as one line of at most ``most`` characters; of a longer one the beginning and the end."""
    line = " ".join(text.split())
    half = (most - 3) // 2
    return line if len(line) <= most else f"{line[:half]} … {line[-half:]}"


def closest(name: object, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name most similar to an unknown one, or an empty string. What is no
    text, as a caller in Python may have it, is like none.
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5) if isinstance(name, str) else []
    return f" Did you mean '{matches[0]}'?" if matches else ""
