"""Only what we wrote is replaced or removed, links are not followed, and an output folder is tried first."""

import os
from pathlib import Path

import pytest

from ptuning import files
from ptuning.errors import FileError
from ptuning.names import PROMPT, RUN, check_free, check_output, check_writable, publish_folder
from tests.top.test_files import full_disk, make, names, no_rights


def test_a_folder_is_free_that_is_new_or_empty(tmp_path: Path) -> None:
    """A file in its place is an error, and so is a path that no file of ours could be written under."""
    full, empty, file = make(tmp_path / "full"), make(tmp_path / "empty"), tmp_path / "file"
    file.touch()
    (full / "a").touch()
    check_free(tmp_path / "new" / "deep")
    check_free(empty)
    assert names(tmp_path) == ["empty", "file", "full"]
    with pytest.raises(FileError, match=r"full exists and is not empty; choose another folder$"):
        check_free(full)
    with pytest.raises(FileError, match="file exists and is not a folder; choose another output folder"):
        check_output(file)
    with pytest.raises(FileError, match="File name too long"):
        check_output(tmp_path / ("x" * 300))


def test_a_folder_that_is_not_empty_names_the_remedies_that_there_are(tmp_path: Path) -> None:
    """``--resume`` was answered with the advice to give ``--resume``, in a folder without any run."""
    foreign, run, prompt = make(tmp_path / "foreign"), make(tmp_path / "run"), make(tmp_path / "prompt")
    (foreign / "mine.txt").touch()
    (run / "run.json").write_text('{"format_version": 1, "command": "train"}')
    (prompt / "prompt.json").write_text('{"format_version": 1, "template": "[P] [Y]"}')
    for folder, layout, resume, options in (
        (foreign, RUN, True, set()),
        (foreign, RUN, False, {"overwrite"}),
        (run, RUN, False, {"resume", "overwrite"}),
        (prompt, PROMPT, False, {"overwrite"}),
    ):
        with pytest.raises(FileError, match="is not empty") as caught:
            check_writable(folder, layout, resume=resume)
        assert {option for option in ("resume", "overwrite") if f"({option})" in str(caught.value)} == options
    check_writable(run, RUN, resume=True)
    check_writable(foreign, RUN, overwrite=True)


def test_an_output_folder_is_tried_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That it cannot be written used to be noticed after an epoch of training; and nothing is left by the try."""
    check_output(tmp_path)
    assert names(tmp_path) == []
    monkeypatch.setattr("tempfile.TemporaryFile", no_rights)
    for folder in (tmp_path, tmp_path / "new" / "deep"):
        with pytest.raises(FileError, match=r"cannot write into .*: Permission denied"):
            check_output(folder)


def test_a_path_that_is_no_text_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    """The record names the folder, in UTF-8; it used to fail there, when training had ended."""
    with pytest.raises(FileError, match=r"is not UTF-8 text; choose another output folder"):
        check_output(tmp_path / os.fsdecode(b"caf\xe9"))


def test_new_files_and_folders_have_the_rights_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "")
        with publish_folder(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_a_published_folder_appears_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    with publish_folder(folder) as temporary:
        (temporary / "a").write_text("new", encoding="utf-8")
        assert not folder.exists()
    assert (folder / "a").read_text(encoding="utf-8") == "new"
    assert names(tmp_path / "deep") == ["out"]


def test_new_files_go_one_by_one_into_a_folder_that_has_others(tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    (folder / "mine").touch()
    (folder / "a").write_text("old", encoding="utf-8")
    with pytest.raises(FileError, match="not empty"), publish_folder(folder):
        pytest.fail("the block must not run")
    with publish_folder(folder, last="a") as temporary:
        files.write_text(temporary / "a", "new")
        files.write_text(temporary / "b", "new")
    assert names(folder) == ["a", "b", "mine"]
    assert (folder / "a").read_text(encoding="utf-8") == "new"
    assert names(tmp_path) == ["out"]


def test_a_block_that_fails_leaves_what_stood_there(tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    (folder / "old").touch()
    with pytest.raises(ZeroDivisionError), publish_folder(folder, last="new") as temporary:
        (temporary / "new").write_text(str(1 / 0), encoding="utf-8")
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_rename_that_fails_leaves_what_stood_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    folder = tmp_path / "out"
    if is_there:
        (make(folder) / "old").touch()
    monkeypatch.setattr(Path, "replace", full_disk)
    with (
        pytest.raises(FileError, match=r"cannot write .*out: No space left on device; free some space"),
        publish_folder(folder, last="new") as temporary,
    ):
        (temporary / "new").touch()
    assert names(tmp_path) == (["out"] if is_there else [])
    assert not is_there or names(folder) == ["old"]


def test_what_another_process_published_meanwhile_stays(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(FileError, match="not empty"), publish_folder(folder):
        files.write_text(make(folder) / "theirs", "")
    assert names(folder) == ["theirs"]
    assert names(tmp_path) == ["out"]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", no_rights)
    with (
        pytest.raises(FileError, match=r"cannot create .*: Permission denied"),
        publish_folder(tmp_path / "a"),
    ):
        pytest.fail("the block must not run")


def test_a_folder_behind_a_link_takes_what_is_published(tmp_path: Path) -> None:
    """The link used to become a folder of its own, and to stay behind under another name."""
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big")
    with publish_folder(tmp_path / "link") as temporary:
        (temporary / "a").write_text("1", encoding="utf-8")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "big" / "a").read_text(encoding="utf-8") == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "link"]
