"""Invented values: the share of the values in generated texts that neither the attributes nor a reference have.

    python -m experiments.invented PREDICTIONS.JSONL

The file is that of a cell (``cells/TASK/METHOD/seed-0/predictions.jsonl``) or of ``eval --out``, on records
with attributes (:mod:`ptuning.metrics.slot_coverage`). Invented are values of other rows, and names and numbers: words
with a capital inside a sentence, with a digit, or with a leading dot.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ptuning.metrics.slot_coverage import content_field, coverage, places, values_of
from ptuning.records import Record, references_of
from ptuning.report.results_file import read_answers
from ptuning.statistics import Ratios, summary

# A word as a name or number may be one, with a domain's dot.
WORD = re.compile(r"(?<!\w)\.?\w[\w'&-]*")
POSSESSIVE = re.compile(r"['’]s?$")
SENTENCE_ENDS = ".!?:;"

Span = tuple[int, int]


def invented(texts: Sequence[str], records: Sequence[Record]) -> Ratios:
    """Return the share of invented values among those that each text mentions."""
    field = content_field(records)
    every = list(dict.fromkeys(value for record in records for value in values_of(record[field]) or ()))
    counts = [
        len(_invented(text, (record[field], *references_of(record)), every))
        for text, record in zip(texts, records, strict=True)
    ]
    column = np.array(counts, dtype=np.float64)[:, None]
    return Ratios(column, coverage(texts, records).over + column)


def _invented(text: str, known: Sequence[str], values: Sequence[str]) -> list[Span]:
    """Return the spans of values and names that no known text has; adjacent ones count once."""
    spans = [
        place
        for value in values
        for place in places(value, text)[:1]
        if not any(places(value, other) for other in known)
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
    return any(all(any(places(name, text) for text in known) for name in group) for group in ([word], names) if group)


def _names(text: str) -> Iterator[Span]:
    """Yield the spans of names and numbers. The first word of a sentence has its capital anyway."""
    for match in WORD.finditer(text):
        word, before = match[0], text[: match.start()].rstrip()
        is_first = not before or before[-1] in SENTENCE_ENDS
        is_name = word[0].isupper() and len(word) > 1 and not is_first
        if is_name or any(sign.isdigit() for sign in word) or (word[0] == "." and match.start() and word[1:].isalpha()):
            yield match.span()


if __name__ == "__main__":
    rows = read_answers(Path(sys.argv[1]))
    score = summary([invented([row.answer.text for row in rows], [row.record for row in rows])])
    print(f"invented  {score.value:.3f} [{score.low:.3f}, {score.high:.3f}], n = {score.n}")
