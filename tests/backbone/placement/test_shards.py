"""One model over several processes: a run and a fleet learn what they learn in one process, and one process writes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from ptuning import files
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.backbone.placement.shards import Shards
from ptuning.config import TrainConfig
from ptuning.errors import BackboneError, ConfigError
from ptuning.files import write_json_lines
from ptuning.prompt.prompt import Prompt
from ptuning.records import Record
from ptuning.training.run import train
from ptuning.training.spec import FleetPrompt
from ptuning.training.train_fleet import train_fleet
from tests.cli.test_app import call
from tests.conftest import RECORDS, WARM
from tests.families import model_of, tokenizer_of
from tests.processes import forked, launched

FAST = TrainConfig(epochs=2, batch_size=3, lr=0.01, patience=99)
LABELLED: list[Record] = [{**row, "y": "ab"[number % 2]} for number, row in enumerate(RECORDS)]
PROMPTS = (
    FleetPrompt("warm", WARM, RECORDS, config=FAST),
    FleetPrompt("free", "[P*2] [X] [Y]", RECORDS, config=replace(FAST, encoder="none", seed=1)),
    FleetPrompt("deep", "[P] [X] [D:is] [Y]", RECORDS, config=replace(FAST, batch_size=2)),
    FleetPrompt("labels", "[P] [X] [Y]", LABELLED, config=FAST, labels="a=yes;b=a good film"),
    FleetPrompt("written", "[P:The] [X] [Y]", RECORDS, config=replace(FAST, choose_by="bleu")),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with a plan for tensor parallelism: one whose head is its table, and one with a head of its own."""
    found = {}
    for name, is_tied in (("llama", True), ("qwen3", False)):
        found[name] = tmp_path_factory.mktemp("shards") / name
        model_of(name, tie_word_embeddings=is_tied).save_pretrained(found[name])
        tokenizer_of("llama").save_pretrained(found[name])
    return found


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
        with pytest.raises(BackboneError, match="spread over 2 processes, and only a prompt's slots"):
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


