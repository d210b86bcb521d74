"""Conversations on the command line: data in known forms, `--chat`, and a prompt that answers as the assistant."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ptuning.cli import terminal
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Candidate, Prediction
from tests.chats import SHAPES
from tests.cli.test_app import QUICK, call, fails, works

QUESTION, ANSWER = "the movie?", "It was great"
TEMPLATE = "[INST] [P:the movie was good]\n\n[C] [/INST] [Y]</s>"
# Markup that the tiny model's tokenizer has tokens for; it takes no system text.
JINJA = SHAPES["mistral"].jinja


@pytest.fixture
def chatty(llama: str, tmp_path: Path) -> Path:
    """The tiny model with a chat template."""
    folder = shutil.copytree(llama, tmp_path / "chatty")
    (folder / "chat_template.jinja").write_text(JINJA, encoding="utf-8")
    return folder


def talk(*said: str, **more: object) -> dict[str, object]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(said)], **more}


def write(name: str, rows: Sequence[object]) -> Path:
    path = Path(name)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


TALKS = [talk(f"{QUESTION} {at}", ANSWER, "And in Kenya?", f"yes, {at}") for at in range(6)]
PAIRS = [{"prompt": f"{QUESTION} {at}", "response": ANSWER, "history": []} for at in range(6)]


def template_of(folder: str = "out") -> str:
    return str(json.loads(Path(f"{folder}/prompt/prompt.json").read_text(encoding="utf-8"))["template"])


def test_a_chat_is_learned_and_answers(chatty: Path) -> None:
    """Every command works with it as with any prompt; the file has the whole template."""
    data = write("talks.jsonl", TALKS)
    done = call("train", "--data", data, "--chat", "--backbone", chatty, *QUICK, "--out", "out")
    assert done.code == 0, done.err
    assert "talks.jsonl: the form openai (messages), 6 conversations, 12 answers\n" in done.err
    assert template_of() == "<s>[[INST][P:You are a helpful assistant.]\n\n[C][[/INST] [Y]</s>"
    record = json.loads(Path("out/run.json").read_text(encoding="utf-8"))
    assert record["data"]["train"]["rows"] + record["data"]["dev"]["rows"] == 12
    assert record["data"]["dev"]["rows"] % 2 == 0  # whole conversations
    for args in (["predict", "out", QUESTION], ["inspect", "out"], ["eval", "out", "--data", data, "--json"]):
        assert works(*args, "--backbone", chatty)
    rows = works("predict", "out", "--data", data, "--backbone", chatty, "--json").splitlines()
    assert len(rows) == 6  # what each conversation asks in the end
    asked = json.loads(json.loads(rows[0])["record"]["messages"])
    assert [turn["content"] for turn in asked] == [f"{QUESTION} 0", ANSWER, "And in Kenya?"]
    works("predict", "out", "--data", data, "--backbone", chatty, "--out", "answers.jsonl")
    written = [json.loads(line) for line in Path("answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(written) == 6
    works("predict", "out", "--data", data, "--backbone", chatty, "--out", "texts.jsonl")
    texts = [json.loads(line) for line in Path("texts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [text["target"] for text in texts] == [f"yes, {at}" for at in range(6)]


@pytest.mark.parametrize(
    ("rows", "learned", "says"),
    [
        (TALKS, "[C]", "the form openai (messages), 6 conversations, 12 answers"),
        ([{**PAIRS[0], "history": [["a", "b"]]}, *PAIRS[1:]], "[C]", "the form ChatGLM's chat (prompt, response), 6 c"),
        (PAIRS, "[P:Question:] {prompt}\n[P:Answer:] [Y]", "the form ChatGLM's chat (prompt, response), 6 records;"),
        (
            [{"content": f"name#Kenya*n#{at}", "summary": "yes"} for at in range(6)],
            "[P*3] {content}\n[P:Summary:] [Y]",
            "the form ChatGLM's texts (content, summary), 6 records; chat makes conversations of them",
        ),
        (
            [{"instruction": f"say {at}", "input": "it", "output": "yes"} for at in range(6)],
            "[P:### Instruction:]\n{instruction}\n\n[P:### Input:]\n{input}\n\n[P:### Response:]\n [Y]",
            "the form alpaca (instruction, output), 6 records",
        ),
    ],
    ids=["messages", "history", "prompt", "content", "alpaca"],
)
def test_the_form_of_the_data_is_a_default_template(
    rows: Sequence[object], learned: str, says: str, chatty: Path
) -> None:
    """And names of fields, nothing more; without a flag, and said in a line."""
    data = write("data.jsonl", rows)
    done = call("train", "--data", data, "--backbone", chatty, *QUICK, "--out", "out")
    assert done.code == 0, done.err
    assert f"data.jsonl: {says}" in done.err
    assert learned.replace("\n [Y]", "\n[Y]") in template_of()
    assert works("eval", "out", "--data", data, "--backbone", chatty, "--json")


def test_a_system_text_is_what_the_slots_start_at(chatty: Path) -> None:
    (chatty / "chat_template.jinja").write_text(SHAPES["llama-2"].jinja, encoding="utf-8")
    data = write("talks.jsonl", [{**row, "system": "the movie was good"} for row in TALKS])
    args = ("train", "--data", data, "--chat", "--backbone", chatty, *QUICK)
    works(*args, "--out", "out")
    assert "<<SYS>>\n[P:the movie was good]\n<</SYS>>" in template_of()
    works(*args, "--set", "system=be kind", "--out", "other")
    assert "<<SYS>>\n[P:be kind]\n<</SYS>>" in template_of("other")
    several = write("several.jsonl", [{**row, "system": f"be {at}"} for at, row in enumerate(TALKS)])
    asked = ("train", "--data", several, "--chat", "--backbone", chatty, "--out", "third")
    fails(*asked, says=["6 different system texts, as 'be 0' (several.jsonl, line 1)", "(system)"])
    works(*asked, *QUICK, "--set", "system=be kind")
    own = "<s>[P] {system} [C] [[/INST] [Y]</s>"  # a template of one's own may read them
    works("train", "--data", several, "--template", own, "--backbone", chatty, *QUICK, "--out", "fourth")


def test_what_cannot_be_learned_from(llama: str, chatty: Path) -> None:
    unknown = write("unknown.jsonl", [{"question": "a", "reply": "b"}])
    for more in ((), ("--chat",)):
        says = ["unknown.jsonl, line 1: no known form", "openai (messages)", "the keys found: question, reply"]
        fails("train", "--data", unknown, *more, "--backbone", chatty, "--out", "out", says=says)
    half = write("half.jsonl", [*TALKS, talk("a", "b", "c")])
    says = ["half.jsonl, line 7: the conversation ends with the user (messages[2].content)"]
    fails("train", "--data", half, "--chat", "--backbone", chatty, "--out", "out", says=says)
    data = write("talks.jsonl", TALKS)
    says = ["the model has no chat template"]
    fails("train", "--data", data, "--chat", "--backbone", llama, "--out", "out", says=says)


def test_a_conversation_that_is_too_long_is_said(chatty: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write("talks.jsonl", TALKS)
    works("train", "--data", data, "--chat", "--backbone", chatty, *QUICK, "--out", "out", "--set", "max_length=50")
    assert "answers of talks.jsonl (20% set aside, seed 0): the oldest turns are left out" in caplog.text
    assert "fields were cut" not in caplog.text


def test_template_show_goes_through_a_conversation(chatty: Path) -> None:
    data = write("talks.jsonl", TALKS)
    show = ("template", "show", "--chat", "--backbone", chatty, "--system", "be kind")
    rows = json.loads(works(*show, "--data", data, "--json"))
    parts = [row["part"] for row in rows]
    assert {"special", "slot", "user", "assistant", "target", "end"} <= set(parts)
    assert "".join(row["token"] for row in rows if row["part"] == "target").strip() == "yes, 0"
    assert [row["token"] for row in rows if row["part"] == "end"] == ["</s>"]
    told = works(*show, "--data", data)
    count = parts.count("target") + 1
    assert f"{len(rows)} positions; learned is to write {count} of them, the target and its end" in told
    open_one = json.loads(works(*show, "--record", json.dumps(talk(QUESTION)), "--json"))
    assert "target" not in {row["part"] for row in open_one}
    assert "slot" in works(*show)
    fails(*show, "[P] [Y]", says=["give either a TEMPLATE, or --template-file, or --chat"])
    fails(*show, "--data", data, "--record", "{}", says=["--record and --data both say"])


def test_what_is_typed_goes_on(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model reads what was said before, its own answers included."""
    data = write("talks.jsonl", TALKS)
    works("train", "--data", data, "--chat", "--backbone", chatty, *QUICK, "--out", "out")
    lines, seen = iter([QUESTION, "And in Kenya?", ""]), list[Any]()
    answers = iter(["one", "two"])
    monkeypatch.setattr(terminal, "is_interactive", lambda: True)
    monkeypatch.setattr(terminal, "ask", lambda _: next(lines))

    def answer(_: object, part: Any, *__: object, **___: object) -> list[Prediction]:
        seen.extend(json.loads(one.record["messages"]) for one in part)
        text = next(answers)
        return [Prediction(text, (Candidate(text, 0.0),))]

    monkeypatch.setattr(PromptModel, "predict", answer)
    done = call("predict", "out", "--backbone", chatty, stdin=io.StringIO())
    assert done.code == 0, done.err
    assert [[turn["content"] for turn in turns] for turns in seen] == [
        [QUESTION],
        [QUESTION, "one", "And in Kenya?"],
    ]


