"""Trained weights: which they are, set aside bit by bit, kept whole or as a difference, refused if they do not fit."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers

from ptuning.backbone import lora
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.backbone.lora import add_adapters
from ptuning.backbone.trained_weights import (
    DIFFERENCE_FILE,
    ROWS,
    WHOLE_FILE,
    TrainedWeights,
    WeightsEntry,
    read_tensors,
    trained_parameters,
    with_adapters,
    write_tensors,
)
from ptuning.config import SaveWeights
from ptuning.errors import BackboneError, FileError, PromptError
from ptuning.files import Json, validate
from tests.conftest import make_tokenizer
from tests.families import POSITIONS, SMALL

EXPERTS = ("MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM")


def experts(head: str) -> Backbone:
    """Return a frozen tiny backbone with a mixture of experts."""
    tokenizer = make_tokenizer("llama")
    sizes = {**SMALL, **POSITIONS, "num_key_value_heads": 2, "num_experts_per_tok": 2, "num_local_experts": 4}
    sizes |= {"num_experts": 4, "moe_intermediate_size": 24} if head == "Qwen3MoeForCausalLM" else {}
    head_class = getattr(transformers, head)
    model = head_class(head_class.config_class(vocab_size=len(tokenizer), **sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5.0)
    backbone = Backbone(model, tokenizer, name="some model")
    backbone.freeze()
    return backbone


def weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in backbone.model.state_dict().items()}


def moved(backbone: Backbone) -> Backbone:
    """Return a copy whose weights are others, but for one tensor, and for all rows but two of another."""
    other = backbone.copy()
    (first, second), *_ = [list(other.model.parameters())[:2]]
    with torch.no_grad():
        for weight in other.model.parameters():
            if weight is first:
                weight[torch.tensor([1, 3])] *= -1.0
            elif weight is not second:
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return other


def adapted(backbone: Backbone, *, targets: str = "all-linear") -> Backbone:
    """Return a copy with adapters that do something."""
    other = backbone.copy(share=True)
    add_adapters(other.model, rank=4, alpha=8.0, targets=targets, seed=0)
    with torch.no_grad():
        for weight in trained_parameters(other, "lora").values():
            weight.add_(0.1)
    other.freeze()
    return other


def logits(backbone: Backbone) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = backbone.model(input_ids=torch.tensor([[7, 9, 11, 13]])).logits
    return found


def test_which_weights_are_trained(backbone: Backbone) -> None:
    assert trained_parameters(backbone, "none") == {}
    assert list(trained_parameters(backbone, "full")) == [name for name, _ in backbone.model.named_parameters()]
    found = trained_parameters(adapted(backbone), "lora")
    assert found
    assert not any(one is other for one in found.values() for other in backbone.model.parameters())


@pytest.mark.parametrize("keep", ["difference", "whole"])
def test_tuned_weights_come_back_bit_by_bit(backbone: Backbone, keep: SaveWeights, tmp_path: Path) -> None:
    """Invariant *Saved is what was trained* (docs/invariants.md): bit by bit, a zero's changed sign included."""
    before, trained = weights(backbone), moved(backbone)
    with torch.no_grad():
        last = list(trained.model.parameters())[-1]
        last.reshape(-1)[0] = 0.0
    found = TrainedWeights.of(trained, backbone, train_backbone="full", keep=keep)
    about = found.save(tmp_path)
    read = TrainedWeights.load(tmp_path, about)
    other = read.into(backbone)
    wanted, got = weights(trained), weights(other)
    assert wanted.keys() == got.keys()
    for name in wanted:
        assert torch.equal(wanted[name].reshape(-1).view(torch.uint8), got[name].reshape(-1).view(torch.uint8)), name
    assert torch.equal(logits(other), logits(trained))
    assert not torch.equal(logits(other), logits(backbone))
    assert other.fingerprint == trained.fingerprint == read.fingerprint != backbone.fingerprint
    after = weights(backbone)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not other.model.training
    assert not any(weight.requires_grad for weight in other.model.parameters())


