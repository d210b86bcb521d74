"""Number formats: the one of ``auto``; and quantised backbones: slots learn through them, prompts name the format."""

import json
import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ptuning.backbone import probes
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.backbone.number_format import (
    ALIKE,
    ANOTHER,
    UNKNOWN,
    choose_dtype,
    format_of,
    in_another_format,
    warn_if_slow,
)
from ptuning.backbone.weights import stored_tensors
from ptuning.config import TrainConfig
from ptuning.engine.memory import tensor_bytes
from ptuning.errors import BackboneError
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.training.estimate import estimate
from ptuning.training.run import train
from tests.conftest import RECORDS, WARM, make_tokenizer

INT8 = "torchao int8-weight-only, 8 bits, a scale for each row"
NF4 = "bitsandbytes nf4, 4 bits, groups of 64"
BNB8 = "bitsandbytes int8, 8 bits, a scale for each row"
NEEDS = {"int8": "torchao", "nf4": "bitsandbytes", "int8-bnb": "bitsandbytes"}
# How alike gradients must be: the cosine with those of whole weights, on a random model.
LEAST = {"int8": 0.99, "nf4": 0.8, "int8-bnb": 0.9}

EVERY = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}"))
    for name, package in NEEDS.items()
]
TORCHAO = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
BITSANDBYTES = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


CPU = torch.device("cpu")


