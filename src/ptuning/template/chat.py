"""The chat template of a model: what it writes around the turns of a conversation, and a template made of that.

A chat template is a program that writes text. It is run on placeholder words, and the result
is cut at them: what is between is the model's markup, in which special tokens are such; the contents of a record go
into the gaps, where they are text.
"""

import contextlib
import itertools
import logging
import re
from collections.abc import Sequence

from ptuning.errors import BackboneError, RecordError, cut
from ptuning.template.language import Conversation, Literal, Piece, Target, Template, TextSlots, render
from ptuning.template.messages import ASSISTANT, SYSTEM, USER, ChatMessage, Messages
from ptuning.template.segments import LITERAL, NOTHING, MarkedText, Tokenizer, as_markup

logger = logging.getLogger(__name__)

# What the slots of a system text start from where neither the data nor the model has one.
DEFAULT_SYSTEM = "You are a helpful assistant."
# Between a system text and the user's, where a chat template has no place for the first.
APART = "\n\n"
# Placeholders of contents while a chat template is taken apart.
PLACEHOLDER = re.compile(r"qx\d{4,}xq")
# Letters that templates like to escape, to strip or to read as their own.
AWKWARD = 'Tom & "Ann" said: 5 > 3 <b>\n\n it\'s {{ not }} 100 %'


class ChatMarkup:
    """What a model's chat template writes around the turns of a conversation, whatever they say."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._around: dict[tuple[tuple[str, ...], bool], tuple[str, ...]] = {}

    def around(self, roles: Sequence[str], *, answer_next: bool = True) -> tuple[str, ...]:
        """Return the text before the content of each turn, and that after the last one. A BackboneError without a
        chat template, or if that does not write every content once and in order.
        """
        key = (tuple(roles), answer_next)
        if key not in self._around:
            words = [f"qx{number:04d}xq" for number in range(len(roles))]
            text = self._tokenizer.render_chat(list(map(ChatMessage, roles, words)), answer_next=answer_next)
            pieces = PLACEHOLDER.split(text)
            if PLACEHOLDER.findall(text) != words:
                raise BackboneError(
                    f"the chat template of this model does not write the texts of {', '.join(roles)} once and in this "
                    "order, so it cannot be used; write its markup into a template"
                )
            self._around[key] = tuple(pieces)
        return self._around[key]

    def between(self, turns: Messages) -> list[tuple[str, MarkedText]]:
        """Return the segments from the first content to the last one: contents, which are text and named by their role,
        and the markup between them.
        """
        pieces = self.around([turn.role for turn in turns])[1:]
        segments = [
            ((turn.role, MarkedText(turn.content)), (LITERAL, as_markup(piece, self._tokenizer)))
            for turn, piece in zip(turns, pieces, strict=True)
        ]
        return list(itertools.chain.from_iterable(segments))[:-1]

    def check(self, turns: Sequence[ChatMessage], *, answer_next: bool, where: str) -> None:
        """Raise a RecordError if the chat template changes a content: leaves a part of it out, or escapes letters."""
        roles = [turn.role for turn in turns]
        pieces = self.around(roles, answer_next=answer_next)
        written = self._tokenizer.render_chat(turns, answer_next=answer_next)
        contents = [*(turn.content for turn in turns), ""]
        if written == "".join(piece + content for piece, content in zip(pieces, contents, strict=True)):
            return
        changed = next((turn for turn in turns if turn.content not in written), turns[-1])
        raise RecordError(
            f"{where}: the model's chat template does not write the {changed.role}'s text '{cut(changed.content)}' as "
            "it is; leave out of it what the template takes for its own, such as </think>"
        )


def chat_template(tokenizer: Tokenizer, system: str | None = None) -> Template:
    """Return the template of a model's conversations: its chat template around ``[C]``, the turns, and ``[Y]``, the
    answer, with slots that start at the ``system`` text; by default at the chat template's own.

    They are placed where a system text is, or before the user's text if the chat template has no place for one.

    Raises:
        BackboneError: If the model has no chat template, or it changes the contents of turns.
    """
    markup = ChatMarkup(tokenizer)
    for roles in ([USER, ASSISTANT], [USER, ASSISTANT, USER, ASSISTANT]):
        turns = [ChatMessage(role, f"{AWKWARD} {number}") for number, role in enumerate(roles)]
        try:
            markup.check(turns, answer_next=False, where="")
        except RecordError as error:
            raise BackboneError(
                "the chat template of this model does not write the texts of turns as they are (it escapes or leaves "
                "out letters), so it cannot be used; write its markup into a template"
            ) from error
    opening, header, _ = markup.around([USER, ASSISTANT], answer_next=False)
    longer = markup.around([USER, ASSISTANT, USER, ASSISTANT], answer_next=False)
    if (opening, header) != (longer[0], longer[3]):
        raise BackboneError(
            "the chat template of this model begins the conversation or its last answer in another way when there are "
            "more turns, so it cannot be used; write its markup into a template"
        )
    asking = markup.around([USER])[-1]
    if not header.startswith(asking):
        text = "the chat template asks for an answer after %r, and writes answers after %r, where they are learned"
        logger.warning(text, asking, header)
    # The text after an answer up to the special token that ends the turn, as the conversation goes on.
    end = first_special(markup.around([USER, ASSISTANT, USER])[2], tokenizer)
    if end is None:
        end = next((name for name, index in tokenizer.special_ids.items() if index == tokenizer.stop_id), "")
    own, after = "", APART
    with contextlib.suppress(BackboneError):  # no place for a system text before all turns
        first, second, *_ = markup.around([SYSTEM, USER])
        if markup.around([SYSTEM, USER, ASSISTANT, USER])[:2] == (first, second):
            if len(opening) >= len(first + second) and opening.startswith(first) and opening.endswith(second):
                own = opening[len(first) : len(opening) - len(second)].strip()
            opening, after = first, second
    pieces: list[Piece] = [Literal(opening), TextSlots(system or own or DEFAULT_SYSTEM), Literal(after)]
    pieces += [Conversation(), Literal(header), Target(), Literal(end)]
    return Template(tuple(piece for piece in pieces if piece != Literal("")))


def first_special(text: str, tokenizer: Tokenizer) -> str | None:
    """Return the beginning of a text up to its first special token, if only white space is before that."""
    begun = text.lstrip()
    names = [name for name in tokenizer.special_ids if begun.startswith(name)]
    return text[: len(text) - len(begun)] + max(names, key=len) if names else None


def own_end(template: Template, tokenizer: Tokenizer) -> tuple[MarkedText, str]:
    """Return the special token after ``[Y]``, with which answers end, and the rest of the text there."""
    left, dropped = template.without_tail()
    after = template.pieces[len(left.pieces) :]
    if not (after and isinstance(after[0], Literal) and (special := first_special(after[0].text, tokenizer))):
        return NOTHING, dropped
    rest = Literal(after[0].text.removeprefix(special))
    return MarkedText(special, ((0, len(special)),)), render([rest, *after[1:]])
