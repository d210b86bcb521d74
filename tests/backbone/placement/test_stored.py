"""The fingerprint: of what weights stand for, whatever form they are stored in."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.placement.stored import is_packed, opened, stored_tensors
from ptuning.engine.memory import tensor_bytes


def in_bfloat16(weight: Tensor) -> bytes:
    return weight.detach().to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


def test_the_fingerprint_of_plain_weights_is_the_one_that_prompts_have(backbone: Backbone) -> None:
    """Prompts of every release say which backbone is theirs by it: it is written down here once more."""
    (rows,) = backbone.model.get_input_embeddings().parameters()
    table = hashlib.sha256(in_bfloat16(rows)).hexdigest()
    samples = sorted(
        hashlib.sha256(in_bfloat16(weight.reshape(-1)[:: max(1, weight.numel() // 256)])).hexdigest()
        for weight in backbone.model.parameters()
    )
    assert backbone.fingerprint == f"{table[:16]}-{hashlib.sha256(''.join(samples).encode()).hexdigest()[:16]}"


class Packed:
    """A weight of codes and scales, as packages for quantised weights make them."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales

    def __tensor_flatten__(self) -> tuple[list[str], object]:
        return ["codes", "scales"], None


def test_a_packed_weight_is_opened() -> None:
    codes, scales = torch.ones(4, 2, dtype=torch.int8), torch.ones(4)
    inner: Any = Packed(codes, scales)
    assert list(opened(inner)) == [codes, scales]
    outer: Any = Packed(inner, scales)
    assert list(opened(outer)) == [codes, scales, scales]


def test_the_bytes_of_a_plain_model_are_those_of_its_weights(backbone: Backbone) -> None:
    weights = [*backbone.model.parameters(), *backbone.model.buffers()]
    assert tensor_bytes(stored_tensors(backbone.model)) == tensor_bytes(weights)


def test_only_weights_that_are_codes_are_packed(causal: Backbone) -> None:
    """A model that was made whole again on loading keeps the config of its folder."""
    assert not is_packed(causal.model)
    before = causal.fingerprint
    causal.model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert not is_packed(causal.model)
    del causal.__dict__["fingerprint"]
    assert causal.fingerprint == before
    codes = torch.ones(2, dtype=torch.uint8)
    causal.model.register_buffer("codes", codes)
    assert is_packed(causal.model)
    del causal.__dict__["fingerprint"]
    packed = causal.fingerprint
    assert packed.split("-")[0] == before.split("-")[0]
    assert packed != before
    codes += 1
    del causal.__dict__["fingerprint"]
    assert causal.fingerprint not in (before, packed)
