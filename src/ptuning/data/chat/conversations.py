"""From rows in one of the known forms to records: a conversation with n answers becomes n, which begin alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptuning.data.chat.shapes import ChatPart, Shape, recognise
from ptuning.data.questions import Question, Questions
from ptuning.data.reading import RawRows, Row, load_rows, renamed
from ptuning.errors import ConfigError, RecordError, cut
from ptuning.records import TARGET_FIELD, clean
from ptuning.template.language import CONVERSATION_FIELD
from ptuning.template.messages import ASSISTANT, SYSTEM, USER, ChatMessage, write_messages


@dataclass(frozen=True)
class ConversationRows:
    """Rows that were read as conversations: their form, a question for each answer to learn or to give, and the row
    that each was made of.
    """

    shape: Shape
    questions: Questions
    rows: Sequence[Row]

    @property
    def told(self) -> str:
        """What was recognised, in a line."""
        rows = len({where for where, _ in self.rows})
        count = (
            f"{rows} conversation{'s' * (rows != 1)}, {len(self.questions)} answer{'s' * (len(self.questions) != 1)}"
        )
        return f"{self.questions.name}: the form {self.shape.described}, {count}"


def load_conversations(source: str | Path, *, fields: Mapping[str, str] | None = None) -> Questions:
    """Read conversations from a data file in one of the known forms: OpenAI's ``messages``, sharegpt's
    ``conversations``, alpaca, or ChatGLM's ``prompt`` and ``response``, ``content`` and ``summary``.

    There is a record for each answer: the field ``messages`` holds the turns in front of it, as one text, and ``y`` the
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
        named = [(where, renamed(row, _there(row, fields), where=where)) for where, row in rows if _is_row(row, where)]
        rows = RawRows(named, name=rows.name, digest=rows.sha256, format=rows.format)
    shape = recognise(rows, ask=ask)
    found: list[tuple[Question, Row]] = []
    for where, row in rows:
        try:
            found += [(one, (where, row)) for one in _questions(shape, row, where=where, ask=ask)]
        except RecordError as error:
            raise RecordError(f"{where}: {error}" if not str(error).startswith(where) else str(error)) from error
    if not found:
        raise RecordError(f"{rows.name} has no answer to learn: every one is marked to be left out (loss, weight)")
    questions = Questions((one for one, _ in found), name=rows.name, digest=rows.sha256, fields=fields)
    return ConversationRows(shape, questions, [row for _, row in found])


def system_text(questions: Questions) -> str | None:
    """Return the system text of conversations, None without one. A ConfigError if they have several."""
    texts: dict[str, str] = {}
    for one in questions:
        if SYSTEM in one.record:
            texts.setdefault(one.record[SYSTEM], one.where)
    if len(texts) > 1:
        (first, where), (second, other) = list(texts.items())[:2]
        raise ConfigError(
            f"{questions.name} has {len(texts)} different system texts, as '{cut(first)}' ({where}) and "
            f"'{cut(second)}' ({other}), and the slots start at one: give it (--system TEXT), and theirs are not read"
        )
    return next(iter(texts), None)


def _there(row: Mapping[str, object], fields: Mapping[str, str]) -> dict[str, str]:
    """Return the new names of keys that a row has."""
    return {new: old for new, old in fields.items() if old in row}


def _is_row(row: object, where: str) -> bool:
    if not isinstance(row, Mapping):
        raise RecordError(f"{where}: a record must be an object with named fields, not {type(row).__name__}")
    return True


def _questions(shape: Shape, row: Mapping[str, object], *, where: str, ask: bool) -> Iterator[Question]:
    """Yield a question for each answer of a conversation, or for its last question."""
    _is_row(row, where)
    missing = [key for key in (shape.asked if ask else shape.keys) if key not in row]
    if missing:
        raise RecordError(f"no '{missing[0]}', as the first record has; its keys: {', '.join(map(str, row)) or 'none'}")
    parts = list(shape.read(row))
    system, said = _checked(parts, ask=ask)
    own = (*shape.keys, *shape.more, CONVERSATION_FIELD, TARGET_FIELD)
    record = {name: text for name, text in clean(row, where=where).items() if name not in own}
    if system is not None:
        record[SYSTEM] = system
    turns = [ChatMessage(part.role, part.content) for part in said]
    if ask:
        last = max(at for at, part in enumerate(said) if part.role == USER)
        record[CONVERSATION_FIELD] = write_messages(turns[: last + 1])
        if last + 1 < len(said) and said[-1].content:
            record[TARGET_FIELD] = said[-1].content
        yield Question(record, where=where)
        return
    for at, part in enumerate(said):
        if part.role == ASSISTANT and part.learned:
            told = {CONVERSATION_FIELD: write_messages(turns[:at]), TARGET_FIELD: part.content}
            yield Question({**record, **told}, group=where, where=where)


def _checked(parts: Sequence[ChatPart], *, ask: bool) -> tuple[str | None, list[ChatPart]]:
    """Return the system text, and the turns of user and assistant; a RecordError names the key that is wrong."""
    systems = [part for part in parts if part.role == SYSTEM]
    said = [part for part in parts if part.role != SYSTEM]
    if len(systems) > 1:
        raise RecordError(f"two system texts, {systems[0].key} and {systems[1].key}; a conversation has one, in front")
    if systems and systems[0].key != SYSTEM and parts[0] is not systems[0]:
        raise RecordError(f"{systems[0].key} is a system text behind other turns; it stands in front of them")
    if not said:
        raise RecordError("a conversation without turns")
    for at, part in enumerate(said):
        if part.role != (ASSISTANT if at % 2 else USER):
            what = "the first turn must be the user's" if not at else "user and assistant take turns"
            raise RecordError(f"{part.key} is a turn of the {part.role}, and {what}")
    for part in (*systems, *said):
        if not part.content and not (ask and part.role == ASSISTANT):
            raise RecordError(f"{part.key} is empty")
    if said[-1].role == USER and not ask:
        raise RecordError(f"the conversation ends with the user ({said[-1].key}); there is no answer to learn")
    return (systems[0].content if systems else None), said
