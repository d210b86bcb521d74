"""Conversations in data files: the known forms, recognised by their keys, and the records made of them, one for each
answer. Chat templates are applied later.

Source: the documentation of ChatGLM-6B (``ptuning/``), Alpaca, ShareGPT as LLaMA-Factory and torchtune read it, and
OpenAI's interface.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptuning.data.questions import Question, Questions
from ptuning.data.reading import RawRows, Row, load_rows, renamed
from ptuning.errors import ConfigError, RecordError, cut, shown
from ptuning.files import parse_json
from ptuning.records import TARGET_FIELD, References, check_text, clean, scalar
from ptuning.template.language import CONVERSATION_FIELD
from ptuning.template.messages import ASSISTANT, SYSTEM, USER, ChatMessage, read_messages, write_messages

# Names of roles in data.
ROLES = {
    "user": USER, "human": USER, "assistant": ASSISTANT, "gpt": ASSISTANT, "model": ASSISTANT, "bot": ASSISTANT,
    "system": SYSTEM, "developer": SYSTEM,
}  # fmt: skip


@dataclass(frozen=True)
class ChatPart:
    """One text of a conversation: its role, its key in the row, and whether it is learned."""

    role: str
    content: str
    key: str
    learned: bool = True


@dataclass(frozen=True)
class Shape:
    """A form of data.

    Args:
        name: Its name.
        keys: The keys of its rows; the last one holds the answer, unless it is the only one.
        more: Keys that rows may have besides; ``input`` is part of the question.
        turn_keys: The keys of role and content, if rows are lists of turns.
        manual: The template of data that is no conversation, with the fields of a row; None if it always is one.
    """

    name: str
    keys: tuple[str, ...]
    more: tuple[str, ...] = (SYSTEM,)
    turn_keys: tuple[str, ...] = ()
    manual: str | None = None

    @property
    def needed(self) -> tuple[str, ...]:
        """The keys that a row without an answer has."""
        return self.keys[:-1] or self.keys

    @property
    def described(self) -> str:
        """The name with the keys."""
        return f"{self.name} ({', '.join(self.keys)})"


ALPACA = Shape(
    "alpaca",
    ("instruction", "output"),
    ("input", SYSTEM, "history"),
    manual="### Instruction:\n{instruction}\n\n### Response:\n[Y]",
)
SHAPES: tuple[Shape, ...] = (
    Shape("openai", (CONVERSATION_FIELD,), turn_keys=("role", "content")),
    Shape("sharegpt", ("conversations",), turn_keys=("from", "value")),
    ALPACA,
    Shape(
        "ChatGLM's chat",
        ("prompt", "response"),
        (SYSTEM, "history"),
        manual="Question: {prompt}\nAnswer: [Y]",
    ),
    Shape("ChatGLM's texts", ("content", "summary"), manual="{content}\nSummary: [Y]"),
    Shape("facts", ("x", TARGET_FIELD)),
)


def recognise(rows: RawRows, *, ask: bool = False) -> Shape:
    """Return the form of rows by the keys of the first one; if they are to ``ask``, answers may be missing. A
    RecordError names the known forms and the keys of the row.
    """
    where, first = next(iter(rows), (rows.name, None))
    if first is None:
        raise RecordError(f"{rows.name} holds no records; it needs one conversation per record")
    known = next((shape for shape in SHAPES if {*first}.issuperset(shape.needed if ask else shape.keys)), None)
    if known is None:
        forms = ", ".join(shape.described for shape in SHAPES)
        raise RecordError(
            f"{where}: no known form of conversations; looked for {forms}; the keys found: "
            f"{', '.join(map(str, first)) or 'none'}. field NEW=NAME reads the key NAME as NEW"
        )
    return known


def _parts(shape: Shape, row: Mapping[str, object]) -> Iterator[ChatPart]:
    """Yield the texts of a row, in order."""
    if shape.turn_keys:
        yield from _turns(shape, row)
    if row.get(SYSTEM):
        yield ChatPart(SYSTEM, _text(row[SYSTEM], SYSTEM), SYSTEM)
    if shape.turn_keys:
        return
    history = row.get("history") or ()
    if isinstance(history, str):
        history = () if history.strip() == "[]" else _list_of(history)
    if not isinstance(history, list | tuple):
        raise RecordError(f"history is {shown(row['history'])}, and must be a list of [question, answer]")
    for at, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RecordError(f"history[{at}] is {shown(pair)}, and must be [question, answer]")
        # Each answer of ChatGLM's histories has its own row.
        for place, (role, learned) in enumerate(((USER, True), (ASSISTANT, shape is ALPACA))):
            key = f"history[{at}][{place}]"
            yield ChatPart(role, _text(pair[place], key), key, learned)
    question, answer = shape.keys
    inputs = (question, "input") if "input" in shape.more else (question,)
    texts = [_text(row.get(key), key) for key in inputs if row.get(key) not in (None, "")]
    yield ChatPart(USER, "\n".join(texts), question)
    if answer in row:
        yield ChatPart(ASSISTANT, _answer(row[answer], answer), answer)


def _turns(shape: Shape, row: Mapping[str, object]) -> Iterator[ChatPart]:
    """Yield the turns of a list; they may use the other form's names as well."""
    (key,) = shape.keys
    value = row.get(key)
    turns = _list_of(value) if isinstance(value, str) else value
    if isinstance(value, str) and (TARGET_FIELD in row or turns is None):
        # A text alone, or a record as this package has it: the turns before one answer.
        yield from (ChatPart(turn.role, turn.content, key, learned=False) for turn in read_messages(value, where=key))
        if row.get(TARGET_FIELD):
            yield ChatPart(ASSISTANT, _answer(row[TARGET_FIELD], TARGET_FIELD), TARGET_FIELD)
        return
    if not isinstance(turns, list | tuple):
        raise RecordError(f"{key} is {shown(turns)}, and must be a list of turns")
    for at, turn in enumerate(turns):
        place = f"{key}[{at}]"
        if not isinstance(turn, Mapping):
            raise RecordError(f"{place} is {shown(turn)}, and must be an object with {' and '.join(shape.turn_keys)}")
        forms = (shape.turn_keys, ("role", "content"), ("from", "value"))
        role_key, content_key = names = next((form for form in forms if form[0] in turn), forms[0])
        missing = [name for name in names if name not in turn]
        if missing:
            raise RecordError(f"{place} has no '{missing[0]}'; its keys: {', '.join(map(str, turn)) or 'none'}")
        role = ROLES.get(str(turn[role_key]).lower())
        if role is None:
            raise RecordError(f"{place}.{role_key} is {shown(turn[role_key])}; known roles are {', '.join(ROLES)}")
        is_learned = turn.get("loss", True) is not False and turn.get("weight", 1) != 0
        yield ChatPart(role, _text(turn[content_key], f"{place}.{content_key}"), f"{place}.{content_key}", is_learned)


