"""Which answers a tokenizer tells apart (only these can be hits), and warnings about the others."""

import functools
import logging
from collections.abc import Collection, Hashable, Sequence

from ptuning.errors import RecordError, cut
from ptuning.records import TARGET_FIELD, Records
from ptuning.template.segments import Ids, Tokenizer

logger = logging.getLogger(__name__)

# Other answers that are written with the same tokens; None for an answer that the tokenizer does not know.
Collisions = Collection[Hashable] | None

# From this share of unknown targets on, the vocabulary does not fit the data.
MISFIT_SHARE = 0.8
# Records whose fields are looked at, and the share of unknown tokens from which nothing is left of a text to read.
# A unigram vocabulary writes one unknown word as a space's mark and the unknown token.
LOOKED_AT = 500
UNREADABLE_SHARE = 0.5
# Signs of cuneiform and Linear A, which hardly any vocabulary has; letters for private use would be dropped by some.
PROBE = "\U00012000 \U00010600"
SHOWN_CHARACTERS = 40
REMEDY = "Use words that it knows, leave these records out, or take another backbone"


def is_known(ids: Ids, unknown_id: int | None) -> bool:
    """Whether the tokenizer knows a text by its ids: there are some, and none is the unknown token.

    >>> is_known((7, 8), 1), is_known((7, 1), 1), is_known((), 1)
    (True, False, False)
    """
    return bool(ids) and (unknown_id is None or unknown_id not in ids)


def collisions_of(keys: Sequence[Hashable | None], owners: Sequence[int]) -> list[frozenset[int] | None]:
    """Return the collisions of each answer: the others of which a text has the same key, which is all that is scored.

    Args:
        keys: What is scored of each text; None for a text that the tokenizer does not know.
        owners: The answer that each text belongs to, from 0.

    >>> collisions_of(["great", "bad", "bad", None], [0, 1, 2, 3])
    [frozenset(), frozenset({2}), frozenset({1}), None]
    """
    sharing: dict[Hashable, set[int]] = {}
    known: dict[int, list[Hashable]] = {}
    for key, owner in zip(keys, owners, strict=True):
        known.setdefault(owner, [])
        if key is not None:
            sharing.setdefault(key, set()).add(owner)
            known[owner].append(key)
    return [
        frozenset().union(*(sharing[key] for key in known[owner])) - {owner} if known[owner] else None
        for owner in sorted(known)
    ]


def is_distinguishable(collisions: Collisions, right: Collection[Hashable]) -> bool:
    """Whether an answer that is right can be a hit: the tokenizer knows it, and tells it from every wrong one."""
    return collisions is not None and all(other in right for other in collisions)


def check_targets(known: Sequence[bool], records: Records, *, is_choice: bool = False) -> list[str]:
    """Return a warning about records that can never be a hit, if there are any. Nearly all of them are a RecordError.

    Args:
        known: For each record, whether it can be one.
        records: The records, with targets.
        is_choice: Whether targets are choices, which may also have the tokens of a wrong one.
    """
    count = len(known) - sum(known)
    if not count:
        return []
    first = list(known).index(False)
    what = "unknown to the tokenizer" + " or, by their tokens, also a wrong choice" * is_choice
    text = (
        f"{count} of {len(known)} targets of {records.name} are {what}, such as "
        f"{_short(records[first][TARGET_FIELD])} ({records.place(first + 1)}); they are never a hit"
    )
    if count >= MISFIT_SHARE * len(known):
        raise RecordError(
            f"{text}: the vocabulary does not fit the data. Take another backbone, or see whether this "
            "one's folder has its tokenizer's whole vocabulary"
        )
    return [f"{text}, and training leaves them out. {REMEDY}"]


def check_candidates(collisions: Sequence[Collisions], texts: Sequence[str]) -> list[str]:
    """Return a warning about candidates that the tokenizer does not know or tell apart, if there are any."""
    doubtful = [text for text, same in zip(texts, collisions, strict=True) if same is None or same]
    if not doubtful:
        return []
    return [
        f"{len(doubtful)} of {len(texts)} possible answers, such as {_short(doubtful[0])}, are unknown to the "
        "tokenizer or have the tokens of another; they are never a hit. Use words that it knows and tells apart, or "
        "take another backbone"
    ]


def check_fields(tokenizer: Tokenizer, records: Records, fields: Sequence[str]) -> list[str]:
    """Return a warning for each field of which the tokenizer does not know most, in the first :data:`LOOKED_AT` records
    that have it.
    """
    unknown, looked_at = tokenizer.unknown_id, records[:LOOKED_AT]
    if unknown is None or unknown not in tokenizer.encode([PROBE])[0]:
        return []  # it spells out what it does not know
    warnings = []
    for field in fields:
        rows = tokenizer.encode([record.get(field, "") for record in looked_at])
        places = [at for at, ids in enumerate(rows) if ids and ids.count(unknown) >= UNREADABLE_SHARE * len(ids)]
        if places:
            at = places[0]
            warnings.append(
                f"the field '{field}' of {len(places)} of {len(looked_at)} records of {records.name} is mostly unknown "
                f"to the tokenizer, such as {_short(looked_at[at][field])} ({records.place(at + 1)}); the model sees "
                f"none of that. {REMEDY}"
            )
    return warnings


def warn(warnings: Sequence[str]) -> None:
    """Log warnings, each once: the same data is read by many methods and trainings."""
    for text in warnings:
        _warn_once(text)


@functools.lru_cache(maxsize=1024)
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def _short(text: str) -> str:
    return repr(cut(text, SHOWN_CHARACTERS))
