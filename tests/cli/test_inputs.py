"""Reading what options name: records, tasks, templates, prompts and candidates."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ptuning.backbone.sources import LoadOptions
from ptuning.cli import inputs
from ptuning.cli.options import AskedBackbone
from ptuning.data.relations import read_relations
from ptuning.data.task_files import TaskFile, find_split
from ptuning.errors import BackboneError, ConfigError, FileError, PTuningError, RecordError
from ptuning.prompt.asked import ToAnswer
from ptuning.prompt.backbone_id import BackboneId
from ptuning.prompt.prompt import Prompt
from ptuning.records import require_fields
from ptuning.report.results_file import read_results
from ptuning.template.language import Template
from ptuning.training.fleet_file import read_fleet


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_records_and_their_fields() -> None:
    Path("facts.csv").write_text("name,answer\nKenya,Nairobi\n", encoding="utf-8")
    assert inputs.records_of("facts.csv", ["x=name", "y=answer"]) == [{"x": "Kenya", "y": "Nairobi"}]
    with pytest.raises(ConfigError, match="'x' is not --field NEW=NAME"):
        inputs.records_of("facts.csv", ["x"])


def test_a_manual_prompt_is_made_on_the_spot() -> None:
    assert str(inputs.prompt_of("manual: [X] is [Y]").template) == "[X] is [Y]"
    with pytest.raises(FileError, match="missing"):
        inputs.prompt_of("missing")


def test_a_prompt_whose_backbone_has_moved_says_how_to_name_it() -> None:
    """A prompt records where its backbone lay, such as the path of a GGUF file, which another folder does not have."""
    own = BackboneId("../moved.gguf", None, "0-0")
    prompt = Prompt(Template.parse("[X] is [Y]"), backbone=own)
    unasked, asked = (AskedBackbone(name, LoadOptions()) for name in (None, "./nowhere"))
    with pytest.raises(BackboneError, match=r"'\.\./moved\.gguf'.*learned on this backbone.* say where: --backbone"):
        inputs.load(unasked, prompt=prompt)
    with pytest.raises(BackboneError, match=r"'\./nowhere'") as found:
        inputs.load(asked, prompt=prompt)
    assert "learned on" not in str(found.value)
    there = AskedBackbone(None, LoadOptions(device="cuba"))  # an error of something else says nothing of it
    with pytest.raises(BackboneError, match="device 'cuba' cannot be used") as found:
        inputs.load(there, prompt=prompt)
    assert "learned on" not in str(found.value)


def given(
    monkeypatch: pytest.MonkeyPatch,
    typed: bytes,
    prompt: Prompt,
    field: list[str] | None = None,
    *,
    text: str | None = None,
    data: str | None = None,
) -> ToAnswer:
    """Read what to answer from the standard input, which ``text`` or ``data`` names."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
    return inputs.data_to_answer(prompt, text, data, field)


def test_data_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = Prompt.manual("[X] is [Y]")
    assert inputs.data_to_answer(prompt, "Kenya", None, None).questions.records == [{"x": "Kenya"}]
    for text, data in (("-", None), (None, "-")):
        found = given(monkeypatch, b'{"name": "Peru"}\n', prompt, ["x=name"], text=text, data=data)
        assert found.questions.records == [{"x": "Peru"}]
        with pytest.raises(RecordError, match="the standard input holds no records: lines of text, CSV or JSONL"):
            given(monkeypatch, b"\n \n", prompt, text=text, data=data)
    for text, data in ((None, None), ("Kenya", "facts.csv"), ("-", "-")):
        with pytest.raises(ConfigError, match="give either a TEXT or --data"):
            inputs.data_to_answer(prompt, text, data, None)
    with pytest.raises(ConfigError, match="a TEXT fills one field, and the template reads x, z; use --data"):
        inputs.data_to_answer(Prompt.manual("[X] in {z} is [Y]"), "Kenya", None, None)


