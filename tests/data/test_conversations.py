"""Conversations in data files: five forms by their keys, records for each answer, and errors that name line and key."""

from __future__ import annotations

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
    found = read_conversations(rows_of(row))
    name = form.split(",")[0]
    assert found.shape.name == name
    assert found.summary == (
        f"talks.jsonl: the form {found.shape.described}, 1 conversation, {len(expected)} answer"
        f"{'s' * (len(expected) != 1)}"
    )
    records = [one.record for one in found.questions]
    assert [(one.get("system"), turns(one)[-1], one["y"]) for one in records] == expected
    if len(expected) > 1:
        assert turns(records[1]) == [Q1, A1, Q2]
        assert {one.group for one in found.questions} == {"talks.jsonl, line 1"}


@pytest.mark.parametrize(
    "row", [{"instruction": Q1, "output": [A1, A2]}, {"x": Q1, "y": [A1, A2]}, {"messages": Q1, "y": [A1, A2]}]
)
@pytest.mark.parametrize("ask", [False, True])
def test_an_answer_may_have_several_references(row: Mapping[str, object], ask: bool) -> None:
    (one,) = read_conversations(rows_of(row), ask=ask).questions
    assert one.record["y"] == A1
    assert references_of(one.record) == (A1, A2)


def test_what_is_asked_is_the_last_question() -> None:
    """With its answer, if there is one; lines of text and a key alone will do."""
    for row in ({"messages": MESSAGES}, {"messages": MESSAGES[:3]}, {"prompt": Q2, "history": [[Q1, A1]]}):
        (one,) = read_conversations(rows_of(row), ask=True).questions
        assert one.record.get("y") == (A2 if row == {"messages": MESSAGES} else None)
        assert turns(one.record) == [Q1, A1, Q2]
    text = raw_rows(f"{Q1}\n{Q2}\n".encode(), name="asked.txt", asked={"messages": ("messages",)})
    found = read_conversations(text, ask=True)
    assert [turns(one.record) for one in found.questions] == [[Q1], [Q2]]
    assert [where for where, _ in found.rows] == ["asked.txt, line 1", "asked.txt, line 2"]


