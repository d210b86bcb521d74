"""A copy of a GGUF file with the slots as tokens: transformers reads it, and all else has the bytes that it had."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from transformers import AutoModelForCausalLM

from ptuning.backbone.loading import load_backbone
from ptuning.errors import ConfigError, ExchangeError
from ptuning.exchange import gguf_copy
from ptuning.exchange.gguf_copy import FILE
from tests.conftest import RECORDS, learned
from tests.exchange.conftest import ANYWHERE, RESERVED, asked, exported, ours, reserving, reserving_tokenizer
from tests.tiny_gguf import write_gguf


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize(("kind", "rounding"), [("F32", 1e-4), ("Q8_0", 0.5)])
def test_the_copy_gives_the_log_probability_of_the_example(kind: str, rounding: float, tmp_path: Path) -> None:
    """A tied head gets the table as it was; packed weights are rounded in the backbone and not in the copy."""
    original = write_gguf(tmp_path / "tiny.gguf", kind=kind, tokenizer=reserving_tokenizer())
    backbone = load_backbone(str(original), dtype="float32", device="cpu")
    prompt = learned(backbone, ANYWHERE)
    about = exported(prompt, backbone, tmp_path / "out", "gguf")
    assert about["slot_tokens"] == RESERVED[:3]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=FILE, dtype=torch.float32).eval()
    found = asked(model, about["example"])
    assert found == pytest.approx(about["example"]["log_prob"], abs=1e-4)
    assert found == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=rounding)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_everything_else_has_the_bytes_that_it_had(kind: str, tmp_path: Path) -> None:
    original = write_gguf(tmp_path / "tiny.gguf", kind=kind, tokenizer=reserving_tokenizer())
    backbone = load_backbone(str(original), dtype="float32", device="cpu")
    exported(learned(backbone, ANYWHERE), backbone, tmp_path / "out", "gguf")
    before, after = (GGUFReader(path) for path in (original, tmp_path / "out" / FILE))
    fields = {name: field.contents() for name, field in before.fields.items() if not name.startswith("GGUF.")}
    assert {name: after.fields[name].contents() for name in fields} == fields
    old, new = ({tensor.name: tensor for tensor in reader.tensors} for reader in (before, after))
    assert new.keys() - old.keys() == {"output.weight"}
    for name, tensor in old.items():
        if name != "token_embd.weight":
            assert np.array_equal(new[name].data, tensor.data)
    assert np.array_equal(new["output.weight"].data, old["token_embd.weight"].data)
    table = new["token_embd.weight"].tensor_type
    assert table == (GGMLQuantizationType.F32 if kind == "F32" else GGMLQuantizationType.F16)


def test_what_cannot_be_copied_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = reserving()
    with pytest.raises(ExchangeError, match=r"'tiny' is not a GGUF file.*convert_hf_to_gguf\.py"):
        exported(learned(backbone, ANYWHERE), backbone, tmp_path / "out", "gguf")
    original = write_gguf(tmp_path / "tiny.gguf", tokenizer=reserving_tokenizer())
    backbone = load_backbone(str(original), dtype="float32", device="cpu")
    with pytest.raises(ExchangeError, match=r"7 slots, and the tokenizer of .* keeps 6 tokens in reserve"):
        exported(learned(backbone, "[P*7] {x} [Y]"), backbone, tmp_path / "out", "gguf")

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(gguf_copy, "version", missing)
    with pytest.raises(ConfigError, match="pip install gguf"):
        exported(learned(backbone, ANYWHERE), backbone, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()