def test_a_model_over_two_processes_learns_what_it_learns_in_one(folders: dict[str, Path], tmp_path: Path) -> None:
    """Tensor parallelism rounds sums in another way; layers that are only kept apart change no bit. The fingerprint is
    that of the whole model, both processes learn the same bits, and the first one writes.
    """
    program = (
        f"import sys, pathlib; sys.path.insert(0, {str(Path(__file__).parents[3])!r})\n"
        "import tests.backbone.placement.test_shards as t\n"
        "t.spread(*map(pathlib.Path, sys.argv[1:]))\n"
    )
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                forked(
                    program,
                    tmp_path,
                    folders["llama"],
                    folders["qwen3"],
                    folder=tmp_path / f"said-{rank}",
                    environment=told,
                )
            )
            for rank, told in enumerate(launched(2))
        ]
        assert [process.wait() for process in running] == [0, 0], [process.err[-4000:] for process in running]
    both = [safetensors.torch.load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for name, value in both[0].items():
        assert torch.equal(value, both[1][name]), f"{name}: processes must agree to the bit"
    for name, family in (("llama", "llama"), ("qwen3", "qwen3"), ("layers", "llama")):
        whole = learned(load_backbone(folders[family], dtype="float32", device="cpu"))
        for key, value in whole.items():
            tolerance = 0.0 if name == "layers" else 1e-6
            torch.testing.assert_close(both[0][f"{name} {key}"], value, rtol=0, atol=tolerance, msg=f"{name} {key}")
        record = json.loads((tmp_path / name / "run" / "run.json").read_text())
        how = "layers" if name == "layers" else "tp"
        assert record["backbone"]["shards"] == {
            "how": how, "processes": 2, "shares_prefix": True, "keeps_prefixes": False
        }  # fmt: skip
        assert torch.equal(vectors(tmp_path / name / "run"), both[0][f"{name} run"])
        assert sorted(path.name for path in (tmp_path / name / "fleet").iterdir()) == [
            "deep", "fleet.json", "free", "labels", "warm", "written"
        ]  # fmt: skip
    half = logits(load_backbone(folders["llama"], dtype="bfloat16", device="cpu"))
    torch.testing.assert_close(both[0]["bfloat16 logits"], half, rtol=0.03, atol=0.03)
    steps = both[0]["bfloat16 logits"] * 128
    assert not torch.equal(steps, steps.round()), "logits that are scored are float32"


def vectors(folder: Path) -> Tensor:
    found = Prompt.load(folder).slot_vectors
    assert found is not None
    return found


def test_the_command_trains_over_two_processes(folders: dict[str, Path], tmp_path: Path) -> None:
    """`torchrun --nproc-per-node 2 -m ptuning train --shard tp`: the first process speaks for both."""
    write_json_lines(tmp_path / "data.jsonl", RECORDS)
    words = ["train", "--data", tmp_path / "data.jsonl", "--template", WARM, "--set", "epochs=1", "--dtype", "float32"]
    words += ["--backbone", folders["llama"], "--device", "cpu"]
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                forked(
                    "import runpy\nrunpy.run_module('ptuning', run_name='__main__', alter_sys=True)\n",
                    *words, "--shard", "tp", "--out", tmp_path / "spread",
                    folder=tmp_path / f"said-{rank}", environment=told,
                )
            )
            for rank, told in enumerate(launched(2))
        ]  # fmt: skip
        assert [process.wait() for process in running] == [0, 0], [process.err[-3000:] for process in running]
    assert "chosen:" in running[0].out
    assert (running[1].out, running[1].err) == ("", "")
    assert call(*words, "--out", tmp_path / "whole").code == 0
    torch.testing.assert_close(vectors(tmp_path / "spread"), vectors(tmp_path / "whole"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shard", ["tp", "layers"])
def test_a_model_is_not_spread_over_one_process(shard: str, folders: dict[str, Path]) -> None:
    with pytest.raises(BackboneError, match=rf"shard '{shard}' spreads the model over several processes.*torchrun"):
        load_backbone(folders["llama"], shard=shard)


def test_a_map_is_for_one_process(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_backbone(folders["llama"], dtype="float32", shard="map")
    assert found.fingerprint == load_backbone(folders["llama"], dtype="float32", device="cpu").fingerprint
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BackboneError, match=r"shard 'map' is one process over all devices, and WORLD_SIZE says .* 2"):
        load_backbone(folders["llama"], shard="map")


def test_a_model_without_a_plan_says_what_it_can_do(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not transformers.AutoConfig.from_pretrained(model_folder("bert")).base_model_tp_plan
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BackboneError, match=r"no plan for the tensor parallelism of bert; use --shard layers"):
        load_backbone(model_folder("bert"), shard="tp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": "pp"}, "unknown shard 'pp'; use tp, map or layers"),
        ({"shard": "map", "device_map": "auto"}, "shard and device_map are two answers to one question"),
        ({"shard": "tp", "quantize": "int8"}, "quantised weights are not spread over processes"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(BackboneError, match=message):
        load_backbone(folders["llama"], **options)


def test_commands_of_one_process_refuse_it(folders: dict[str, Path]) -> None:
    found = call("eval", "manual:[X] is [Y]", "--data", "capitals:dev", "--backbone", folders["llama"], "--shard", "tp")
    assert found.code == 2
    assert "--shard tp is for train and fleet" in found.err


def test_what_is_timed_runs_in_one_process(causal: Backbone) -> None:
    """Processes that go by their own clocks would not run the same passes, and wait for each other forever."""
    causal.shards = Shards("tp", 2)
    with pytest.raises(ConfigError, match="is timed in one process"):
        train(WARM, RECORDS, backbone=causal, config=FAST, ceiling=True)