def _list_of(text: str) -> list[object] | None:
    """Return the list that a cell of a table holds as JSON."""
    try:
        values: object = parse_json(text) if text.lstrip().startswith("[") else None
    except ValueError:
        return None
    is_list = isinstance(values, list) and values and all(isinstance(item, dict | list) for item in values)
    return values if is_list else None  # type: ignore[return-value]  # a list


def _answer(value: object, key: str) -> str:
    """Return an answer as text; a list of texts is one with several references."""
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        texts = [_text(item, key) for item in value]
        if "" in texts:
            raise RecordError(f"{key}[{texts.index('')}] is empty")
        different = list(dict.fromkeys(texts))
        return References(different) if len(different) > 1 else different[0]
    return _text(value, key)


def _text(value: object, key: str) -> str:
    """Return a content as text, without the white space around it; parts of the type text are joined."""
    if isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        kinds = {str(item.get("type")) for item in value}
        if kinds != {"text"}:
            raise RecordError(f"{key} has parts of the type {', '.join(sorted(kinds - {'text'}))}; only text is read")
        value = "".join(str(item["text"]) for item in value if item.get("text") is not None)
    plain = scalar(value)
    if plain is None and value is not None:
        raise RecordError(f"{key} is {shown(value)}, and must be a text")
    text = plain if isinstance(plain, str) else "" if plain is None else json.dumps(plain)
    check_text(text, where=key, what="it")
    return text.strip()


@dataclass(frozen=True)
class ConversationRows:
    """Rows that were read as conversations: their form, a question for each answer to learn or to give, and the row
    that each was made of.
    """

    shape: Shape
    questions: Questions
    rows: Sequence[Row]

    @property
    def summary(self) -> str:
        """The form and the counts, in a line."""
        rows = len({where for where, _ in self.rows})
        count = (
            f"{rows} conversation{'s' * (rows != 1)}, {len(self.questions)} answer{'s' * (len(self.questions) != 1)}"
        )
        return f"{self.questions.name}: the form {self.shape.described}, {count}"


def load_conversations(source: str | Path, *, fields: Mapping[str, str] | None = None) -> Questions:
    """Read conversations from a data file in one of the known forms: OpenAI's ``messages``, sharegpt's
    ``conversations``, alpaca, or ChatGLM's ``prompt`` and ``response``, ``content`` and ``summary``.

    There is a record for each answer: the field ``messages`` holds the turns before it, as one text, and ``y`` the
    answer. Those of a conversation are a group. ``fields`` maps new names of keys to those in the file.

    Raises:
        FileError: If the file cannot be read.
        RecordError: If the form is unknown, or a conversation is broken; names file, line and key.
    """
    return read_conversations(load_rows(source), fields=fields).questions


