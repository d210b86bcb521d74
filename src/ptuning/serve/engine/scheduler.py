"""Which rows are run next, and in which passes: one turn of the engine after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from ptuning.config import GenerationSettings
from ptuning.data.questions import Questions
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Prediction
from ptuning.serve.engine.beginnings import PassRow
from ptuning.serve.engine.filling import ClosedRow, Filling, WrittenRow
from ptuning.serve.engine.job import CallRow, EchoRow, Outcome, PromptRow, TextRow, Usage
from ptuning.serve.engine.passes import Passes
from ptuning.serve.engine.scoring import checked, classify, each_alone, echo
from ptuning.serve.engine.waiting import Waiting
from ptuning.serve.engine.writing import Writing
from ptuning.template.segments import FILLS_MASKS

Given = TypeVar("Given")
Found = TypeVar("Found")

# Most tokens that are read in a turn, on a processor and on an accelerator: more in a pass is not faster there, and a
# request waits for the pass before its own. While answers are written, fewer, so that they go on meanwhile.
PROCESSOR_TOKENS, ACCELERATOR_TOKENS = 1024, 8192
TOKENS_BETWEEN_STEPS = 512
# Most answers that are written at a time.
MAX_LINES = 64


@dataclass(frozen=True)
class WholeRow:
    """A row that ``PromptModel.predict`` answers in one go: among candidates, by filled masks, or by beams."""

    row: PromptRow
    tokens: int

    @property
    def kind(self) -> Hashable:
        """Rows of one kind are answered together."""
        how = self.row.how
        return how.candidates, how.top_k, how.generation, how.normalise, how.count_stop


Filled = ClosedRow | WholeRow | WrittenRow | PassRow


class Scheduler:
    """Takes rows and answers them, turn by turn."""

    def __init__(self, model: PromptModel, filling: Filling, passes: Passes, writing: Writing) -> None:
        self._model, self._filling, self._passes, self._writing = model, filling, passes, writing
        self._fills_masks = model.backbone.kind in FILLS_MASKS
        on_processor = model.backbone.device.type == "cpu"
        self._most = PROCESSOR_TOKENS if on_processor else ACCELERATOR_TOKENS
        # Rows that were filled and had no room.
        self._held: deque[tuple[Waiting, Filled]] = deque()
        self._in_hand: list[Waiting] = []

    def __len__(self) -> int:
        return len(self._held)

    def drop_cancelled(self) -> None:
        """Leave out the rows of cancelled jobs."""
        gone = [one for one, _ in self._held if one.job.cancelled]
        self._held = deque(entry for entry in self._held if not entry[0].job.cancelled)
        for one in gone:
            one.drop()
        self._writing.drop_cancelled()

    def fail(self, error: Exception) -> None:
        """Tell all jobs with rows that were taken and not answered that these have failed."""
        for one in [*self._in_hand, *(one for one, _ in self._held)]:
            one.fail(error)
        self._held.clear()
        self._writing.fail(error)

    def once(self, take: Callable[[], Waiting | None]) -> None:
        """Take rows (``take`` returns the next one), answer those that are scored, and write a token of the others."""
        rows = self._take(take)
        self._in_hand = [one for one, _ in rows]
        self._classify([(one, filled) for one, filled in rows if isinstance(filled, ClosedRow)])
        self._predict([(one, filled) for one, filled in rows if isinstance(filled, WholeRow)])
        for one, filled in rows:
            if isinstance(filled, PassRow):
                self._echo(one, filled)
        self._begin([(one, filled) for one, filled in rows if isinstance(filled, WrittenRow)])
        self._in_hand = []
        self._writing.step()

    def _take(self, take: Callable[[], Waiting | None]) -> list[tuple[Waiting, Filled]]:
        """Take rows up to the bounds of a turn. Those that the lines have no room for wait, and others go first."""
        most = min(self._most, TOKENS_BETWEEN_STEPS) if len(self._writing) else self._most
        taken: list[tuple[Waiting, Filled]] = []
        held: deque[tuple[Waiting, Filled]] = deque()
        begun: set[bytes] = set()
        tokens = written = 0
        while tokens < most:
            entry = self._held.popleft() if self._held else self._next(take)
            if entry is None:
                break
            _, filled = entry
            size = self._cost(filled, begun)
            no_line = isinstance(filled, WrittenRow) and len(self._writing) + written >= MAX_LINES
            if no_line:
                held.append(entry)
                continue
            if taken and tokens + size > most:
                held.append(entry)
                break
            taken.append(entry)
            tokens += size
            written += isinstance(filled, WrittenRow)
        self._held = held + self._held
        return taken

    def _cost(self, filled: Filled, begun: set[bytes]) -> int:
        """Return how many tokens are read for a row beside those that have ``begun`` already."""
        if isinstance(filled, WholeRow):
            return filled.tokens
        rows = (filled,) if isinstance(filled, PassRow) else filled.rows
        return sum(self._passes.kept.to_read(row, begun) for row in rows)

    def _next(self, take: Callable[[], Waiting | None]) -> tuple[Waiting, Filled] | None:
        """Return the next row that can be filled; those that cannot fail."""
        while (one := take()) is not None:
            one.taken()
            try:
                filled = self._fill(one)
            except Exception as error:  # noqa: BLE001 - of this row
                one.fail(error)
                continue
            if filled is not None:
                return one, filled
        return None

    def _fill(self, one: Waiting) -> Filled | None:
        """Fill a row's template; None if there is none, and its call is made."""
        row = one.row
        if isinstance(row, CallRow):
            one.answer(Outcome(value=row.call()))
            return None
        if isinstance(row, TextRow):
            return self._filling.continued(row)
        if isinstance(row, EchoRow):
            return self._filling.echoed(row)
        answers = self._filling.answers(row)
        if answers.is_closed and row.how.candidates is None:
            return self._filling.scored(row, answers)
        several = row.how.top_k > 1 or row.how.generation.num_beams > 1
        if row.how.candidates is not None or several or self._fills_masks:
            return WholeRow(row, self._filling.read_whole(row))
        return self._filling.written(row)

    def _classify(self, rows: Sequence[tuple[Waiting, ClosedRow]]) -> None:
        if rows:
            asked = [(cast("PromptRow", one.row), filled) for one, filled in rows]
            _answer((one for one, _ in rows), each_alone(lambda some: classify(self._passes, some), asked))

    def _predict(self, rows: Sequence[tuple[Waiting, WholeRow]]) -> None:
        kinds: dict[Hashable, list[tuple[Waiting, WholeRow]]] = {}
        for one, filled in rows:
            kinds.setdefault(filled.kind, []).append((one, filled))
        for same in kinds.values():
            _answer((one for one, _ in same), each_alone(self._predicted, [filled for _, filled in same]))

    def _predicted(self, rows: Sequence[WholeRow]) -> list[Outcome]:
        how = rows[0].row.how
        listed = how.candidates
        found = self._model.predict(
            Questions((one.row.question for one in rows), name="the request"),
            [one.row.prompt for one in rows],
            listed,
            top_k=how.top_k,
            generation=how.generation if listed is None else GenerationSettings(),
            normalise=how.normalise,
            count_stop=how.count_stop,
        )
        return [self._outcome(one, prediction) for one, prediction in zip(rows, found, strict=True)]

    def _outcome(self, row: WholeRow, prediction: Prediction) -> Outcome:
        checked(prediction.candidates)
        self._passes.read_elsewhere(row.tokens)
        return Outcome(prediction, Usage(row.tokens, prediction.tokens or 0))

    def _echo(self, one: Waiting, row: PassRow) -> None:
        most = cast("EchoRow", one.row).alternatives
        _answer([one], each_alone(lambda some: [echo(self._passes, each, alternatives=most) for each in some], [row]))

    def _begin(self, rows: Sequence[tuple[Waiting, WrittenRow]]) -> None:
        """Begin to write rows, those of one company together; if that fails, each alone."""
        companies: dict[Hashable, list[tuple[Waiting, WrittenRow]]] = {}
        for one, filled in rows:
            companies.setdefault(filled.company, []).append((one, filled))
        for same in companies.values():
            for (one, _), found in zip(same, each_alone(self._begun, same), strict=True):
                if isinstance(found, Exception):
                    one.fail(found)

    def _begun(self, rows: Sequence[tuple[Waiting, WrittenRow]]) -> Sequence[None]:
        self._writing.begin(rows)
        return [None] * len(rows)


def _answer(waiting: Iterable[Waiting], found: Sequence[Outcome | Exception]) -> None:
    for one, outcome in zip(waiting, found, strict=True):
        if isinstance(outcome, Exception):
            one.fail(outcome)
        else:
            one.answer(outcome)
