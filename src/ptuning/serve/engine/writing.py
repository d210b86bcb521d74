"""Answers that are being written: rows join between two steps, and leave when they end or are cancelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ptuning.engine.writing.continuation import Continuation
from ptuning.engine.writing.ending import Growing
from ptuning.engine.writing.writer import Line, Writer
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.serve.engine.filling import WrittenRow
from ptuning.serve.engine.job import Finish, Outcome, Token, Usage
from ptuning.serve.engine.passes import Passes
from ptuning.serve.engine.scoring import checked
from ptuning.serve.engine.waiting import Waiting


@dataclass(eq=False)
class Open:
    """An answer that is being written: whose it is, its line, and what was told of it."""

    waiting: Waiting
    row: WrittenRow
    cached: int
    text: Growing = field(init=False)
    told: int = 0  # tokens

    def __post_init__(self) -> None:
        self.text = Growing(self.row.line.ending)

    @property
    def line(self) -> Line:
        """The line."""
        return self.row.line

    def finish(self) -> Finish:
        """Return how the answer ended."""
        return "stop" if self.line.ending.is_own(self.line.draft.ids) else "length"


class Writing:
    """The lines that are written now, in as few batches as can be: rows of any prompts together, apart only those that
    the model cannot continue in one batch.
    """

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._tokenizer = passes.backbone.tokenizer
        self._writers: list[tuple[object, Writer]] = []
        self._open: dict[Line, Open] = {}
        self.tokens_written = 0

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, rows: Sequence[tuple[Waiting, WrittenRow]]) -> None:
        """Read rows of one company, and write them with those that are written already. If it raises, none is begun."""
        company = rows[0][1].company
        own = [filled.row for _, filled in rows]
        begun: list[tuple[Writer, list[Open]]] = []
        # A row that turns is read anew with each token, and so whole.
        for group in self._passes.together(own, whole=company.turns):
            some = [own[at] for at in group.places]
            first = self._passes.run(some, group, pad_side="left", keep=not company.turns)
            behind = Continuation.behind(self._passes.backbone, [row.example for row in some], first)
            opened = [Open(*rows[at], cached) for at, cached in zip(group.places, group.begun, strict=True)]
            begun.append((Writer(self._passes.backbone, behind, [one.line for one in opened]), opened))
        for writer, opened in begun:
            self._open |= {one.line: one for one in opened}
            self._join(company, writer)

    def _join(self, company: object, writer: Writer) -> None:
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

    def _tell(self, one: Open) -> None:
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

    def _outcome(self, one: Open) -> Outcome:
        line = one.line
        written = line.ending.written(line.draft)
        found = checked([Candidate(written.text, written.log_prob)])
        prediction = Prediction(written.text, tuple(found), tokens=written.tokens)
        usage = Usage(one.row.tokens, len(line.draft.ids), one.cached)
        return Outcome(prediction, usage, one.finish(), self._tokens(line, 0))

    def _tokens(self, line: Line, first: int) -> tuple[Token, ...]:
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
