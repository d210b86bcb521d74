"""Closed sets of answers: lists of words from files, and which records' targets belong to them. Knows no method."""

from __future__ import annotations

import json
from pathlib import Path

from ptuning.errors import FileError
from ptuning.files import read_bytes


def read_vocabulary(path: Path) -> tuple[str, ...]:
    """Read a list of possible answers: a text file with one per line, or JSON: a list, or the lists of several models,
    of which those words are taken that all have (as the files of LAMA-29k and LAMA-34k come).

    Raises:
        FileError: If it cannot be read, or holds no words.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
        listed = json.loads(text) if path.suffix.lower() == ".json" else [line.strip() for line in text.splitlines()]
    except ValueError as error:
        raise FileError(f"{path} is no list of words ({error}); give a .txt with one per line, or .json") from error
    lists = list(listed.values()) if isinstance(listed, dict) else [listed]
    if isinstance(listed, dict) and all(isinstance(one, int) for one in lists):
        lists = [listed]  # one model's token -> id
    if not all(isinstance(one, list | dict) and all(isinstance(word, str | int) for word in one) for one in lists):
        raise FileError(f"{path} holds other JSON than a list of words, or the lists of several models")
    # Byte-level and SentencePiece vocabularies write the space in front of a word as a sign of their own.
    words = [dict.fromkeys(str(word).lstrip("\u0120\u2581").strip() for word in one) for one in lists]
    common = tuple(word for word in (words[0] if words else ()) if word and all(word in other for other in words))
    if not common:
        raise FileError(f"{path} holds no words" + (" that all its models share" if len(words) > 1 else ""))
    return common
