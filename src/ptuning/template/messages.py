"""The turns of a conversation, as a record holds them: one text, which is JSON."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from ptuning.errors import RecordError
from ptuning.files import parse_json

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


class ChatMessage(NamedTuple):
    """What the user or the assistant said."""

    role: str
    content: str


Messages = tuple[ChatMessage, ...]


def write_messages(turns: Sequence[ChatMessage]) -> str:
    """Return the text of turns, from which :func:`read_messages` reads the same."""
    return json.dumps([turn._asdict() for turn in turns], ensure_ascii=False)


def read_messages(text: str, *, where: str = "the record") -> Messages:
    """Return the turns that a text holds; a text that is no list of turns is itself what the user said.

    Contents lose the white space around them. A RecordError if turns do not alternate or are not the user's in the end.

    >>> read_messages("Is it far?")
    (ChatMessage(role='user', content='Is it far?'),)
    """
    listed = _listed(text) if text.lstrip().startswith("[") else None
    if listed is None:
        return (ChatMessage(USER, text.strip()),)
    turns = tuple(ChatMessage(role, content.strip()) for role, content in listed)
    for number, turn in enumerate(turns):
        expected = ASSISTANT if number % 2 else USER
        if turn.role != expected:
            raise RecordError(f"{where}: turn {number + 1} is of the role '{turn.role}', and must be the {expected}'s")
    if len(turns) % 2 == 0:
        raise RecordError(f"{where}: the last turn is the assistant's, and the answer to the user's is asked for")
    return turns


def newest(turns: Messages, characters: int) -> Messages:
    """Return the newest turns that have at most ``characters`` together: of the oldest, a question goes with its
    answer. The last question alone is cut.
    """
    first, left = 0, sum(len(turn.content) for turn in turns)
    while first + 1 < len(turns) and left > characters:
        left -= len(turns[first].content) + len(turns[first + 1].content)
        first += 2
    kept = turns[first:]
    return kept if len(kept) > 1 else (ChatMessage(kept[0].role, kept[0].content[:characters]),)


def _listed(text: str) -> list[tuple[str, str]] | None:
    """Return roles and contents of a list of turns; None if the text is something else."""
    try:
        listed = parse_json(text)
    except ValueError:
        return None
    pairs: list[tuple[str, str]] = []
    for turn in listed if isinstance(listed, list) else ():
        role, content = (turn.get(name) for name in ChatMessage._fields) if isinstance(turn, dict) else (None, None)
        if not (isinstance(role, str) and isinstance(content, str)):
            return None
        pairs.append((role, content))
    return pairs or None
