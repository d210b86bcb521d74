"""Tokenize a shared prefix (one record, many candidates) only once."""

import re
from collections.abc import Callable, Collection, Sequence

from ptuning.template.segments import ANCHOR_WORD

Encode = Callable[[Sequence[str]], list[list[int]]]

# Texts are compared if at least SHARING_TEXTS of them have the first SHARED_CHARACTERS in common.
SHARED_CHARACTERS = 64
SHARING_TEXTS = 4
# The space between two words; tokens of one side never depend on the other where no token reaches across.
BORDER = re.compile(r"(?<=\w) (?=\w)")


def shared_length(left: Sequence[object], right: Sequence[object]) -> int:
    """Return the number of leading elements that two sequences share.

    >>> shared_length("Mexico City", "Mexicali")
    5
    """
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))


def has_words_apart(tokens: Collection[str]) -> bool:
    """Whether none of a vocabulary's tokens, written with any mark of a space, reaches from one word into another."""
    bytes_as_letters = {"Ġ": " ", "Ċ": "\n", "č": "\r", "ĉ": "\t"} if "Ġ" in tokens else {}
    marks = str.maketrans({"▁": " ", **bytes_as_letters})
    return re.search(r"\S +\S", "\n".join(tokens).translate(marks)) is None  # all at once: it is asked at each start


def encode_shared_prefix(encode: Encode, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts as ``encode`` gives them, for a vocabulary that :func:`has_words_apart`.

    Of texts that begin alike, the beginning is tokenised once, up to the last space between two words; and each rest
    after a word that is cut off again. Where that does not give the ids of the whole text, for the first and the last
    of them in order, the texts are tokenised whole.
    """
    groups: dict[str, list[str]] = {}
    for text in dict.fromkeys(texts):
        groups.setdefault(text[:SHARED_CHARACTERS] if len(text) > SHARED_CHARACTERS else "", []).append(text)
    whole = groups.pop("", [])
    encoded: dict[str, list[int]] = {}
    for group in groups.values():
        parts = _in_parts(encode, group) if len(group) >= SHARING_TEXTS else None
        if parts is None:
            whole += group
        else:
            encoded |= parts
    if len(whole) == len(texts):
        return encode(texts)
    encoded |= zip(whole, encode(whole), strict=True)
    return [encoded[text] for text in texts]


def _in_parts(encode: Encode, texts: Sequence[str]) -> dict[str, list[int]] | None:
    """Return the ids of each text, put together from two parts; None if that is not possible."""
    first, last = min(texts), max(texts)
    borders = [match.start() for match in BORDER.finditer(first[: shared_length(first, last)])]
    if not borders or borders[-1] < SHARED_CHARACTERS:
        return None
    at = borders[-1]
    lead, head, *tails = encode([ANCHOR_WORD, first[:at], *(ANCHOR_WORD + text[at:] for text in texts)])
    if any(tail[: len(lead)] != lead for tail in tails):
        return None
    joined = {text: head + tail[len(lead) :] for text, tail in zip(texts, tails, strict=True)}
    return joined if [joined[first], joined[last]] == encode([first, last]) else None
