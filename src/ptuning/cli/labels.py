"""Labels on the terminal: precision and recall of each, the confusion matrix, and the worst errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from rich.markup import escape

from ptuning.cli import terminal
from ptuning.metrics import MAX_LABELS

if TYPE_CHECKING:
    from ptuning.files import Json
    from ptuning.metrics import Confusion

LABEL_WIDTH = 24
SHORT_WIDTH = 12  # of targets and answers next to a text
TEXT_WIDTH = 26


def show_labels(confusion: Confusion) -> None:
    """Print precision, recall and F1 of each label, and the confusion matrix; of many labels the most frequent."""
    count, shown = len(confusion.labels), confusion.shortened()
    table = terminal.table("label", "n", "precision", "recall", "F1", numbers=True)
    for label, scores in confusion.scores.items():
        if label in shown.labels:
            numbers = (f"{value:.3f}" for value in (scores.precision, scores.recall, scores.f1))
            table.add_row(escape(_short(label, LABEL_WIDTH)), str(scores.n), *numbers)
    terminal.results().print(table)
    if len(shown.labels) < count:
        terminal.line(f"the {MAX_LABELS} most frequent of {count} labels; --json has all")
    show_confusion(shown)


def show_confusion(confusion: Confusion, *, of: str = "") -> None:
    """Print a confusion matrix: a row for each target, a column for each answer, by the number of its label."""
    terminal.line("")
    terminal.heading(f"confusion{f' of {of}' * bool(of)}: a row for each target, a column for each answer")
    table = terminal.table("", *(str(number) for number in range(1, len(confusion.labels) + 1)), numbers=True)
    for at, (label, row) in enumerate(zip(confusion.labels, confusion.counts, strict=True)):
        counts = [str(count) if count else "." for count in row]
        counts[at] = f"[bold]{counts[at]}[/bold]"
        table.add_row(escape(f"{at + 1} {_short(label, LABEL_WIDTH)}"), *counts)
    terminal.results().print(table)


def show_errors(
    rows: Sequence[Mapping[str, Json]], worst: Sequence[int], *, places: Sequence[str], fields: Sequence[str]
) -> None:
    """Print the worst errors, each on one line, with the probabilities of the answer and of the target."""
    if not worst:
        terminal.line("no errors")
        return
    has_labels = "probabilities" in rows[worst[0]]
    terminal.line("")
    terminal.heading(f"the {len(worst)} worst of {sum(not row['hit'] for row in rows)} errors, the surest first")
    table = terminal.table("where", "text", "target", "answer", *(("p", "p(target)") if has_labels else ("log-prob",)))
    for at in worst:
        row, record = rows[at], cast("Mapping[str, Json]", rows[at]["record"])
        target, answer = str(row["target"]), str(row["prediction"])
        if has_labels:
            probabilities = cast("Mapping[str, float]", row["probabilities"])
            numbers = [f"{probabilities[name]:.3f}" if name in probabilities else "" for name in (answer, target)]
        else:
            numbers = [f"{row['log_prob']:.2f}"]
        text = _short(" | ".join(str(record.get(name, "")) for name in fields), TEXT_WIDTH)
        cells = (places[at].rpartition(", ")[2], text, _short(target, SHORT_WIDTH), _short(answer, SHORT_WIDTH))
        table.add_row(*map(escape, cells), *numbers)
    terminal.results().print(table)


def _short(text: str, width: int) -> str:
    flat = terminal.visible(" ".join(text.split()))
    return flat if len(flat) <= width else f"{flat[: width - 1]}\N{HORIZONTAL ELLIPSIS}"
