"""A check says in one line what was found, and in another what to do."""

from __future__ import annotations

import pytest

from ptuning.doctor.checks import SHOWN_CHARACTERS, Check, Group


def test_what_was_found_is_one_line_however_long() -> None:
    found = Group("prompt a").failed("files", "cut\n  off \t here " + "x" * 1000, "copy\nit")
    assert found.found.startswith("cut off here xxx")
    assert len(found.found) == SHOWN_CHARACTERS
    assert found.remedy == "copy it"


@pytest.mark.parametrize("status", ["ok", "warning", "failed"])
def test_a_check_as_json(status: str) -> None:
    group = Group("machine")
    makers = {
        "ok": lambda: group.ok("disk", "much"),
        "warning": lambda: group.warning("disk", "much", "wait"),
        "failed": lambda: group.failed("disk", "much", "wait"),
    }
    found: Check = makers[status]()
    remedy = "" if status == "ok" else "wait"
    assert found.to_json() == {
        "group": "machine", "name": "disk", "status": status, "found": "much", "remedy": remedy
    }  # fmt: skip
