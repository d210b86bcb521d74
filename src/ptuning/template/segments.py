"""Text -> token ids, cut into the segments that the text was put together from."""

from __future__ import annotations

import functools
import itertools
import operator
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

from ptuning.template.messages import ChatMessage

Ids = tuple[int, ...]

# The kinds of language models, by what their input must look like.
Kind = Literal["causal", "masked", "permuted", "encoder-decoder"]
# The kinds that read masks at the target's place, and fill them all at once.
FILLS_MASKS: tuple[Kind, ...] = ("masked", "permuted")

# Names of segments; callers may use others.
LITERAL, TARGET = "literal", "target"
# A placeholder word that shows how the text next to a missing word is tokenised; it is cut off again.
ANCHOR_WORD = "a"


@dataclass(frozen=True)
class Gap:
    """The ids around a target in an encoder-decoder model that fills gaps: ``encoder_ids`` in its place on the
    encoder's side, ``decoder_ids`` before it on the decoder's side. ``end_id`` ends it there, if not the stop token.
    """

    encoder_ids: Ids = ()
    decoder_ids: Ids = ()
    end_id: int | None = None


class MarkedText(NamedTuple):
    """Characters, and the (start, end) spans of ``markup``: what a template wrote there with special tokens in it. Only
    these special tokens are such, also where a record writes the same.
    """

    characters: str
    markup: tuple[tuple[int, int], ...] = ()

    def __add__(self, other: MarkedText) -> MarkedText:  # type: ignore[override]  # one text, not a longer tuple
        if not other.markup:
            return MarkedText(self.characters + other.characters, self.markup)
        shift = len(self.characters)
        moved = tuple((start + shift, end + shift) for start, end in other.markup)
        return MarkedText(self.characters + other.characters, (*self.markup, *moved))

    def removesuffix(self, suffix: str) -> MarkedText:
        """Return the text without an ending, if it has that."""
        left = self.characters.removesuffix(suffix)
        return MarkedText(left, tuple((start, min(end, len(left))) for start, end in self.markup))

    def has_markup(self, start: int, end: int) -> bool:
        """Whether the text from ``start`` to ``end``, without white space around it, is markup."""
        name = self.characters[start:end].strip()
        start = self.characters.index(name, start)
        at = bisect_right(self.markup, (start, len(self.characters))) - 1  # spans are in order, and apart
        return at >= 0 and start + len(name) <= self.markup[at][1]


NOTHING = MarkedText("")


