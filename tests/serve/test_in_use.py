"""Prompts that change while they are asked: every answer is that of the prompt its request began with."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.data.questions import Question
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.rows import PromptRow
from ptuning.serve.engine.engine import Engine
from ptuning.serve.registry import ConflictError, Registry, Served, UnknownPromptError
from ptuning.template.labels import LabelWords
from tests.conftest import learned

# The text in front of the slots is kept, and the same for all: only the vectors tell the prompts apart.
TEMPLATE = "{x} [P*3] is [Y]"
RECORDS = [{"x": "the movie Zürich was great"}, {"x": "Kenya"}]
VERSIONS = 3
REQUESTS = 15


@pytest.fixture
def engine(causal: Backbone) -> Iterator[Engine]:
    made = Engine(PromptModel(causal))
    made.start()
    yield made
    made.stop()


def test_answers_are_those_of_the_prompt_that_a_request_began_with(
    engine: Engine, causal: Backbone, tmp_path: Path
) -> None:
    """Abuse cases 12 and 15: loaded, replaced, unloaded and reloaded under one name while four clients ask it; no
    answer is another prompt's, and none comes from keys and values that an earlier prompt has left.
    """
    alone = PromptModel(copy.deepcopy(causal))
    words = LabelWords.of(["Paris", "Lima", "located", "people", "question", "answer", "cities", "number"])
    expected: dict[tuple[str, str], float] = {}
    for version in range(VERSIONS):
        prompt = replace(learned(causal, TEMPLATE, seed=version), label_words=words)
        prompt.save(tmp_path / f"v{version}")
        for record in RECORDS:
            (found,) = alone.predict([record], prompt)
            expected[f"v{version}", record["x"]] = found.log_prob
    assert len({round(value, 3) for value in expected.values()}) == len(expected)

    registry = Registry(tmp_path, base_name="base", check=lambda prompt: engine.call(lambda: prompt.bind(causal)))
    registry.load("name", "v0")
    over = threading.Event()
    seen: set[str] = set()

    def change() -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            if turn % 5 == 4:
                registry.unload("name")
                registry.load("name", f"v{turn % VERSIONS}")
            elif turn % 5 == 3:
                registry.reload()
            else:
                registry.replace("name", f"v{turn % VERSIONS}")

    def ask() -> None:
        for turn in itertools.count():
            if turn >= REQUESTS and len(seen) > 1:  # on a busy machine the name changes late
                return
            try:
                served: Served = registry.get("name")
            except UnknownPromptError:
                continue
            for record in RECORDS * 2:  # meanwhile the name changes
                (outcome,) = engine.ask([PromptRow(served.prompt, Question(record))], timeout=60)
                assert outcome.prediction is not None
                assert outcome.prediction.log_prob == pytest.approx(expected[served.folder.name, record["x"]], abs=1e-4)
            seen.add(served.folder.name)

    with ThreadPoolExecutor(5) as pool:
        changing = pool.submit(change)
        try:
            for done in [pool.submit(ask) for _ in range(4)]:
                done.result(120)
        finally:
            over.set()
        changing.result(60)
    assert len(seen) > 1


def test_a_prompt_that_the_engine_refuses_is_not_served(engine: Engine, causal: Backbone, tmp_path: Path) -> None:
    """Checked in the engine's thread, between its rows; two loads at once are still one."""
    learned(causal, TEMPLATE).save(tmp_path / "good")
    registry = Registry(tmp_path, base_name="base", check=lambda prompt: engine.call(lambda: prompt.bind(causal)))
    winners: list[Served] = []
    losers: list[ConflictError] = []

    def load(_: int) -> None:
        try:
            winners.append(registry.load("one", "good"))
        except ConflictError as error:
            losers.append(error)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load, range(8)))
    assert (len(winners), len(losers)) == (1, 7)
    assert registry.get("one") is winners[0]
