"""A GGUF file as a backbone: converted once into the cache, known by its content, refused when it is damaged."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ptuning.backbone import sources
from ptuning.backbone.loading import load_backbone, load_tokenizer
from ptuning.backbone.sources import cache_root
from ptuning.errors import BackboneError
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.training.run import train
from tests.conftest import RECORDS
from tests.tiny_gguf import write_gguf


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def copies() -> list[Path]:
    """The folders of the cache."""
    return sorted(cache_root().iterdir())


def test_a_file_is_converted_once_and_known_by_its_content(tmp_path: Path) -> None:
    """Moved, renamed or given as a path object, it is the same backbone."""
    path = write_gguf(tmp_path / "tiny.gguf")
    one = load_backbone(path, device="cpu")
    (copy,) = copies()
    written = (copy / "model.safetensors").stat().st_mtime_ns
    moved = path.rename(tmp_path / "sha256-of-an-ollama-blob")
    other = load_backbone(str(moved), device="cpu")
    assert one.fingerprint == other.fingerprint
    assert one.name == str(path)
    assert load_tokenizer(moved)[1] == "causal"
    assert copies() == [copy]
    assert (copy / "model.safetensors").stat().st_mtime_ns == written
    # A file that was replaced under its name is converted anew.
    replaced = load_backbone(write_gguf(path, kind="Q8_0"), device="cpu")
    assert one.fingerprint != replaced.fingerprint
    assert len(copies()) == 2


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", torch.float32), ("F16", torch.float32), ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16)],
)
def test_what_was_not_quantised_loses_nothing(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """bfloat16 would round 16 and 32 bits; a quantised weight was rounded harder before."""
    import gguf

    path = write_gguf(tmp_path / "tiny.gguf", kind=kind)
    backbone = load_backbone(path, dtype="float32", device="cpu")
    (copy,) = copies()
    assert {weight.dtype for weight in load_file(copy / "model.safetensors").values()} == {dtype}
    stored = next(one for one in gguf.GGUFReader(path).tensors if one.name == "token_embd.weight")
    values = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(backbone.table(), values.to(dtype).float())


def test_a_prompt_is_learned_saved_and_used_again(tmp_path: Path) -> None:
    """The whole way, in another copy of the cache."""
    path = write_gguf(tmp_path / "tiny.gguf")
    found = train("[P:The capital of] [X] [P:is] [Y]", RECORDS, backbone=load_backbone(path), out=tmp_path / "run")
    answers = PromptModel(load_backbone(path)).predict(RECORDS, found.prompt)
    assert found.prompt.backbone is not None
    assert found.prompt.backbone.name == str(path)
    again = Prompt.load(tmp_path / "run")
    assert PromptModel(load_backbone(path)).predict(RECORDS, again) == answers


@pytest.mark.parametrize("part", [0.0, 0.0001, 0.01, 0.5, 0.9999])
def test_a_file_that_is_cut_off(part: float, tmp_path: Path) -> None:
    """Half a download, at any place: one line, and nothing in the cache."""
    path = write_gguf(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(BackboneError, match=r"tiny.gguf is not a whole GGUF file, but cut off or") as caught:
        load_backbone(path)
    assert "\n" not in str(caught.value)
    assert copies() == []


def test_a_file_that_asks_for_more_than_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a million layers would be made before its weights are missed."""
    path = write_gguf(tmp_path / "tiny.gguf", blocks=10**6)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", pytest.fail)
    with pytest.raises(BackboneError, match=r"the header of tiny.gguf asks for 1,000,000 layers, and the weights are"):
        load_backbone(path)
    assert copies() == []


def test_an_architecture_that_transformers_does_not_read(tmp_path: Path) -> None:
    """It is named, with what to do."""
    path = write_gguf(tmp_path / "tiny.gguf", architecture="unheard-of")
    with pytest.raises(BackboneError, match=r"architecture unheard-of is not supported.*take the model's safetensors"):
        load_backbone(path)
    assert copies() == []


def test_the_package_that_reads_gguf_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(sources, "find_spec", lambda _: None)
    with pytest.raises(BackboneError, match="needs the package gguf: pip install gguf"):
        load_backbone(path)
