"""Reading data: every format and what is wrong with it, with file and line; shipped facts."""

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ptuning.data.questions import as_questions
from ptuning.data.reading import as_read, load_records, raw_rows, with_fields
from ptuning.data.splits import split_questions
from ptuning.errors import FileError, RecordError
from ptuning.files import sha256
from ptuning.records import Records, as_records, require_targets

ROWS = [{"x": "Kenya", "y": "Nairobi"}, {"x": "São Tomé", "y": '"b", a'}]


def write(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"x": "Kenya", "y": "Nairobi"}\n\n{"x": "S\\u00e3o Tomé", "y": "\\"b\\", a"}'),
        ("a.ndjson", '{"x": "Kenya", "y": "Nairobi"}\r\n{"x": "São Tomé", "y": "\\"b\\", a"}\r\n'),
        ("a.json", ' [{"x": "Kenya", "y": "Nairobi"},\n {"x": "São Tomé", "y": "\\"b\\", a"}]'),
        ("a.JSON", '{"x": "Kenya", "y": "Nairobi"}\n{"x": "São Tomé", "y": "\\"b\\", a"}'),
        ("a.csv", 'x,y\nKenya,Nairobi\n\n"São Tomé","""b"", a"\n'),
        ("a.csv", 'x,y\r\nKenya,Nairobi\r\n"São Tomé","""b"", a"'),
        ("a.csv", 'x;y\nKenya;Nairobi\nSão Tomé;"""b"", a"\n'),
        ("a.csv", 'x\ty\nKenya\tNairobi\n"São Tomé"\t"""b"", a"\n'),
        ("a.tsv", 'x\ty\nKenya\tNairobi\nSão Tomé\t"b", a\n'),
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_every_text_format_gives_the_same_records(tmp_path: Path, name: str, text: str, mark: bytes) -> None:
    """JSONL, a JSON array, quoted CSV, and tab-separated files, whose quotes are text; with and without a BOM."""
    data = mark + text.encode()
    records = load_records(write(tmp_path, name, data))
    assert list(records) == ROWS
    assert records.name == str(tmp_path / name)
    assert records.sha256 == sha256(data)


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("a;b\nhello, you;1\nhello;2\n", ["a", "b"]),
        ("a,b\n1;2,3\n4;5,6\n", ["a", "b"]),
        ("a\tb\n1,2\t3\n", ["a", "b"]),
        ('"a;b",c\n1,2\n', ["a;b", "c"]),
        ('a;b\n"1\n;2";3\n', ["a", "b"]),
        ("name; surname\nAda\nBob\n", ["name; surname"]),
        ("text\na; b\nc\n", ["text"]),
        ("a;b\n", ["a", "b"]),
    ],
)
def test_what_separates_a_csv_is_seen_in_its_first_rows(text: str, columns: list[str]) -> None:
    assert list(raw_rows(text.encode(), name="a.csv").columns) == columns


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"x": ["Kenya", "Peru"], "n": [1, None], "ok": [True, False], "many": [[1], [2]]})
    pyarrow.parquet.write_table(table, path)
    assert list(load_records(path)) == [{"x": "Kenya", "n": "1", "ok": "true"}, {"x": "Peru", "ok": "false"}]


