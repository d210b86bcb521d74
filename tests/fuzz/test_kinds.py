"""A few inputs of every kind; `make fuzz` tries a million."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.kinds import KINDS

# As many as take about two seconds.
EXAMPLES = {"odd_texts": 15, "reports": 10, "relation_folders": 60, "task_files": 40, "prompt_folders": 80}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_comes_in_is_accepted_or_ends_in_one_error(kind: str) -> None:
    @settings(max_examples=EXAMPLES.get(kind, 100), database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        KINDS[kind](data.draw)

    check()
