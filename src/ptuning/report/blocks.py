"""The parts of a report's page (text, tables, pictures), and how numbers are written in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ptuning.metrics import most_of
from ptuning.report.results_file import ScoreWithSpread
from ptuning.statistics import Score


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    kind: ClassVar[str] = "items"
    items: Sequence[str]


@dataclass(frozen=True)
class Entry:
    """An entry of a table: a text, smaller lines below it, whether it is the best of its row or column, and the score
    that it shows, if it shows one.
    """

    text: str
    small: Sequence[str] = ()
    best: bool = False
    score: Score | None = None


@dataclass(frozen=True)
class Table:
    """A table. The first entry of each row is its heading; ``numbers`` aligns the other columns to the right."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    numbers: bool = True


@dataclass(frozen=True)
class Picture:
    """An SVG drawing, with a caption and a description for readers who cannot see it."""

    kind: ClassVar[str] = "picture"
    name: str
    svg: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Fold:
    """Blocks that are hidden until the reader opens them."""

    kind: ClassVar[str] = "fold"
    title: str
    blocks: Sequence[Text | Items | Table | Picture]


Block = Text | Items | Table | Picture | Fold


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    heading: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """The target of links within the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.heading.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A whole report: title, a warning if results are missing, the main result in a paragraph, and the sections."""

    title: str
    warning: Fold | None
    answer: str
    sections: Sequence[Section]


NO_INTERVAL = "no interval"  # of a single value, or of equal ones


def reading(score: Score) -> str:
    """Return whether the interval of a difference is above, below, or around zero."""
    if not score.has_interval:
        return NO_INTERVAL
    if score.low > 0:
        return "above zero"
    return "below zero" if score.high < 0 else "includes zero"


def percent(value: float) -> str:
    """Write a fraction as a percentage with one decimal.

    >>> percent(0.5234) == "52.3\N{NO-BREAK SPACE}%"
    True
    """
    return f"{decimal(value)}\N{NO-BREAK SPACE}%"


def points(value: float) -> str:
    """Write a difference of fractions in percentage points, with its sign.

    >>> points(0.284), points(-0.0001)
    ('+28.4', '0.0')
    """
    shown = decimal(value)
    return f"+{shown}" if value > 0 and shown != "0.0" else shown


def entry(score: Score | None, *, best: bool = False, of: str = "") -> Entry:
    """Return a score ``of`` a name with its interval, n, and its spread over seeds if there are several."""
    if score is None:
        return Entry("–")
    most = most_of(of)
    small = [_interval(score, most=most), f"n = {score.n:,}"]
    if isinstance(score, ScoreWithSpread) and score.std is not None and score.seeds > 1:
        small.append(f"sd {decimal(score.std / most)}, {score.seeds} seeds")
        small += [f"lowest {decimal(score.lowest / most)}"] if score.lowest is not None else []
    return Entry(valued(score.value, of), small, best, score)


def difference(score: Score | None, *, of: str = "") -> Entry:
    """Return a difference in points with its interval and n."""
    if score is None:
        return Entry("–")
    most = most_of(of)
    small = [_interval(score, signed=True, most=most), f"n = {score.n:,}"]
    return Entry(points(score.value / most), small, score=score)


def phrase(score: Score, unit: str, *, signed: bool = False, of: str = "") -> str:
    r"""Write a score ``of`` a name within a sentence.

    >>> phrase(Score(0.5, 0.4, 0.6, n=10), "facts")
    '50.0\xa0% (95 % interval 40.0 to 60.0, n = 10 facts)'
    >>> phrase(Score(50.0, 40.0, 60.0, n=10), "records", of="bleu")
    '50.0 (95 % interval 40.0 to 60.0, n = 10 records)'
    """
    write, most = points if signed else decimal, most_of(of)
    shown = f"{points(score.value / most)} points" if signed else valued(score.value, of)
    n = f"n = {score.n:,} {unit}".rstrip()
    ends = (write(end / most) for end in (score.low, score.high))
    interval = NO_INTERVAL if not score.has_interval else f"95 % interval {' to '.join(ends)}"
    return f"{shown} ({interval}, {n})"


def valued(value: float, of: str) -> str:
    """Write the value of a score: a percentage, or as it is where the score goes up to 100."""
    return percent(value) if most_of(of) == 1.0 else decimal(value / most_of(of))


def counted(number: int, one: str, many: str = "") -> str:
    """Write a number with its noun.

    >>> counted(1, "task"), counted(2, "task")
    ('1 task', '2 tasks')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _interval(score: Score, *, signed: bool = False, most: float = 1.0) -> str:
    write = points if signed else decimal
    return NO_INTERVAL if not score.has_interval else f"[{write(score.low / most)}, {write(score.high / most)}]"


def decimal(value: float) -> str:
    """Write a fraction times a hundred, without its unit."""
    shown = f"{100 * value:.1f}"
    return "0.0" if shown == "-0.0" else shown.replace("-", "\N{MINUS SIGN}")