@pytest.mark.parametrize(
    ("data", "texts", "rows"),
    [
        (b"a\nb\n", ["a", "b"], [{"message": "a"}, {"message": "b"}]),
        (b"a, b\r\n\n[c] d", ["a, b", "", "[c] d"], [{"message": one} for one in ("a, b", "", "[c] d")]),
        (b"message\na\n", ["a"], [{"message": "a"}]),
        (b"id;message\n1;a, b\n", ["a, b"], [{"id": "1", "message": "a, b"}]),
        (b'message\tid\n"a\t1\n', ['"a'], [{"message": '"a', "id": "1"}]),
        (b'{"id": 1, "message": "a"}\n', ["a"], [{"id": 1, "message": "a"}]),
        (b'[{"message": "a"}]', ["a"], [{"message": "a"}]),
    ],
)
def test_the_input_is_recognised_by_its_content(
    monkeypatch: pytest.MonkeyPatch, data: bytes, texts: list[str], rows: list[dict[str, object]]
) -> None:
    """Lines of text, CSV with commas, semicolons or tabs, JSONL, a JSON array; also in a file with any ending."""
    prompt = Prompt.manual("{message} is [Y]")
    Path("mail.dat").write_bytes(data)
    for found in (given(monkeypatch, data, prompt, text="-"), inputs.data_to_answer(prompt, None, "mail.dat", None)):
        assert [one.record["message"] for one in found.questions] == texts
        assert [row for _, row in found.rows] == rows


def test_lines_of_a_text_file_are_texts_whatever_they_look_like() -> None:
    Path("mail.txt").write_text('{"message": "a"}\nmessage\n', encoding="utf-8")
    found = inputs.data_to_answer(Prompt.manual("{message} is [Y]"), None, "mail.txt", None)
    assert [one.record["message"] for one in found.questions] == ['{"message": "a"}', "message"]
    with pytest.raises(RecordError, match=r"mail\.txt holds lines of text, which fill one field, and the fields a, b"):
        inputs.data_to_answer(Prompt.manual("{a} {b} [Y]"), None, "mail.txt", None)


