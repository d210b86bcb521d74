"""Slot coverage: the share of given attribute values that a text mentions, and the share of invented ones.

Attributes are written as in ADGEN (``name#Kenya*capital#Nairobi``) or as in E2E (``name[Kenya], capital[Nairobi]``).
The idea is that of ``slot_error.py`` of Dusek et al. (2019), E2E cleaning, without its lists of words.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence

from ptuning.errors import RecordError
from ptuning.records import TARGET_FIELD, Record, references_of
from ptuning.statistics import Ratios

# Boolean values, which no text mentions as they are.
WITHOUT_WORDS = frozenset({"yes", "no"})
ADGEN = re.compile(r"[^#*]+#[^#*]+(\*[^#*]+#[^#*]+)*")
E2E = re.compile(r"\s*[^][,]+\[[^][]+\](\s*,\s*[^][,]+\[[^][]+\])*\s*")
E2E_VALUE = re.compile(r"\[([^][]+)\]")
# A word as a name or number may be one, with a domain's dot.
WORD = re.compile(r"(?<!\w)\.?\w[\w'&-]*")
POSSESSIVE = re.compile(r"['’]s?$")
SENTENCE_ENDS = ".!?:;"

Span = tuple[int, int]


def values_of(text: str) -> tuple[str, ...] | None:
    """Return the distinct values of written attributes; None if the text is something else.

    >>> values_of("name#Kenya*capital#Nairobi"), values_of("name[Aromi], area[city centre]"), values_of("Kenya")
    (('Kenya', 'Nairobi'), ('Aromi', 'city centre'), None)
    """
    if ADGEN.fullmatch(text):
        values = [part.partition("#")[2] for part in text.split("*")]
    elif E2E.fullmatch(text):
        values = E2E_VALUE.findall(text)
    else:
        return None
    return tuple(dict.fromkeys(value.strip() for value in values if value.strip().lower() not in WITHOUT_WORDS))


def coverage(texts: Sequence[str], records: Sequence[Record]) -> dict[str, Ratios]:
    """Return ``coverage``, the share of values that the texts mention, and ``invented``, the share of the mentioned
    values that are in neither the attributes nor a reference.

    A value is mentioned if it is in the text, in any case. Invented are values of other rows, and names and numbers:
    words with a capital inside a sentence, with a digit, or with a leading dot.
    """
    import numpy as np

    field = content_field(records)
    attributes = [values_of(record[field]) or () for record in records]
    every = list(dict.fromkeys(value for own in attributes for value in own))
    rows = []
    for text, record, own in zip(texts, records, attributes, strict=True):
        mentioned = sum(_places(value, text) != [] for value in own)
        known = (record[field], *references_of(record))
        rows.append((mentioned, len(own), len(_invented(text, known, every))))
    table = np.array(rows, dtype=np.float64)
    mentioned_counts, given, invented = table[:, :1], table[:, 1:2], table[:, 2:]
    return {"coverage": Ratios(mentioned_counts, given), "invented": Ratios(invented, mentioned_counts + invented)}


def content_field(records: Sequence[Record]) -> str:
    """Return the field that holds attributes in most records; a RecordError if there is none."""
    names = [name for name in dict.fromkeys(name for record in records for name in record) if name != TARGET_FIELD]
    counts = {name: sum(values_of(record.get(name, "")) is not None for record in records) for name in names}
    best = max(names, key=lambda name: counts[name], default=None)
    if best is None or 2 * counts[best] <= len(records):
        raise RecordError(
            "the metric 'coverage' reads attributes, such as name#Kenya*capital#Nairobi or name[Kenya], "
            f"capital[Nairobi], and no field holds them; fields: {', '.join(names) or 'none'}"
        )
    return best


def _invented(text: str, known: Sequence[str], values: Sequence[str]) -> list[Span]:
    """Return the spans of values and names that no known text has; adjacent ones count once."""
    spans = [
        place
        for value in values
        for place in _places(value, text)[:1]
        if not any(_places(value, other) for other in known)
    ]
    for start, end in _names(text):
        if not _is_known(text[start:end], known):
            spans.append((start, end))
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and not text[merged[-1][1] : start].strip():
            start, end = merged[-1][0], max(end, merged.pop()[1])
        merged.append((start, end))
    return merged


def _is_known(word: str, known: Sequence[str]) -> bool:
    """Whether a name or number, or each part of a compound (Kenya's, Nairobi-based), is in a known text."""
    parts = [POSSESSIVE.sub("", part) for part in word.split("-")]
    names = [part for part in parts if part[:1].isupper() or any(sign.isdigit() for sign in part)]
    return any(all(any(_places(name, text) for text in known) for name in group) for group in ([word], names) if group)


def _names(text: str) -> Iterator[Span]:
    """Yield the spans of names and numbers. The first word of a sentence has its capital anyway."""
    for match in WORD.finditer(text):
        word, before = match[0], text[: match.start()].rstrip()
        is_first = not before or before[-1] in SENTENCE_ENDS
        is_name = word[0].isupper() and len(word) > 1 and not is_first
        if is_name or any(sign.isdigit() for sign in word) or (word[0] == "." and match.start() and word[1:].isalpha()):
            yield match.span()


def _places(value: str, text: str) -> list[Span]:
    """Return the spans of a value as whole words, in any case."""
    return [match.span() for match in _pattern(value).finditer(_folded(text))]


@functools.lru_cache(maxsize=4096)
def _pattern(value: str) -> re.Pattern[str]:
    words = [re.escape(word) for word in _folded(value).split()]
    front, back = (r"(?<![^\W_])" if _is_letter(value[:1]) else ""), (r"(?![^\W_])" if _is_letter(value[-1:]) else "")
    return re.compile(front + r"\s+".join(words) + back)


def _is_letter(sign: str) -> bool:
    """Whether a character belongs to a space-separated word, unlike Chinese letters."""
    return sign.isalnum() and not "\u3400" <= sign <= "\u9fff"


@functools.lru_cache(maxsize=4096)
def _folded(text: str) -> str:
    """Return a text in lower case, of the same length."""
    return "".join(low if len(low := sign.lower()) == 1 else sign for sign in unicodedata.normalize("NFC", text))
