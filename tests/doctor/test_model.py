"""A backbone is found or missing, loads or does not, and says which one it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ptuning.backbone import sources
from ptuning.backbone.sources import LoadOptions
from ptuning.doctor import model
from tests.doctor.conftest import named
from tests.hub import Hub, serving

PLAIN = LoadOptions(dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("family", "kind", "slots"),
    [
        ("llama", "causal, LlamaForCausalLM", "anywhere; it writes"),
        ("bert", "masked, Bert", "anywhere; it fills masks"),
    ],
)
def test_a_folder_is_found_loaded_and_described(
    family: str, kind: str, slots: str, model_folder: Callable[[str], Path]
) -> None:
    folder = str(model_folder(family))
    assert model.find(folder, PLAIN, is_asked=True).found == f"{folder}: the folder"
    backbone, checks = model.load(folder, PLAIN)
    assert backbone is not None
    found = named(checks)
    assert list(found) == ["loads", "fingerprint", "kind", "sizes", "slots"]
    assert found["fingerprint"].found == backbone.fingerprint
    assert kind in found["kind"].found
    taken = sum(4 * weight.numel() for weight in backbone.model.parameters())
    assert f" M weights in {taken / 1e6:.1f} MB" in found["kind"].found
    assert found["sizes"].found == f"width 32, vocabulary {backbone.vocabulary}, rows of 64 tokens at most"
    assert slots in found["slots"].found
    assert "on cpu: float32, " in found["loads"].found
    assert "it was asked for" in found["loads"].found


@pytest.mark.parametrize(("is_asked", "status"), [(True, "failed"), (False, "warning")])
def test_one_that_is_missing_is_a_fault_if_it_was_asked_for(is_asked: bool, status: str, tmp_path: Path) -> None:
    found = model.find(str(tmp_path / "none"), PLAIN, is_asked=is_asked)
    assert found.status == status
    assert "no such backbone folder" in found.found
    assert "--backbone" in found.remedy


def test_the_default_is_in_the_cache_or_comes_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sources.PackagedWeights, "find", lambda *_: tmp_path / "weights.gguf")
    found = model.find(sources.BACKBONE, PLAIN, is_asked=False)
    assert found.found == f"{sources.BACKBONE}: {tmp_path}/weights.gguf, which is converted the first time"
    monkeypatch.setattr(sources, "is_cached", lambda _: True)
    found = model.find(sources.BACKBONE, PLAIN, is_asked=False)
    assert found.found.startswith(f"{sources.BACKBONE}: its converted copy, {tmp_path}/ptuning/smollm2-135m-")
    wrong = model.find(sources.BACKBONE, LoadOptions(revision="main"), is_asked=True)
    assert (wrong.status, "revision 'main'" in wrong.found) == ("failed", True)


def test_one_of_the_hub_names_its_commit(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "a" * 40
    hub = Hub("owner/tiny", {commit: model_folder("llama")}, {"main": commit})
    with serving(hub, monkeypatch):
        found = model.find("owner/tiny", LoadOptions(cache_dir=tmp_path), is_asked=True)
    assert found.status == "ok", found
    assert found.found.startswith(f"owner/tiny: from the hub, commit {commit[:12]}, in {tmp_path}")


def test_weights_that_are_not_whole_do_not_load(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(model_folder("llama"), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert model.find(str(folder), PLAIN, is_asked=True).status == "ok"
    backbone, checks = model.load(str(folder), PLAIN)
    assert backbone is None
    assert (checks[0].name, checks[0].status) == ("loads", "failed")
    assert "cannot load the backbone" in checks[0].found


def test_memory_that_runs_out_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(model, "load_backbone", load)
    backbone, checks = model.load("big", PLAIN)
    assert backbone is None
    assert checks[0].found == "it does not fit: MemoryError"
    assert "--dtype bfloat16" in checks[0].remedy
