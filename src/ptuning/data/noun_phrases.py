"""Noun phrases of a sentence, found without a parser: candidates for what a pronoun in it refers to."""

import re
from collections.abc import Iterable

# Words that begin a noun phrase, and words that are in none.
_DETERMINERS = "a an the this that these those my your his her its our their some any no every each"
_STOPPERS = (
    "i you he she it we they me him us them himself herself itself themselves who whom which what whose where "
    "when why how and or but nor so yet if because although though while since until unless than as of in on at "
    "by for from with to into onto over under after before behind beside between through across around about "
    "against off out up down is are was were be been being am do does did have has had will would shall should "
    "can could may might must not there here then now very too also just only still always away never even again all "
    "both"
)
DETERMINERS, STOPPERS = frozenset(_DETERMINERS.split()), frozenset(_STOPPERS.split())
LONGEST_PHRASE = 3


def noun_phrases(text: str) -> list[str]:
    """Return what looks like a noun phrase: names (neighbouring words with capitals), and up to three words behind an
    article or a possessive. Some are wrong, and some are missing; they serve as distractors.

    >>> noun_phrases("The man lifted Bob because he was strong.")
    ['The man', 'Bob']
    """
    found: list[str] = []
    for clause in re.split(r"[,;:!?\"()]+|(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)\.", text):
        words = [word for word in clause.replace("*", "").split() if re.search(r"\w", word)]
        at = 0
        while at < len(words):
            length = _phrase(words, at)
            if length:
                found.append(" ".join(words[at : at + length]))
            at += max(1, length)
    return list(dict.fromkeys(found))


def other_phrases(text: str, *, than: Iterable[str]) -> list[str]:
    """Return the noun phrases that share no word with the given ones; without any, single words that may be one."""
    taken = {word for phrase in than for word in _words(phrase)} - DETERMINERS
    found = [phrase for phrase in noun_phrases(text) if not taken & set(_words(phrase))]
    if found:
        return found
    known = taken | DETERMINERS | STOPPERS
    return list(dict.fromkeys(word for word in re.findall(r"\w+", text) if word.lower() not in known))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _phrase(words: list[str], at: int) -> int:
    first = words[at].lower()
    if first in DETERMINERS:
        rest = 0
        for word in words[at + 1 : at + 1 + LONGEST_PHRASE]:
            is_verb = rest > 0 and re.fullmatch(r"[a-z]+(ed|ing)", word) is not None
            if word.lower() in STOPPERS | DETERMINERS or is_verb:
                break
            rest += 1
        return rest + 1 if rest else 0
    length = 0
    while at + length < len(words) and words[at + length][0].isupper() and words[at + length].lower() not in STOPPERS:
        length += 1
    return length
