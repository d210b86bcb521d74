"""One model over several processes: a run and a fleet learn what they learn in one process, and one process writes."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.backbone.weights import Shards
from ptuning.errors import BackboneError, ConfigError
from ptuning.files import write_json_lines
from ptuning.prompt.prompt import Prompt
from ptuning.training.run import train
from tests.backbone.spread import FAST, learned, logits
from tests.cli.calls import call
from tests.conftest import RECORDS, WARM
from tests.families import model_of, tokenizer_of
from tests.processes import forked, launched


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with a plan for tensor parallelism: one whose head is its table, and one with a head of its own."""
    found = {}
    for name, is_tied in (("llama", True), ("qwen3", False)):
        found[name] = tmp_path_factory.mktemp("shards") / name
        model_of(name, tie_word_embeddings=is_tied).save_pretrained(found[name])
        tokenizer_of("llama").save_pretrained(found[name])
    return found


def test_a_model_over_two_processes_learns_what_it_learns_in_one(folders: dict[str, Path], tmp_path: Path) -> None:
    """Tensor parallelism rounds sums in another way; layers that are only kept apart change no bit. The fingerprint is
    that of the whole model, both processes learn the same bits, and the first one writes.
    """
    program = (
        f"import sys, pathlib; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.backbone.spread import spread\n"
        "spread(*map(pathlib.Path, sys.argv[1:]))\n"
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
    alone = {name: learned(load_backbone(folder, dtype="float32", device="cpu")) for name, folder in folders.items()}
    for name, family in (("llama", "llama"), ("qwen3", "qwen3"), ("layers", "llama")):
        for key, value in alone[family].items():
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
    """`torchrun --nproc-per-node 2 -m ptuning train --model-arg shard=tp`: the first process speaks for both."""
    write_json_lines(tmp_path / "data.jsonl", RECORDS)
    words = ["train", "--data", tmp_path / "data.jsonl", "--template", WARM, "--set", "epochs=1", "--dtype", "float32"]
    words += ["--backbone", folders["llama"], "--device", "cpu"]
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                forked(
                    "import runpy\nrunpy.run_module('ptuning', run_name='__main__', alter_sys=True)\n",
                    *words, "--model-arg", "shard=tp", "--out", tmp_path / "spread",
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
    with pytest.raises(BackboneError, match=r"shard 'map' is one process over all devices, and WORLD_SIZE is 2"):
        load_backbone(folders["llama"], shard="map")


def test_a_model_without_a_plan_says_what_it_can_do(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not transformers.AutoConfig.from_pretrained(model_folder("bert")).base_model_tp_plan
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BackboneError, match=r"no plan for the tensor parallelism of bert; use shard=layers"):
        load_backbone(model_folder("bert"), shard="tp")


def test_commands_of_one_process_refuse_it(folders: dict[str, Path]) -> None:
    found = call(
        "eval", "manual:[X] is [Y]", "--data", "capitals:dev", "--backbone", folders["llama"], "--model-arg", "shard=tp"
    )
    assert found.code == 2
    assert "shard=tp is for train and fleet" in found.err


def test_what_is_timed_runs_in_one_process(causal: Backbone) -> None:
    """Processes that go by their own clocks would not run the same passes, and wait for each other forever."""
    causal.shards = Shards("tp", 2)
    with pytest.raises(ConfigError, match="is timed in one process"):
        train(WARM, RECORDS, backbone=causal, config=FAST, ceiling=True)
