"""What the engine is asked and what it answers: a job of rows, and the outcome of each row."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ptuning.config import GenerationSettings
from ptuning.data.questions import Question
from ptuning.errors import PTuningError
from ptuning.prompt.prediction import Prediction
from ptuning.prompt.prompt import Prompt
from ptuning.template.labels import Normalise
from ptuning.template.segments import Ids

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
class Answering:
    """How rows are answered; names and defaults are those of :meth:`ptuning.prompt.predict.PromptModel.predict`.

    Args:
        alternatives: For written answers: so many of the likeliest tokens of each step are reported; None for none, and
            0 for the chosen token alone.
        pieces: Whether pieces of a written answer are told while it is written.
    """

    candidates: tuple[str, ...] | None = None
    top_k: int = 1
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    normalise: Normalise | None = None
    calibrate: bool | None = None
    count_stop: bool = False
    min_probability: float | None = None
    alternatives: int | None = None
    pieces: bool = False


@dataclass(frozen=True)
class PromptRow:
    """A record, or a question of a task, to answer with a prompt."""

    prompt: Prompt
    question: Question
    how: Answering = Answering()


@dataclass(frozen=True)
class TextRow:
    """A text, or token ids, that the base model continues; behind a prompt's beginning, if one is given: its template
    must end in one field and the target, and the text is the field's.
    """

    text: str | Ids
    how: Answering = Answering()
    prompt: Prompt | None = None


@dataclass(frozen=True)
class EchoRow:
    """A text, or token ids, whose own tokens are scored by the base model; with a ``prompt`` as in :class:`TextRow`."""

    text: str | Ids
    alternatives: int = 0
    prompt: Prompt | None = None


@dataclass(frozen=True)
class CallRow:
    """Something else to do with the model or its tokenizer, in the engine's thread; it must be short."""

    call: Callable[[], object]


Row = PromptRow | TextRow | EchoRow | CallRow


@dataclass(frozen=True)
class Token:
    """A token with its natural log-probability (None for the first of a text), and the likeliest ones in its place."""

    id: int
    text: str
    log_prob: float | None
    alternatives: tuple[tuple[str, float], ...] = ()


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


class Listener(Protocol):
    """Is told what becomes of a job's rows, in the engine's thread; it must return at once."""

    def piece(self, row: int, text: str, tokens: Sequence[Token]) -> None:
        """A written answer has grown by a text that will not change, and by these tokens."""

    def answered(self, row: int, outcome: Outcome) -> None:
        """A row is answered."""

    def failed(self, row: int, error: Exception) -> None:
        """A row has failed: a PTuningError says what is wrong with it, anything else is a fault of the service."""


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
