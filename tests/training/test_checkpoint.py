"""The best weights so far, kept on disk beside a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.trained_weights import trained_parameters, write_tensors
from ptuning.errors import FileError, PromptError
from ptuning.training.checkpoint import KeptWeights
from tests.backbone.test_trained_weights import weights


def test_what_was_kept_is_put_back(backbone: Backbone, tmp_path: Path) -> None:
    own = trained_parameters(backbone, "full")
    before = weights(backbone)
    kept = KeptWeights(tmp_path)
    for epoch in (0, 1):
        kept.keep(own, epoch=epoch)
        with torch.no_grad():
            for weight in own.values():
                weight.add_(1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-0.safetensors", "best-1.safetensors"]
    kept.restore(own, epoch=0)
    after = weights(backbone)
    assert all(torch.equal(before[name], after[name]) for name in before)
    kept.forget_others(epoch=1)
    assert [path.name for path in tmp_path.iterdir()] == ["best-1.safetensors"]
    kept.close()
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_folder_nothing_is_left_behind(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept = KeptWeights()
    kept.keep(trained_parameters(causal, "full"), epoch=0)
    assert len(list(tmp_path.iterdir())) == 1
    kept.close()
    assert list(tmp_path.iterdir()) == []


def test_kept_weights_of_another_backbone(causal: Backbone, tmp_path: Path) -> None:
    own = trained_parameters(causal, "full")
    kept = KeptWeights(tmp_path)
    write_tensors(tmp_path / "best-0.safetensors", {"x": torch.zeros(2)})
    with pytest.raises(PromptError, match="holds the weights of another backbone"):
        kept.restore(own, epoch=0)
    with pytest.raises(FileError, match="cannot read"):
        kept.restore(own, epoch=7)
