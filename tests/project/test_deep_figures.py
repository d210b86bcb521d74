"""The figures of docs/evidence/deep.md are those of docs/deep.json."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import load_script


@pytest.fixture(scope="module")
def deep() -> ModuleType:
    return load_script("deep")


def test_the_documented_tables_are_those_of_the_documented_results(deep: ModuleType) -> None:
    page = "".join(one.read_text(encoding="utf-8") for one in (deep.PAGE, deep.PAPER))
    made = deep.tables(deep.read_figures(deep.FIGURES)["runs"])
    shown = re.findall(r"<!-- deep: (\w+) -->\n(.*?)\n<!-- deep: end -->", page, flags=re.DOTALL)
    assert len(shown) > 5
    for name, text in shown:
        assert text == made[name]


def test_every_run_has_its_command_on_the_page(deep: ModuleType) -> None:
    page = deep.PAGE.read_text(encoding="utf-8")
    for name, run in deep.read_figures(deep.FIGURES)["runs"].items():
        assert f"--out runs/{name}" in page.replace("\\\n", ""), name
        assert run["command"].endswith(f"--out runs/{name}")


def course(scores: list[float], seconds: list[float]) -> dict[str, Any]:
    return {"scores": scores, "seconds": seconds}


def test_the_time_until_a_score_is_reached(deep: ModuleType) -> None:
    one = course([0.1, 0.4, 0.6], [10.0, 7.0])
    assert [deep.seconds_to(one, enough) for enough in (0.1, 0.3, 0.5, 0.7)] == [0.0, 10.0, 17.0, None]


def test_the_spread_over_draws_is_that_of_starts_and_of_last_epochs(deep: ModuleType) -> None:
    courses = {
        f"P{task}/context-tuning/{seed}": course([before, 0.0, after], [1.0, 1.0])
        for task in (1, 2)
        for seed, (before, after) in enumerate([(0.2, 0.5), (0.4, 0.5), (0.6, 0.5)])
    }
    lines = deep.spread({"courses": courses}).splitlines()
    assert lines[2] == "| P1 | 0.200 0.400 0.600 | 0.200 | 0.500 0.500 0.500 | 0.000 |"
    assert lines[4] == "| mean | | **0.200** | | **0.000** |"
    assert lines[5].startswith("| paired | | | -0.200 [")
