"""The files of a cell: ``predictions.jsonl`` with one answer per line, and the learning curve in ``run.json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptuning.files import Json, Unchecked, read_json, read_json_lines, write_json_lines
from ptuning.metrics import Answer
from ptuning.names import RUN_FILE
from ptuning.records import References, plain
from ptuning.report.results_file import AGAIN


@dataclass(frozen=True)
class AnsweredRow:
    """A row of a test part with the answer of a method.

    ``target`` is None where labels are not known, ``idx`` the row's number or numbers in the data set, and ``group``
    what it is scored together with. ``choices`` are the texts to choose among, where the row brings them.
    """

    record: Mapping[str, str]
    target: str | None
    answer: Answer
    idx: Json = None
    group: str | None = None
    choices: Sequence[str] = ()

    def to_json(self) -> dict[str, Json]:
        """Return the line of ``predictions.jsonl``."""
        about: dict[str, Json] = {"idx": self.idx, "group": self.group, "choices": list(self.choices) or None}
        return {
            "record": plain(self.record),
            **{name: value for name, value in about.items() if value is not None},
            "target": self.target,
            "prediction": self.answer.text,
            "rank": self.answer.rank,
            "hit": self.answer.hit,
            "log_prob": self.answer.log_prob,
            **({} if self.answer.known else {"known": False}),
        }

    @classmethod
    def from_json(cls, value: Unchecked) -> AnsweredRow:
        """Read what :meth:`to_json` returned."""
        return cls(
            {name: _text(text) for name, text in value.at("record").table().items()},
            value.optional("target", Unchecked.text),
            Answer(
                value.at("prediction", "").text(),
                value.at("hit").flag(),
                value.optional("rank", Unchecked.whole),
                value.optional("log_prob", lambda number: number.number(finite=False)),
                value.at("known", default=True).flag(),
            ),
            value.mapping().get("idx"),
            value.optional("group", Unchecked.text),
            value.at("choices", []).texts(),
        )


def _text(field: Unchecked) -> str:
    """Return the text of a field, or a target with its references."""
    return References(field.texts()) if isinstance(field.value, list) and field.value else field.text()


def write_answers(path: Path, rows: Iterable[AnsweredRow]) -> None:
    """Write ``predictions.jsonl``."""
    write_json_lines(path, (row.to_json() for row in rows))


def read_answers(path: Path) -> list[AnsweredRow]:
    """Read what :func:`write_answers` wrote; raise FileError if it is missing or damaged."""
    rows = enumerate(read_json_lines(path), start=1)
    return [AnsweredRow.from_json(Unchecked(row, f"{path}, row {at} is damaged", advice=AGAIN)) for at, row in rows]


def read_curve(folder: Path) -> list[tuple[int, float]] | None:
    """Read a cell's learning curve: (epoch, development score), epoch 0 being the start; None without ``run.json``."""
    if not (folder / RUN_FILE).is_file():
        return None
    value = Unchecked(read_json(folder / RUN_FILE), f"{folder / RUN_FILE} is damaged", advice=AGAIN)
    points = [(row.at("epoch").whole(), row.at("dev_score").number()) for row in value.at("history", []).items()]
    start = value.at("start", {}).optional("dev_score", Unchecked.number)
    return [(0, start), *points] if points and start is not None else points
