"""The task commands, and training, scoring and answering with --task, from files to answers on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ptuning.cli.commands import tasks
from ptuning.data.checks import Report
from ptuning.data.task_files import load_task, shipped_names, shipped_tasks
from ptuning.prompt.prompt import Prompt
from tests.cli.commands.test_compare import printed as printed
from tests.cli.test_app import QUICK, call, fails, works

TASK = """
name = "moods"
version = "3"
[values.label]
0 = "bad"
1 = "good"
[labels]
good = ["great"]
bad = ["terrible"]
[[patterns]]
manual = "{text} It was [Y]."
[[patterns]]
manual = "Text: {text} All in all, [Y]."
"""
CHOOSE = """
name = "choose"
version = "1"
[choices]
from = ["a", "b"]
[[patterns]]
manual = "[X] is [Y]"
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with two tasks and their data."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("moods", TASK), ("choose", CHOOSE)):
        Path(f"{name}.toml").write_text(text, encoding="utf-8")
    rows: list[dict[str, object]] = [{"text": f"a film of {at}", "label": at % 2} for at in range(8)]
    pairs: list[dict[str, object]] = [
        {"x": f"city {at}", "a": "yes", "b": "a good film", "label": at % 2} for at in range(8)
    ]
    for folder, data in (("d/moods", rows), ("d/choose", pairs)):
        Path(folder).mkdir(parents=True)
        for part in ("train", "dev32", "val"):
            write_lines(Path(folder) / f"{part}.jsonl", data)
        write_lines(Path(folder) / "test.jsonl", [{k: v for k, v in row.items() if k != "label"} for row in data])


@pytest.fixture(scope="module")
def llama(model_folder: Callable[[str], Path]) -> str:
    return str(model_folder("llama"))


def write_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_list_and_show() -> None:
    listed = works("task", "list")
    assert all(name in listed for name in shipped_names())
    assert '[labels]\nentailment = ["yes"]' in works("task", "show", "RTE")
    fails("task", "show", "RTEE", says=["no shipped task 'RTEE'", "Did you mean 'RTE'"])


def test_every_task_command_has_an_example() -> None:
    for name in ("list", "show", "check"):
        assert f"Example: ptuning task {name}" in works("task", name, "--help")


def test_check_reads_file_words_and_data(llama: str) -> None:
    out = works("task", "check", "moods.toml", "--data", "d", "--backbone", llama)
    assert "label words and their tokens: good: 'great'" in out
    assert "train: 8 rows of d/moods/train.jsonl; good 4, bad 4" in out
    assert "test: 8 rows of d/moods/test.jsonl" in out
    assert "fine with the tokenizer of" in out
    assert "data: 8 rows" in works("task", "check", "moods.toml", "--data", "d/moods/val.jsonl", "--backbone", llama)
    fails("task", "check", "moods.toml", "--data", "nowhere", says=["nowhere"])


def test_check_ends_with_2_where_something_must_be_mended(model_folder: Callable[[str], Path]) -> None:
    Path("bad.toml").write_text(TASK.replace('"terrible"', '"漢"'), encoding="utf-8")
    done = call("task", "check", "bad.toml", "--backbone", model_folder("bert"))
    assert done.code == 2
    assert "error: bad.toml: pattern 1, manual: the word '漢' of label 'bad' is unknown" in done.err
    assert "pattern 2, learned" in done.err
    Path("bad.toml").write_text(TASK.replace("[labels]", "[label]"), encoding="utf-8")
    fails("task", "check", "bad.toml", says=["bad.toml: "])


def test_train_eval_and_predict_with_choices(llama: str) -> None:
    works("train", "--task", "choose.toml", "--data", "d/choose/train.jsonl", "--dev", "d:val", "--backbone", llama,
          "--out", "run", "--set", "calibrate=true", *QUICK)  # fmt: skip
    prompt = Prompt.load("run")
    assert (prompt.answer_space.has_choices, prompt.calibrate) == (True, True)
    assert '"accuracy"' in works("eval", "run", "--data", "d:val", "--json", "--no-calibrate", "--normalise", "mean")
    found = lines_of(works("predict", "run", "--data", "d:test", "--json", "--num-answers", 2))
    assert [sorted(one["text"] for one in row["candidates"]) for row in found] == [["a good film", "yes"]] * 8
    given = b'{"x": "Kenya", "a": "Nairobi", "b": "no"}\n'
    assert works("predict", "run", "--data", "-", stdin=given).strip() in ("Nairobi", "no")
    fails("predict", "run", "Kenya", says=["a TEXT is not enough for the task choose", "use --data"])
    fails(
        "eval", "run", "--data", "d:val", "--candidates", "train", says=["brings its own choices; leave the candidates"]
    )