@pytest.mark.parametrize("damage", [b"no parquet at all", None])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, damage: bytes | None) -> None:
    """Whether the file is something else or only its footer is broken, which pyarrow reports in another way."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"x": ["Kenya"] * 9}), path)
    whole = path.read_bytes()
    path.write_bytes(damage or whole[: len(whole) // 2] + b"\xff" * (len(whole) // 2 - 8) + whole[-8:])
    with pytest.raises(RecordError, match=r"a\.parquet is not a readable Parquet file"):
        load_records(path)


def test_values_become_text_and_null_is_absent(tmp_path: Path) -> None:
    line = '{"a": 1, "b": 2.5, "c": true, "d": null, "e": [1], "f": {"g": 1}, "h": "", "i": 1e3}'
    assert list(load_records(write(tmp_path, "a.jsonl", line))) == [
        {"a": "1", "b": "2.5", "c": "true", "h": "", "i": "1000.0"}
    ]


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path: Path) -> None:
    """JSON strings may hold U+2028, at which ``str.splitlines`` would cut."""
    records = load_records(write(tmp_path, "a.jsonl", '{"x": "a\u2028b\x85c"}\n{"x": "d"}\n'))
    assert [record["x"] for record in records] == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", '{"x": "1"}\n\n{"x": ', r"a\.jsonl, line 3: not a JSON object"),
        ("a.jsonl", '{"x": "1"}\n[1, 2]', r"a\.jsonl, line 2: .*not list"),
        ("a.json", '[{"x": "1"}, 7]', r"a\.json, record 2: .*not int"),
        ("a.json", '[{"x": "1"}', r"a\.json: not valid JSON"),
        ("a.csv", 'x,y\n1,2\n"3\n4"\n', r"a\.csv, line 4: 1 cells, and the header has 2 columns"),
        ("a.csv", "x,y\nhello, you,1\n", r"line 2: 3 cells, .* 2 columns, separated by commas"),
        # Most rows decide on the separator, so that a row with another one is an error, and no row of one cell.
        ("a.csv", "x;y\n1;2\n3,4\n", r"a\.csv, line 3: 1 cells, and the header has 2 .*by semicolons"),
        ("a.csv", 'x,y\n1,"2', r"a\.csv, line 2: unexpected end of data"),
        ("a.csv", 'x,y\n1,2\n3,"4\n5,6\n', "line 4: unexpected .*; the row that begins in line 3 .* not closed"),
        ("a.csv", 'x,y\n1,2\n3,"4\n5,"6"\n', "line 4: .* expected after .*; the row that begins in line 3 .* twice"),
        ("a.csv", "x,y,x\n1,2,3\n", r"a\.csv, line 1: the column names x are there twice"),
        ("a.tsv", "x\ty\n1\n", r"a\.tsv, line 2: 1 cells"),
        ("a.csv", b"x,y\n1,2\n3,\xe9\n", r"a\.csv, line 3: not UTF-8 text"),
        ("a.jsonl", b'{"x": "1"}\n\xff\xfe', r"a\.jsonl, line 2: not UTF-8 text"),
        ("a.jsonl", '{"x": "\\ud83d"}', r"a\.jsonl, line 1: .*half a character"),
        ("a.jsonl", "", r"a\.jsonl holds no records"),
        ("a.jsonl", "\n \n", "holds no records"),
        ("a.json", "[]", "holds no records"),
        ("a.csv", "x,y\n", "holds no records"),
        ("a.csv", "", "holds no records"),
    ],
)
def test_mistakes_in_a_file_are_named_with_their_line(
    tmp_path: Path, name: str, data: str | bytes, message: str
) -> None:
    with pytest.raises(RecordError, match=message):
        load_records(write(tmp_path, name, data))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("capital_train.jsonl", r"Did you mean 'capitals_train.*capitals:train\|dev\|test"),
        ("no folder/a.jsonl", "no such data file"),
        ("x" * 300 + ".jsonl", "no such data file"),
        ("a\0b.jsonl", "no such data file"),
        ("\udc80.jsonl", "not UTF-8"),
        ("a.txt", r"cannot tell the format of .*a\.txt; .*\.jsonl, \.nd"),
        ("folder.jsonl", r"cannot read .*folder\.jsonl"),
        ("capitals", r"capitals:train\|dev\|test"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, message: str) -> None:
    write(tmp_path, "capitals_train.jsonl", "{}")
    write(tmp_path, "a.txt", "x")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(FileError, match=message):
        load_records(tmp_path / name)


def test_shipped_facts() -> None:
    train = load_records("capitals:train")
    assert train.name == "capitals:train"
    assert set(train[0]) == {"x", "y"}
    assert load_records("capitals:dev").sha256 != train.sha256
    with pytest.raises(FileError, match="train, dev, test, not 'trian'"):
        load_records("capitals:trian")
    with pytest.raises(FileError, match=r"'capitols:train'\. Did you mean 'capitals'"):
        load_records("capitols:train")


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"sub_label": "Kenya", "obj_label": "Nairobi"}, ("Kenya", "Nairobi")),
        ({"x": "film", "label": 1}, ("film", "1")),
        ({"x": "own", "sub_label": "other", "y": "own", "label": "other"}, ("own", "own")),
        ({"x": "a", "y": None, "label": "b"}, ("a", "b")),
    ],
)
def test_the_names_of_lama_and_of_classification_sets_are_known(
    row: dict[str, object], record: tuple[str, str]
) -> None:
    (read,) = as_read(raw_rows(json.dumps(row).encode(), name="a.jsonl"))
    assert (read["x"], read["y"]) == record


def test_fields_are_renamed_and_no_answer_stays_behind(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"question": "who", "answer": "me", "x": "1", "y": "2"}')
    assert list(load_records(path, fields={"y": "answer"})) == [{"question": "who", "x": "1", "y": "me"}]
    assert list(load_records(path, fields={"x": "y", "y": "x"})) == [
        {"question": "who", "answer": "me", "x": "2", "y": "1"}
    ]
    with pytest.raises(RecordError, match=r"line 1: no field 'reply' to use as 'y'; it has answer, question, x, y"):
        load_records(path, fields={"y": "reply"})


def test_a_target_with_another_name_is_without_the_space_around_it(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "message,team\n a , billing \n")
    assert list(load_records(path, fields={"y": "team"})) == [{"message": " a ", "y": "billing"}]


def test_records_know_file_and_line_also_behind_a_split(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'x,y\na,1\n"b\nb",2\nc,3\n')
    records = load_records(path)
    assert [records.place(number) for number in (1, 2, 3)] == [f"{path}, line {line}" for line in (2, 4, 5)]
    for part in split_questions(as_questions(records), fraction=0.3, seed=0):
        for row in part:
            assert row.where == records.place(records.index(row.record) + 1)
    records.append({"x": "d", "y": "4"})
    assert records.place(4) == f"{path}, record 4"
    assert as_records([{"x": "1"}]).place(1) == "in memory, record 1"


def test_remembered_fields_are_read_where_they_are(tmp_path: Path) -> None:
    records = load_records(write(tmp_path, "a.csv", "message,team\nhello, billing \n"))
    found = with_fields(records, {"y": "team", "x": "text"})
    assert list(found) == [{"message": "hello", "y": "billing"}]
    assert (found.name, found.sha256, found.places) == (records.name, records.sha256, records.places)
    assert as_questions(found).fields == {"y": "team", "x": "text"}
    assert with_fields(records, {}) is records


def test_records_in_memory_are_cleaned_and_known_by_their_content() -> None:
    records = as_records([{"x": "Kenya", "y": "Nairobi"}])
    assert as_records(records) is records
    assert records.sha256 == as_records([{"y": "Nairobi", "x": "Kenya"}]).sha256
    assert records.sha256 != as_records([{"x": "Kenya", "y": "Lima"}]).sha256
    with pytest.raises(RecordError, match="record 2: a record must be an object with named fields, not str"):
        as_records([{"x": "1"}, "Kenya"])  # type: ignore[list-item]
    with pytest.raises(RecordError, match="record 1: field names must be text, not 1"):
        as_records([{1: "Kenya"}])  # type: ignore[dict-item]


def test_records_without_a_target_are_named() -> None:
    require_targets(Records([{"y": "1"}]))
    with pytest.raises(RecordError, match=r"a\.jsonl, record 2: no target; .*'y' .*a, b, y.*field y=NAME"):
        require_targets(Records([{"y": "1"}, {"a": "1", "y": " ", "b": ""}], name="a.jsonl"))
    with pytest.raises(RecordError, match="the record has no fields"):
        require_targets(Records([{}]))


def test_a_data_file_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    """The record of a run names its data; training used to end in a traceback when it was written."""
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    path.write_text('{"x": "a", "y": "b"}\n', encoding="utf-8")
    with pytest.raises(FileError, match="is not UTF-8 text; rename it"):
        load_records(path)
