"""Whether a text ends in the right answer: exact match of the whole text, or of its last number."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal

from ptuning.metrics import exact_match
from ptuning.texts.measured import Measured

NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?|(?<=[^\W\d_])\d[\d,]*(?:\.\d+)?")


def exact(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Mapping[str, Measured]:
    """Return the share of texts that are one of their references, without capitals, punctuation and articles."""
    pairs = zip(texts, references, strict=True)
    return {"exact": Measured([exact_match(text, own) for text, own in pairs])}


def last_number(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Mapping[str, Measured]:
    """Return the share of texts whose last number is that of a reference: the answer behind steps of arithmetic."""
    pairs = zip(texts, references, strict=True)
    rights = [({number_of(one) for one in own} - {None}, number_of(text)) for text, own in pairs]
    return {"last-number": Measured([float(said in right) for right, said in rights])}


def number_of(text: str) -> Decimal | None:
    """Return the last number of a text.

    >>> number_of("12 + 7 = 19."), number_of("-1,234.50"), number_of("none")
    (Decimal('19'), Decimal('-1234.50'), None)
    """
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
