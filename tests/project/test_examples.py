"""The files of ``examples/``: what the script builds, and as untidy as the pages say."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from tests.conftest import load_script

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def rows(name: str) -> list[dict[str, str]]:
    with (EXAMPLES / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_rebuilding_gives_the_same_bytes(tmp_path: Path) -> None:
    load_script("build_examples").build(tmp_path)
    built = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert built == {
        str(path.relative_to(EXAMPLES)): path.read_bytes() for path in EXAMPLES.rglob("*") if path.is_file()
    }


def test_the_mailbox_is_untidy_and_its_test_part_is_new() -> None:
    mail, test = rows("mail.csv"), rows("mail-test.csv")
    teams = Counter(row["team"] for row in mail)
    assert teams["biling"] == 1
    assert set(teams) - {"biling"} == {row["team"] for row in test}
    messages = Counter(row["message"] for row in mail)
    assert messages.pop("") == 2
    assert sorted(messages.values())[-2:] == [1, 2]
    assert not set(messages) & {row["message"] for row in test}
