"""Text -> token ids, cut into the segments that the text was put together from. Knows no templates and no model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

Ids = tuple[int, ...]

# The kinds of language models, by what their input must look like.
Kind = Literal["causal", "masked", "permuted", "encoder-decoder"]
# The kinds that read masks at the target's place, and fill them all at once.
FILLS_MASKS: tuple[Kind, ...] = ("masked", "permuted")

# What a segment is called; others are called as their makers like.
LITERAL, TARGET = "literal", "target"
# A word that stands in for one that is not there, to see how the text beside it is tokenised; it is cut off again.
ANCHOR_WORD = "a"


@dataclass(frozen=True)
class Gap:
    """What stands for the target where an encoder-decoder model learned to fill gaps.

    Args:
        encoder_ids: At the target's place in what the encoder reads.
        decoder_ids: In front of the target on the decoder's side.
        end_id: What ends the target there, if not the end of the text.
    """

    encoder_ids: Ids = ()
    decoder_ids: Ids = ()
    end_id: int | None = None


class Tokenizer(Protocol):
    """What filling needs of a tokenizer. ``encode`` adds no special tokens and treats special text as plain text."""

    prefix_ids: Ids  # what the tokenizer puts in front of a sentence, such as BOS or CLS
    suffix_ids: Ids  # what it puts behind one, such as SEP
    mask_id: int | None
    unknown_id: int | None  # what stands for text that has no token
    stop_id: int | None  # what ends a text
    line_end_id: int | None  # what ends a line, if that is one token
    gap: Gap
    decoder_ids: Ids  # what a decoder starts with
    special_ids: Mapping[str, int]  # special tokens by their text
    max_tokens: int  # longest row the model takes

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        ...


@dataclass(frozen=True)
class TextRun:
    """Text that is tokenised as one string.

    Args:
        segments: (name, text) in order; at most one is the :data:`TARGET`.
        is_open: Whether the target is not known; then :data:`ANCHOR_WORD` is its text.
        lead: A word that is put in front and cut off again; see :meth:`behind_slots`.
    """

    segments: tuple[tuple[str, str], ...]
    is_open: bool = False
    lead: str = ""

    @property
    def prefixes(self) -> list[str]:
        """The text up to the end of each segment, with the lead; the last is the whole text."""
        return list(itertools.accumulate((text for _, text in self.segments), initial=self.lead))[1:]

    def behind_slots(self) -> TextRun:
        """Return the run as it goes on behind slots: there it is not the beginning of a text, which some tokenizers
        mark. Only a word that is glued to the slots begins anew.
        """
        return self if self.prefixes[-1][:1].isalnum() else replace(self, lead=ANCHOR_WORD)


class Encoded(dict[str, Ids]):
    """The ids of texts: all that cutting ``runs`` looks up is encoded in one call, any other text when it is asked for.

    Args:
        tokenizer: Encodes the texts.
        runs: The runs to cut.
    """

    def __init__(self, tokenizer: Tokenizer, runs: Iterable[TextRun]) -> None:
        texts: dict[str, None] = {}
        for run in runs:
            *inner, whole = run.prefixes
            texts |= dict.fromkeys((whole, *itertools.chain.from_iterable(map(_probes, inner))))
        super().__init__(zip(texts, map(tuple, tokenizer.encode(list(texts))), strict=True))
        self._tokenizer = tokenizer

    def __missing__(self, text: str) -> Ids:
        self[text] = ids = tuple(self._tokenizer.encode([text])[0])
        return ids

    def cut(self, run: TextRun) -> list[tuple[str, Ids]]:
        """Return (name, ids) of a run's segments; a token belongs to the segment in which it ends, but one
        that begins in the target belongs to the target.

        The cuts are found by tokenising ever longer prefixes of the text rather than by character offsets, which
        tokenizers trim and normalise in different ways. A target that is not known has no ids.
        """
        *inner, whole = run.prefixes
        ids = self[whole]
        lead_ids = self[run.lead] if run.lead else ()
        if ids[: len(lead_ids)] != lead_ids:  # lead and text have grown together
            return self.cut(replace(run, lead=""))
        before = [lead_ids, *map(self._within, inner)]
        cuts = [*itertools.accumulate((_common(prefix_ids, ids) for prefix_ids in before), max), len(ids)]
        spans = [(name, ids[cuts[at] : cuts[at + 1]]) for at, (name, _) in enumerate(run.segments)]
        target = next((at for at, (name, _) in enumerate(run.segments) if name == TARGET), None)
        if target is None:
            return spans
        # A word of several tokens may grow together with what follows by its last one alone.
        is_whole = target + 1 == len(spans) or cuts[target + 1] == len(before[target + 1])
        if spans[target][1] and is_whole and not run.is_open:
            return spans
        if run.is_open and spans[target][1] and cuts[target] == len(before[target]):
            return [*spans[:target], (TARGET, ()), *spans[target + 1 :]]
        text = "".join(text for _, text in run.segments[target + 1 :])
        behind = self[text]
        if run.is_open:
            # The word in the target's place has grown together with the text beside it, which is then taken alone.
            return [(LITERAL, before[target][len(lead_ids) :]), (TARGET, ()), (LITERAL, behind)]
        # The target's last token runs on into the text behind it, as in "[Y]s"; then that whole token is the target's.
        rest = ids[cuts[target] :]
        own = len(rest) - max(_common(end[::-1], rest[::-1]) for end in (behind, self._behind_word(text)))
        return [*spans[:target], (TARGET, rest[:own]), (LITERAL, rest[own:])]

    def _behind_word(self, text: str) -> Ids:
        """Return the ids of the end of a text as they are behind a word; nothing where the two grow together."""
        word, both = self[ANCHOR_WORD], self[ANCHOR_WORD + text]
        return both[len(word) :] if both[: len(word)] == word else ()

    def _within(self, prefix: str) -> Ids:
        """Return the ids of the beginning of a text as they are when more follows.

        Two line breaks may be one token at the end of a text, and two tokens in front of a word.
        """
        alone, followed, word = (self[text] for text in _probes(prefix))
        apart = followed[: len(alone)] != alone and followed[-len(word) :] == word
        return followed[: -len(word)] if apart else alone


def _probes(prefix: str) -> tuple[str, str, str]:
    """Return a prefix without a space at its end, the same with a word behind it, and the word."""
    shorter = prefix.removesuffix(" ")
    word = prefix[len(shorter) :] + ANCHOR_WORD
    return shorter, shorter + word, word


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many ids two sequences share from their beginning."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
