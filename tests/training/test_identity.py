"""What must be equal for a result to be resumed or reused."""

from __future__ import annotations

import pytest

from ptuning.config import TrainConfig
from ptuning.errors import FileError, TrainingError
from ptuning.files import Json
from ptuning.training.identity import check_identity, identity, identity_of_run

SETTINGS: dict[str, Json] = {**TrainConfig().to_json(), "device": "cpu"}


def test_settings_that_change_no_result_are_left_out() -> None:
    found = identity(SETTINGS, {"train": "a1"}, fingerprint="f0", recipe=4)
    other: dict[str, Json] = {
        **SETTINGS,
        "device": "cuda",
        "checkpointing": True,
        "cache_memory": 0.0,
        "cache_disk": 1.0,
    }
    assert identity({**other, "checkpoint_seconds": 1.0}, {"train": "a1"}, fingerprint="f0", recipe=4) == found
    assert found["train data (sha256)"] == "a1"
    assert "recipe of training" not in identity({}, {}, fingerprint="f0", recipe=None)


@pytest.mark.parametrize("change", [{"lora_rank": 9}, {"keep": "whole"}, {"seed": 1}])
def test_every_other_setting_counts(change: dict[str, Json]) -> None:
    one, two = ({**SETTINGS, **more} for more in ({}, change))
    now, saved = (identity(each, {}, fingerprint="f0", recipe=4) for each in (two, one))
    (name,) = change
    with pytest.raises(TrainingError, match=f"cannot resume from here: {name} was .* and is {change[name]}"):
        check_identity(now, saved, where="here")


def test_of_a_record() -> None:
    record: dict[str, Json] = {
        "settings": {"epochs": 2},
        "data": {"train": {"sha256": "a1"}, "dev": {"sha256": "b2"}, "test": None},
        "backbone": {"fingerprint": "f0"},
        "recipe": 4,
    }
    found = identity_of_run(record)
    assert found == identity({"epochs": 2}, {"train": "a1", "dev": "b2"}, fingerprint="f0", recipe=4)
    assert identity_of_run({**record, "task": {"file": "text"}}) != found
    with pytest.raises(FileError, match=r"run\.json is damaged"):
        identity_of_run({**record, "data": None})