BROKEN: dict[str, tuple[Mapping[str, object], str]] = {
    "ends with the user": ({"messages": MESSAGES[:3]}, "the conversation ends with the user (messages[2].content)"),
    "two systems": (
        {"messages": [{"role": "system", "content": BRIEF}] * 2 + MESSAGES},
        "two system texts, messages[0].content and messages[1].content",
    ),
    "a system of its own and one of the row": (
        {"messages": [{"role": "system", "content": BRIEF}, *MESSAGES], "system": BRIEF},
        "two system texts, messages[0].content and system",
    ),
    "a late system": (
        {"messages": [*MESSAGES, {"role": "system", "content": BRIEF}]},
        "messages[4].content is a system text",
    ),
    "an unknown role": (
        {"messages": [*MESSAGES[:3], {"role": "tool", "content": "1"}]},
        "messages[3].role is 'tool'; known roles are user, human, assistant",
    ),
    "an unknown role of sharegpt": (
        {"conversations": [*SHAREGPT[:3], {"from": "observation", "value": "1"}]},
        "conversations[3].from is 'observation'",
    ),
    "an empty content": (
        {"messages": [MESSAGES[0], {"role": "assistant", "content": " \n"}]},
        "messages[1].content is empty",
    ),
    "no content": ({"messages": [MESSAGES[0], {"role": "assistant", "content": None}]}, "messages[1].content is empty"),
    "a part that is null": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}, MESSAGES[1]]},
        "messages[0].content is empty",
    ),
    "a missing role": ({"messages": [{"content": Q1}]}, "messages[0] has no 'role'; its keys: content"),
    "an empty reference": ({"instruction": Q1, "output": ["", A1]}, "output[0] is empty"),
    "a missing content": (
        {"messages": [MESSAGES[0], {"role": "assistant", "text": "a"}]},
        "messages[1] has no 'content'; its keys: role, text",
    ),
    "an empty output": ({"instruction": Q1, "output": ""}, "output is empty"),
    "an empty answer of a history": (
        {"prompt": Q1, "response": A1, "history": [[Q1, ""]]},
        "history[0][1] is empty",
    ),
    "a history of something else": (
        {"prompt": Q1, "response": A1, "history": [[Q1]]},
        "history[0] is ['Is it far?'], and must be [question, answer]",
    ),
    "a history that is no list": ({"prompt": Q1, "response": A1, "history": 5}, "history is 5, and must be a list"),
    "two users": ({"messages": [MESSAGES[0], *MESSAGES]}, "messages[1].content is a turn of the user, and user and"),
    "an assistant first": ({"messages": MESSAGES[1:]}, "messages[0].content is a turn of the assistant, and the first"),
    "no turns": ({"messages": []}, "a conversation without turns"),
    "no list": ({"messages": 5}, "messages is 5, and must be a list of turns"),
    "a turn that is no object": (
        {"messages": ["a"]},
        "messages[0] is 'a', and must be an object with role and content",
    ),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, MESSAGES[1]]},
        "messages[0].content has parts of the type image_url; only text is read",
    ),
    "another content": ({"messages": [{"role": "user", "content": {}}, MESSAGES[1]]}, "messages[0].content is {}, and"),
    "another form": ({"prompt": Q1}, "no 'messages', as the first record has; its keys: prompt"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_conversation_is_an_error_with_file_line_and_key(fault: str) -> None:
    row, says = BROKEN[fault]
    good: Mapping[str, object] = {"messages": MESSAGES}
    if fault != "another form":
        good = next(one for one, _ in FORMS.values() if set(one) <= set(row) | {"y"} or set(row) <= set(one))
        good = good if recognise(rows_of(good)) is recognise(rows_of(row)) else row
    rows = rows_of(good, row)
    with pytest.raises(RecordError) as found:
        read_conversations(rows)
    line = 1 if good is row else 2
    assert str(found.value).startswith(f"talks.jsonl, line {line}: {says}")
    assert str(found.value).count("talks.jsonl") == 1


def test_an_unknown_form_says_what_was_looked_for_and_what_is_there() -> None:
    with pytest.raises(RecordError) as found:
        recognise(rows_of({"question": "a", "reply": "b"}))
    said = str(found.value)
    assert said.startswith("talks.jsonl, line 1: no known form of conversations; looked for openai (messages), ")
    assert all(shape.described in said for shape in SHAPES)
    assert "the keys found: question, reply. --field NEW=NAME" in said
    with pytest.raises(RecordError, match=r"talks.jsonl holds no records"):
        recognise(rows_of())


def test_nothing_to_learn_is_an_error() -> None:
    muted = {"messages": [MESSAGES[0], {**MESSAGES[1], "loss": False}]}
    with pytest.raises(RecordError, match=r"talks.jsonl has no answer to learn"):
        read_conversations(rows_of(muted))


def test_keys_may_have_other_names(tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps({"dialog": MESSAGES, "source": "mail"}), encoding="utf-8")
    found = load_conversations(file, fields={"messages": "dialog"})
    assert [one.record["y"] for one in found] == [A1, A2]
    assert found.fields == {"messages": "dialog"}
    assert found[0].record["source"] == "mail"  # other fields are there for templates that read them
    with pytest.raises(RecordError, match="no known form"):
        load_conversations(file)


def questions(*systems: str | None) -> Questions:
    rows = [{"prompt": Q1, "response": A1} | ({"system": one} if one else {}) for one in systems]
    return read_conversations(rows_of(*rows)).questions


@pytest.mark.parametrize(("systems", "found"), [((None,), None), ((BRIEF, None, BRIEF), BRIEF)])
def test_the_system_text_is_that_of_all(systems: tuple[str | None, ...], found: str | None) -> None:
    assert system_text(questions(*systems)) == found


def test_two_system_texts_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"2 different system texts, as 'Be brief.' \(talks.jsonl, line 1\) and 'b'"):
        system_text(questions(BRIEF, "b"))


def test_a_conversation_is_never_in_two_parts() -> None:
    rows = rows_of(
        *({"messages": [{"role": role, "content": f"{text} {at}"} for role, text in OPENAI]} for at in range(9))
    )
    kept, held = split_questions(read_conversations(rows).questions, fraction=0.3, seed=0)
    places: Callable[[Questions], set[str]] = lambda part: {one.where for one in part}  # noqa: E731
    assert places(kept).isdisjoint(places(held))
    assert len(kept) + len(held) == 18


def test_a_conversation_is_the_same_after_it_was_read() -> None:
    (first, second) = read_conversations(rows_of({"messages": MESSAGES})).questions
    again = read_conversations(rows_of(dict(second.record))).questions
    assert [one.record for one in again] == [second.record]
    assert read_messages(first.record["messages"]) == (Turn("user", Q1),)
