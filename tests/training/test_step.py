"""What one step needs before it can run."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState

from ptuning.errors import TrainingError
from ptuning.training.step import _accelerator


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LOCAL_RANK", "0"),
        ("LOCAL_RANK", "abc"),
        ("ACCELERATE_USE_CPU", "maybe"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "x"),
        ("ACCELERATE_DYNAMO_BACKEND", "none at all"),
    ],
)
def test_what_a_launcher_left_in_the_environment_is_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate reads the environment once
    with monkeypatch.context() as patch:
        patch.setenv(name, value)
        with pytest.raises(TrainingError, match=rf"accelerate cannot start with the environment's .*{name}.*unset"):
            _accelerator()
    assert _accelerator().num_processes == 1
