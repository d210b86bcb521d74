"""How a training was launched."""

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.engine.processes import TORCHRUN, DataRanks, _on_cpus, processes
from ptuning.errors import TrainingError
from ptuning.training.run import train
from tests.conftest import RECORDS, WARM


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


@pytest.mark.usefixtures("unread")
def test_a_process_that_believes_it_is_alone_trains_nothing(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate sees one process on a processor unless it is told: two of them used to train one run in one folder."""
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(TrainingError, match=r"2 processes were started, and accelerate sees 1.*ACCELERATE_USE_CPU"):
            train(WARM, RECORDS, backbone=causal, out=tmp_path / "run", config=TrainConfig(epochs=1))
    assert not (tmp_path / "run").exists()
    assert processes().num_processes == 1


@pytest.mark.parametrize(("told", "expected"), [({}, False), ({TORCHRUN: "none"}, True)])
def test_processes_of_torchrun_meet_on_cpus_where_there_is_no_gpu(
    told: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked for counts more, and variables that stayed in a shell do not start anything."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert _on_cpus() is expected
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert not _on_cpus()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert _on_cpus()


def test_rows_are_spread_over_ranks_and_one_rank_sends_nothing() -> None:
    rows = list(range(7))
    parts = [DataRanks(rank, 3).own(rows) for rank in range(3)]
    assert sorted(row for part in parts for row in part) == rows
    one = torch.ones(2)
    assert DataRanks().sum([one])[0] is one