def test_a_field_that_is_missing_is_named_with_its_line_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to say "no field 'message' in in memory, record 1, answer 1; its fields: msg"."""
    prompt = Prompt.manual("{message} is [Y]")
    for data, says in (
        (b'{"message": "a"}\n{"msg": "x"}\n', "standard input, line 2: .*its fields: msg.*add --field message=msg"),
        (
            b'{"msg": "x", "y": "b"}\n',
            "standard input, line 1: no text in the field 'message'.*add --field message=msg",
        ),
        (b"msg,team\nhello,billing\n", "standard input, line 2: no text in the field 'message'; .*--field message=msg"),
        (b"a,b\nhello,billing\n", "standard input, line 2: no text in the field 'message'; .*--field message=NAME"),
        (b'{"message": null}\n', "standard input, line 1: no text in the field 'message'; its fields: none"),
    ):
        with pytest.raises(RecordError, match=says):
            given(monkeypatch, data, prompt, text="-")
    found = given(monkeypatch, b"msg,team\nhello,billing\n", prompt, ["message=msg"], text="-")
    assert found.questions.records == [{"message": "hello", "team": "billing"}]
    Path("mail.csv").write_text("msg;team\na;b\n", encoding="utf-8")
    with pytest.raises(RecordError, match=r"mail\.csv, line 2: no text in the field 'message'.*message=msg"):
        require_fields(inputs.records_of("mail.csv", None), ["message"])


def test_empty_texts_are_known_with_their_lines() -> None:
    Path("mail.csv").write_text("message,y\na,b\n ,b\n\n,b\n", encoding="utf-8")
    found = inputs.data_to_answer(Prompt.manual("{message} is [Y]"), None, "mail.csv", None)
    assert found.empty_fields(["message"]) == [("mail.csv, line 3", "message"), ("mail.csv, line 5", "message")]
    with pytest.raises(ConfigError, match="the TEXT is empty"):
        inputs.data_to_answer(Prompt.manual("{message} is [Y]"), " ", None, None)


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
    found = inputs.task_of("moods.toml")
    assert found is not None
    return found


def test_data_of_a_task_is_a_file_a_folder_or_a_part_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert inputs.task_of(None) is None
    task = write_task()
    for source in ("d", "d:val", "d/val.jsonl"):
        (row,) = inputs.data_of(source, None, task, part="val")
        assert row.record == {"text": "c", "y": "bad"}  # type: ignore[union-attr]
    assert inputs.dev_part("d", None) is inputs.dev_part("d/val.jsonl", task) is inputs.dev_part("d", task) is None
    assert "d has no development part; a share of the training part is set aside" in capsys.readouterr().err
    with pytest.raises(FileError, match=r"no 'test' part of the task moods in d"):
        inputs.data_of("d:test", None, task, part="val")
    with pytest.raises(FileError, match=r"no such data: e:val.*With the task moods, data is a file, a folder"):
        inputs.data_of("e:val", None, task, part="val")
    with pytest.raises(ConfigError, match="--field goes without a task"):
        inputs.data_of("d", ["x=text"], task, part="val")


def test_prompts_of_a_task() -> None:
    task = write_task()
    for source, template in (("manual:", 0), ("manual:2", 1), ("manual:{text} It was [Y].", 0)):
        found = inputs.prompt_of(source, task)
        assert (found.template, found.label_words, found.task) == (task.manual[template], task.label_words, task)
    with pytest.raises(ConfigError, match="the task moods has the patterns 1 to 2, not 3"):
        inputs.prompt_of("manual:3", task)
    inputs.prompt_of("manual:2", task).save("p")
    assert inputs.prompt_of("p", task).task == task
    other = inputs.task_of("RTE")
    with pytest.raises(ConfigError, match="the prompt was made for the task moods, not for RTE; leave --task out"):
        inputs.prompt_of("p", other)


def test_rows_to_answer_are_read_by_the_prompts_task(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = inputs.prompt_of("manual:", write_task())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "z", "label": "unheard of"}\n')))
    for source in ("-", "d/val.jsonl", "d:val"):
        (row,) = inputs.data_to_answer(prompt, None, source, None).questions
        assert list(row.record) == ["text"]
    Path("mail.txt").write_text("one\ntwo\n", encoding="utf-8")
    found = inputs.data_to_answer(prompt, None, "mail.txt", None).questions
    assert found.records == [{"text": "one"}, {"text": "two"}]


def test_candidates() -> None:
    Path("words.txt").write_text("\ufeffLima\n\nParis \nLima\n", encoding="utf-8")
    Path("facts.csv").write_text("x,answer\na,no\nb,yes\nc,no\n", encoding="utf-8")
    Path("empty.txt").write_text("\n", encoding="utf-8")
    assert inputs.read_candidates("words.txt", "manual:[X] [Y]", None, None) == ["Lima", "Paris"]
    assert inputs.read_candidates("facts.csv", "manual:[X] [Y]", None, ["y=answer", "z=missing"]) == ["no", "yes"]
    known = {row["y"] for row in inputs.records_of("capitals:train", None)}
    assert set(inputs.read_candidates("train", "manual:[X] [Y]", "capitals:test", None)) == known
    with pytest.raises(FileError, match=r"empty\.txt holds no words"):
        inputs.read_candidates("empty.txt", "manual:[X] [Y]", None, None)
    with pytest.raises(ConfigError, match=r"--candidates train needs the prompt's run\.json, or shipped facts"):
        inputs.read_candidates("train", "manual:[X] [Y]", "facts.csv", None)


def test_a_closed_input_holds_no_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(RecordError, match="the standard input holds no records"):
        inputs.data_to_answer(Prompt.manual("[X] is [Y]"), None, "-", None)


@pytest.mark.parametrize(
    "record", ["{}", '{"data": 1}', '{"data": {"train": []}}', '{"data": {"train": {"name": 7}}}', '{"data": null}']
)
def test_a_record_that_is_no_trainings_has_no_candidates(record: str) -> None:
    Path("run.json").write_text(record, encoding="utf-8")
    with pytest.raises(FileError, match=r"run\.json is not the record of a training: .*name a file instead"):
        inputs.read_candidates("train", ".", None, None)


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "/".join(["a" * 200] * 30)])
def test_names_that_cannot_be_paths_are_names_of_nothing(name: str) -> None:
    """Of files and folders: each reader says that there is no such thing."""
    task = inputs.task_of("RTE")
    assert task is not None
    calls: list[Callable[[], object]] = [
        lambda: inputs.task_of(name),
        lambda: inputs.prompt_of(name),
        lambda: inputs.data_of(name, None, task, part="train"),
        lambda: inputs.data_of(f"{name}:val", None, task, part="train"),
        lambda: inputs.records_of(f"{name}.csv", None),
        lambda: inputs.read_candidates("train", name, None, None),
        lambda: find_split(Path(name), task, "dev"),
        lambda: find_split(Path(), task, name),
        lambda: read_fleet(Path(name)),
        lambda: read_results(name),
        lambda: task.read(name),
        lambda: read_relations(name),
    ]
    for read in calls:
        with pytest.raises(PTuningError):
            read()


def test_a_manual_prompt_of_a_number_that_is_no_pattern() -> None:
    with pytest.raises(PTuningError):
        inputs.prompt_of(f"manual:{'9' * 5000}", inputs.task_of("RTE"))