@pytest.mark.parametrize("units", [{}, {"avx512_bf16": True}, {"amx_bf16": True}])
def test_a_processor_takes_float32_whatever_its_units(
    units: dict[str, bool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Scores in bfloat16 were not shown to be the same (decision 9), so results do not depend on the processor."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    dtype, reason = choose_dtype("auto", CPU)
    assert dtype == torch.float32
    assert ("dtype=bfloat16" in reason) == bool(units)
    assert choose_dtype("bfloat16", CPU).dtype == torch.bfloat16
    with caplog.at_level(logging.WARNING):
        warn_if_slow(torch.float32, CPU)
        assert not caplog.records
        warn_if_slow(torch.bfloat16, CPU)
    assert ("5 to 40 times" in caplog.text) == (not units)


def wide_model() -> transformers.PreTrainedModel:
    """A model that is wide enough for weights in groups of 64."""
    tokenizer = make_tokenizer("llama")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(5.0)
    return model


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    wide_model().save_pretrained(folder)
    make_tokenizer("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def load(wide: Path) -> Callable[[str | None], Backbone]:
    """Load the wide model in a format; not to be changed."""
    return cache(lambda quantize: load_backbone(wide, dtype="float32", device="cpu", quantize=quantize))


def gradient(backbone: Backbone) -> Tensor:
    """The gradient of what is scored at the end of a row at all of its tokens, as one vector."""
    ids = torch.tensor([[7, 8, 9, 10, 11, 12]])
    embeddings = backbone.embed(ids).detach().clone().requires_grad_(True)
    logits, _ = backbone.run(
        embeddings,
        mask=torch.ones_like(ids),
        positions=torch.arange(6)[None],
        rows=torch.zeros(1, dtype=torch.int64),
        cols=torch.tensor([5]),
    )
    (result,) = torch.autograd.grad(torch.logsumexp(logits, dim=-1).sum() - logits[0, 7], embeddings)
    return result[0, :5].reshape(-1)


@pytest.mark.parametrize("quantize", EVERY)
def test_slots_learn_through_quantised_weights(
    quantize: str, load: Callable[[str | None], Backbone], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The gradients are those of whole weights but for rounding, before and after a pass without any; the prompt says
    which format it is of, and is used without a word.
    """
    whole, packed = load(None), load(quantize)
    alike = torch.nn.functional.cosine_similarity(gradient(whole), gradient(packed), dim=0)
    assert float(alike) > LEAST[quantize]
    assert packed.passes_gradients
    assert packed.parameters == whole.parameters
    assert tensor_bytes(stored_tensors(packed.model)) < 0.6 * tensor_bytes(stored_tensors(whole.model))
    with caplog.at_level(logging.WARNING):
        result = train(WARM, RECORDS, backbone=packed, out=tmp_path / "run", config=TrainConfig(epochs=2, lr=0.01))
        prompt = Prompt.load(tmp_path / "run")
        answers = PromptModel(packed).predict(RECORDS, prompt)
    assert caplog.text == ""
    assert answers == PromptModel(packed).predict(RECORDS, result.prompt)
    assert prompt.backbone is not None
    assert prompt.backbone.loaded["quantization"] == packed.loaded["quantization"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["backbone"]["quantization"] == {"int8": INT8, "nf4": NF4, "int8-bnb": BNB8}[quantize]


@pytest.mark.parametrize("quantize", EVERY)
def test_formats_are_told_apart_and_have_one_table(quantize: str, load: Callable[[str | None], Backbone]) -> None:
    """The fingerprint does not change while a model is used."""
    whole, packed = load(None), load(quantize)
    assert packed.fingerprint.split("-")[0] == whole.fingerprint.split("-")[0]
    assert packed.fingerprint != whole.fingerprint
    before, shared = packed.fingerprint, packed.copy(share=True)
    with torch.no_grad():
        PromptModel(packed).predict(RECORDS[:1], Prompt.manual("[X] is [Y]"))
    gradient(packed)
    for backbone in (packed, shared):
        backbone.__dict__.pop("fingerprint", None)
        assert backbone.fingerprint == before


@TORCHAO
def test_the_fingerprint_covers_the_scales_and_a_prompt_of_another_format_warns(
    wide: Path, load: Callable[[str | None], Backbone], caplog: pytest.LogCaptureFixture
) -> None:
    whole, packed = load(None), load_backbone(wide, dtype="float32", device="cpu", quantize="int8")
    prompt = train(WARM, RECORDS, backbone=whole, config=TrainConfig(epochs=1)).prompt
    with caplog.at_level(logging.WARNING):
        PromptModel(packed).predict(RECORDS, prompt)
    (record,) = caplog.records
    assert all(fact in record.getMessage() for fact in (whole.name, "whole weights", INT8, ALIKE))
    before = packed.fingerprint
    del packed.__dict__["fingerprint"]
    packed.model.model.layers[0].mlp.up_proj.weight.scale.mul_(1.5)
    assert packed.fingerprint != before


@pytest.mark.parametrize(
    ("trained", "used", "known"),
    [
        (None, None, None),
        (NF4, NF4, None),
        (None, INT8, ALIKE),
        (INT8, None, ALIKE),
        (None, NF4, ANOTHER),
        (INT8, NF4, ANOTHER),
        (None, "gptq, 4 bits, groups of 128", ANOTHER),
        ("gptq, 4 bits, groups of 128", None, UNKNOWN),
        (NF4, None, ALIKE),
        (BNB8, None, ALIKE),
        ("fp8", INT8, UNKNOWN),
    ],
)
def test_what_is_known_of_formats(trained: str | None, used: str | None, known: str | None) -> None:
    assert in_another_format(trained, used) == known


@pytest.mark.parametrize("quantize", EVERY)
def test_what_quantised_weights_cannot_do_is_refused(quantize: str, load: Callable[[str | None], Backbone]) -> None:
    """Training the weights, and drawing them anew; before a step is run."""
    packed = load(quantize)
    with pytest.raises(BackboneError, match=r"its weights are quantised \(.*\), so they cannot be trained or"):
        train(WARM, RECORDS, backbone=packed, config=TrainConfig(train_backbone="full"))
    with pytest.raises(BackboneError, match="or load it without quantize"):
        packed.with_random_weights(seed=0)


@pytest.mark.parametrize("quantize", EVERY)
def test_a_folder_that_is_quantised_just_loads(
    quantize: str, load: Callable[[str | None], Backbone], tmp_path: Path
) -> None:
    """It is the same backbone as the one that was quantised on loading, and is not quantised twice."""
    packed = load(quantize)
    packed.model.save_pretrained(tmp_path)
    packed.tokenizer.save(tmp_path)
    again = load_backbone(tmp_path, dtype="float32", device="cpu")
    assert again.loaded["quantization"] == packed.loaded["quantization"]
    assert again.fingerprint == packed.fingerprint
    with pytest.raises(BackboneError, match=r"is quantised already: .* 8 bits.*|is quantised already: .* 4 bits"):
        load_backbone(tmp_path, quantize=quantize)


@TORCHAO
def test_weights_and_activations_in_8_bits_are_refused_for_training(wide: Path) -> None:
    """transformers says that such a model is trainable. Its gradients are exactly zero."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    model = transformers.AutoModelForCausalLM.from_pretrained(
        wide,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=transformers.TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
    )
    backbone = Backbone.from_model(model, make_tokenizer("llama"))
    with pytest.raises(BackboneError, match="slots would stay as they start; load it in another format"):
        train(WARM, RECORDS, backbone=backbone, config=TrainConfig(epochs=1))
    assert len(PromptModel(backbone).predict(RECORDS, Prompt.manual("[X] is [Y]"))) == len(RECORDS)


def test_a_format_that_a_model_cannot_be_read_in_says_so(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLM.int8 multiplies in another way where any token of a pass has large numbers, and Gemma 3 shows it."""
    monkeypatch.setattr(probes, "format_of", lambda _: BNB8)
    same = iter([True, True, False])  # embeddings, positions, and what stands behind
    monkeypatch.setattr(probes, "same_logits", lambda *_: next(same))
    with pytest.raises(BackboneError, match=r"quantised to bitsandbytes int8, .*quantize=int8 or nf4, or none"):
        probes.check_reading(causal)


@BITSANDBYTES
def test_weights_of_4_bits_stay_where_they_are(wide: Path) -> None:
    """bitsandbytes reorders them at the first pass without gradients on some processors: products with these pass no
    gradient, and what is saved then is another model. It used to be the state after every check on loading.
    """
    backbone = load_backbone(wide, dtype="bfloat16", device="cpu", quantize="nf4")
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    with torch.no_grad():
        PromptModel(backbone).predict(RECORDS, Prompt.manual("[X] is [Y]"))
    after = backbone.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(
        getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)
        for weight in backbone.model.parameters()
    )


@TORCHAO
def test_an_estimate_counts_the_bytes_that_are_there(load: Callable[[str | None], Backbone]) -> None:
    whole, packed = (
        estimate(WARM, RECORDS * 4, backbone=load(quantize), config=TrainConfig(epochs=1)).memory["weights"]
        for quantize in (None, "int8")
    )
    assert packed < 0.6 * whole


def test_a_format_whose_package_is_missing_says_what_to_install(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptuning.backbone.number_format.find_spec", lambda _: None)
    with pytest.raises(BackboneError, match=r"'int8' needs the package torchao: pip install 'ptuning\[quantized\]'"):
        load_backbone(wide, quantize="int8")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq, 4 bits, groups of 128"),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "gptq, 8 bits"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
            | {"bnb_4bit_use_double_quant": True},
            f"{NF4}, scales in 8 bits",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, BNB8),
    ],
)  # fmt: skip
def test_formats_are_named_by_method_bits_and_groups(config: dict[str, Any], expected: str) -> None:
    given: Any = {"quantization_config": config}
    assert format_of(transformers.GPT2Config(**given)) == expected
    assert format_of(transformers.GPT2Config()) is None


class Wrapped(torch.Tensor):
    """A weight that keeps codes inside."""

    def __tensor_flatten__(self) -> tuple[list[str], object]:
        return [], None


def test_a_quantised_table_is_refused(causal: Backbone) -> None:
    """Slots are vectors among its rows."""
    table = causal.model.get_input_embeddings()
    rows = table._parameters.pop("weight")
    assert rows is not None
    vars(table)["weight"] = rows.detach().as_subclass(Wrapped)
    with pytest.raises(BackboneError, match="its embedding table is quantised, and slots are vectors in that table"):
        _ = causal.embedding_rows
