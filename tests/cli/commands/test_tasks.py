"""`ptuning task list`, `show` and `check`; tests/cli/commands/test_train.py trains with tasks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ptuning.data.task_files import load_task, shipped_tasks
from tests.cli.calls import call, fails, lines_of, works, write_lines

TASK = """
name = "moods"
version = "3"
[labels]
good = ["great"]
bad = ["terrible"]
[[patterns]]
manual = "{text} It was [Y]."
[[patterns]]
manual = "Text: {text} All in all, [Y]."
"""


@pytest.fixture(autouse=True)
def _files(tmp_path: Path) -> None:
    """A task and its data, in the folder where every test works."""
    Path("moods.toml").write_text(TASK, encoding="utf-8")
    rows = [{"text": f"a film of {at}", "label": ("good", "bad")[at % 2]} for at in range(8)]
    for part in ("train", "val"):
        write_lines(f"d/moods/{part}.jsonl", rows)
    write_lines("d/moods/test.jsonl", [{"text": row["text"]} for row in rows])


def test_list_and_show() -> None:
    listed = works("task", "list")
    for task in shipped_tasks():
        assert any(line.startswith(task.name) for line in listed.splitlines())
    assert max(map(len, listed.splitlines())) <= 80
    task, shown = load_task("RTE"), works("task", "show", "RTE")
    for text in (task.text.strip(), f"pattern 2  manual   {task.manual[1]}", f"learned  {task.learned[1]}"):
        assert text in shown
    fails("task", "show", "RTEE", says=["'RTEE'", "'RTE'"])


def test_check_reads_file_words_and_data(llama: str) -> None:
    args = ("task", "check", "moods.toml", "--backbone", llama, "--data")
    out = works(*args, "d")
    for text in ("2 patterns", "good: 'great'", "8 rows of d/moods/train.jsonl; good 4, bad 4", "d/moods/test.jsonl"):
        assert text in out
    assert "data: 8 rows" in works(*args, "d/moods/val.jsonl")
    fails(*args, "nowhere", says=["nowhere"])


def test_check_ends_with_2_where_something_must_be_mended(model_folder: Callable[[str], Path]) -> None:
    Path("bad.toml").write_text(TASK.replace('"terrible"', '"漢"'), encoding="utf-8")
    done = call("task", "check", "bad.toml", "--backbone", model_folder("bert"))
    assert done.code == 2
    assert "error: bad.toml: pattern 1" in done.err
    assert "'漢'" in done.err
    Path("bad.toml").write_text(TASK.replace("[labels]", "[label]"), encoding="utf-8")
    fails("task", "check", "bad.toml", says=["bad.toml: "])


def test_warnings_of_a_check_name_lines_and_are_errors_with_strict(llama: str) -> None:
    Path("moods.csv").write_text("text,label\na film,good\n,bad\nanother,bad\n", encoding="utf-8")
    args = ("task", "check", "moods.toml", "--data", "moods.csv", "--backbone", llama)
    for more, code, level in (((), 0, "warning: "), (("--strict",), 2, "error: ")):
        done = call(*args, *more)
        assert done.code == code, done.err
        assert level in done.err
        assert "moods.csv, line 3" in done.err


def test_a_text_is_read_as_a_row_of_a_file(llama: str) -> None:
    """Repairs and values of its field count for it, too."""
    text = TASK.replace("[labels]", '[fields]\ntext = "text|lower_first|no_full_stop"\n[labels]', 1)
    Path("moods.toml").write_text(text, encoding="utf-8")
    write_lines("one.jsonl", [{"text": "The film was good."}])
    args = ("predict", "manual:", "--task", "moods.toml", "--backbone", llama, "--json")
    (typed,) = lines_of(works(*args, "The film was good."))
    (row,) = lines_of(works(*args, "--data", "one.jsonl"))
    assert typed == row
    assert typed["record"] == {"text": "the film was good"}
