"""How a training was launched."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from accelerate import PartialState
from accelerate.state import AcceleratorState

from ptuning.engine.processes import processes
from ptuning.errors import TrainingError


@pytest.fixture
def unread() -> None:
    """accelerate reads the environment once; here it reads it again."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("name", "value"), [("LOCAL_RANK", "0"), ("LOCAL_RANK", "abc"), ("ACCELERATE_USE_CPU", "maybe")]
)
def test_what_a_launcher_left_in_the_environment_is_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv(name, value)
        with pytest.raises(TrainingError, match=rf"accelerate cannot start with the environment's .*{name}.*unset"):
            processes()
    assert processes().num_processes == 1


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND"])
def test_settings_of_accelerate_that_are_not_ours_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    assert processes().num_processes == 1


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns a hundred thousand times a second."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hurried")
def test_threads_see_whole_processes_and_a_whole_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread finds accelerate's state as it should be, and no thread ever sees the environment emptied."""
    monkeypatch.setenv("PTUNING_TEST", "here")
    over, missed = threading.Event(), []

    def watch() -> None:
        while not over.is_set():
            if "PTUNING_TEST" not in os.environ:
                missed.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(30):
            PartialState._reset_state()
            with ThreadPoolExecutor(4) as threads:
                assert list(threads.map(lambda _: processes().num_processes, range(8))) == [1] * 8
    finally:
        over.set()
        watcher.join()
    assert not missed
