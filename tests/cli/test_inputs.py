"""Reading what options name: records, tasks, templates, prompts and candidates."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from ptuning.backbone.sources import LoadOptions
from ptuning.cli import inputs
from ptuning.cli.options import AskedBackbone
from ptuning.data.task_files import TaskFile
from ptuning.errors import BackboneError, ConfigError, FileError, PTuningError, RecordError
from ptuning.prompt.inputs import InferenceInputs
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import BackboneId
from ptuning.template.language import Template


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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
) -> InferenceInputs:
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


def test_a_manual_prompt_of_a_number_that_is_no_pattern() -> None:
    with pytest.raises(PTuningError):
        inputs.prompt_of(f"manual:{'9' * 5000}", inputs.task_of("RTE"))
