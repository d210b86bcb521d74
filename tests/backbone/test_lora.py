"""Adapters: nothing before they are trained, the caller's model as it was, and files that peft itself reads."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import torch

from ptuning.backbone import lora
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.trained_weights import TrainedWeights, trained_parameters, with_adapters
from ptuning.errors import BackboneError, ConfigError, PromptError
from ptuning.prompt.predict import PromptModel
from tests.backbone.test_trained_weights import EXPERTS, adapted, experts, logits, weights
from tests.conftest import RECORDS, learned
from tests.families import backbone_of


def test_the_model_that_was_copied_stays_as_it_was(backbone: Backbone) -> None:
    before, answer, modules = weights(backbone), logits(backbone), [type(one) for one in backbone.model.modules()]
    other = adapted(backbone)
    other.thaw(trained_parameters(other, "lora").values())
    logits(other)
    after = weights(backbone)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(backbone), answer)
    assert [type(one) for one in backbone.model.modules()] == modules
    assert not any(one.training for one in backbone.model.modules())
    assert not any(weight.requires_grad for weight in backbone.model.parameters())


def test_logits_at_scored_positions_are_those_of_a_plain_run(backbone: Backbone) -> None:
    """Invariant *Fast = slow* (docs/invariants.md): the hook on the body sees a model with adapters, too.

    Source: docs/decisions.md, decision 6.
    """
    other = adapted(backbone)
    prompt = learned(other, "[P*2] [X] [P:is] [Y]")
    found = PromptModel(other).target_logits(RECORDS, prompt)
    hooks = [(module, dict(module._forward_hooks)) for module in other.model.modules() if module._forward_hooks]
    assert hooks
    for module, _ in hooks:
        module._forward_hooks.clear()
    plain = PromptModel(other).target_logits(RECORDS, prompt)
    for one, two in zip(found, plain, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    different = PromptModel(backbone, force=True).target_logits(RECORDS, prompt)
    assert not torch.allclose(different[0], found[0], atol=1e-3)


def test_adapters_are_float32_under_a_bfloat16_backbone(causal: Backbone) -> None:
    causal.model.to(torch.bfloat16)  # type: ignore[arg-type]
    other = adapted(causal)
    assert {weight.dtype for weight in trained_parameters(other, "lora").values()} == {torch.float32}
    assert other.dtype == causal.dtype == torch.bfloat16
    assert logits(other).dtype == torch.bfloat16


def test_seed_rank_and_targets(causal: Backbone) -> None:
    def made(seed: int = 0, rank: int = 4, targets: str = "all-linear") -> dict[str, torch.Tensor]:
        other = causal.copy(share=True)
        state = torch.get_rng_state()
        lora.add_adapters(other.model, rank=rank, alpha=8.0, targets=targets, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
        return {name: weight.detach() for name, weight in lora.adapter_parameters(other.model).items()}

    one, two, other = made(), made(), made(seed=1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert {weight.shape[0] for name, weight in made(rank=3).items() if "lora_A" in name} == {3}
    assert {name.split(".")[-3] for name in made(targets="q_proj, v_proj")} == {"q_proj", "v_proj"}
    assert 0 < len(made(targets="default")) < len(one)
    assert not any("embed" in name or "lm_head" in name for name in one)
    # Invariant *Identity* (docs/invariants.md): before the first step they change nothing.
    copy = causal.copy(share=True)
    lora.add_adapters(copy.model, rank=4, alpha=8.0, targets="all-linear", seed=0)
    assert torch.equal(logits(copy), logits(causal))


def test_a_graphics_processor_draws_on_as_if_no_adapters_were_made(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant *Seeds are separate* (docs/invariants.md): only the generator that adapters draw from is seeded."""
    seed_all = Mock()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_all)
    with_adapters(causal, rank=4, alpha=8.0, targets="all-linear", seed=0)
    causal.with_random_weights(seed=0)
    assert not seed_all.called


def test_adapters_that_cannot_be_made(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackboneError, match=r"no adapters on 'nothing': .*set lora_targets to"):
        lora.add_adapters(causal.copy().model, rank=4, alpha=8.0, targets="nothing", seed=0)
    monkeypatch.setattr(lora, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'ptuning\[lora\]'"):
        lora.add_adapters(causal.copy().model, rank=4, alpha=8.0, targets="all-linear", seed=0)


@pytest.mark.parametrize("changes", [{"r": 10**13}, {"rank_pattern": {"q_proj": 10**13}}, {"r": 10**18}])
def test_a_rank_that_no_memory_holds_is_refused_before_any_is_taken(causal: Backbone, changes: dict[str, Any]) -> None:
    """Shapes of the saved weights and of the config are compared first."""
    other = adapted(causal)
    config = json.dumps({**json.loads(lora.adapter_config(other.model, backbone="")), **changes}).encode()
    with pytest.raises(PromptError, match=r"wrong shape|do not fit LlamaForCausalLM"):
        lora.restore_adapters(causal.copy(share=True).model, config, lora.adapter_parameters(other.model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("head", ["llama", "bert", *EXPERTS])
def test_peft_reads_what_is_saved(head: str, tmp_path: Path) -> None:
    backbone = experts(head) if head in EXPERTS else backbone_of(head)
    trained = adapted(backbone)
    TrainedWeights.of(trained, backbone, train_backbone="lora", keep="difference").save(tmp_path)
    assert json.loads((tmp_path / lora.CONFIG_FILE).read_text())["base_model_name_or_path"] == backbone.name
    plain = backbone.copy().model
    model = peft.PeftModel.from_pretrained(plain, tmp_path)
    model.eval()
    with torch.no_grad():
        found = model(input_ids=torch.tensor([[7, 9, 11, 13]])).logits
    assert torch.equal(found, logits(trained))
