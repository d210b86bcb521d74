"""The template language: parse a pattern into pieces, write pieces as a pattern.

Grammar:
    ``[P]`` ``[P*3]``   one / three slots (virtual tokens), started at random
    ``[P:words]``       one slot per token of the words, started at their embeddings; ``]]`` and ``[[`` inside are
                        literal brackets
    ``[D]`` ``[D*3]``   deep slots, which have a vector of their own in every layer; started at tokens of the data
    ``[D:words]``       one deep slot per token of the words, which it is before training
    ``[D:examples]``    worked examples of the training data as deep slots; training puts their words in its place
    ``{name}``          the record's field, may be truncated; ``{name!}`` never is
    ``[X]``             short for ``{x}``
    ``[C]``             the conversation of a chat, in the markup of the model's chat template; at most one
    ``[Y]``             the target, exactly one
    ``[>]``             from here on the decoder reads (encoder-decoder models only); at most one, before ``[Y]``
    ``[[`` ``{{``       literal opening brackets
    anything else       literal text
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ptuning.errors import TemplateError
from ptuning.records import TARGET_FIELD

EXPECTED = "expected [P], [P*3], [P:words], [D], [D*3], [D:words], [X], [C], [Y] or [>]; write [[ for a literal bracket"
# The record's field that [C] reads: the turns of a conversation as JSON, or the text of one turn of the user.
CONVERSATION_FIELD = "messages"
MAX_SLOTS = 1000
DEFAULT_FRONT_SLOTS = 3
# The words of ``[D:examples]``, a placeholder of examples of the training data.
EXAMPLES = "examples"


@dataclass(frozen=True)
class Literal:
    """Text that is the same in every filled template (the paper's anchors)."""

    text: str


@dataclass(frozen=True)
class Field:
    """A field of the record; with ``keep`` it is never truncated."""

    name: str
    keep: bool = False


@dataclass(frozen=True)
class Conversation(Field):
    """The turns of a conversation, from the user's first text to the last one, with the markup of the model's own chat
    template between them. The oldest turns are left out where there is no room for all.
    """

    name: str = CONVERSATION_FIELD


@dataclass(frozen=True)
class Slots:
    """A number of slots that start at random; ``deep`` ones have a vector in every layer, and start at tokens of the
    training data.
    """

    count: int
    deep: bool = False


@dataclass(frozen=True)
class TextSlots:
    """One slot per token of ``text``, started at the embeddings of those tokens (warm start); ``deep`` ones have a
    vector in every layer.
    """

    text: str
    deep: bool = False


@dataclass(frozen=True)
class Target:
    """The place of the text to predict."""


@dataclass(frozen=True)
class Turn:
    """Start of the decoder's side in a template for an encoder-decoder model."""


Piece = Literal | Field | Slots | TextSlots | Target | Turn
SHOWN_EXAMPLES = TextSlots(EXAMPLES, deep=True)
BRACKETS: Mapping[str, Piece] = {
    "X": Field("x"),
    "C": Conversation(),
    "Y": Target(),
    ">": Turn(),
    "P": Slots(1),
    "D": Slots(1, deep=True),
}
TOKEN = re.compile(
    r"""(?P<escape>\[\[|\{\{)
    |\[(?P<kind>[PD]):(?P<words>(?:\[\[|\]\]|[^\[\]])*)\](?!\])
    |\[(?![PD]:)(?P<bracket>[^\]]*)\]
    |\{(?P<field>[^}]*)\}
    |(?P<text>[^\[{]+)""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Template:
    """A parsed pattern: pieces in order, neighbouring literals joined. Raises a TemplateError if there is not exactly
    one target, if its own field is also an input, if ``[>]`` is there twice or after the target, if ``[C]`` or
    ``[D:examples]`` is there twice, or if a text holds half a character.

    >>> [type(piece).__name__ for piece in Template.parse("[P:The capital of] [X] is [Y]").pieces]
    ['TextSlots', 'Literal', 'Field', 'Literal', 'Target']
    """

    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        pattern = str(self)
        try:
            pattern.encode()
        except UnicodeEncodeError as error:
            message = "half a character (a lone surrogate); write the template in UTF-8"
            raise TemplateError(message, pattern=pattern, column=error.start) from error
        for kind, message in (
            (Target, "a template has exactly one [Y], this one has two or more"),
            (Turn, "a template turns to the decoder's side once, this one has two or more [>]"),
            (Conversation, "a template has one conversation, this one has two or more [C]"),
            (SHOWN_EXAMPLES, "a template shows examples once, this one has two or more [D:examples]"),
        ):
            places = self._places(kind)
            if len(places) > 1:
                raise self.error(message, places[1])
        if not self._places(Target):
            raise self.error("a template needs one [Y], the place of the target; this one has none", len(self.pieces))
        if self.turn is not None and self.turn > self.target:
            raise self.error("[>] comes after [Y], but the target is always on the decoder's side", self.turn)
        for index, piece in enumerate(self.pieces):
            if isinstance(piece, Field) and piece.name == TARGET_FIELD:
                raise self.error("{y} would show the target to the model; write [Y] where it is to be predicted", index)

    @classmethod
    def parse(cls, pattern: str) -> Template:
        """Parse a pattern; a TemplateError shows it with a caret at the column, and what was expected."""
        return cls(tuple(_joined(_scan(pattern))))

    @classmethod
    def from_manual(cls, manual: str, *, about: str | None = None, after: bool = False) -> Template:
        """Make a learned template from a manual one: its words become slots that start from them.

        ``about``, a noun, goes first. Without it, a manual template that begins with a field gets three random slots
        first, since slots on both sides learn better. Source: docs/decisions.md, decision 34 (six LAMA relations).
        With ``after``, only words after the last field become slots, and others stay words: a causal model then reads
        a long text once for all epochs (decision 38).
        Raises a TemplateError if the manual template is malformed or has slots already, or if there are no words
        between the last field and the target to be slots ``after`` it.

        >>> str(Template.from_manual("[X] is located in [Y]", about="country"))
        '[P:The country:] [X] [P:is located in] [Y]'
        >>> str(Template.from_manual("Message: {text} It is for [Y]", after=True))
        'Message: {text} [P:It is for] [Y]'
        """
        parsed = cls.parse(manual)
        parsed.check_manual()
        noun = about.strip() if about is not None else ""
        if after:
            at = parsed.end_of_fields()
            words = [Literal(f"The {noun}: ")] if noun else []
            return cls(tuple(_joined([*words, *parsed.pieces[:at], *_words_to_slots(parsed.pieces[at:])])))
        front: list[Piece] = []
        if noun:
            front = [TextSlots(f"The {noun}:"), Literal(" ")]
        elif not (isinstance(parsed.pieces[0], Literal) and parsed.pieces[0].text.strip()):
            front = [Slots(DEFAULT_FRONT_SLOTS), Literal(" ")]
        return cls(tuple(_joined([*front, *_words_to_slots(parsed.pieces)])))

    def check_manual(self) -> None:
        """Raise a TemplateError at the first slot."""
        if self.has_slots:
            index = min(self._places(Slots | TextSlots))
            raise self.error("a manual template has no slots; give this one as template", index)

    def _places(self, kind: Any) -> list[int]:
        """Return the indices of the pieces of a type, or equal to a piece."""
        is_type = not isinstance(kind, TextSlots)
        return [at for at, piece in enumerate(self.pieces) if (isinstance(piece, kind) if is_type else piece == kind)]

    @property
    def target(self) -> int:
        """Index of ``[Y]`` among the pieces."""
        return self._places(Target)[0]

    @property
    def turn(self) -> int | None:
        """Index of ``[>]`` among the pieces, None without one."""
        return next(iter(self._places(Turn)), None)

    @property
    def examples(self) -> int | None:
        """Index of ``[D:examples]`` among the pieces, None without one."""
        return next(iter(self._places(SHOWN_EXAMPLES)), None)

    @property
    def has_slots(self) -> bool:
        """Whether the template has slots; without, it is a manual prompt."""
        return bool(self._places(Slots | TextSlots))

    @property
    def has_deep(self) -> bool:
        """Whether some of its slots are deep."""
        return any(isinstance(piece, Slots | TextSlots) and piece.deep for piece in self.pieces)

    @property
    def has_input_slots(self) -> bool:
        """Whether some of its slots are not deep."""
        return any(isinstance(piece, Slots | TextSlots) and not piece.deep for piece in self.pieces)

    @property
    def has_conversation(self) -> bool:
        """Whether the template reads a conversation (``[C]``)."""
        return bool(self._places(Conversation))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the record's fields that the template reads, without the target, in order of appearance."""
        return tuple(dict.fromkeys(piece.name for piece in self.pieces if isinstance(piece, Field)))

    def end_of_fields(self) -> int:
        """Return the index after the last field before the target; a TemplateError without words there."""
        at = 1 + max((index for index in self._places(Field) if index < self.target), default=-1)
        if not at or not any(map(_has_words, self.pieces[at : self.target])):
            raise self.error("no words between the last field and [Y], which could be slots after the text", at)
        return at

    def without_tail(self) -> tuple[Template, str]:
        """Return the template up to the target, and the dropped rest as a pattern (for models that write)."""
        end = self.target + 1
        return Template(self.pieces[:end]), render(self.pieces[end:])

    def without_slots(self) -> Template:
        """Return the template with words in place of the slots that start at them, and without random slots.

        >>> str(Template.parse("[P*3] [X] [P:is] [P] [Y]").without_slots())
        '[X] is [Y]'
        """
        left: list[Piece] = []
        for piece in self.pieces:
            if isinstance(piece, Slots):
                continue
            if isinstance(piece, TextSlots):
                left.append(Literal(piece.text))
                continue
            last = left[-1] if left else Literal(" ")
            if isinstance(piece, Literal) and isinstance(last, Literal) and last.text.endswith(" "):
                piece = Literal(piece.text.removeprefix(" "))
            if piece != Literal(""):
                left.append(piece)
        return Template(tuple(_joined(left)))

    def error(self, message: str, index: int) -> TemplateError:
        """Return the error that shows the template with a caret under the piece at ``index``."""
        return TemplateError(message, pattern=str(self), column=len(render(self.pieces[:index])))

    def __str__(self) -> str:
        return render(self.pieces)


def render(pieces: Iterable[Piece]) -> str:
    """Write pieces as a pattern, from which ``Template.parse`` reads the same pieces."""
    written = []
    for piece in pieces:
        match piece:
            case Literal(text):
                written.append(text.replace("[", "[[").replace("{", "{{"))
            case Conversation():
                written.append("[C]")
            case Field(name, keep):
                written.append("[X]" if name == "x" and not keep else f"{{{name}{'!' if keep else ''}}}")
            case Slots(count, deep):
                written.append(f"[{'D' if deep else 'P'}{'' if count == 1 else f'*{count}'}]")
            case TextSlots(text, deep):
                written.append(f"[{'D' if deep else 'P'}:{text.replace('[', '[[').replace(']', ']]')}]")
            case Target():
                written.append("[Y]")
            case Turn():
                written.append("[>]")
    return "".join(written)


def _scan(pattern: str) -> Iterator[Piece]:
    at = 0
    while at < len(pattern):
        match = TOKEN.match(pattern, at)
        if match is None:
            if pattern[at] == "{":
                message = "unclosed brace; expected {field} or {field!}, and {{ for a literal brace"
            elif pattern.startswith(("[P:", "[D:"), at):
                words = pattern[at : at + 2]
                message = (
                    f"unclosed bracket; expected ] after the words of {words}:words], and [[ for a bracket among them"
                )
            else:
                message = f"unclosed bracket; {EXPECTED}"
            raise TemplateError(message, pattern=pattern, column=at)
        yield _piece(match)
        at = match.end()


def _piece(match: re.Match[str]) -> Piece:
    """Return the piece of a token; a TemplateError if it is none."""
    message, kind = "", match["kind"]
    if match["text"] or match["escape"]:
        return Literal(match["text"] or match["escape"][0])
    if kind:
        if match["words"].strip():
            return TextSlots(match["words"].replace("[[", "[").replace("]]", "]"), deep=kind == "D")
        start = "at a token of the data" if kind == "D" else "at random"
        message = f"[{kind}:words] without words; write [{kind}] for one slot that starts {start}"
    elif match["field"] is not None:
        name = match["field"].removesuffix("!")
        if name.strip() and name == name.strip() and not {"{", "["} & {*name}:
            return Field(name, keep=match["field"].endswith("!"))
        message = "a field's name goes in braces; expected {field} or {field!}"
    elif match["bracket"] in BRACKETS:
        return BRACKETS[match["bracket"]]
    elif counted := re.fullmatch(r"([PD])\*([0-9]+)", match["bracket"]):
        digits = counted[2]
        if len(digits) < 7 and 1 <= int(digits) <= MAX_SLOTS:
            return Slots(int(digits), deep=counted[1] == "D")
        message = f"a piece takes 1 to {MAX_SLOTS} slots, not {digits}"
    else:
        message = f"unknown piece [{match['bracket']}]; {EXPECTED}"
    raise TemplateError(message, pattern=match.string, column=match.start())


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for _, alike in itertools.groupby(pieces, lambda piece: isinstance(piece, Literal)):
        group = list(alike)
        texts = [piece.text for piece in group if isinstance(piece, Literal)]
        joined += [Literal("".join(texts))] if texts else group
    return joined


def _has_words(piece: Piece) -> bool:
    return isinstance(piece, Literal) and re.search(r"\w", piece.text) is not None


def _words_to_slots(pieces: Iterable[Piece]) -> list[Piece]:
    turned: list[Piece] = []
    for piece in pieces:
        # Punctuation alone stays an anchor: it holds the sentence together, and there is no wording to learn.
        if not isinstance(piece, Literal) or not _has_words(piece):
            turned.append(piece)
            continue
        words = piece.text.strip()
        before, after = piece.text.split(words, 1)
        turned += [piece for piece in (Literal(before), TextSlots(words), Literal(after)) if piece.text]
    return turned
