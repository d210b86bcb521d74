"""A few inputs of every kind; `make fuzz` tries a million."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptuning.errors import RecordError
from tests.fuzz.base import tried
from tests.fuzz.kinds import KINDS

# As many as take about half a second.
EXAMPLES = {
    "odd_texts": 5, "reports": 3, "relation_folders": 15, "task_files": 10, "prompt_folders": 20, "model_folders": 5,
    "gguf_files": 10,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_comes_in_is_accepted_or_ends_in_one_error(kind: str) -> None:
    @settings(max_examples=EXAMPLES.get(kind, 25), database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        KINDS[kind](data.draw)

    check()


def test_any_other_exception_is_a_fault() -> None:
    def refused() -> None:
        raise RecordError("row 3 has no target; name another field")

    assert tried(int, "3") == 3
    assert tried(refused) is None
    with pytest.raises(ValueError, match="invalid literal"):
        tried(int, "three")
