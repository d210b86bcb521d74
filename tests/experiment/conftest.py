"""What the tests of comparisons share: reports without drawings."""

import pytest


@pytest.fixture(autouse=True)
def _undrawn(undrawn: None) -> None:
    """Each comparison writes a report."""
