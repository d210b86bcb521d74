"""Jobs, the parts that a command is divided into, and the lock of a job."""

import multiprocessing
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptuning.errors import ConfigError
from ptuning.progress import Interrupted
from ptuning.workers.jobs import Job, WorkPart, job_lock, split_evenly

JOBS = [Job(f"job {number}", (f"cells/{number}",)) for number in range(7)]


@pytest.mark.parametrize("text", ["3/16", " 3 / 16 "])
def test_a_part_is_read_and_written(text: str) -> None:
    assert WorkPart.parse(text) == WorkPart(3, 16)
    assert str(WorkPart(3, 16)) == "3/16"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "part '' is not K/N"),
        ("3", "part '3' is not K/N"),
        ("3/", "is not K/N"),
        ("3/16/2", "is not K/N"),
        ("-1/4", "is not K/N"),
        ("1.5/4", "is not K/N"),
        ("٣/٤", "is not K/N"),
        ("9" * 30 + "/4", "is not K/N"),
        ("0/4", "there is no part 0"),
        ("5/4", "part 5/4: parts are counted from 1 to 4, so there is no part 5"),
        ("1/0", "the number of parts must be from 1"),
        ("1/2000000", "the number of parts must be from 1 to 1,000,000"),
    ],
)
def test_a_part_that_cannot_be_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        WorkPart.parse(text)


@given(st.integers(1, 7))
def test_parts_have_every_job_once_and_about_equally_many(of: int) -> None:
    shares = [WorkPart(number, of).share(JOBS) for number in range(1, of + 1)]
    assert sorted(job.name for share in shares for job in share) == sorted(job.name for job in JOBS)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_parts_than_jobs_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"part 2/8: there are only 7 jobs to share"):
        WorkPart(2, 8).share(JOBS)
    with pytest.raises(ConfigError, match=r"part 2/2: there are only 1 jobs to share"):
        WorkPart(2, 2).share(JOBS[:1])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(1, 20))
def test_items_are_cut_in_their_order_and_none_is_lost(weights: list[int], most: int) -> None:
    items = list(range(len(weights)))
    runs = split_evenly(items, weights, most)
    assert [item for run in runs for item in run] == items
    for run in runs:
        assert len(run) == 1 or sum(weights[item] for item in run) <= most


@given(st.integers(1, 100), st.integers(1, 5))
def test_runs_of_equal_items_are_few_and_about_equally_long(count: int, weight: int) -> None:
    sizes = [len(run) for run in split_evenly(range(count), [weight] * count, 16)]
    assert len(sizes) == -(-count // (16 // weight))
    assert max(sizes) - min(sizes) <= 1


def test_a_job_is_locked_by_one_process_at_a_time(tmp_path: Path) -> None:
    """Another one waits, and can be stopped while it does; the end of a process lets go of its unit."""
    job = Job("both", ("cells/a", "cells/b"))
    begun, go_on = multiprocessing.get_context("fork").Event(), multiprocessing.get_context("fork").Event()

    def hold() -> None:
        with job_lock(tmp_path, job, lambda: None):
            begun.set()
            go_on.wait(60)

    process = multiprocessing.get_context("fork").Process(target=hold, daemon=True)
    process.start()
    assert begun.wait(60)

    def stop() -> None:
        raise Interrupted("stopped")

    with pytest.raises(Interrupted), job_lock(tmp_path, Job("one", ("cells/b",)), stop):
        pytest.fail("the block must not begin")
    with job_lock(tmp_path, Job("other", ("cells/c",)), stop):
        pass
    asked: list[int] = []

    def let_go() -> None:
        asked.append(1)
        go_on.set()

    with job_lock(tmp_path, job, let_go):
        assert asked
    process.join(60)
