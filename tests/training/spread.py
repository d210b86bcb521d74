"""Trainings that are spread over processes. Those import this module: nothing heavy stands here."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.config import TrainConfig
from ptuning.engine.processes import DataRanks
from ptuning.records import Record
from ptuning.training.trainer import Trainer
from tests.conftest import bound, items_of

TEMPLATE = "[P*2] [X] [P:is] [Y]"
FACTS: list[Record] = [{"x": f"city {index}", "y": ("yes", "no", "São Tomé")[index % 3]} for index in range(7)]
FAST = {"epochs": 2, "batch_size": 3, "lr": 0.01, "patience": 99}
# What several processes must learn as one does: settings, the template, and the numbers that a step sends around.
SPREAD: dict[str, tuple[dict[str, Any], str, int]] = {
    "lstm": ({"dropout": 0.2}, TEMPLATE, 3 * 32),
    "none": ({"encoder": "none"}, TEMPLATE, 3 * 32),
    "several batches a step": ({"dropout": 0.2, "batch_size": 1, "accumulation_steps": 3}, TEMPLATE, 3 * 3 * 32),
    "without dropout": ({"batch_size": 1, "accumulation_steps": 3}, TEMPLATE, 3 * 32),
    "deep": ({}, "[P*2] [X] [D:is] [Y]", 3 * 32 + 32),
}


def spread_trainer(backbone: Backbone, case: str, **more: Any) -> Trainer:
    """Return the trainer of a case of :data:`SPREAD`."""
    settings, template, _ = SPREAD[case]
    config = TrainConfig.from_json({**FAST, **settings, **more})
    return Trainer(backbone, bound(backbone, template), config=config)


def fit_spread(backbone: Backbone, case: str, **more: Any) -> Trainer:
    """Train a case of :data:`SPREAD`."""
    found, items = spread_trainer(backbone, case, **more), items_of(backbone, SPREAD[case][1], FACTS)
    found.fit(items, items[:4])
    return found


def learned_of(found: Trainer) -> Tensor:
    """Everything that was learned, as one tensor."""
    return torch.cat([one.reshape(-1) for one in found.learner.learned().tensors])


def spread(folder: Path, out: Path) -> None:
    """Train all cases as one of several processes, and write what was learned and what was sent around."""
    sizes: list[int] = []
    real = torch.distributed.all_reduce

    def spy(tensor: Tensor, **more: Any) -> object:
        sizes.append(tensor.numel())
        return real(tensor, **more)

    torch.distributed.all_reduce = spy  # type: ignore[assignment]
    backbone = load_backbone(str(folder), dtype="float32", device="cpu")
    found = {}
    for case in SPREAD:
        sizes.clear()
        trained = fit_spread(backbone, case)
        assert trained.learner.ranks.size == 2
        assert len(sizes) == trained.state.step, "one all-reduce in each step"
        found[case] = learned_of(trained)
        found[f"{case}, sent"] = torch.tensor(sizes)
    found["full"] = learned_of(fit_spread(backbone, "lstm", train_backbone="full"))
    safetensors.torch.save_file(found, out / f"{DataRanks.of(backbone).rank}.safetensors")
    torch.distributed.destroy_process_group()
