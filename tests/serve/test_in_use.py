"""Prompts that change while requests run: every answer is that of the prompt its request began with."""

import copy
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.data.questions import Question
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.rows import PromptRow
from ptuning.serve.engine.engine import Engine
from ptuning.serve.registry import ConflictError, Registry, UnknownPromptError
from ptuning.template.labels import LabelWords
from tests.conftest import learned

# The text before the slots is cached, and the same for all: only the vectors tell the prompts apart.
TEMPLATE = "{x} [P*3] is [Y]"
RECORDS = [{"x": "the movie Zürich was great"}, {"x": "Kenya"}]
VERSIONS = 3
REQUESTS = 15


def test_answers_are_those_of_the_prompt_that_a_request_began_with(causal: Backbone, tmp_path: Path) -> None:
    """Abuse cases 12 and 15: loaded, replaced, unloaded and reloaded under one name while four clients ask it; no
    answer is another prompt's, and none comes from the cache of an earlier prompt. Of eight loads at once, one wins.
    """
    alone = PromptModel(copy.deepcopy(causal))
    words = LabelWords.of(["Paris", "Lima", "located", "people", "question", "answer", "cities", "number"])
    expected: dict[tuple[str, str], float] = {}
    for version in range(VERSIONS):
        prompt = replace(learned(causal, TEMPLATE, seed=version), label_words=words)
        prompt.save(tmp_path / f"v{version}")
        for record, prediction in zip(RECORDS, alone.predict(RECORDS, prompt), strict=True):
            expected[f"v{version}", record["x"]] = prediction.log_prob
    assert len({round(value, 3) for value in expected.values()}) == len(expected)

    engine = Engine(PromptModel(causal))
    engine.start()
    registry = Registry(tmp_path, base_name="base", check=lambda prompt: engine.call(lambda: prompt.bind(causal)))
    over = threading.Event()
    seen: set[str] = set()

    def load(_: int) -> bool:
        try:
            registry.load("name", "v0")
        except ConflictError:
            return False
        return True

    def change() -> None:
        for turn in itertools.count():
            if over.is_set():
                return
            if turn % 5 == 4:
                registry.unload("name")
                registry.load("name", f"v{turn % VERSIONS}")
            elif turn % 5 == 3:
                registry.reload()
            else:
                registry.load("name", f"v{turn % VERSIONS}", replaces=True)

    def ask() -> None:
        for turn in itertools.count():
            if turn >= REQUESTS and len(seen) > 1:  # on a busy machine the name changes late
                return
            try:
                served = registry.get("name")
            except UnknownPromptError:
                continue
            for record in RECORDS * 2:  # meanwhile the name changes
                (outcome,) = engine.ask([PromptRow(served.prompt, Question(record))], timeout=60)
                assert outcome.prediction is not None
                assert outcome.prediction.log_prob == pytest.approx(expected[served.folder.name, record["x"]], abs=1e-4)
            seen.add(served.folder.name)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(load, range(8))) == 1
        changing = pool.submit(change)
        try:
            for asking in [pool.submit(ask) for _ in range(4)]:
                asking.result(120)
        finally:
            over.set()
            changing.result(60)
            engine.stop()
    assert len(seen) > 1
