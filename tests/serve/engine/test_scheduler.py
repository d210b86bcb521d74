"""Turns of the engine: how much is read in one, how many answers are written at a time, and how soon a row leaves."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import GenerationSettings
from ptuning.data.questions import Question
from ptuning.engine.decoding import Token
from ptuning.engine.runner import Generation, Runner
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.rows import Answering, PromptRow
from ptuning.serve.engine import scheduler
from ptuning.serve.engine.engine import Engine
from ptuning.serve.engine.job import CancelledError, Job, Listener, Outcome
from tests.conftest import learned
from tests.serve.engine.test_engine import LABELS

LONG = Answering(generation=GenerationSettings(max_new_tokens=30, stop_strings=("never",)), pieces=True)


@contextmanager
def started(backbone: Backbone) -> Iterator[Engine]:
    engine = Engine(PromptModel(backbone), cache_memory=0)
    engine.start()
    yield engine
    engine.stop()


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """Keep the engine's thread, so that what is submitted meanwhile is taken in one turn."""
    is_held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        is_held.set()
        assert let_go.wait(60)

    thread = threading.Thread(target=lambda: engine.call(hold))
    thread.start()
    assert is_held.wait(60)
    yield
    let_go.set()
    thread.join()


def writing(backbone: Backbone) -> PromptRow:
    prompt = replace(learned(backbone, "[P*2] about {x} [Y]"), multiline=True)
    return PromptRow(prompt, Question({"x": "Kenya"}), LONG)


def choosing(backbone: Backbone) -> PromptRow:
    words = Prompt.manual("{x} [Y]", label_words=LABELS).label_words
    return PromptRow(replace(learned(backbone, "about {x} [P*2] so [Y]"), label_words=words), Question({"x": "Kenya"}))


class Steps(Listener):
    """Counts the steps of its rows, which end after the third if it ``cancels``."""

    job: Job

    def __init__(self, rows: int, *, cancels: bool = False) -> None:
        super().__init__(rows)
        self.begun = threading.Event()
        self.steps, self._cancels = 0, cancels

    def piece(self, row: int, text: str, tokens: Sequence[Token]) -> None:
        self.steps += 1
        self.begun.set()
        if self._cancels and self.steps == 3:
            self.job.cancel()


def submit(engine: Engine, rows: Sequence[PromptRow], heard: Steps) -> Steps:
    heard.job = Job(rows, heard)
    engine.submit(heard.job)
    return heard


def test_while_answers_are_written_little_is_read_between_two_steps(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream does not stand still while a hundred other rows are read; without one they are read at once."""
    turns: list[tuple[int, int]] = []
    take = scheduler.Scheduler._take

    def noted(self: scheduler.Scheduler, *given: object) -> object:
        lines, found = self.running, take(self, *given)  # type: ignore[arg-type]
        if found:
            turns.append((lines, len(found)))
        return found

    monkeypatch.setattr(scheduler.Scheduler, "_take", noted)
    monkeypatch.setattr(scheduler, "TOKENS_BETWEEN_STEPS", 40)
    with started(causal) as engine:
        alone = submit(engine, [choosing(causal)], Steps(1))
        assert alone.ready.wait(60)
        tokens = engine.status.tokens_read
        fit = 40 // tokens
        assert 1 <= fit < 6
        with held(engine):
            rest = submit(engine, [choosing(causal)] * 12, Steps(12))
        assert rest.ready.wait(60)
        assert turns == [(0, 1), (0, 12)]
        turns.clear()
        stream = submit(engine, [writing(causal)], Steps(1))
        assert stream.begun.wait(60)
        with held(engine):
            rest = submit(engine, [choosing(causal)] * 12, Steps(12))
        assert rest.ready.wait(60)
        assert stream.ready.wait(60)
    assert turns[0] == (0, 1)
    assert [count for lines, count in turns[1:] if lines] == [fit] * (12 // fit) + [12 % fit] * (12 % fit > 0)


def test_answers_that_find_no_line_wait_and_others_go_first(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more lines than fit into memory; what waits for a line counts as waiting, and loses its place to none."""
    monkeypatch.setattr(scheduler, "MAX_SEQUENCES", 2)
    lines: list[int] = []
    step = Runner.step

    def noted(self: Runner, **named: bool) -> list[Generation]:
        lines.append(len(self.running))
        return step(self, **named)

    monkeypatch.setattr(Runner, "step", noted)
    with started(causal) as engine:
        with held(engine):
            written = [submit(engine, [writing(causal)], Steps(1)) for _ in range(5)]
            chosen = submit(engine, [choosing(causal)], Steps(1))
        assert chosen.ready.wait(60)
        assert not written[2].ready.is_set()
        for one in written:
            assert one.ready.wait(60)
            assert isinstance(one.outcomes[0], Outcome)
    assert max(lines) == 2


def test_a_cancelled_answer_leaves_within_two_steps(causal: Backbone) -> None:
    """Whoever disconnects frees the place of a row that is written; another row goes on."""
    with started(causal) as engine:
        with held(engine):
            gone = submit(engine, [writing(causal)], Steps(1, cancels=True))
            stays = submit(engine, [writing(causal)], Steps(1))
        for one in (gone, stays):
            assert one.ready.wait(60)
        assert isinstance(gone.outcomes[0], CancelledError)
        assert gone.steps <= 3 + 2
        assert isinstance(stays.outcomes[0], Outcome)
        assert stays.steps == 30
        assert (engine.status.rows_cancelled, engine.status.rows_writing) == (1, 0)
