"""Files are whole or not there, and nothing is overwritten unasked."""

import errno
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import Field

from ptuning import files
from ptuning.errors import ConfigError, FileError
from ptuning.names import RUN, remove_stale


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_rights(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"é": [1, None, "\u2028"]})
    assert files.read_json(tmp_path / "a.json") == {"é": [1, None, "\u2028"]}
    assert (tmp_path / "a.json").read_text(encoding="utf-8").endswith("}\n")
    files.write_json_lines(tmp_path / "a.jsonl", [{"a": 1}, {"b": "é"}])
    assert files.read_bytes(tmp_path / "a.jsonl") == '{"a": 1}\n{"b": "é"}\n'.encode()
    assert files.sha256(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert names(tmp_path) == ["a.json", "a.jsonl"]


@pytest.mark.parametrize("step", ["replace", "open"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old", encoding="utf-8")
    monkeypatch.setattr(Path, step, full_disk)
    with pytest.raises(FileError, match=r"cannot write .*a\.json: No space left on device; free some space or choose"):
        files.write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are on the disk before the name is given to them."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(FileError, match="No space left"):
        files.write_bytes(path, b"new" * 1000)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_other_errors_say_what_to_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileError, match=r"cannot read .*no\.json: No such file or directory; check the path and its"):
        files.read_bytes(tmp_path / "no.json")
    with pytest.raises(FileError, match=r"cannot write .*; check the path and its rights"):
        files.write_bytes(tmp_path / "no folder" / "a", b"")
    monkeypatch.setattr(Path, "mkdir", no_rights)
    with pytest.raises(FileError, match=r"cannot create .*: Permission denied; check the path and its rights"):
        files.make_folder(tmp_path / "a")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": ', r"a\.json is not valid JSON \(.*\); it is damaged or was cut off"),
        (b"\xff", r"a\.json is not valid JSON"),
        (b"[1]", r"a\.json must hold a JSON object, and holds list"),
    ],
)
def test_damaged_json_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(FileError, match=message):
        files.read_json(tmp_path / "a.json")


def test_a_file_of_a_temporary_name_is_neither_followed_nor_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever guesses the name of a temporary file could have us write through a link; the name cannot be guessed."""
    victim = tmp_path / "victim"
    victim.write_text("mine", encoding="utf-8")
    path = tmp_path / "a.json"
    (tmp_path / f".a.json.{os.getpid()}.tmp").symlink_to(victim)
    files.write_text(path, "new")
    assert not path.is_symlink()
    monkeypatch.setattr("secrets.token_hex", lambda _: "0" * 16)
    files.new_path(path).symlink_to(victim)
    with pytest.raises(FileError, match="cannot write"):
        files.write_text(path, "newer")
    assert (victim.read_text(encoding="utf-8"), path.read_text(encoding="utf-8")) == ("mine", "new")


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "a.json"
    victim.write_text("mine", encoding="utf-8")
    path.symlink_to(victim)
    files.write_text(path, "new")
    assert (victim.read_text(encoding="utf-8"), path.read_text(encoding="utf-8")) == ("mine", "new")
    assert not path.is_symlink()


def test_threads_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    """They shared the name of the temporary file, and half of the writes failed."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: files.write_json(tmp_path / "a.json", {"n": number}), range(200)))
    assert "n" in files.read_json(tmp_path / "a.json")
    assert names(tmp_path) == ["a.json"]


def test_only_regular_files_of_a_plausible_size_are_read(tmp_path: Path) -> None:
    """A pipe would never end, /dev/zero would fill the memory, and so would a file with a hole."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with (tmp_path / "hole").open("wb") as handle:
        handle.truncate(2**31)
    (tmp_path / "link").symlink_to(tmp_path / "small")
    (tmp_path / "small").write_bytes(b"1234")
    for name in ("pipe", "zero"):
        for read in (files.file_sha256, files.read_json, lambda path: files.read_bytes(path, at_most=9)):
            with pytest.raises(FileError, match=f"{name}.*not a regular file"):
                read(tmp_path / name)
    for path, limit in ((tmp_path / "hole", 2**20), (tmp_path / "small", 3)):
        with pytest.raises(FileError, match=rf"is larger than the {limit:,} bytes that it can have"):
            files.read_bytes(path, at_most=limit)
    assert files.read_bytes(tmp_path / "link", at_most=4) == b"1234"


def test_check_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is asked through the nearest folder that is there."""
    asked = []

    def usage(path: Path) -> object:
        asked.append(path)
        return shutil._ntuple_diskusage(0, 0, 2_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    folder = tmp_path / "a" / "b"
    files.check_room(folder, 2_000_000)
    with pytest.raises(FileError, match=r"no room on disk for .*b: 3 MB are needed and 2 MB are free; free some space"):
        files.check_room(folder, 3_000_000)
    assert asked == [tmp_path, tmp_path]


def test_toml_and_text_name_their_file(tmp_path: Path) -> None:
    assert files.parse_toml("a = 1", where="x.toml", error=ConfigError) == {"a": 1}
    with pytest.raises(ConfigError, match=r"x\.toml is not a valid TOML file: .*line 1"):
        files.parse_toml("a = x", where="x.toml", error=ConfigError)
    (tmp_path / "a.txt").write_bytes("\ufeffé".encode())
    assert files.read_text(tmp_path / "a.txt") == "é"
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"a\.txt is not UTF-8 text \(.*\); save it as UTF-8"):
        files.read_text(tmp_path / "a.txt", error=ConfigError)