def test_a_text_is_read_as_a_file_s_is(llama: str) -> None:
    """Repairs and values of its field count for it, too."""
    text = TASK.replace("[labels]", '[fields]\ntext = "text|lower_first|no_full_stop"\n[labels]', 1)
    Path("moods.toml").write_text(text, encoding="utf-8")
    write_lines(Path("one.jsonl"), [{"text": "The film was good."}])
    args = ("manual:", "--task", "moods.toml", "--backbone", llama, "--json")
    (alone,) = lines_of(works("predict", *args, "The film was good."))
    (of_file,) = lines_of(works("predict", *args, "--data", "one.jsonl"))
    assert alone == of_file
    assert alone["record"] == {"text": "the film was good"}
    Path("moods.toml").write_text(
        text.replace("[values.label]", '[values.text]\na = "b"\n[values.label]'), encoding="utf-8"
    )
    fails("predict", *args, "nonsense", says=["the field 'text' is 'nonsense'", "have a"])


def test_a_run_is_not_resumed_with_another_task_file(llama: str) -> None:
    args = ("--task", "moods.toml", "--data", "d", "--backbone", llama, "--out", "run", *QUICK)
    works("train", *args)
    works("train", *args, "--resume")
    Path("moods.toml").write_text(TASK.replace('0 = "bad"\n1 = "good"', '0 = "good"\n1 = "bad"'), encoding="utf-8")
    fails("train", *args, "--resume", says=["cannot resume from run: task file (sha256) was"])


def test_a_row_that_does_not_fit_is_named(model_folder: Callable[[str], Path]) -> None:
    write_lines(Path("d/moods/val.jsonl"), [{"text": "a", "label": 0}, {"text": "a film " * 400, "label": 1}])
    Path("moods.toml").write_text(TASK.replace("{text}", "{text!}"), encoding="utf-8")
    done = call("task", "check", "moods.toml", "--data", "d", "--backbone", model_folder("bert"))
    assert done.code == 2
    assert "d/moods/val.jsonl, row 2" in done.err


@pytest.mark.parametrize("name", ["moods", "choose"])
def test_manual_prompts_of_a_task(name: str, llama: str) -> None:
    for prompt in ("manual:", "manual:1", f"manual:{'{text} [Y]' if name == 'moods' else '[X]: [Y]'}"):
        out = works("eval", prompt, "--task", f"{name}.toml", "--data", "d", "--backbone", llama, "--json")
        assert set(json.loads(out)["scores"]) == {"accuracy"}


def test_the_list_names_each_task_with_its_kind_of_answers(printed: Callable[[], tuple[str, str]]) -> None:
    tasks.list_tasks()
    out, _ = printed()
    for task in shipped_tasks():
        assert any(line.startswith(task.name) for line in out.splitlines())
    assert max(len(line) for line in out.splitlines()) <= 80
    assert [load_task(name).answer_space.described for name in ("COPA", "topic")] == ["own choices", "6 labels"]


def test_a_task_is_shown_with_its_file(printed: Callable[[], tuple[str, str]]) -> None:
    task = load_task("RTE")
    tasks.show_task("RTE")
    out, _ = printed()
    assert task.text.strip() in out
    assert f"pattern 2  manual   {task.manual[1]}" in out
    assert f"           learned  {task.learned[1]}" in out


def test_facts_are_results_and_doubts_are_warnings(printed: Callable[[], tuple[str, str]]) -> None:
    tasks.show_report(load_task("RTE"), Report(("train: 3 rows",), ("odd",), ("bad",)))
    out, err = printed()
    assert "RTE, version 1: 2 labels, 2 patterns" in out
    assert "  train: 3 rows" in out
    assert err.strip() == "warning: odd"


def test_warnings_of_a_check_name_lines_and_are_errors_with_strict(llama: str) -> None:
    Path("moods.toml").write_text(
        'name = "moods"\nversion = "1"\n[labels]\ngood = ["great"]\nbad = ["terrible"]\n'
        '[[patterns]]\nmanual = "{text} It was [Y]."\n',
        encoding="utf-8",
    )
    Path("moods.csv").write_text("text,label\na film,good\n,bad\nanother,bad\n", encoding="utf-8")
    args = ("task", "check", "moods.toml", "--data", "moods.csv", "--backbone", llama)
    done = call(*args)
    assert done.code == 0, done.err
    assert "warning: data: the field 'text' is empty in 1 row: moods.csv, line 3" in done.err
    done = call(*args, "--strict")
    assert done.code == 2
    assert "error: moods.toml: data: the field 'text' is empty in 1 row: moods.csv, line 3" in done.err
