"""Jobs of rows for the engine, and the outcome of each row."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ptuning.engine.decoding import Token
from ptuning.errors import PTuningError
from ptuning.prompt.prediction import Prediction
from ptuning.prompt.rows import EchoRow, PromptRow, TextRow

Finish = Literal["stop", "length"]


class QueueFullError(PTuningError):
    """The queue has no room for the rows of a job; ``retry_after`` says in how many seconds it may have."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StoppedError(PTuningError):
    """The engine takes no more jobs: it is about to end, or has failed."""


class CancelledError(PTuningError):
    """The job was cancelled before this row was answered."""


@dataclass(frozen=True)
class CallRow:
    """Something else to do with the model or its tokenizer, in the engine's thread; it must be short."""

    call: Callable[[], object]


Row = PromptRow | TextRow | EchoRow | CallRow


@dataclass(frozen=True)
class Usage:
    """Tokens of a row: of what was read, slots included; of the answer; and of the first, those that were kept."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class Outcome:
    """The answer to a row.

    Args:
        prediction: The answer, as ``PromptModel.predict`` gives it; None for an EchoRow or CallRow.
        usage: Its tokens.
        finish: Whether a written answer ended by itself (or at a stop string), or was cut off at its most tokens.
        tokens: The tokens of a written answer, if asked for; of an EchoRow, those of its text.
        value: What a CallRow returned.
        waited: Seconds for which the row waited until the engine took it.
    """

    prediction: Prediction | None = None
    usage: Usage = Usage()
    finish: Finish = "stop"
    tokens: tuple[Token, ...] = ()
    value: object = None
    waited: float = 0.0


class Listener:
    """Collects the outcomes of a job's rows; its methods are called in the engine's thread, and must return at once."""

    def __init__(self, rows: int) -> None:
        self.outcomes: list[Outcome | Exception | None] = [None] * rows
        self.ready = threading.Event()
        self._left = rows
        if not rows:
            self.ready.set()

    def piece(self, row: int, text: str, tokens: Sequence[Token]) -> None:
        """Take the new text and tokens of a generated answer."""

    def ended(self, row: int, outcome: Outcome | Exception) -> None:
        """Take the outcome of a row, or its error: a PTuningError says what is wrong with it, anything else is a fault
        of the service.
        """
        self.outcomes[row] = outcome
        self._left -= 1
        if not self._left:
            self.ready.set()


class Job:
    """The rows of one request. Rows are answered in any order, each on its own. ``is_begun`` says whether the engine
    has taken one of them.
    """

    def __init__(self, rows: Sequence[Row], listener: Listener) -> None:
        self.rows = list(rows)
        self.listener = listener
        self.is_begun = False
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Drop what is not answered yet: rows that wait at once, rows that are written after the running step."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._cancelled.is_set()