DEEP = "[" * 5000 + "]" * 5000
HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (f'{{"a": {DEEP}}}', "nested deeper than 100"),
        (f'{{"a": {"[" * 101}{"]" * 101}}}', "nested deeper than 100"),
        (f'{{"a": {HUGE}}}', "4300 digits"),
        ('{"\\ud800": 1}', "half a character"),
        ('{"a": ["x", {"b": "\\uDFFF"}]}', "half a character"),
    ],
)
def test_json_that_cannot_be_used_is_an_error_of_its_file(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    for read in (files.read_json, files.read_json_lines):
        with pytest.raises(FileError, match=rf"a\.json is not valid JSON.*{what}"):
            read(path)


def test_json_of_whole_characters_and_some_depth_is_read() -> None:
    assert files.parse_json(f'["\\ud83d\\ude00", "\\\\ud800", {"[" * 90}{"]" * 90}]')[:2] == ["\U0001f600", "\\ud800"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (f"x = {DEEP}", "nested too deeply"),
        (".".join("a" * 700) + " = 1", "nested too deeply"),
        (f"x = {HUGE}", "not a valid TOML file"),
    ],
)
def test_toml_that_cannot_be_used_is_an_error_of_its_reader(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=rf"x\.toml is {what}"):
        files.parse_toml(text, where="x.toml", error=ConfigError)


def test_a_name_that_cannot_be_a_path_is_an_error_of_reading() -> None:
    for name in ("a\0b", "a" * 300):
        with pytest.raises(FileError, match="cannot read"):
            files.read_bytes(Path(name))


def test_temporary_files_of_another_machine_are_spared_while_they_are_young(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several machines write into a folder that they share. Two processes of one number used to have one name for a
    temporary file, and whoever came later removed what the other was writing.
    """
    monkeypatch.setattr("secrets.token_hex", lambda _: "0" * 16)  # the same draws, as of two machines with one seed
    files._host.cache_clear()
    mine = files.new_path(tmp_path / "run.json")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("socket.gethostname", lambda: "elsewhere")
        files._host.cache_clear()
        other = files.new_path(tmp_path / "run.json")
    files._host.cache_clear()
    assert mine != other
    for path in (mine, other):
        path.touch()
        assert files.is_temporary(path.name)
    remove_stale(tmp_path, RUN)
    assert list(tmp_path.iterdir()) == [other]
    os.utime(other, (0, 0))
    remove_stale(tmp_path, RUN)
    assert list(tmp_path.iterdir()) == []


class _Seeds(files.FileModel, extra="forbid"):
    count: files.WholeNumber
    names: tuple[str, ...] = ()
    labels: str | dict[str, tuple[str, ...]] = ""
    shares: dict[str, float] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("value", "facts"),
    [
        ({}, ("'count'", "missing")),
        ({"count": "1"}, ("'count'", '"1"')),
        ({"count": True}, ("'count'", "true")),
        ({"count": 2**64}, ("'count'",)),
        ({"count": 1, "names": ["a", 2]}, ("'names #2'", "2")),
        ({"count": 1, "labels": {"good": [3]}}, ("'labels", "3")),
        ({"count": 1, "shares": {"a": float("nan")}}, ("'shares.a'",)),
        ({"count": 1, "name": ["a"]}, ("'name'", "Did you mean 'names'", "Known: count")),
        ([], ("[]",)),
    ],
)
def test_a_model_names_file_key_and_value_of_a_mistake(value: object, facts: Sequence[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        files.validate(_Seeds, value, "seeds.toml", error=ConfigError, advice="write it again")

    assert all(fact in str(caught.value) for fact in ("seeds.toml: ", *facts, "; write it again"))


def test_a_model_reads_lists_as_tuples_and_whole_numbers_as_float() -> None:
    seeds = files.validate(_Seeds, {"count": 1, "names": ["a"], "shares": {"a": 1}})

    assert (seeds.names, seeds.shares) == (("a",), {"a": 1.0})