@pytest.mark.parametrize("keep", ["difference", "whole"])
@pytest.mark.parametrize("files", [torch.float32, torch.bfloat16])
def test_weights_trained_in_one_type_and_loaded_in_another(
    causal: Backbone, keep: SaveWeights, files: torch.dtype, tmp_path: Path
) -> None:
    """What docs/tune.md says of untouched rows: rounded as the backbone is, where its files hold more than bfloat16."""
    causal.model.to(files).save_pretrained(tmp_path)  # type: ignore[arg-type]
    causal.tokenizer.save(tmp_path)
    full = load_backbone(tmp_path, dtype="float32", device="cpu")
    half = load_backbone(tmp_path, dtype="bfloat16", device="cpu")
    for one, other in ((full, half), (half, full)):
        trained = moved(one)
        found = TrainedWeights.of(trained, one, train_backbone="full", keep=keep)
        assert torch.equal(logits(found.into(one)), logits(trained))
        same = torch.equal(logits(found.into(other)), logits(trained))
        assert same == (keep == "whole" or files == torch.bfloat16)


def test_a_difference_holds_what_changed(causal: Backbone, tmp_path: Path) -> None:
    trained = moved(causal)
    names = [name for name, _ in causal.model.named_parameters()]
    found = TrainedWeights.of(trained, causal, train_backbone="full", keep="difference").tensors
    assert set(found) == {names[0], names[0] + ROWS, *names[2:]}
    assert found[names[0] + ROWS].tolist() == [1, 3]
    assert len(found[names[0]]) == 2
    nothing = TrainedWeights.of(causal.copy(), causal, train_backbone="full", keep="difference")
    assert nothing.tensors == {}
    read = TrainedWeights.load(tmp_path, nothing.save(tmp_path))
    assert torch.equal(logits(read.into(causal)), logits(causal))


def test_whole_weights_are_a_model_that_works_alone(backbone: Backbone, tmp_path: Path) -> None:
    trained = moved(backbone)
    TrainedWeights.of(trained, backbone, train_backbone="full", keep="whole").save(tmp_path)
    alone = load_backbone(tmp_path, dtype="float32", device="cpu")
    assert torch.equal(logits(alone), logits(trained))
    assert alone.fingerprint == trained.fingerprint
    text = ["The capital of Kenya is </s> [MASK] <mask>"]
    assert alone.tokenizer.encode(text) == backbone.tokenizer.encode(text)
    assert alone.tokenizer.special_ids == backbone.tokenizer.special_ids
    assert alone.tokenizer.prefix_ids == backbone.tokenizer.prefix_ids
    assert not [file for file in tmp_path.iterdir() if b"/tmp" in file.read_bytes()]


def test_adapters_come_back_bit_by_bit(backbone: Backbone, tmp_path: Path) -> None:
    trained = adapted(backbone)
    read = TrainedWeights.load(
        tmp_path, TrainedWeights.of(trained, backbone, train_backbone="lora", keep="difference").save(tmp_path)
    )
    other = read.into(backbone)
    assert torch.equal(logits(other), logits(trained))
    assert not torch.equal(logits(other), logits(backbone))
    # The other weights are the very same ones, not a copy.
    own = {weight.data_ptr() for weight in other.model.parameters()}
    assert all(weight.data_ptr() in own for weight in backbone.model.parameters())


