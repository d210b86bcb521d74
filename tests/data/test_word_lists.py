"""Word lists: every file that they come in, and the records whose targets are in them."""

import json
from pathlib import Path
from typing import Any

import pytest

from ptuning.data.reading import load_records
from ptuning.data.word_lists import read_words, targets_of
from ptuning.errors import FileError, RecordError


def file(folder: Path, content: Any, *, name: str = "words.json") -> Path:
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_text_file_has_a_word_per_line(tmp_path: Path) -> None:
    path = file(tmp_path, "\ufeffNairobi\n\n  São Tomé \r\nNairobi\nLima", name="words.txt")
    assert read_words(path) == ("Nairobi", "São Tomé", "Lima")


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
    assert read_words(file(tmp_path, content)) == words


def test_data_and_shipped_facts_give_their_targets(tmp_path: Path) -> None:
    rows = [{"x": "a", "y": " no"}, {"x": "b", "y": "yes"}, {"x": "c", "y": "no"}, {"x": "d"}]
    assert targets_of(rows) == ["no", "yes"]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, content in (
        ("a.json", rows),
        ("b.json", lines),
        ("c.jsonl", lines),
        ("d.csv", "x,y\na,no\nb,yes\n"),
        ("e.csv", "x;y\na, b;no\nb;yes\n"),
        ("e.tsv", "y\nno\nyes\n"),
    ):
        assert read_words(file(tmp_path, content, name=name)) == ("no", "yes")
    assert set(read_words("capitals:dev")) == {row["y"] for row in load_records("capitals:dev")}


def test_only_the_targets_new_name_counts(tmp_path: Path) -> None:
    """Other fields may well be missing beside the answers."""
    path = file(tmp_path, "x,answer\na,no\nb,yes\n", name="a.csv")
    assert read_words(path, fields={"y": "answer", "z": "missing"}) == ("no", "yes")
    path = file(tmp_path, "answer\nno\nyes\n", name="b.csv")
    assert read_words(path, fields={"y": "answer"}) == ("no", "yes")


def test_one_column_without_a_targets_name_is_a_list(tmp_path: Path) -> None:
    assert read_words(file(tmp_path, "Lima\nParis\n", name="a.csv")) == ("Lima", "Paris")
    assert read_words(file(tmp_path, "Lima\nParis\n", name="a.words")) == ("Lima", "Paris")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"a": ["Lima"], "b": ["Paris"]}, "holds no words that all its models share; give"),
        ([], "holds no words; give a .txt file with one per line, JSON lists, or data with y"),
        ({}, "holds no words; "),
        (["", " "], "holds no words; "),
        ('["Lima", ', "words.json: not valid JSON"),
        ('"Lima"', "words.json, line 1: a record must be an object"),  # and not its four letters
        ("5", "words.json, line 1: a record must be an object"),
        ([{"word": "Lima"}], "holds no words; "),
        ({"a": ["Lima"], "b": 3}, "holds no words; "),
        ({"a": [None]}, "holds no words; "),
    ],
)
def test_files_without_words(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises((FileError, RecordError), match=says):
        read_words(file(tmp_path, content))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("São".encode("latin-1"))
    with pytest.raises(FileError, match=r"latin\.txt is not UTF-8 text"):
        read_words(tmp_path / "latin.txt")
    with pytest.raises(FileError, match="no such data file"):
        read_words(tmp_path / "missing.txt")
    with pytest.raises(FileError, match="holds no words"):
        read_words(file(tmp_path, "\n\n", name="empty.txt"))
