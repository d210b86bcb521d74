"""Slot coverage: the share of given attribute values that a text mentions.

Attributes are written as in ADGEN (``name#Kenya*capital#Nairobi``) or as in E2E (``name[Kenya], capital[Nairobi]``).
The idea is that of ``slot_error.py`` of Dusek et al. (2019), E2E cleaning, without its lists of words.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence

from ptuning.errors import RecordError
from ptuning.records import TARGET_FIELD, Record
from ptuning.statistics import Ratios

# Boolean values, which no text mentions literally.
WITHOUT_WORDS = frozenset({"yes", "no"})
ADGEN = re.compile(r"[^#*]+#[^#*]+(\*[^#*]+#[^#*]+)*")
E2E = re.compile(r"\s*[^][,]+\[[^][]+\](\s*,\s*[^][,]+\[[^][]+\])*\s*")
E2E_VALUE = re.compile(r"\[([^][]+)\]")


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


def coverage(texts: Sequence[str], records: Sequence[Record]) -> Ratios:
    """Return the share of attribute values that each text mentions: as whole words, in any case."""
    import numpy as np

    field = content_field(records)
    attributes = [values_of(record[field]) or () for record in records]
    mentioned = [sum(places(value, text) != [] for value in own) for text, own in zip(texts, attributes, strict=True)]
    counts = np.array([mentioned, [len(own) for own in attributes]], dtype=np.float64)
    return Ratios(counts[0][:, None], counts[1][:, None])


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


def places(value: str, text: str) -> list[tuple[int, int]]:
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
