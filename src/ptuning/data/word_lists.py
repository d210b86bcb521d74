"""Word lists: the closed sets of answers that ``--candidates`` and ``--vocabulary`` name."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ptuning.data.reading import DELIMITERS, SUFFIXES, load_records
from ptuning.errors import FileError
from ptuning.files import parse_json, read_text
from ptuning.records import ALIASES, TARGET_FIELD, as_records

TARGETS = (TARGET_FIELD, *ALIASES[TARGET_FIELD])


def read_words(source: str | Path, *, fields: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Read a word list, each word once; a FileError if it holds none.

    ``source`` is a text file with one word per line; a data file or shipped facts (``NAME:split``), whose targets are
    the words; or JSON: a list of words, a vocabulary (token -> id), or several of these by model. Of several, the words
    are taken that all have, as in the files of LAMA-29k and LAMA-34k. ``fields`` renames fields of data (new -> old).
    """
    target = {new: old for new, old in (fields or {}).items() if new == TARGET_FIELD}
    lists = [] if target or not os.path.exists(source) else _lists(Path(source))
    if lists:
        first, *others = [dict.fromkeys(word.strip() for word in words) for words in lists]
        shared = [word for word in first if word and all(word in other for other in others)]
    else:
        shared = targets_of(load_records(source, fields=target))
    if not shared:
        several = " that all its models share" if len(lists) > 1 else ""
        raise FileError(
            f"{source} holds no words{several}; give a .txt file with one per line, JSON lists, or data with "
            f"{TARGET_FIELD}"
        )
    return tuple(shared)


def targets_of(data: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the different targets of records, in order of appearance."""
    return list(dict.fromkeys(record[TARGET_FIELD].strip() for record in as_records(data) if record.get(TARGET_FIELD)))


def _lists(path: Path) -> list[list[str]]:
    """Return the lists of words in a file; none if it holds records, or is broken."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        try:
            value = parse_json(read_text(path))
        except (ValueError, FileError):
            return []
        is_vocabulary = isinstance(value, dict) and all(isinstance(item, int) for item in value.values())
        lists = list(value.values()) if isinstance(value, dict) and not is_vocabulary else [value]
        if not all(isinstance(words, list | dict) for words in lists):
            return []
        if not all(isinstance(word, str | int) for words in lists for word in words):
            return []
        # Byte-level and SentencePiece vocabularies write the space before a word as a sign of its own.
        return [[str(word).lstrip("\u0120\u2581") for word in words] for words in lists]
    if suffix not in SUFFIXES or suffix in (".csv", ".tsv"):
        lines = read_text(path).splitlines() or [""]
        # A table with one column is a list of words, unless the column has a target's name.
        is_table = any(mark in lines[0] for mark in DELIMITERS) or lines[0].strip('" ') in TARGETS
        return [] if suffix in SUFFIXES and is_table else [lines]
    return []
