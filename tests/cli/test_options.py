"""What the commands share: settings, records and candidates from options, and stopping at a signal."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from ptuning.cli import options
from ptuning.config import TrainConfig
from ptuning.data.task_files import TaskFile
from ptuning.errors import ConfigError, FileError, RecordError
from ptuning.progress import Interrupted
from ptuning.prompt.prompt import Prompt


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ptuning", "compare", "--manual", "[X] is [Y]", "--out", "out"])


def test_settings_of_options_and_of_set() -> None:
    assert options.config_of(None) == TrainConfig()
    found = options.config_of(["patience=2", "lr=0.01", "learn-to-stop=false", "start=vocabulary"], epochs=3, seed=7)
    assert found == TrainConfig(patience=2, lr=0.01, learn_to_stop=False, start="vocabulary", epochs=3, seed=7)
    assert options.config_of(["epochs=3"], epochs=3) == options.config_of(["epochs=3"], epochs=TrainConfig().epochs)


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        (["epochs=4"], "'epochs' is given twice: 3 by its option, and 4 by --set"),
        (["patience"], "'patience' is not --set NAME=VALUE, such as patience=2"),
        (["patiance=2"], r"unknown setting 'patiance'\. Did you mean 'patience'\?"),
        (["patience=two"], "setting 'patience' is 'two'; it must be a whole number"),
    ],
)
def test_settings_that_are_none(pairs: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        options.config_of(pairs, epochs=3)


def test_a_command_without_any_argument_has_no_values_to_fill_in() -> None:
    assert options.with_optional_values([]) == []


def test_how_candidates_are_scored() -> None:
    assert options.normalise_of("mean", closed=True) == "mean"
    assert options.normalise_of("sum", closed=False) == "sum"
    with pytest.raises(ConfigError, match="--normalise is sum or mean, not 'max'"):
        options.normalise_of("max", closed=True)
    with pytest.raises(ConfigError, match="--normalise goes with a closed set of answers"):
        options.normalise_of("mean", closed=False)


def test_the_command_line_can_be_given_again() -> None:
    assert options.command_line() == "ptuning compare --manual '[X] is [Y]' --out out"


def test_records_and_their_fields() -> None:
    Path("facts.csv").write_text("name,answer\nKenya,Nairobi\n", encoding="utf-8")
    assert options.records_of("facts.csv", ["x=name", "y=answer"]) == [{"x": "Kenya", "y": "Nairobi"}]
    with pytest.raises(ConfigError, match="'x' is not --field NEW=NAME"):
        options.records_of("facts.csv", ["x"])


def test_a_manual_prompt_is_made_on_the_spot() -> None:
    assert str(options.prompt_of("manual: [X] is [Y]").template) == "[X] is [Y]"
    with pytest.raises(FileError, match="missing"):
        options.prompt_of("missing")


def test_data_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = Prompt.manual("[X] is [Y]")
    assert options.data_to_answer(prompt, "Kenya", None, None) == [{"x": "Kenya"}]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"name": "Peru"}\n')))
    assert options.data_to_answer(prompt, None, "-", ["x=name"]) == [{"x": "Peru"}]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(RecordError, match="the standard input holds no records"):
        options.data_to_answer(prompt, None, "-", None)
    for text, data in ((None, None), ("Kenya", "facts.csv")):
        with pytest.raises(ConfigError, match="give either a TEXT or --data"):
            options.data_to_answer(prompt, text, data, None)
    with pytest.raises(ConfigError, match="a TEXT fills one field, and the template reads x, z; use --data"):
        options.data_to_answer(Prompt.manual("[X] in {z} is [Y]"), "Kenya", None, None)


TASK = """
name = "moods"
version = "2"
[labels]
good = ["great"]
bad = ["poor"]
[[patterns]]
manual = "{text} It was [Y]."
[[patterns]]
manual = "{text} All in all: [Y]."
"""


def write_task() -> TaskFile:
    """Write a task file, and a folder with a training and a validation part."""
    Path("moods.toml").write_text(TASK, encoding="utf-8")
    Path("d").mkdir()
    Path("d/train.jsonl").write_text(
        '{"text": "a", "label": "good"}\n{"text": "b", "label": "bad"}\n', encoding="utf-8"
    )
    Path("d/val.jsonl").write_text('{"text": "c", "label": "bad"}\n', encoding="utf-8")
    found = options.task_of("moods.toml")
    assert found is not None
    return found


def test_data_of_a_task_is_a_file_a_folder_or_a_part_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert options.task_of(None) is None
    task = write_task()
    for source in ("d", "d:val", "d/val.jsonl"):
        (row,) = options.data_of(source, None, task, part="val")
        assert row.record == {"text": "c", "y": "bad"}  # type: ignore[union-attr]
    assert options.dev_part("d", None) is options.dev_part("d/val.jsonl", task) is options.dev_part("d", task) is None
    assert "d has no development part; a share of the training part is set aside" in capsys.readouterr().err
    with pytest.raises(FileError, match=r"no 'test' part of the task moods in d"):
        options.data_of("d:test", None, task, part="val")
    with pytest.raises(FileError, match=r"no such data: e:val.*With the task moods, data is a file, a folder"):
        options.data_of("e:val", None, task, part="val")
    with pytest.raises(ConfigError, match="--field goes without a task"):
        options.data_of("d", ["x=text"], task, part="val")


def test_prompts_of_a_task() -> None:
    task = write_task()
    for source, template in (("manual:", 0), ("manual:2", 1), ("manual:{text} It was [Y].", 0)):
        found = options.prompt_of(source, task)
        assert (found.template, found.label_words, found.task) == (task.manual[template], task.label_words, task)
    with pytest.raises(ConfigError, match="the task moods has the patterns 1 to 2, not 3"):
        options.prompt_of("manual:3", task)
    options.prompt_of("manual:2", task).save("p")
    assert options.prompt_of("p", task).task == task
    other = options.task_of("RTE")
    with pytest.raises(ConfigError, match="the prompt was made for the task moods, not for RTE; leave --task out"):
        options.prompt_of("p", other)


def test_rows_to_answer_are_read_by_the_prompts_task(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = options.prompt_of("manual:", write_task())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "z", "label": "unheard of"}\n')))
    for source in ("-", "d/val.jsonl"):
        (row,) = options.data_to_answer(prompt, None, source, None)
        assert list(row.record) == ["text"]  # type: ignore[union-attr]


def test_only_closed_answers_are_calibrated() -> None:
    prompt = options.prompt_of("manual:", write_task())
    options.check_calibrate(True, prompt, candidates=False)
    options.check_calibrate(None, Prompt.manual("[X] is [Y]"), candidates=True)
    for one, candidates in ((prompt, True), (Prompt.manual("[X] is [Y]"), False)):
        with pytest.raises(ConfigError, match="--calibrate is for label words and a task's choices"):
            options.check_calibrate(True, one, candidates=candidates)


def test_candidates() -> None:
    Path("words.txt").write_text("\ufeffLima\n\nParis \nLima\n", encoding="utf-8")
    Path("facts.csv").write_text("x,answer\na,no\nb,yes\nc,no\n", encoding="utf-8")
    Path("empty.txt").write_text("\n", encoding="utf-8")
    assert options.read_candidates("words.txt", "manual:[X] [Y]", None, None) == ["Lima", "Paris"]
    assert options.read_candidates("facts.csv", "manual:[X] [Y]", None, ["y=answer", "z=missing"]) == ["no", "yes"]
    known = {row["y"] for row in options.records_of("capitals:train", None)}
    assert set(options.read_candidates("train", "manual:[X] [Y]", "capitals:test", None)) == known
    with pytest.raises(FileError, match=r"empty\.txt holds no candidates"):
        options.read_candidates("empty.txt", "manual:[X] [Y]", None, None)
    with pytest.raises(ConfigError, match=r"--candidates train needs the prompt's run\.json, or shipped facts"):
        options.read_candidates("train", "manual:[X] [Y]", "facts.csv", None)


# Stopping


def stopped(
    body: Callable[[Callable[[], bool]], None], capsys: pytest.CaptureFixture[str], **more: str
) -> tuple[int, str]:
    """Run something that signals end, and return the exit code and what was said."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as ended, options.stoppable(Path("out"), **more) as (_, should_stop):
        body(should_stop)
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    return ended.value.exit_code, capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_asks_to_stop(number: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def body(should_stop: Callable[[], bool]) -> None:
        assert not should_stop()
        signal.raise_signal(number)
        assert should_stop()
        raise Interrupted("stopped after 1 of 4 cells")

    exit_code, said = stopped(body, capsys)
    assert exit_code == code
    assert said == (
        "stopping after this step; once more to stop at once\nstopped after 1 of 4 cells; nothing was written\n"
    )


@pytest.mark.parametrize(
    ("left", "again", "end"),
    [
        ("results.json", "", "compare --manual '[X] is [Y]' --out out\n"),
        ("checkpoint", "--resume", "compare --manual '[X] is [Y]' --out out --resume\n"),
        ("run.json", "--out", "compare --manual '[X] is [Y]' --out out\n"),  # what is there is not said twice
    ],
)
def test_what_is_left_and_how_to_go_on(left: str, again: str, end: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out", left).write_text("")

    def body(_: Callable[[], bool]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal stops at once")

    code, said = stopped(body, capsys, again=again)
    assert code == 130
    assert f"stopped at once; out/{left} is kept, go on with:\n" in said
    assert said.endswith(end)