class Tokenizer(Protocol):
    """A tokenizer, as far as templates need it. It adds no special tokens."""

    prefix_ids: Ids  # put before a sentence, such as BOS or CLS
    suffix_ids: Ids  # put after a sentence, such as SEP
    mask_id: int | None
    unknown_id: int | None  # the token of text that has no other
    stop_id: int | None  # the end of a text
    line_end_id: int | None  # a line break, if that is one token
    gap: Gap
    decoder_ids: Ids  # the start of a decoder's side
    special_ids: Mapping[str, int]  # special tokens by their text
    max_tokens: int  # longest row that the model takes

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text; special tokens in it are plain text."""
        ...

    def encode_markup(self, texts: Sequence[MarkedText]) -> list[list[int]]:
        """Return the token ids of each text; special tokens in its markup are special, others plain text."""
        ...

    def render_chat(self, turns: Sequence[ChatMessage], *, answer_next: bool) -> str:
        """Return a conversation as the model's chat template writes it, perhaps with the beginning of an answer. Raises
        a BackboneError without a chat template, or if that refuses the turns.
        """
        ...


def as_markup(text: str, tokenizer: Tokenizer) -> MarkedText:
    """Return a text that a template wrote; it is markup if it has special tokens in it."""
    is_markup = any(token in text for token in tokenizer.special_ids)
    return MarkedText(text, ((0, len(text)),) if is_markup else ())


@dataclass(frozen=True)
class TextRun:
    """Text that is tokenised as one string: (name, text) segments, of which at most one is the :data:`TARGET`; its text
    is :data:`ANCHOR_WORD` if ``is_open``. ``lead`` is text in front that is cut off again; see :meth:`after_slots`.
    """

    segments: tuple[tuple[str, MarkedText], ...]
    is_open: bool = False
    lead: MarkedText = NOTHING

    @functools.cached_property
    def prefixes(self) -> list[MarkedText]:
        """The text up to the end of each segment, with the lead; the last one is the whole text. If it has markup, all
        are marked, since the two kinds of text are tokenised in different ways.
        """
        texts = list(itertools.accumulate((text for _, text in self.segments), operator.add, initial=self.lead))[1:]
        return [text._replace(markup=text.markup or ((0, 0),)) for text in texts] if texts[-1].markup else texts

    def after_slots(self, tail: MarkedText = NOTHING) -> TextRun:
        """Return the run after slots, not as a text's beginning: as after the text that they end with (``tail``), or
        after any word. Only a word glued to slots without a tail begins anew.
        """
        if tail.characters:
            return replace(self, lead=tail)
        first = next((text.characters for _, text in self.segments if text.characters), "")
        return self if first[:1].isalnum() else replace(self, lead=MarkedText(ANCHOR_WORD))


class Encoded(dict[MarkedText, Ids]):
    """The ids of texts: all that cutting ``runs`` looks up is encoded in one call, other texts when asked for."""

    def __init__(self, tokenizer: Tokenizer, runs: Iterable[TextRun]) -> None:
        texts: dict[MarkedText, None] = {}
        for run in runs:
            *inner, whole = run.prefixes
            texts |= dict.fromkeys((whole, *itertools.chain.from_iterable(map(_probes, inner))))
        self._tokenizer = tokenizer
        plain, marked = ([text for text in texts if bool(text.markup) == has] for has in (False, True))
        super().__init__(zip(plain, map(tuple, tokenizer.encode([text.characters for text in plain])), strict=True))
        if marked:
            self.update(zip(marked, map(tuple, tokenizer.encode_markup(marked)), strict=True))

    def __missing__(self, text: MarkedText) -> Ids:
        self.update(Encoded(self._tokenizer, [TextRun(((LITERAL, text),))]))
        return self[text]

    def cut(self, run: TextRun) -> list[tuple[str, Ids]]:
        """Return (name, ids) of a run's segments. A token belongs to the segment in which it ends, but one that begins
        in the target is the target's; an unknown target has no ids. The cuts come from ever longer prefixes rather
        than character offsets, which tokenizers trim and normalise in different ways.
        """
        *inner, whole = run.prefixes
        ids = self[whole]
        lead_ids = self[run.lead] if run.lead.characters else ()
        if ids[: len(lead_ids)] != lead_ids:  # lead and text share a token
            return self.cut(replace(run, lead=NOTHING))
        before = [lead_ids, *map(self._within, inner)]
        cuts = [*itertools.accumulate((_common(prefix_ids, ids) for prefix_ids in before), max), len(ids)]
        spans = [(name, ids[cuts[at] : cuts[at + 1]]) for at, (name, _) in enumerate(run.segments)]
        target = next((at for at, (name, _) in enumerate(run.segments) if name == TARGET), None)
        if target is None:
            return spans
        # The last token of a word may be joined with the text after it.
        is_whole = target + 1 == len(spans) or cuts[target + 1] == len(before[target + 1])
        if spans[target][1] and is_whole and not run.is_open:
            return spans
        if run.is_open and spans[target][1] and cuts[target] == len(before[target]):
            return [*spans[:target], (TARGET, ()), *spans[target + 1 :]]
        text = sum((text for _, text in run.segments[target + 1 :]), start=NOTHING)
        after = self[text]
        if run.is_open:
            # The placeholder word shares a token with the text next to it, so that text is tokenised alone.
            return [(LITERAL, before[target][len(lead_ids) :]), (TARGET, ()), (LITERAL, after)]
        # The target's last token reaches into the text after it, as in "[Y]s"; the whole token is the target's.
        rest = ids[cuts[target] :]
        own = len(rest) - max(_common(end[::-1], rest[::-1]) for end in (after, self._after_word(text)))
        name = run.segments[target + 1][0] if target + 2 == len(spans) else LITERAL
        return [*spans[:target], (TARGET, rest[:own]), (name, rest[own:])]

    def _after_word(self, text: MarkedText) -> Ids:
        """Return the ids that a text has after a word; nothing if the two share a token."""
        word, both = self[MarkedText(ANCHOR_WORD)], self[MarkedText(ANCHOR_WORD) + text]
        return both[len(word) :] if both[: len(word)] == word else ()

    def _within(self, prefix: MarkedText) -> Ids:
        """Return the ids of the beginning of a text as they are when more follows: two line breaks may be one token."""
        alone, followed, word = (self[text] for text in _probes(prefix))
        apart = followed[: len(alone)] != alone and followed[-len(word) :] == word
        return followed[: -len(word)] if apart else alone


def _probes(prefix: MarkedText) -> tuple[MarkedText, MarkedText, MarkedText]:
    """Return a prefix without a space at its end, the same followed by a word, and the word."""
    shorter = prefix.removesuffix(" ")
    word = MarkedText(prefix.characters[len(shorter.characters) :] + ANCHOR_WORD)
    return shorter, shorter + word, word


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of leading ids that two sequences share."""
    if other[: len(one)] == one:
        return len(one)
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
