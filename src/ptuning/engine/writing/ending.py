"""Where a written answer ends, and which text it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ptuning.backbone.backbone import Backbone
from ptuning.records import Record
from ptuning.template.encode import TokenizedTemplate

# What a tokenizer's decoder shows for the bytes of a letter that is not whole yet.
UNFINISHED = "\ufffd"
# Why an answer ended: at a token or a text that ends it, at the end of its line, or since there may be no more of it.
Stopped = Literal["end", "line", "length"]
# A stop string of N letters is looked for in the last tokens only: at most 4 bytes a letter, and some more.
MORE_TOKENS = 8


@dataclass(frozen=True)
class OpenRow:
    """A row to be answered by writing: the prompt's template, the record, and the most tokens of the answer."""

    bound: TokenizedTemplate
    record: Record
    max_tokens: int


@dataclass(frozen=True)
class Written:
    """A written answer: text, natural log-probability (with the stop token, if there is one), number of own tokens, and
    why it ended; masks that are filled have an end by themselves.
    """

    text: str
    log_prob: float
    tokens: int
    stopped: Stopped = "end"


@dataclass(frozen=True)
class Draft:
    """Tokens that were written, and their natural log-probability."""

    ids: tuple[int, ...] = ()
    log_prob: float = 0.0

    def grown(self, token: int, log_prob: float) -> Draft:
        """Return the draft with a token more."""
        return Draft((*self.ids, token), self.log_prob + log_prob)


class Ending:
    """Where the answer to a row ends: at a token that ends the model's texts, at a stop string, at its most tokens and,
    unless it may have several lines (``multiline``), after its first line. A text that only goes on (``as_is``) keeps
    the white space at its ends.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        max_tokens: int,
        multiline: bool,
        stop_strings: Sequence[str] = (),
        as_is: bool = False,
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = backbone.tokenizer
        self._multiline = multiline
        self.most = max_tokens
        self._as_is = as_is
        self._stop_strings = stop_strings
        self._tail = 4 * max(map(len, stop_strings), default=0) + MORE_TOKENS
        # The ends of a text and of an answer; and of a filled gap, for a model that learned to write one.
        self.ids = end_ids | self._tokenizer.end_ids | ({self._tokenizer.gap.end_id} - {None})

    @classmethod
    def of(cls, backbone: Backbone, row: OpenRow, *, stop_strings: Sequence[str] = ()) -> Ending:
        """Return where the answer of a prompt ends."""
        bound, most = row.bound, row.max_tokens
        return cls(
            backbone, max_tokens=most, multiline=bound.multiline, stop_strings=stop_strings, end_ids=bound.end_ids
        )

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether an answer ends with the last of its tokens."""
        return len(ids) >= self.most or self.is_own(ids)

    def is_own(self, ids: Sequence[int]) -> bool:
        """Whether the last token of an answer ends it by itself, and not only since there may be no more."""
        return ids[-1] in self.ids or self._ends_line(ids) or self._stops(ids)

    def _ends_line(self, ids: Sequence[int]) -> bool:
        # A line break before the answer does not end it.
        return not self._multiline and self._tokenizer.ends_line(ids[-1]) and bool(self._tokenizer.decode(ids).strip())

    def _stops(self, ids: Sequence[int]) -> bool:
        if not self._stop_strings:
            return False
        tail = self._tokenizer.decode(ids[-self._tail :])
        return any(one in tail for one in self._stop_strings)

    def written(self, draft: Draft) -> Written:
        """Return a draft as an answer; its log-probability includes the token that ended it, its tokens do not."""
        return Written(self.text(draft.ids), draft.log_prob, len(self._own(draft.ids)), self.stopped(draft.ids))

    def stopped(self, ids: Sequence[int]) -> Stopped:
        """Return why an answer ended with the last of its tokens."""
        if ids[-1] in self.ids or self._stops(ids):
            return "end"
        return "line" if self._ends_line(ids) else "length"

    def text(self, ids: Sequence[int], *, is_whole: bool = True) -> str:
        """Return the text of an answer or, unless it ``is_whole``, the part of it that more tokens will not change."""
        text = self._tokenizer.decode(self._own(ids))
        text = text[: min((at for one in self._stop_strings if (at := text.find(one)) >= 0), default=len(text))]
        if not is_whole:
            text = text.rstrip(UNFINISHED)
            begun = (size for one in self._stop_strings for size in range(1, len(one)) if text.endswith(one[:size]))
            text = text[: len(text) - max(begun, default=0)]
        if self._as_is:
            return text
        text = text.strip()
        return text if self._multiline else text.split("\n")[0].strip()

    def _own(self, ids: Sequence[int]) -> Sequence[int]:
        """Return the tokens without one that ended them and that has no text."""
        ends = ids[-1] in self.ids or (self._ends_line(ids) and not self._tokenizer.decode(ids[-1:]).strip())
        return ids[:-1] if ends else ids


class Growing:
    """The text of an answer while it is written, told in pieces that joined are the whole."""

    def __init__(self, ending: Ending) -> None:
        self._ending = ending
        self._told = ""

    def piece(self, ids: Sequence[int], *, is_whole: bool) -> str:
        """Return what is new of the text, as far as more tokens will not change it; all of it if it ``is_whole``."""
        text = self._ending.text(ids, is_whole=is_whole)
        if not text.startswith(self._told) or (len(text) <= len(self._told) and not is_whole):
            return ""
        new, self._told = text[len(self._told) :], text
        return new


def alike(rows: Sequence[OpenRow]) -> Iterator[tuple[tuple[TokenizedTemplate, int], list[int]]]:
    """Group rows by prompt and by the most tokens of their answers; yield both with the indices of the rows."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((id(row.bound), row.max_tokens), []).append(index)
    for indices in groups.values():
        yield (rows[indices[0]].bound, rows[indices[0]].max_tokens), indices


def different(written: Iterable[Written]) -> list[Written]:
    """Keep the first of the answers with the same text, which can end in different ways."""
    kept: dict[str, Written] = {}
    for one in written:
        kept.setdefault(one.text, one)
    return list(kept.values())
