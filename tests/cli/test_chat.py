"""Conversations on the command line: `--chat`, data in known forms, and a prompt that answers as the assistant."""

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
from tests.cli.calls import QUICK, call, fails, json_of, lines_of, works, write_lines

QUESTION, ANSWER = "the movie?", "It was great"


@pytest.fixture
def chatty(llama: str, tmp_path: Path) -> Path:
    """The tiny model with a chat template, whose markup has tokens, and which takes no system text."""
    folder = shutil.copytree(llama, tmp_path / "chatty")
    (folder / "chat_template.jinja").write_text(SHAPES["mistral"].jinja, encoding="utf-8")
    return folder


def talk(*texts: str, **more: object) -> dict[str, object]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)], **more}


TALKS = [talk(f"{QUESTION} {at}", ANSWER, "And in Kenya?", f"yes, {at}") for at in range(6)]


def template_of(folder: str = "out") -> str:
    return str(json_of(f"{folder}/prompt/prompt.json")["template"])


def test_a_chat_is_learned_and_answers(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command works with it as with any prompt; what is typed goes on from earlier turns."""
    data = write_lines("talks.jsonl", TALKS)
    done = call("train", "--data", data, "--chat", "--backbone", chatty, *QUICK, "--out", "out")
    assert done.code == 0, done.err
    assert "talks.jsonl: the form openai (messages), 6 conversations, 12 answers\n" in done.err
    assert template_of() == "<s>[[INST][P:You are a helpful assistant.]\n\n[C][[/INST] [Y]</s>"
    parts = json_of("out/run.json")["data"]
    assert parts["train"]["rows"] + parts["dev"]["rows"] == 12
    assert parts["dev"]["rows"] % 2 == 0  # whole conversations
    for args in (["predict", "out", QUESTION], ["inspect", "out"], ["eval", "out", "--data", data, "--json"]):
        assert works(*args, "--backbone", chatty)
    rows = lines_of(works("predict", "out", "--data", data, "--backbone", chatty, "--json"))
    assert len(rows) == 6  # the last turn of each conversation
    turns = json.loads(rows[0]["record"]["messages"])
    assert [turn["content"] for turn in turns] == [f"{QUESTION} 0", ANSWER, "And in Kenya?"]
    lines, answers, seen = iter([QUESTION, "And in Kenya?", ""]), iter(["one", "two"]), list[Any]()

    def answer(_: object, part: Any, *__: object, **___: object) -> list[Prediction]:
        seen.extend(json.loads(question.record["messages"]) for question in part)
        text = next(answers)
        return [Prediction(text, (Candidate(text, 0.0),))]

    monkeypatch.setattr(terminal, "is_interactive", lambda: True)
    monkeypatch.setattr(terminal, "ask", lambda _: next(lines))
    monkeypatch.setattr(PromptModel, "predict", answer)
    done = call("predict", "out", "--backbone", chatty, stdin=io.StringIO())
    assert done.code == 0, done.err
    assert [[turn["content"] for turn in turns] for turns in seen] == [[QUESTION], [QUESTION, "one", "And in Kenya?"]]


@pytest.mark.parametrize(
    ("rows", "learned", "says"),
    [
        (TALKS, "[C]", "the form openai (messages), 6 conversations, 12 answers"),
        (
            [{"content": f"name#Kenya*n#{at}", "summary": "yes"} for at in range(6)],
            "[P*3] {content}\n[P:Summary:] [Y]",
            "the form ChatGLM's texts (content, summary), 6 records",
        ),
        (
            [{"instruction": f"say {at}", "input": "it", "output": "yes"} for at in range(6)],
            "[P:### Instruction:]\n{instruction}\n\n[P:### Input:]\n{input}\n\n[P:### Response:]\n[Y]",
            "the form alpaca (instruction, output), 6 records",
        ),
    ],
    ids=["messages", "content", "alpaca"],
)
def test_the_form_of_the_data_is_a_default_template(
    rows: Sequence[dict[str, object]], learned: str, says: str, chatty: Path
) -> None:
    data = write_lines("data.jsonl", rows)
    done = call("train", "--data", data, "--backbone", chatty, *QUICK, "--out", "out")
    assert done.code == 0, done.err
    assert f"data.jsonl: {says}" in done.err
    assert learned in template_of().replace("\n [Y]", "\n[Y]")


def test_a_system_text_is_the_start_of_the_slots(chatty: Path) -> None:
    (chatty / "chat_template.jinja").write_text(SHAPES["llama-2"].jinja, encoding="utf-8")
    data = write_lines("talks.jsonl", [{**row, "system": "the movie was good"} for row in TALKS])
    args = ("--chat", "--backbone", chatty, *QUICK)
    for more, system in (((), "the movie was good"), (("--set", "system=be kind", "--overwrite"), "be kind")):
        works("train", "--data", data, *args, *more, "--out", "out")
        assert f"<<SYS>>\n[P:{system}]\n<</SYS>>" in template_of()
    several = write_lines("several.jsonl", [{**row, "system": f"be {at}"} for at, row in enumerate(TALKS)])
    fails(
        "train", "--data", several, *args, "--out", "third", says=["6 different system texts", "several.jsonl, line 1"]
    )


def test_what_cannot_be_learned_from(llama: str, chatty: Path) -> None:
    unknown = write_lines("unknown.jsonl", [{"question": "a", "reply": "b"}])
    half = write_lines("half.jsonl", [*TALKS, talk("a", "b", "c")])
    data = write_lines("talks.jsonl", TALKS)
    for source, model, more, says in (
        (unknown, chatty, (), ["unknown.jsonl, line 1", "question, reply"]),
        (unknown, chatty, ("--chat",), ["unknown.jsonl, line 1", "question, reply"]),
        (half, chatty, ("--chat",), ["half.jsonl, line 7", "messages[2].content"]),
        (data, llama, ("--chat",), ["no chat template"]),
    ):
        fails("train", "--data", source, *more, "--backbone", model, "--out", "out", says=says)


def test_template_show_goes_through_a_conversation(chatty: Path) -> None:
    data = write_lines("talks.jsonl", TALKS)
    show = ("template", "show", "--chat", "--backbone", chatty, "--system", "be kind")
    rows = json.loads(works(*show, "--data", data, "--json"))
    parts = [row["part"] for row in rows]
    assert {"special", "slot", "user", "assistant", "target", "end"} <= set(parts)
    assert "".join(row["token"] for row in rows if row["part"] == "target").strip() == "yes, 0"
    assert [row["token"] for row in rows if row["part"] == "end"] == ["</s>"]
    assert f"{len(rows)} positions, {parts.count('target') + 1} of them" in works(*show, "--data", data)
    unanswered = json.loads(works(*show, "--record", json.dumps(talk(QUESTION)), "--json"))
    assert "target" not in {row["part"] for row in unanswered}
    fails(*show, "[P] [Y]", says=["TEMPLATE", "--chat"])
    fails(*show, "--data", data, "--record", "{}", says=["--record", "--data"])


def test_a_fleet_learns_chats_next_to_other_prompts(chatty: Path) -> None:
    data = write_lines("talks.jsonl", TALKS)
    Path("fleet.toml").write_text(
        f'[all]\ndata = "{data}"\nepochs = 1\nmanual = "{{x}} is [Y]"\n'
        '[[prompt]]\nname = "chat"\nchat = true\nsystem = ["be kind", "a film"]\n',
        encoding="utf-8",
    )
    works("fleet", "--config", "fleet.toml", "--backbone", chatty, "--out", "fleet")
    learned = {template_of(str(folder)) for folder in Path("fleet").iterdir() if folder.is_dir()}
    assert {text in template for template in learned for text in ("[P:be kind]", "[P:a film]")} == {True, False}


def test_examples_in_context_are_not_for_conversations(chatty: Path) -> None:
    data = write_lines("talks.jsonl", TALKS)
    args = ("compare", "--data", data, "--test", data, "--manual", "[C] so [Y]", "--methods", "in-context")
    done = call(*args, "--backbone", chatty, "--out", "compared")
    assert done.code != 0
    assert "([C])" in done.err + done.out