def test_a_fleet_learns_chats_beside_other_prompts(chatty: Path) -> None:
    data = write("talks.jsonl", TALKS)
    Path("fleet.toml").write_text(
        f'[all]\ndata = "{data}"\nepochs = 1\nmanual = "{{x}} is [Y]"\n'
        '[[prompt]]\nname = "chat"\nchat = true\nsystem = ["be kind", "a film"]\n',
        encoding="utf-8",
    )
    works("fleet", "--config", "fleet.toml", "--backbone", chatty, "--out", "fleet")
    learned = {template_of(str(folder)) for folder in Path("fleet").iterdir() if folder.is_dir()}
    assert {text in template for template in learned for text in ("[P:be kind]", "[P:a film]")} == {True, False}
    Path("wrong.toml").write_text(
        f'[[prompt]]\nname = "a"\ndata = "{data}"\nchat = true\ntask = "boolq"\n', encoding="utf-8"
    )
    says = ["prompt 'a': chat makes the template of the model's chat template; leave task out"]
    fails("fleet", "--config", "wrong.toml", "--backbone", chatty, "--out", "other", says=says)


def test_examples_in_context_are_not_for_conversations(chatty: Path) -> None:
    data = write("talks.jsonl", TALKS)
    args = ("compare", "--data", data, "--test", data, "--manual", "[C] so [Y]", "--methods", "in-context")
    done = call(*args, "--backbone", chatty, "--out", "compared")
    assert done.code != 0
    assert "examples are for templates of one turn; a conversation ([C]) is none" in done.err + done.out
