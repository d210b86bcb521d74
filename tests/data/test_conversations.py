"""Conversations in data files: five forms by their keys, records for each answer, and errors that name line and key."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from ptuning.data.conversations import SHAPES, load_conversations, read_conversations, recognise, system_text
from ptuning.data.questions import Questions
from ptuning.data.reading import RawRows, raw_rows
from ptuning.data.splits import split_questions
from ptuning.errors import ConfigError, RecordError
from ptuning.records import references_of
from ptuning.template.messages import ChatMessage as Turn
from ptuning.template.messages import read_messages

Q1, A1, Q2, A2 = "Is it far?", "No.", "And Peru?", "Yes, it is."
OPENAI = [("user", Q1), ("assistant", A1), ("user", Q2), ("assistant", A2)]
MESSAGES = [{"role": role, "content": text} for role, text in OPENAI]
SHAREGPT = [{"from": "gpt" if role == "assistant" else "human", "value": text} for role, text in OPENAI]
BRIEF = "Be brief."
# A conversation of two answers in each form -> its records: system text, the question, and the answer.
Found = list[tuple[str | None, str, str]]
BOTH: Found = [(BRIEF, Q1, A1), (BRIEF, Q2, A2)]
FORMS: dict[str, tuple[Mapping[str, object], Found]] = {
    "openai": ({"messages": [{"role": "system", "content": BRIEF}, *MESSAGES]}, BOTH),
    "openai, parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": Q1}]}, MESSAGES[1]]},
                      [(None, Q1, A1)]),
    "openai, as text": ({"messages": json.dumps(MESSAGES), "system": BRIEF}, BOTH),
    "openai, some learned": ({"messages": [MESSAGES[0], {**MESSAGES[1], "loss": False}, *MESSAGES[2:]]},
                             [(None, Q2, A2)]),
    "openai, some weighed": ({"messages": [*MESSAGES[:3], {**MESSAGES[3], "weight": 0}]}, [(None, Q1, A1)]),
    "sharegpt": ({"conversations": SHAREGPT, "system": BRIEF}, BOTH),
    "sharegpt, with roles": ({"conversations": MESSAGES}, [(None, Q1, A1), (None, Q2, A2)]),
    "alpaca": ({"instruction": Q2, "output": A2, "system": BRIEF, "history": [[Q1, A1]]}, BOTH),
    "alpaca, with input": ({"instruction": Q1, "input": "Kenya", "output": A1}, [(None, f"{Q1}\nKenya", A1)]),
    "alpaca, with none": ({"instruction": Q1, "input": "", "output": A1, "history": []}, [(None, Q1, A1)]),
    "alpaca, as a table": ({"instruction": Q1, "output": A1, "history": "[]"}, [(None, Q1, A1)]),
    "ChatGLM's chat": ({"prompt": Q2, "response": A2, "history": [[Q1, A1]]}, [(None, Q2, A2)]),
    "ChatGLM's texts": ({"content": "a#b*c#d", "summary": A1}, [(None, "a#b*c#d", A1)]),
    "facts": ({"x": "Kenya", "y": "Nairobi"}, [(None, "Kenya", "Nairobi")]),
    "openai, a record": ({"messages": Q1, "y": A1}, [(None, Q1, A1)]),
}  # fmt: skip


def rows_of(*rows: object) -> RawRows:
    lines = "\n".join(json.dumps(row) for row in rows)
    return raw_rows(lines.encode(), name="talks.jsonl")


def turns(record: Mapping[str, str]) -> list[str]:
    return [turn.content for turn in read_messages(record["messages"])]


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_recognised_by_its_keys(form: str) -> None:
    """And read: a record for each answer, behind all turns in front of it; nothing is lost or added."""
    row, expected = FORMS[form]
    read = read_conversations(rows_of(row))
    name = form.split(",")[0]
    assert read.shape.name == name
    assert read.summary == (
        f"talks.jsonl: the form {read.shape.described}, 1 conversation, {len(expected)} answer"
        f"{'s' * (len(expected) != 1)}"
    )
    records = [each.record for each in read.questions]
    assert [(each.get("system"), turns(each)[-1], each["y"]) for each in records] == expected
    if len(expected) > 1:
        assert turns(records[1]) == [Q1, A1, Q2]
        assert {each.group for each in read.questions} == {"talks.jsonl, line 1"}


@pytest.mark.parametrize(
    "row", [{"instruction": Q1, "output": [A1, A2]}, {"x": Q1, "y": [A1, A2]}, {"messages": Q1, "y": [A1, A2]}]
)
@pytest.mark.parametrize("ask", [False, True])
def test_an_answer_may_have_several_references(row: Mapping[str, object], ask: bool) -> None:
    (question,) = read_conversations(rows_of(row), ask=ask).questions
    assert question.record["y"] == A1
    assert references_of(question.record) == (A1, A2)


def test_what_is_asked_is_the_last_question() -> None:
    """With its answer, if there is one; lines of text and a key alone will do."""
    for row in ({"messages": MESSAGES}, {"messages": MESSAGES[:3]}, {"prompt": Q2, "history": [[Q1, A1]]}):
        (question,) = read_conversations(rows_of(row), ask=True).questions
        assert question.record.get("y") == (A2 if row == {"messages": MESSAGES} else None)
        assert turns(question.record) == [Q1, A1, Q2]
    text = raw_rows(f"{Q1}\n{Q2}\n".encode(), name="asked.txt", columns={"messages": ("messages",)})
    read = read_conversations(text, ask=True)
    assert [turns(each.record) for each in read.questions] == [[Q1], [Q2]]
    assert [where for where, _ in read.rows] == ["asked.txt, line 1", "asked.txt, line 2"]


SYSTEM = {"role": "system", "content": BRIEF}
PAIR = {"prompt": Q1, "response": A1}
BROKEN: list[tuple[Mapping[str, object], str]] = [
    ({"messages": MESSAGES[:3]}, "ends with the user (messages[2].content)"),
    ({"messages": [SYSTEM, SYSTEM, *MESSAGES]}, "two system texts, messages[0].content and messages[1].content"),
    ({"messages": [SYSTEM, *MESSAGES], "system": BRIEF}, "two system texts, messages[0].content and system"),
    ({"messages": [*MESSAGES, SYSTEM]}, "messages[4].content is a system text"),
    ({"messages": [*MESSAGES[:3], {"role": "tool", "content": "1"}]}, "messages[3].role is 'tool'"),
    ({"conversations": [*SHAREGPT[:3], {"from": "tool", "value": "1"}]}, "conversations[3].from is 'tool'"),
    ({"messages": [MESSAGES[0], {"role": "assistant", "content": " \n"}]}, "messages[1].content is empty"),
    ({"messages": [MESSAGES[0], {"role": "assistant", "content": None}]}, "messages[1].content is empty"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}, MESSAGES[1]]},
        "messages[0].content is empty",
    ),
    ({"messages": [{"content": Q1}]}, "messages[0] has no 'role'; its keys: content"),
    ({"messages": [MESSAGES[0], {"role": "assistant", "text": "a"}]}, "messages[1] has no 'content'"),
    ({"instruction": Q1, "output": ["", A1]}, "output[0] is empty"),
    ({"instruction": Q1, "output": ""}, "output is empty"),
    ({**PAIR, "history": [[Q1, ""]]}, "history[0][1] is empty"),
    ({**PAIR, "history": [[Q1]]}, "history[0] is ['Is it far?']"),
    ({**PAIR, "history": 5}, "history is 5"),
    ({"messages": [MESSAGES[0], *MESSAGES]}, "messages[1].content is a turn of the user"),
    ({"messages": MESSAGES[1:]}, "messages[0].content is a turn of the assistant"),
    ({"messages": []}, "a conversation without turns"),
    ({"messages": 5}, "messages is 5"),
    ({"messages": ["a"]}, "messages[0] is 'a'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, MESSAGES[1]]},
        "messages[0].content has parts",
    ),
    ({"messages": [{"role": "user", "content": {}}, MESSAGES[1]]}, "messages[0].content is {}"),
]


@pytest.mark.parametrize(("row", "message"), BROKEN)
def test_a_broken_conversation_is_an_error_with_file_line_and_key(row: Mapping[str, object], message: str) -> None:
    good = next(each for each, _ in FORMS.values() if recognise(rows_of(each)) is recognise(rows_of(row)))
    with pytest.raises(RecordError, match="line 2: ") as error:
        read_conversations(rows_of(good, row))
    assert message in str(error.value)
    assert str(error.value).count("talks.jsonl") == 1


def test_unknown_forms() -> None:
    with pytest.raises(RecordError, match=r"line 1: .*looked for openai") as error:
        recognise(rows_of({"question": "a", "reply": "b"}))
    assert all(shape.described in str(error.value) for shape in SHAPES)
    assert "question, reply. field NEW=NAME" in str(error.value)
    with pytest.raises(RecordError, match=r"talks.jsonl holds no records"):
        recognise(rows_of())
    with pytest.raises(RecordError, match="line 2: no 'messages', as the first record has; its keys: prompt"):
        read_conversations(rows_of({"messages": MESSAGES}, {"prompt": Q1}))


def test_nothing_to_learn_is_an_error() -> None:
    muted = {"messages": [MESSAGES[0], {**MESSAGES[1], "loss": False}]}
    with pytest.raises(RecordError, match=r"talks.jsonl has no answer to learn"):
        read_conversations(rows_of(muted))


def test_keys_may_have_other_names(tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps({"dialog": MESSAGES, "source": "mail"}), encoding="utf-8")
    talks = load_conversations(file, fields={"messages": "dialog"})
    assert [each.record["y"] for each in talks] == [A1, A2]
    assert talks.fields == {"messages": "dialog"}
    assert talks[0].record["source"] == "mail"  # other fields are there for templates that read them
    with pytest.raises(RecordError, match="no known form"):
        load_conversations(file)


def test_all_conversations_have_one_system_text() -> None:
    def text(*systems: str | None) -> str | None:
        rows = [PAIR | ({"system": system} if system else {}) for system in systems]
        return system_text(read_conversations(rows_of(*rows)).questions)

    assert (text(None), text(BRIEF, None, BRIEF)) == (None, BRIEF)
    with pytest.raises(ConfigError, match=r"'Be brief.' \(talks.jsonl, line 1\) and 'b' \(talks.jsonl, line 2\)"):
        text(BRIEF, "b")


def test_a_conversation_is_never_in_two_parts() -> None:
    rows = rows_of(
        *({"messages": [{"role": role, "content": f"{text} {at}"} for role, text in OPENAI]} for at in range(9))
    )
    kept, held = split_questions(read_conversations(rows).questions, fraction=0.3, seed=0)
    places: Callable[[Questions], set[str]] = lambda part: {each.where for each in part}  # noqa: E731
    assert places(kept).isdisjoint(places(held))
    assert len(kept) + len(held) == 18


def test_a_conversation_is_the_same_after_it_was_read() -> None:
    (first, second) = read_conversations(rows_of({"messages": MESSAGES})).questions
    again = read_conversations(rows_of(dict(second.record))).questions
    assert [each.record for each in again] == [second.record]
    assert read_messages(first.record["messages"]) == (Turn("user", Q1),)
