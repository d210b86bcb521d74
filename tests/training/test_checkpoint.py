"""Checkpoints: identities, damage, and the best weights of the backbone."""

from pathlib import Path

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.trained_weights import trained_parameters, write_tensors
from ptuning.config import TrainConfig
from ptuning.errors import FileError, PromptError, TrainingError
from ptuning.files import Json
from ptuning.training.checkpoint import BestWeights, check_identity, identity
from tests.backbone.test_trained_weights import weights

SETTINGS: dict[str, Json] = {**TrainConfig().to_json(), "device": "cpu"}


def test_settings_that_change_no_result_are_left_out() -> None:
    one = identity(SETTINGS, {"train": "a1"}, fingerprint="f0")
    changed: dict[str, Json] = {"device": "cuda", "checkpointing": True, "cache_memory": 0.0, "cache_disk": 1.0}
    assert identity({**SETTINGS, **changed, "checkpoint_seconds": 1.0}, {"train": "a1"}, fingerprint="f0") == one
    assert one["train data (sha256)"] == "a1"
    assert identity(SETTINGS, {"train": "a1"}, fingerprint="f0", task_file="text") != one


@pytest.mark.parametrize("change", [{"lora_rank": 9}, {"save_weights": "whole"}, {"seed": 1}])
def test_every_other_setting_counts(change: dict[str, Json]) -> None:
    now, saved = (identity({**SETTINGS, **more}, {}, fingerprint="f0") for more in (change, {}))
    (name,) = change
    with pytest.raises(TrainingError, match=f"from here: {name} was .* and is {change[name]}"):
        check_identity(now, saved, where="here")


def test_the_best_weights_are_restored(backbone: Backbone, tmp_path: Path) -> None:
    own = trained_parameters(backbone, "full")
    before = weights(backbone)
    best, other = BestWeights(tmp_path), BestWeights(tmp_path, start=1)
    other.keep(own, epoch=0)
    for epoch in (0, 1):
        best.keep(own, epoch=epoch)
        with torch.no_grad():
            for weight in own.values():
                weight.add_(1.0)
    best.restore(own, epoch=0)
    after = weights(backbone)
    assert all(torch.equal(before[name], after[name]) for name in before)
    best.forget_others(epoch=1)
    best.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-0-1.safetensors", "best-1-0.safetensors"]


def test_without_a_folder_nothing_is_left(causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    best = BestWeights()
    best.keep(trained_parameters(causal, "full"), epoch=0)
    assert len(list(tmp_path.iterdir())) == 1
    best.close()
    assert list(tmp_path.iterdir()) == []


def test_best_weights_of_another_backbone(causal: Backbone, tmp_path: Path) -> None:
    own, best = trained_parameters(causal, "full"), BestWeights(tmp_path)
    write_tensors(tmp_path / "best-0-0.safetensors", {"x": torch.zeros(2)})
    with pytest.raises(PromptError):
        best.restore(own, epoch=0)
    with pytest.raises(FileError):
        best.restore(own, epoch=7)
