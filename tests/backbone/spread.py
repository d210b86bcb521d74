"""Trainings on a model that is spread over processes. Those import this module: nothing heavy stands here."""

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ptuning import files
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.config import TrainConfig
from ptuning.errors import BackboneError
from ptuning.records import Record
from ptuning.training.fleet import train_fleet
from ptuning.training.run import train
from ptuning.training.spec import FleetPrompt
from tests.conftest import RECORDS, WARM

FAST = TrainConfig(epochs=1, batch_size=3, lr=0.01, patience=99).as_defaults()
LABELLED: list[Record] = [{**row, "y": "ab"[number % 2]} for number, row in enumerate(RECORDS)]
PROMPTS = (
    FleetPrompt("warm", WARM, RECORDS, config=FAST),
    FleetPrompt("free", "[P*2] [X] [Y]", RECORDS, config=FAST.adapted(encoder="none", seed=1)),
    FleetPrompt("deep", "[P] [X] [D:is] [Y]", RECORDS, config=FAST.adapted(batch_size=2)),
    FleetPrompt("labels", "[P] [X] [Y]", LABELLED, config=FAST, labels="a=yes;b=a good film"),
    FleetPrompt("written", "[P:The] [X] [Y]", RECORDS, config=FAST.adapted(metric_for_best_model="bleu")),
)


def learned(backbone: Backbone, out: Path | None = None) -> dict[str, Tensor]:
    """What a run and a fleet learn on a backbone, and which one it is."""
    run = train(WARM, RECORDS, backbone=backbone, out=None if out is None else out / "run", config=FAST)
    fleet = train_fleet(PROMPTS, backbone=backbone, out=None if out is None else out / "fleet")
    assert not fleet.failed
    found = {"fingerprint": torch.tensor(list(backbone.fingerprint.encode()))}
    for name, prompt in (("run", run.prompt), *((name, one.prompt) for name, one in fleet.results.items())):
        assert prompt.slot_vectors is not None
        found[name] = prompt.slot_vectors
        if prompt.deep is not None:
            found |= {f"{name} {part}": value for part, value in prompt.deep.tensors.items()}
    return found


def refuse(path: Path) -> Path:
    raise AssertionError(f"a process that does not write has written {path}")


def spread(out: Path, llama: Path, qwen3: Path) -> None:
    """As one of several processes: train on models in tensor parallelism and on one whose layers are spread."""
    rank = int(os.environ["RANK"])
    if rank:
        files.new_path = refuse
    found: dict[str, Tensor] = {}
    for name, folder, shard in (("llama", llama, "tp"), ("qwen3", qwen3, "tp"), ("layers", llama, "layers")):
        backbone = load_backbone(folder, dtype="float32", device="cpu", shard=shard)
        assert backbone.shards is not None
        whole = sum(weight.numel() for weight in backbone.model.parameters())
        here = sum(getattr(one, "_local_tensor", one).numel() for one in backbone.model.parameters())
        assert here < 0.75 * whole
        with pytest.raises(BackboneError, match="spread over 2 processes, so only a prompt's slots"):
            backbone.with_random_weights(seed=0)
        found |= {f"{name} {key}": value for key, value in learned(backbone, out / name).items()}
    half = load_backbone(llama, dtype="bfloat16", device="cpu", shard="tp")
    found["bfloat16 logits"] = logits(half)
    plain = {name: value.contiguous() for name, value in found.items()}
    safetensors.torch.save_file(plain, out / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


def logits(backbone: Backbone) -> Tensor:
    """The logits of a row at two positions, as they are scored."""
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        return backbone.run(
            backbone.embed(ids),
            mask=torch.ones_like(ids),
            positions=torch.arange(4)[None],
            rows=torch.zeros(2, dtype=torch.int64),
            cols=torch.tensor([2, 3]),
        )[0]
