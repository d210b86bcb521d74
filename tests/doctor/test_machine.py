"""This machine: processors and their quota, threads, memory, disk, number formats, and the port of a server."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from ptuning.doctor import machine
from ptuning.doctor.machine import check_machine, check_port, free_memory, usable_cores
from tests.doctor.conftest import named

measured = machine.product_ms


@pytest.fixture(autouse=True)
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the limits of control groups seem to be: none, on a machine with four processors."""
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "product_ms", lambda *_: 1.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    (tmp_path / "groups").mkdir()
    return tmp_path / "groups"


def test_every_part_of_the_machine_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "product_ms", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    found = named(check_machine())
    assert list(found) == ["cores", "threads", "memory", "disk", "units", "float32", "bfloat16", "gpu"]
    assert found["cores"].found == "4"
    assert " ms for a product" in found["float32"].found
    assert found["gpu"].found == "none"


def test_processors_are_those_that_the_process_may_use(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores() == 4
    (groups / "cpu.max").write_text("max 100000\n")
    assert usable_cores() == 4
    (groups / "cpu.max").write_text("150000 100000\n")
    assert usable_cores() == 1.5
    assert named(check_machine())["cores"].found == "4, of which this process may use 1.5"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2})
    assert usable_cores() == 1
    (groups / "cpu.max").write_text("what 0\n")
    assert usable_cores() == 1


def test_the_older_kind_of_quota_counts_as_well(groups: Path) -> None:
    (groups / "cpu").mkdir()
    (groups / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (groups / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert usable_cores() == 4
    (groups / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    assert usable_cores() == 0.5


@pytest.mark.parametrize(("threads", "status"), [(1, "ok"), (2, "ok"), (3, "warning")])
def test_more_threads_than_processors_are_a_warning(
    threads: int, status: str, groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quota of one and a half keeps two threads busy, and a third waiting."""
    (groups / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.delenv("OMP_NUM_THREADS")
    found = named(check_machine())["threads"]
    assert found.status == status
    assert f"torch uses {threads} (OMP_NUM_THREADS is not set)" in found.found
    assert found.remedy == ("export OMP_NUM_THREADS=1" if status == "warning" else "")


def test_memory_is_bounded_by_the_control_group(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = SimpleNamespace(available=8 * 10**9, total=16 * 10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there)
    assert named(check_machine())["memory"].found == "8.0 GB free of 16.0 GB"
    (groups / "memory.max").write_text("max\n")
    (groups / "memory.current").write_text("1500000000\n")
    assert free_memory() == 8 * 10**9
    (groups / "memory.max").write_text("2000000000\n")
    assert free_memory() == 5 * 10**8
    found = named(check_machine())["memory"]
    assert (found.status, found.found) == ("warning", "0.5 GB free of 16.0 GB")


def test_a_cache_without_room_or_rights_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new" / "cache"))
    found = named(check_machine())["disk"]
    assert found.status == "ok"
    assert str(tmp_path / "new" / "cache") in found.found
    assert not (tmp_path / "new").exists()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**8))
        found = named(check_machine())["disk"]
        assert (found.status, found.found[:7]) == ("warning", "0.1 GB ")
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = named(check_machine())["disk"]
    assert found.status == "warning"
    assert "cannot be written" in found.found
    assert "XDG_CACHE_HOME" in found.remedy


@pytest.mark.parametrize("units", [[], ["amx_bf16"]])
def test_units_for_bfloat16_are_named(units: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "units", lambda: units)
    monkeypatch.setattr(machine, "product_ms", lambda dtype, _: 2.0 if dtype == torch.float32 else 5.0)
    found = named(check_machine())
    assert found["units"].found.endswith("for products in bfloat16: amx_bf16" if units else "bfloat16: none")
    assert found["bfloat16"].found.startswith("5 ms, 2.5 times as long")
    assert ("leave --dtype out" in found["bfloat16"].found) == (not units)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield one.getsockname()[1]


def test_a_port_that_is_taken_is_a_warning_unless_a_server_is_known(taken: int) -> None:
    found = check_port(taken)
    assert (found.status, found.found) == ("warning", "taken by another program")
    assert "--port" in found.remedy
    assert check_port(taken, is_served=True).status == "ok"


def test_a_port_that_is_free_can_be_taken_afterwards(taken: int) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        free = one.getsockname()[1]
    found = check_port(free)
    assert (found.status, found.found, found.name) == ("ok", "free", f"127.0.0.1:{free}")
    with socket.socket() as one:
        one.bind(("127.0.0.1", free))
