"""Weights set aside on disk: put back bit by bit, and gone when the work is done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptuning.backbone import Backbone
from ptuning.weights import PREFIX, KeptWeights


def weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in backbone.model.state_dict().items()}


def test_what_was_kept_is_put_back(backbone: Backbone, tmp_path: Path) -> None:
    before = weights(backbone)
    with KeptWeights(tmp_path) as kept:
        kept.keep(backbone)
        with torch.no_grad():
            for weight in backbone.model.parameters():
                weight.add_(1.0)
        changed = weights(backbone)
        assert not any(torch.equal(before[name], changed[name]) for name, _ in backbone.model.named_parameters())
        kept.restore(backbone)
    after = weights(backbone)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_last_ones_kept_count_and_another_copy_may_take_them(causal: Backbone, tmp_path: Path) -> None:
    with KeptWeights(tmp_path) as kept:
        kept.keep(causal)
        with torch.no_grad():
            next(causal.model.parameters()).add_(1.0)
        kept.keep(causal)
        other = causal.copy()
        with torch.no_grad():
            next(other.model.parameters()).zero_()
        kept.restore(other)
    assert all(map(torch.equal, other.model.parameters(), causal.model.parameters()))


def test_nothing_is_left_behind(causal: Backbone, tmp_path: Path) -> None:
    def interrupted() -> None:
        with KeptWeights(tmp_path) as kept:
            kept.keep(causal)
            assert [path.name.startswith(PREFIX) for path in tmp_path.iterdir()] == [True]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}abc").mkdir()
    (tmp_path / f"{PREFIX}abc" / "weights.safetensors").write_bytes(b"half of it")
    (tmp_path / "run.json").write_text("{}")
    KeptWeights.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    KeptWeights.clear(tmp_path / "missing")
