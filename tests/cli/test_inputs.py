"""Reading the data, tasks, prompts and candidates that options name."""

import io
import sys
from pathlib import Path

import pytest

from ptuning.backbone.sources import LoadOptions
from ptuning.cli import inputs
from ptuning.cli.options import BackboneChoice
from ptuning.errors import BackboneError, ConfigError, FileError, PTuningError, RecordError
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import BackboneId
from ptuning.template.language import Template
from tests.cli.calls import write_lines


@pytest.mark.parametrize(
    ("name", "device", "says"),
    [
        (None, "auto", r"'\.\./moved\.gguf'.*--backbone"),
        ("./nowhere", "auto", r"'\./nowhere'"),
        (None, "cuba", "cuba"),
    ],
)
def test_a_prompt_whose_backbone_has_moved_says_how_to_name_it(name: str | None, device: str, says: str) -> None:
    """A prompt records where its backbone was, such as the path of a GGUF file, which another folder does not have."""
    prompt = Prompt(Template.parse("[X] is [Y]"), backbone=BackboneId("../moved.gguf", None, "0-0"))
    with pytest.raises(BackboneError, match=says) as error:
        inputs.load(BackboneChoice(name, LoadOptions(device=device)), prompt=prompt)
    assert ("learned on it" in str(error.value)) == (name is None and device == "auto")


@pytest.mark.parametrize(
    ("data", "texts", "rows"),
    [
        (b"a\nb\n", ["a", "b"], [{"message": "a"}, {"message": "b"}]),
        (b"a, b\r\n\n[c] d", ["a, b", "", "[c] d"], [{"message": text} for text in ("a, b", "", "[c] d")]),
        (b"id;message\n1;a, b\n", ["a, b"], [{"id": "1", "message": "a, b"}]),
        (b'message\tid\n"a\t1\n', ['"a'], [{"message": '"a', "id": "1"}]),
        (b'{"id": 1, "message": "a"}\n', ["a"], [{"id": 1, "message": "a"}]),
        (b'[{"message": "a"}]', ["a"], [{"message": "a"}]),
    ],
)
def test_the_input_is_recognised_by_its_content(
    data: bytes, texts: list[str], rows: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of text, CSV with commas, semicolons or tabs, JSONL, a JSON array; also in a file with any ending."""
    prompt = Prompt.manual("{message} is [Y]")
    Path("mail.dat").write_bytes(data)
    for text, source in ((None, "mail.dat"), ("-", None), (None, "-")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        found = inputs.data_to_answer(prompt, text, source, None)
        assert [question.record["message"] for question in found.questions] == texts
        assert [row for _, row in found.rows] == rows
        assert [where[-6:] for where, _ in found.empty_fields(["message"])] == ["line 2"] * ("" in texts)


def test_data_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, two = Prompt.manual("[X] is [Y]"), Prompt.manual("[X] in {z} is [Y]")
    assert inputs.data_to_answer(prompt, "Kenya", None, None).questions.records == [{"x": "Kenya"}]
    Path("mail.txt").write_text('{"x": "a"}\nx\n', encoding="utf-8")  # lines, whatever they look like
    texts = inputs.data_to_answer(prompt, None, "mail.txt", None).questions.records
    assert texts == [{"x": '{"x": "a"}'}, {"x": "x"}]
    for chosen, text, data, error, says in (
        (prompt, None, None, ConfigError, "TEXT or --data"),
        (prompt, "Kenya", "facts.csv", ConfigError, "TEXT or --data"),
        (prompt, " ", None, ConfigError, "empty"),
        (two, "Kenya", None, ConfigError, "x, z"),
        (two, None, "mail.txt", RecordError, "x, z"),
        (prompt, "-", None, RecordError, "the standard input"),
    ):
        monkeypatch.setattr(sys, "stdin", None)  # as in "<&-"
        with pytest.raises(error, match=says):
            inputs.data_to_answer(chosen, text, data, None)


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


def test_prompts_and_data_of_a_task() -> None:
    Path("moods.toml").write_text(TASK, encoding="utf-8")
    write_lines("d/val.jsonl", [{"text": "c", "label": "unheard of"}])
    task = inputs.task_of("moods.toml")
    assert task is not None
    for source, template in (("manual:", 0), ("manual:2", 1), ("manual:{text} It was [Y].", 0)):
        prompt = inputs.prompt_of(source, task)
        assert (prompt.template, prompt.label_words, prompt.task) == (task.manual[template], task.label_words, task)
    for number, says in (("3", "moods"), ("9" * 5000, "9999")):
        with pytest.raises(PTuningError, match=says):
            inputs.prompt_of(f"manual:{number}", task)
    for data in ("d/val.jsonl", "d:val"):
        (row,) = inputs.data_to_answer(prompt, None, data, None).questions
        assert row.record == {"text": "c"}
    prompt.save("p")
    other = task.model_copy(update={"name": "other"})
    with pytest.raises(ConfigError, match=r"moods.*other.*--task"):
        inputs.prompt_of("p", other)
    with pytest.raises(FileError, match="missing"):
        inputs.prompt_of("missing")


@pytest.mark.parametrize("record", ["{}", '{"data": 1}', '{"data": {"train": {"name": 7}}}', '{"data": null}'])
def test_a_damaged_record_has_no_candidates(record: str) -> None:
    Path("run.json").write_text(record, encoding="utf-8")
    with pytest.raises(FileError, match=r"run\.json.*name a file of candidates"):
        inputs.read_candidates("train", ".", None, None)
    with pytest.raises(ConfigError, match=r"run\.json"):
        inputs.read_candidates("train", "elsewhere/prompt", None, None)
    assert "Port Vila" in (inputs.read_candidates("train", "manual:[X] [Y]", "capitals:test", None) or ())
