"""`ptuning eval`: what went wrong, seen on the terminal, in JSON and in a file."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from ptuning.prompt.prompt import Prompt
from tests.cli.test_app import call, fails, works

LABELS = {"positive": ["great", "good"], "negative": ["terrible"], "none": ["25"]}
ROWS = [("a good film", "positive"), ("a bad one, all in all", "negative"), ("great", "positive"), ("terrible", "none")]


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, llama: str) -> None:
    Prompt.manual("{message} It was [Y]", label_words=LABELS).save(tmp_path / "moods")
    Path("mail.csv").write_text("message;y\n" + "".join(f"{x};{y}\n" for x, y in ROWS), encoding="utf-8")


def test_labels_one_by_one_and_the_worst_errors(llama: str) -> None:
    args = ("eval", "moods", "--data", "mail.csv", "--backbone", llama)
    found = json.loads(works(*args, "--json"))
    answers = works("predict", "moods", "--data", "mail.csv", "--backbone", llama).splitlines()
    pairs = list(zip([y for _, y in ROWS], answers, strict=True))
    assert list(found["labels"]) == list(LABELS)
    assert found["confusion"] == [[pairs.count((own, other)) for other in LABELS] for own in LABELS]
    assert found["labels"]["positive"]["n"] == 2
    assert found["labels"]["positive"]["recall"] == pairs.count(("positive", "positive")) / 2
    wrong = [at for at, (target, answer) in enumerate(pairs) if target != answer]
    assert sorted(one["place"] for one in found["errors"]) == [f"mail.csv, line {at + 2}" for at in wrong]
    assert {"record", "target", "prediction", "hit", "probabilities"} <= set(found["errors"][0])
    assert len(json.loads(works(*args, "--json", "--errors", "1"))["errors"]) == 1
    printed = works(*args)
    for text in ("precision", "confusion: a row for each target", f"all {len(wrong)} errors, the surest first"):
        assert text in printed
    assert "errors" not in works(*args, "--errors", "0")


def test_the_answers_in_a_file(llama: str) -> None:
    args = ("eval", "moods", "--data", "mail.csv", "--backbone", llama)
    works(*args, "--out", "scored.jsonl")
    rows = [json.loads(line) for line in Path("scored.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["record"] for row in rows] == [{"message": x, "y": y} for x, y in ROWS]
    for row in rows:
        assert list(row)[:4] == ["record", "target", "prediction", "hit"]
        assert row["hit"] == (row["target"] == row["prediction"])
        assert max(row["probabilities"], key=row["probabilities"].get) == row["prediction"]
    fails(*args, "--out", "scored.jsonl", says=["scored.jsonl exists; name another file"])
    fails(*args, "--out", "mail.csv", "--overwrite", says=["mail.csv is the data itself"])
    fails(*args, "--overwrite", says=["--overwrite is for the file of the answers"])
    works(*args, "--out", "scored.csv")
    table = list(csv.DictReader(io.StringIO(Path("scored.csv").read_text(encoding="utf-8"))))
    assert list(table[0]) == ["message", "y", "prediction", "probability", "hit"]
    assert [row["prediction"] for row in table] == [row["prediction"] for row in rows]
    assert [json.loads(row["hit"]) for row in table] == [row["hit"] for row in rows]


def test_written_answers_and_candidates_in_a_file(llama: str) -> None:
    args = ("eval", "manual:{message} It was [Y]", "--data", "mail.csv", "--backbone", llama)
    plain = json.loads(works(*args, "--json"))
    assert not {"labels", "confusion", "errors"} & set(plain)
    works(*args, "--out", "written.jsonl")
    rows = [json.loads(line) for line in Path("written.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["target"] for row in rows] == [y for _, y in ROWS]
    assert "log-prob" in works(*args, "--errors", "2")
    Path("some.txt").write_text("positive\nnegative\n", encoding="utf-8")
    works(*args, "--candidates", "some.txt", "--out", "ranked.jsonl")
    ranked = [json.loads(line) for line in Path("ranked.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["prediction"] for row in ranked} <= {"positive", "negative"}
    assert ranked[3]["rank"] == 0


def test_a_column_that_is_called_otherwise_is_named_with_its_line(llama: str) -> None:
    Path("other.csv").write_text("msg;y\na;positive\n", encoding="utf-8")
    done = call("eval", "moods", "--data", "other.csv", "--backbone", llama)
    assert done.code == 2
    assert "other.csv, line 2: no text in the field 'message'; its fields: msg, y" in done.err
    assert "--field message=msg" in done.err
