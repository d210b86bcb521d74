"""Continuous batching: which rows run next, and the sequences that are decoded now."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

from ptuning.config import GenerationSettings
from ptuning.data.questions import Questions
from ptuning.engine.decoding.decoder import Decoder, DecodingState, OutputSequence, TextStreamer
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.serve.engine.batching import BatchRunner, check_finite, classify_rows, each_alone, score_text
from ptuning.serve.engine.job import CallRow, EchoRow, Finish, Outcome, PromptRow, TextRow, Token, Usage
from ptuning.serve.engine.prefix_cache import ModelRow
from ptuning.serve.engine.preprocess import DecodingRow, Preprocessor, ScoringRow
from ptuning.serve.engine.queue import QueuedRow
from ptuning.template.segments import FILLS_MASKS


@dataclass(eq=False)
class RunningSequence:
    """An answer that is being written: whose it is, its line, and what was told of it."""

    waiting: QueuedRow
    row: DecodingRow
    cached: int
    text: TextStreamer = field(init=False)
    told: int = 0  # tokens

    def __post_init__(self) -> None:
        self.text = TextStreamer(self.row.line.ending)

    @property
    def line(self) -> OutputSequence:
        """The line."""
        return self.row.line

    def finish(self) -> Finish:
        """Return how the answer ended."""
        return "stop" if self.line.ending.is_own(self.line.draft.ids) else "length"


class RunningBatch:
    """The lines that are written now, in as few batches as can be: rows of any prompts together, apart only those that
    the model cannot continue in one batch.
    """

    def __init__(self, passes: BatchRunner) -> None:
        self._passes = passes
        self._tokenizer = passes.backbone.tokenizer
        self._writers: list[tuple[object, Decoder]] = []
        self._open: dict[OutputSequence, RunningSequence] = {}
        self.tokens_written = 0

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, rows: Sequence[tuple[QueuedRow, DecodingRow]]) -> None:
        """Read rows of one company, and write them with those that are written already. If it raises, none is begun."""
        company = rows[0][1].company
        own = [filled.row for _, filled in rows]
        begun: list[tuple[Decoder, list[RunningSequence]]] = []
        # A row that turns is read anew with each token, and so whole.
        for group in self._passes.together(own, whole=company.turns):
            some = [own[at] for at in group.places]
            first = self._passes.run(some, group, pad_side="left", keep=not company.turns)
            behind = DecodingState.behind(self._passes.backbone, [row.example for row in some], first)
            opened = [RunningSequence(*rows[at], cached) for at, cached in zip(group.places, group.begun, strict=True)]
            begun.append((Decoder(self._passes.backbone, behind, [one.line for one in opened]), opened))
        for writer, opened in begun:
            self._open |= {one.line: one for one in opened}
            self._join(company, writer)

    def _join(self, company: object, writer: Decoder) -> None:
        for other, running in self._writers:
            if other == company and running.joins(writer):
                running.join(writer)
                return
        self._writers.append((company, writer))

    def step(self) -> None:
        """Write a token of each line, and tell what has grown."""
        for entry in list(self._writers):
            _, writer = entry
            own = list(writer.lines)
            try:
                lines = writer.step()
            except Exception as error:  # noqa: BLE001 - whatever it is, it ends these rows and nothing else
                self._writers.remove(entry)
                for line in own:
                    self._open.pop(line).waiting.fail(error)
                continue
            self.tokens_written += len(lines)
            for line in lines:
                self._tell(self._open[line])
            if not writer.lines:
                self._writers.remove(entry)

    def _tell(self, one: RunningSequence) -> None:
        """Tell what is new of an answer, and the whole of it if it has ended."""
        line, waiting = one.line, one.waiting
        if waiting.row.how.pieces:  # type: ignore[union-attr]  # only rows with answers are written
            piece = one.text.piece(line.draft.ids, is_whole=line.ended)
            new = self._tokens(line, one.told)
            one.told = len(line.draft.ids)
            waiting.piece(piece, new)
        if line.ended:
            del self._open[line]
            try:
                outcome = self._outcome(one)
            except Exception as error:  # noqa: BLE001 - of this row
                waiting.fail(error)
            else:
                waiting.answer(outcome)

    def _outcome(self, one: RunningSequence) -> Outcome:
        line = one.line
        written = line.ending.written(line.draft)
        found = check_finite([Candidate(written.text, written.log_prob)])
        prediction = Prediction(written.text, tuple(found), tokens=written.tokens)
        usage = Usage(one.row.tokens, len(line.draft.ids), one.cached)
        return Outcome(prediction, usage, one.finish(), self._tokens(line, 0))

    def _tokens(self, line: OutputSequence, first: int) -> tuple[Token, ...]:
        """Return the tokens of a line from one on, if they were asked for."""
        if line.alternatives is None:
            return ()
        decode = self._tokenizer.decode
        return tuple(
            Token(
                token,
                decode([token]),
                line.log_probs[at],
                tuple((decode([one]), value) for one, value in line.likeliest[at]),
            )
            for at, token in enumerate(line.draft.ids[first:], start=first)
        )

    def drop_cancelled(self) -> None:
        """Leave out the lines of cancelled jobs."""
        gone = {line for line, one in self._open.items() if one.waiting.job.cancelled}
        for entry in list(self._writers):
            writer = entry[1]
            if gone & set(writer.lines):
                writer.drop(gone)
                if not writer.lines:
                    self._writers.remove(entry)
        for line in gone:
            self._open.pop(line).waiting.drop()

    def fail(self, error: Exception) -> None:
        """Tell the jobs of all lines that they have failed."""
        self._writers.clear()
        while self._open:
            self._open.popitem()[1].waiting.fail(error)


Given = TypeVar("Given")
Found = TypeVar("Found")

# Most tokens that are read in a turn, on a processor and on an accelerator: more in a pass is not faster there, and a
# request waits for the pass before its own. While answers are written, fewer, so that they go on meanwhile.
PROCESSOR_TOKENS, ACCELERATOR_TOKENS = 1024, 8192
TOKENS_BETWEEN_STEPS = 512
# Most answers that are written at a time.
MAX_LINES = 64


@dataclass(frozen=True)
class BlockingRow:
    """A row that ``PromptModel.predict`` answers in one go: among candidates, by filled masks, or by beams."""

    row: PromptRow
    tokens: int

    @property
    def kind(self) -> Hashable:
        """Rows of one kind are answered together."""
        how = self.row.how
        return how.candidates, how.top_k, how.generation, how.normalise, how.count_stop


PreparedRow = ScoringRow | BlockingRow | DecodingRow | ModelRow


class Scheduler:
    """Takes rows and answers them, turn by turn."""

    def __init__(self, model: PromptModel, filling: Preprocessor, passes: BatchRunner, writing: RunningBatch) -> None:
        self._model, self._filling, self._passes, self._writing = model, filling, passes, writing
        self._fills_masks = model.backbone.kind in FILLS_MASKS
        on_processor = model.backbone.device.type == "cpu"
        self._most = PROCESSOR_TOKENS if on_processor else ACCELERATOR_TOKENS
        # Rows that were filled and had no room.
        self._held: deque[tuple[QueuedRow, PreparedRow]] = deque()
        self._in_hand: list[QueuedRow] = []

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

    def once(self, take: Callable[[], QueuedRow | None]) -> None:
        """Take rows (``take`` returns the next one), answer those that are scored, and write a token of the others."""
        rows = self._take(take)
        self._in_hand = [one for one, _ in rows]
        self._classify([(one, filled) for one, filled in rows if isinstance(filled, ScoringRow)])
        self._predict([(one, filled) for one, filled in rows if isinstance(filled, BlockingRow)])
        for one, filled in rows:
            if isinstance(filled, ModelRow):
                self._echo(one, filled)
        self._begin([(one, filled) for one, filled in rows if isinstance(filled, DecodingRow)])
        self._in_hand = []
        self._writing.step()

    def _take(self, take: Callable[[], QueuedRow | None]) -> list[tuple[QueuedRow, PreparedRow]]:
        """Take rows up to the bounds of a turn. Those that the lines have no room for wait, and others go first."""
        most = min(self._most, TOKENS_BETWEEN_STEPS) if len(self._writing) else self._most
        taken: list[tuple[QueuedRow, PreparedRow]] = []
        held: deque[tuple[QueuedRow, PreparedRow]] = deque()
        begun: set[bytes] = set()
        tokens = written = 0
        while tokens < most:
            entry = self._held.popleft() if self._held else self._next(take)
            if entry is None:
                break
            _, filled = entry
            size = self._cost(filled, begun)
            no_line = isinstance(filled, DecodingRow) and len(self._writing) + written >= MAX_LINES
            if no_line:
                held.append(entry)
                continue
            if taken and tokens + size > most:
                held.append(entry)
                break
            taken.append(entry)
            tokens += size
            written += isinstance(filled, DecodingRow)
        self._held = held + self._held
        return taken

    def _cost(self, filled: PreparedRow, begun: set[bytes]) -> int:
        """Return how many tokens are read for a row beside those that have ``begun`` already."""
        if isinstance(filled, BlockingRow):
            return filled.tokens
        rows = (filled,) if isinstance(filled, ModelRow) else filled.rows
        return sum(self._passes.kept.to_read(row, begun) for row in rows)

    def _next(self, take: Callable[[], QueuedRow | None]) -> tuple[QueuedRow, PreparedRow] | None:
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

    def _fill(self, one: QueuedRow) -> PreparedRow | None:
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
            return BlockingRow(row, self._filling.read_whole(row))
        return self._filling.written(row)

    def _classify(self, rows: Sequence[tuple[QueuedRow, ScoringRow]]) -> None:
        if rows:
            asked = [(cast("PromptRow", one.row), filled) for one, filled in rows]
            _answer((one for one, _ in rows), each_alone(lambda some: classify_rows(self._passes, some), asked))

    def _predict(self, rows: Sequence[tuple[QueuedRow, BlockingRow]]) -> None:
        kinds: dict[Hashable, list[tuple[QueuedRow, BlockingRow]]] = {}
        for one, filled in rows:
            kinds.setdefault(filled.kind, []).append((one, filled))
        for same in kinds.values():
            _answer((one for one, _ in same), each_alone(self._predicted, [filled for _, filled in same]))

    def _predicted(self, rows: Sequence[BlockingRow]) -> list[Outcome]:
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

    def _outcome(self, row: BlockingRow, prediction: Prediction) -> Outcome:
        check_finite(prediction.candidates)
        self._passes.read_elsewhere(row.tokens)
        return Outcome(prediction, Usage(row.tokens, prediction.tokens or 0))

    def _echo(self, one: QueuedRow, row: ModelRow) -> None:
        most = cast("EchoRow", one.row).alternatives
        _answer(
            [one], each_alone(lambda some: [score_text(self._passes, each, alternatives=most) for each in some], [row])
        )

    def _begin(self, rows: Sequence[tuple[QueuedRow, DecodingRow]]) -> None:
        """Begin to write rows, those of one company together; if that fails, each alone."""
        companies: dict[Hashable, list[tuple[QueuedRow, DecodingRow]]] = {}
        for one, filled in rows:
            companies.setdefault(filled.company, []).append((one, filled))
        for same in companies.values():
            for (one, _), found in zip(same, each_alone(self._begun, same), strict=True):
                if isinstance(found, Exception):
                    one.fail(found)

    def _begun(self, rows: Sequence[tuple[QueuedRow, DecodingRow]]) -> Sequence[None]:
        self._writing.begin(rows)
        return [None] * len(rows)


def _answer(waiting: Iterable[QueuedRow], found: Sequence[Outcome | Exception]) -> None:
    for one, outcome in zip(waiting, found, strict=True):
        if isinstance(outcome, Exception):
            one.fail(outcome)
        else:
            one.answer(outcome)
