"""Labels on the terminal: readable, however many labels there are and whatever they are called."""

import pytest

from ptuning.cli.labels import show_confusion, show_errors, show_labels
from ptuning.files import Json
from ptuning.metrics import MAX_LABELS, OTHERS, Confusion

TEAMS = ("billing", "shipping", "technical", "returns")


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_scores_and_confusions_of_labels(capsys: pytest.CaptureFixture[str]) -> None:
    show_labels(Confusion(TEAMS, ((5, 1, 0, 0), (0, 7, 0, 2), (1, 0, 4, 0), (0, 0, 0, 0))))
    rows = [line.split() for line in lines_of(capsys)]
    assert ["shipping", "9", "0.875", "0.778", "0.824"] in rows
    assert ["returns", "0", "0.000", "0.000", "0.000"] in rows
    assert ["2", "shipping", ".", "7", ".", "2"] in rows


@pytest.mark.parametrize("size", [7, 12, 40])
def test_the_most_frequent_of_many_labels_are_shown(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    labels = tuple(f"the label whose number is {at} and that has [bold]a long name" for at in range(size))
    counts = tuple(
        tuple(123 + row if row == column else int(row == column + 1) for column in range(size)) for row in range(size)
    )
    show_labels(Confusion(labels, counts))
    printed = lines_of(capsys)
    assert max(map(len, printed)) <= 80
    shown = min(size, MAX_LABELS + (size > MAX_LABELS))
    assert [str(at) for at in range(1, shown + 1)] in [line.split() for line in printed]
    assert any("12 most frequent of 40 labels" in line for line in printed) == (size == 40)
    assert any(OTHERS in line for line in printed) == (size > MAX_LABELS)


def test_a_label_may_hold_anything(capsys: pytest.CaptureFixture[str]) -> None:
    show_confusion(Confusion(("[red]a", "b\x1b[2J\nc"), ((1, 0), (0, 1))))
    printed = "\n".join(lines_of(capsys))
    assert "[red]a" in printed
    assert "\x1b" not in printed


def row(text: str, target: str, answer: str, **probabilities: float) -> dict[str, Json]:
    return {"record": {"x": text}, "target": target, "prediction": answer, "hit": target == answer, "log_prob": -0.5,
            **({"probabilities": probabilities} if probabilities else {})}  # fmt: skip


def test_errors_fill_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row("a " * 99, "billing", "an overlong label", billing=0.25, other=0.1),
        row("short\n text", "a", "b", a=0.2, b=0.7),
    ]
    show_errors(rows, [1, 0], places=["mail.csv, line 2", "mail.csv, line 31"], fields=["x"])
    printed = lines_of(capsys)
    assert "the 2 worst of 2 errors, the surest first" in printed
    first, second = printed[-2:]
    assert first.split() == ["line", "31", "short", "text", "a", "b", "0.700", "0.200"]
    assert second.startswith("line 2   a a a")
    assert second.rstrip().endswith("0.250")
    show_errors([row("a", "b", "c")], [0], places=["record 1"], fields=["x"])
    assert lines_of(capsys)[-1].split() == ["record", "1", "a", "b", "c", "-0.50"]
    show_errors([row("a", "b", "b")], [], places=["record 1"], fields=["x"])
    assert lines_of(capsys) == ["no errors"]
