"""The documented tables are made of the documented results."""

import re

import pytest

from tests.conftest import load_script


@pytest.mark.parametrize(("name", "count"), [("lama", 5), ("superglue", 4)])
def test_the_documented_tables_are_those_of_the_documented_results(name: str, count: int) -> None:
    script = load_script(name)
    page = script.PAGE.read_text(encoding="utf-8")
    tables = script.tables(script.read_figures(script.FIGURES))
    assert len(tables) >= count
    for table in tables.values():
        assert table in page


def test_the_documented_tables_of_deep_slots() -> None:
    script = load_script("deep")
    pages = "".join(page.read_text(encoding="utf-8") for page in (script.PAGE, script.PAPER))
    runs = script.read_figures(script.FIGURES)["runs"]
    made = script.tables(runs)
    shown = re.findall(r"<!-- deep: (\w+) -->\n(.*?)\n<!-- deep: end -->", pages, flags=re.DOTALL)
    assert len(shown) > 5
    for name, table in shown:
        assert table == made[name]
    for name, run in runs.items():
        assert f"--out runs/{name}" in pages.replace("\\\n", ""), name
        assert run["command"].endswith(f"--out runs/{name}")
