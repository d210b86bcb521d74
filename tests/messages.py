"""A mailbox made by rule: messages for four teams as a CSV, with what goes wrong in such files."""

import csv
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

Message = tuple[str, str]
TEAMS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "billing": (
        ("I was charged twice", "the invoice is wrong", "my card was refused", "the refund did not arrive"),
        ("for the last order", "this month", "after I cancelled", "although I paid", "and nobody answers",
         "for my second account", "since the price went up", "in March"),
    ),
    "shipping": (
        ("my parcel never came", "the package is damaged", "the courier left it outside", "the delivery is late"),
        ("again", "after two weeks", "at the old address", "and tracking shows nothing", "although it was express",
         "on Monday", "for the third time", "without a note"),
    ),
    "technical": (
        ("the app crashes", "the page shows an error", "the update failed", "the sync stopped"),
        ("when I open it", "on my phone", "after the last version", "every morning", "with code 500",
         "in the browser", "while saving", "on both machines"),
    ),
    "account": (
        ("I forgot my password", "please change my email", "I cannot log in", "delete my profile"),
        ("since yesterday", "on the new device", "as soon as possible", "after the merge of our firms",
         "for my colleague", "before Friday", "without losing data", "please"),
    ),
}  # fmt: skip


def messages() -> Iterator[Message]:
    """Yield all messages, the teams in turn."""
    sentences = {
        team: [f"{first} {second}" for second, first in itertools.product(seconds, firsts)]
        for team, (firsts, seconds) in TEAMS.items()
    }
    for number in range(32):
        for team, listed in sentences.items():
            # Neighbours should not share their beginnings, so that any stretch of the file has all of them.
            yield listed[(number * 5) % len(listed)], team


def messy(rows: Sequence[Message]) -> list[Message]:
    """Return rows with a mistyped team (row 34), two empty messages (rows 12 and 57) and one row that is there twice
    (rows 20 and 61). Row N stands in line N + 1.
    """
    found = list(rows)
    found[33] = found[32][0] + " once more", "biling"
    found[11], found[56] = ("", found[11][1]), ("  ", found[56][1])
    found[60] = found[19]
    return found


def as_csv(rows: Sequence[Message], *, names: Sequence[str] = ("message", "team")) -> str:
    """Return rows as the text of a CSV."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([names, *rows])
    return stream.getvalue()


def write_mail(folder: Path, *, rows: int = 90) -> tuple[Path, Path]:
    """Write ``mail.csv``, messy, and ``mail-test.csv`` with the messages that are left of 120; return both."""
    every = list(messages())[:120]
    train, test = folder / "mail.csv", folder / "mail-test.csv"
    train.write_text(as_csv(messy(every[:rows])), encoding="utf-8")
    test.write_text(as_csv(every[rows:]), encoding="utf-8")
    return train, test