@pytest.mark.parametrize(
    ("head", "targets"),
    [
        *itertools.product(EXPERTS, ("all-linear", "q_proj,v_proj")),
        ("MixtralForCausalLM", "w1,w2,w3"),
        ("Qwen3MoeForCausalLM", "gate_proj,up_proj,down_proj"),
    ],
)
def test_adapters_on_experts_come_back_bit_by_bit(head: str, targets: str, tmp_path: Path) -> None:
    """peft puts them on the stacked weights of all experts, with ranks of their own for what is stacked of two."""
    backbone = experts(head)
    trained = adapted(backbone, targets=targets)
    assert any(".mlp." in name for name in trained_parameters(trained, "lora")) == (targets != "q_proj,v_proj")
    read = TrainedWeights.load(
        tmp_path, TrainedWeights.of(trained, backbone, train_backbone="lora", keep="difference").save(tmp_path)
    )
    before = weights(backbone)
    other = read.into(backbone)
    assert torch.equal(logits(other), logits(trained))
    assert not torch.equal(logits(other), logits(backbone))
    own = {weight.data_ptr() for weight in other.model.parameters()}
    assert all(weight.data_ptr() in own for weight in backbone.model.parameters())
    after = weights(backbone)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "changed",
    [
        {"target_modules": "q_proj"},
        {"target_modules": [1]},
        {"target_parameters": "gate.weight"},
        {"rank_pattern": ["x"]},
        {"rank_pattern": {".*\\.gate_up_proj": 0}},
        {"rank_pattern": {".*\\.gate_up_proj": True}},
        {"rank_pattern": {"(a+)+b": 8}},  # nothing from a file is run as an expression of its own
        {"alpha_pattern": {"(": 8}},
        {"alpha_pattern": {".*\\.gate_up_proj": None}},
        {"r": "4"},
        {"r": None},
        {"target_modules": None},
        {"lora_alpha": None},
    ],
)
def test_an_adapters_config_of_other_types(changed: dict[str, Json]) -> None:
    backbone = experts("MixtralForCausalLM")
    found = TrainedWeights.of(adapted(backbone), backbone, train_backbone="lora", keep="difference")
    config = json.loads(found.files[lora.CONFIG_FILE])
    files = {lora.CONFIG_FILE: json.dumps({**config, **changed}).encode()}
    with pytest.raises(PromptError, match=f"do not fit MixtralForCausalLM: '{next(iter(changed))}"):
        replace(found, files=files).into(backbone)


def test_adapters_that_the_model_does_not_run_with() -> None:
    """PhiMoE's router is a linear module that returns three things, and peft takes it for a plain one."""
    backbone = experts("PhimoeForCausalLM")
    with pytest.raises(
        BackboneError,
        match=r"some model: PhimoeForCausalLM cannot run with adapters \(lora_targets all-linear\): .*"
        r"\(AttributeError\); set lora_targets to .* such as q_proj,v_proj",
    ):
        with_adapters(backbone, rank=4, alpha=8.0, targets="all-linear", seed=0)
    state = torch.get_rng_state()
    other = with_adapters(backbone, rank=4, alpha=8.0, targets="q_proj,v_proj", seed=0)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    assert torch.equal(logits(other), logits(backbone))
    assert not any(weight.requires_grad for weight in other.model.parameters())


