"""Closed sets of answers: the files they come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptuning.data.word_lists import read_vocabulary
from ptuning.errors import FileError


def file(folder: Path, content: Any, *, name: str = "words.json") -> Path:
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_text_file_has_a_word_per_line(tmp_path: Path) -> None:
    path = file(tmp_path, "\ufeffNairobi\n\n  São Tomé \r\nNairobi\nLima", name="words.txt")
    assert read_vocabulary(path) == ("Nairobi", "São Tomé", "Lima")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (["Lima", "Paris", "Lima", 1999], ("Lima", "Paris", "1999")),
        # The lists of several models: what they share, in the first one's order.
        ({"bert": ["Lima", "Paris", "yes"], "gpt": ["Paris", "no", "Lima"]}, ("Lima", "Paris")),
        # Token -> id, with the signs that stand for a space in front.
        ({"gpt2": {"ĠParis": 3, "Lima": 4, "Ġ": 5}, "t5": {"▁Lima": 1, "▁Paris": 2, "x": 3}}, ("Paris", "Lima")),
        ({"a": ["ĠLima", "Ġno"], "b": {"Lima": 7}}, ("Lima",)),
        # One model's token -> id.
        ({"ĠLima": 0, "▁Paris": 1, "yes": 2}, ("Lima", "Paris", "yes")),
    ],
)
def test_json_files(tmp_path: Path, content: Any, words: tuple[str, ...]) -> None:
    assert read_vocabulary(file(tmp_path, content)) == words


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"a": ["Lima"], "b": ["Paris"]}, "holds no words that all its models share"),
        ([], "holds no words$"),
        ({}, "holds no words$"),
        (["", " "], "holds no words$"),
        ('["Lima", ', r"is no list of words .*give a \.txt with one per line, or \.json"),
        ('"Lima"', "holds other JSON"),  # and not its four letters
        ("5", "holds other JSON"),
        ([{"word": "Lima"}], "holds other JSON"),
        ({"a": ["Lima"], "b": 3}, "holds other JSON"),
        ({"a": [None]}, "holds other JSON"),
    ],
)
def test_files_without_words(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(FileError, match=says):
        read_vocabulary(file(tmp_path, content))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("São".encode("latin-1"))
    with pytest.raises(FileError, match=r"latin\.txt is no list of words"):
        read_vocabulary(tmp_path / "latin.txt")
    with pytest.raises(FileError, match="cannot read"):
        read_vocabulary(tmp_path / "missing.txt")
    with pytest.raises(FileError, match="holds no words"):
        read_vocabulary(file(tmp_path, "\n\n", name="empty.txt"))
