"""Labels on the terminal: how well each is told, which are taken for which, and the worst errors. On 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from rich.markup import escape

from ptuning.cli import terminal
from ptuning.metrics import MOST_LABELS

if TYPE_CHECKING:
    from ptuning.files import Json
    from ptuning.metrics import Confusion

WIDTH, LABEL_WIDTH, LEAST_WIDTH = 80, 24, 8
# Between two columns.
GAP = 2
SHORT_WIDTH = 12  # of targets and answers beside a text


def show_labels(confusion: Confusion) -> None:
    """Print precision, recall and F1 of each label, and the confusion matrix; of many labels the most frequent."""
    count, shown = len(confusion.labels), confusion.shortened()
    table = terminal.table("label", "n", "precision", "recall", "F1", narrow=True)
    for column in table.columns[1:]:
        column.justify = "right"
    scores = confusion.scores
    for label in (label for label in shown.labels if label in scores):
        one = scores[label]
        numbers = (f"{value:.3f}" for value in (one.precision, one.recall, one.f1))
        table.add_row(escape(_short(label, LABEL_WIDTH)), str(one.n), *numbers)
    terminal.results().print(table)
    if len(shown.labels) < count:
        terminal.line(f"the {MOST_LABELS} most frequent of {count} labels; --json has all")
    show_confusion(shown)


def show_confusion(confusion: Confusion, *, of: str = "") -> None:
    """Print a confusion matrix, with what it is ``of``. Where the names of labels would not fit, columns have numbers;
    where the counts would not, they are percentages of their row.
    """
    heads = labels = [_short(label, LABEL_WIDTH) for label in confusion.labels]
    counts, unit = [["." if not count else str(count) for count in row] for row in confusion.counts], ""
    if max(map(len, labels)) + GAP + _taken(heads, counts) > WIDTH:
        heads = [str(number) for number in range(1, len(labels) + 1)]
        width = len(heads[-1]) + 1
        if width + LEAST_WIDTH + GAP + _taken(heads, counts) > WIDTH:
            unit = ", in % of the row"
            counts = [
                ["." if not count else f"{count / sum(row):.0%}"[:-1] for count in row] for row in confusion.counts
            ]
        room = max(LEAST_WIDTH, min(LABEL_WIDTH, WIDTH - width - GAP - _taken(heads, counts)))
        labels = [f"{head:>{width - 1}} {_short(label, room)}" for head, label in zip(heads, labels, strict=True)]
    terminal.line("")
    terminal.heading(f"confusion{f' of {of}' * bool(of)}: a row for each target, a column for each answer{unit}")
    table = terminal.table("", *map(escape, heads), narrow=True)
    for column in table.columns[1:]:
        column.justify = "right"
    for at, (label, row) in enumerate(zip(labels, counts, strict=True)):
        marked = [f"[bold]{count}[/bold]" if place == at else count for place, count in enumerate(row)]
        table.add_row(escape(label), *marked)
    terminal.results().print(table)


def _taken(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Return the width of columns with their gaps."""
    return sum(max(map(len, column)) + GAP for column in zip(heads, *rows, strict=True))


def show_errors(
    rows: Sequence[Mapping[str, Json]], worst: Sequence[int], *, places: Sequence[str], fields: Sequence[str]
) -> None:
    """Print the worst errors, each on one line, with the probabilities of the answer and of the target."""
    count = sum(not row["hit"] for row in rows)
    if not worst:
        terminal.line("no errors")
        return
    has_labels = "probabilities" in rows[worst[0]]
    which = f"the {len(worst)} worst of {count}" if len(worst) < count else f"all {count}"
    terminal.line("")
    terminal.heading(f"{which} errors, the surest first" if count > 1 else "the one error")
    heads = ("where", "target", "answer", *(("p", "p(target)") if has_labels else ("log-prob",)))
    listed = [_error(rows[at], places[at]) for at in worst]
    room = max(LEAST_WIDTH, WIDTH - GAP - _taken(heads, listed))
    table = terminal.table(heads[0], "text", *heads[1:], narrow=True)
    for column in table.columns[4:]:
        column.justify = "right"
    for at, (where, *others) in zip(worst, listed, strict=True):
        record = cast("Mapping[str, Json]", rows[at]["record"])
        text = _short(" | ".join(str(record.get(name, "")) for name in fields), room)
        table.add_row(*map(escape, (where, text, *others)))
    terminal.results().print(table)


def _error(row: Mapping[str, Json], place: str) -> list[str]:
    """Return the cells of an error but for its text: place, target, answer, and what they were given."""
    target, answer, found = str(row["target"]), str(row["prediction"]), row.get("probabilities")
    if isinstance(found, Mapping):
        given = [f"{found[name]:.3f}" if name in found else "" for name in (answer, target)]
    else:
        given = [f"{row['log_prob']:.2f}"]
    return [place.rpartition(", ")[2], _short(target, SHORT_WIDTH), _short(answer, SHORT_WIDTH), *given]


def _short(text: str, width: int) -> str:
    flat = terminal.visible(" ".join(text.split()))
    return flat if len(flat) <= width else f"{flat[: width - 1]}\N{HORIZONTAL ELLIPSIS}"