def test_adapters_that_would_not_come_back(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's own choice may be a pattern of modules (Gemma 4): refused before it is trained, not when it is loaded."""
    known = {"llama": r".*\.(q_proj|v_proj)"}
    monkeypatch.setattr("peft.tuners.lora.model.LoraModel.target_module_mapping", known)
    with pytest.raises(BackboneError, match=r"not be loaded again: 'target_modules' .*; set lora_targets"):
        with_adapters(causal, rank=4, alpha=8.0, targets="default", seed=0)


def test_adapters_built_of_what_is_not_kept(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what peft writes down only some is read again; where anything else matters, nothing is trained."""
    made, more = peft.LoraConfig, iter([{"use_rslora": True}])
    monkeypatch.setattr(peft, "LoraConfig", lambda **given: made(**given, **next(more, {})))
    with pytest.raises(
        BackboneError, match=r"not be loaded again: .* from use_rslora, which is not read.*set lora_targets"
    ):
        with_adapters(causal, rank=4, alpha=8.0, targets="all-linear", seed=0)


def test_equal_weights_give_equal_bytes(causal: Backbone, tmp_path: Path) -> None:
    for train_backbone, make in (("full", moved), ("lora", adapted)):
        for name in ("one", "two"):
            (tmp_path / f"{train_backbone}-{name}").mkdir()
            weights = TrainedWeights.of(make(causal), causal, train_backbone=train_backbone, keep="difference")  # type: ignore[arg-type]
            weights.save(tmp_path / f"{train_backbone}-{name}")
        one, two = (
            {file.name: file.read_bytes() for file in (tmp_path / f"{train_backbone}-{name}").iterdir()}
            for name in ("one", "two")
        )
        assert one == two


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-10], "not a whole safetensors file"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "was changed since it was saved"),
        (lambda _: b"", "not a whole safetensors file"),
    ],
)
def test_damaged_files(causal: Backbone, tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    about = TrainedWeights.of(adapted(causal), causal, train_backbone="lora", keep="difference").save(tmp_path)
    config = (tmp_path / lora.CONFIG_FILE).read_text()
    (tmp_path / lora.CONFIG_FILE).write_text(config.replace('"lora_alpha": 8', '"lora_alpha": 9'))
    with pytest.raises(PromptError, match=r"adapter_config.json was changed since it was saved"):
        TrainedWeights.load(tmp_path, about)
    about = TrainedWeights.of(moved(causal), causal, train_backbone="full", keep="difference").save(tmp_path)
    file = tmp_path / DIFFERENCE_FILE
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(PromptError, match=message):
        TrainedWeights.load(tmp_path, about)
    file.unlink()
    with pytest.raises(FileError, match=f"cannot read .*{DIFFERENCE_FILE}"):
        TrainedWeights.load(tmp_path, about)


def test_the_entry_of_the_manifest_is_checked(causal: Backbone, tmp_path: Path) -> None:
    entry = TrainedWeights.of(moved(causal), causal, train_backbone="full", keep="difference").save(tmp_path)
    changes: list[tuple[dict[str, Json], str]] = [
        ({"train_backbone": "none"}, "train_backbone"),
        ({"keep": "some"}, "keep"),
        ({"sha256": None}, "sha256"),
        ({"sha256": {}}, DIFFERENCE_FILE),
        ({"keep": "whole"}, "model.safetensors"),
        ({"train_backbone": "lora", "sha256": {"adapter_model.safetensors": ""}}, "adapter_config.json"),
        ({"sha256": {DIFFERENCE_FILE: "", "../x": ""}}, "sha256"),
    ]
    for changed, message in changes:
        with pytest.raises(PromptError, match=message):
            validate(WeightsEntry, {**entry.model_dump(), **changed}, error=PromptError)


@pytest.mark.parametrize("kind", ["whole", "difference", "lora"])
def test_weights_that_do_not_fit(kind: str, causal: Backbone, make_backbone: Callable[[str], Backbone]) -> None:
    if kind == "lora":
        trained = TrainedWeights.of(adapted(causal), causal, train_backbone="lora", keep="difference")
    else:
        trained = TrainedWeights.of(moved(causal), causal, train_backbone="full", keep=kind)  # type: ignore[arg-type]
    *_, name = trained.tensors
    rest = {key: value for key, value in trained.tensors.items() if key != name}
    cases = [
        ({**trained.tensors, "more": torch.zeros(1)}, "'more'"),
        ({**trained.tensors, name: torch.zeros(3, 3)}, rf"wrong shape at '{name}': \(3, 3\)"),
    ]
    cases += [({**trained.tensors, name + ROWS: torch.tensor([999])}, name)] if kind == "difference" else []
    cases += [(rest, f"lack the key '{name}'")] if kind != "difference" else []
    for tensors, message in cases:
        with pytest.raises(PromptError, match=message):
            replace(trained, tensors=tensors).into(causal)
    with pytest.raises(PromptError, match="GPT2LMHeadModel"):
        trained.into(make_backbone("gpt2"))


def test_tensors_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(tmp_path / WHOLE_FILE, {"x": torch.arange(6).reshape(2, 3).T}, texts={"note": "yes"})
    assert torch.equal(read_tensors(tmp_path / WHOLE_FILE)["x"], torch.arange(6).reshape(2, 3).T)
    (tmp_path / "plain").touch()
    assert (tmp_path / WHOLE_FILE).stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").unlink()

    def fail(*_: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(FileError, match=r"cannot write .*No space left on device.*free some space"):
        write_tensors(tmp_path / WHOLE_FILE, {"x": torch.zeros(1)})
    assert [path.name for path in tmp_path.iterdir()] == [WHOLE_FILE]