def read_conversations(
    rows: RawRows, *, fields: Mapping[str, str] | None = None, ask: bool = False
) -> ConversationRows:
    """Make records of rows with the answers to learn; or, if they are to ``ask``, with the last question of each, and
    its answer if there is one. Errors as for :func:`load_conversations`.
    """
    if fields:
        named = [
            (where, renamed(row, {new: old for new, old in fields.items() if old in row}, where=where))
            for where, row in rows
        ]
        rows = RawRows(named, name=rows.name, digest=rows.sha256, format=rows.format)
    shape = recognise(rows, ask=ask)
    pairs: list[tuple[Question, Row]] = []
    for where, row in rows:
        try:
            pairs += [(question, (where, row)) for question in _questions(shape, row, where=where, ask=ask)]
        except RecordError as error:
            raise RecordError(f"{where}: {error}" if not str(error).startswith(where) else str(error)) from error
    if not pairs:
        raise RecordError(f"{rows.name} has no answer to learn: every one is marked to be left out (loss, weight)")
    questions = Questions((question for question, _ in pairs), name=rows.name, digest=rows.sha256, fields=fields)
    return ConversationRows(shape, questions, [row for _, row in pairs])


def system_text(questions: Questions) -> str | None:
    """Return the system text of conversations, None without one. A ConfigError if they have several."""
    texts: dict[str, str] = {}
    for question in questions:
        if SYSTEM in question.record:
            texts.setdefault(question.record[SYSTEM], question.where)
    if len(texts) > 1:
        (first, where), (second, other) = list(texts.items())[:2]
        raise ConfigError(
            f"{questions.name} has {len(texts)} different system texts, as '{cut(first)}' ({where}) and "
            f"'{cut(second)}' ({other}), and the slots start at one: give it (system), and theirs are not read"
        )
    return next(iter(texts), None)


def _questions(shape: Shape, row: Mapping[str, object], *, where: str, ask: bool) -> Iterator[Question]:
    """Yield a question for each answer of a conversation, or for its last question."""
    missing = [key for key in (shape.needed if ask else shape.keys) if key not in row]
    if missing:
        raise RecordError(f"no '{missing[0]}', as the first record has; its keys: {', '.join(map(str, row)) or 'none'}")
    parts = list(_parts(shape, row))
    systems, turns = ([part for part in parts if (part.role == SYSTEM) == is_system] for is_system in (True, False))
    _check(systems, turns, ask=ask)
    if systems and systems[0].key != SYSTEM and parts[0] is not systems[0]:
        raise RecordError(f"{systems[0].key} is a system text after other turns; it must come first")
    own = (*shape.keys, *shape.more, CONVERSATION_FIELD, TARGET_FIELD)
    record = {name: text for name, text in clean(row, where=where).items() if name not in own}
    if systems:
        record[SYSTEM] = systems[0].content
    messages = [ChatMessage(part.role, part.content) for part in turns]
    if ask:
        last = max(at for at, part in enumerate(turns) if part.role == USER)
        record[CONVERSATION_FIELD] = write_messages(messages[: last + 1])
        if last + 1 < len(turns) and turns[-1].content:
            record[TARGET_FIELD] = turns[-1].content
        yield Question(record, where=where)
        return
    for at, part in enumerate(turns):
        if part.role == ASSISTANT and part.learned:
            fields = {CONVERSATION_FIELD: write_messages(messages[:at]), TARGET_FIELD: part.content}
            yield Question({**record, **fields}, group=where, where=where)


def _check(systems: Sequence[ChatPart], turns: Sequence[ChatPart], *, ask: bool) -> None:
    """Check system texts and the turns of user and assistant; a RecordError names the key that is wrong."""
    if len(systems) > 1:
        raise RecordError(
            f"two system texts, {systems[0].key} and {systems[1].key}; a conversation has one, at its beginning"
        )
    if not turns:
        raise RecordError("a conversation without turns")
    for at, part in enumerate(turns):
        if part.role != (ASSISTANT if at % 2 else USER):
            rule = "the first turn must be the user's" if not at else "user and assistant take turns"
            raise RecordError(f"{part.key} is a turn of the {part.role}, and {rule}")
    for part in (*systems, *turns):
        if not part.content and not (ask and part.role == ASSISTANT):
            raise RecordError(f"{part.key} is empty")
    if turns[-1].role == USER and not ask:
        raise RecordError(f"the conversation ends with the user ({turns[-1].key}); there is no answer to learn")
