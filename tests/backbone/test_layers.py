"""Activation checkpointing: the same losses and gradients to the bit, fewer bytes held, and a model left as it was."""

import contextlib
import copy
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.layers import layers_of, recomputing
from ptuning.config import TrainConfig
from ptuning.engine import forward as forward_module
from ptuning.engine import prefix_cache
from ptuning.engine.forward import target_logits
from ptuning.engine.objective import ScoringRequest, inputs_of
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import TrainingError
from ptuning.progress import Interrupted
from ptuning.records import Record
from ptuning.training.trainer import Trainer
from tests.conftest import RECORDS, bound, items_of
from tests.families import FAMILIES, TEMPLATE, TWO_SIDED, backbone_of, own_copy
from tests.live_tensors import LiveTensors

LONG: list[Record] = [{"x": f"the movie {index} was great and a good film", "y": "yes"} for index in range(4)]
INSTRUCTION = "[P:The capital of Kenya is Nairobi. The capital of] [X] is [P] [Y]"
LATE = "{x} and {x} [P:is] [P*2] [Y]"


def gradient(
    backbone: Backbone, items: list[ScoringRequest], *, slots: int, saves: bool, cache: PrefixCache | None = None
) -> tuple[Tensor, Tensor, int]:
    """Return the logits, the gradient in the slot vectors, and the bytes held between forward and backward pass."""
    noise = torch.randn(slots, backbone.width, generator=torch.Generator().manual_seed(1))
    vectors = (noise * float(backbone.table().std())).requires_grad_(True)
    how = recomputing(backbone.model, name="tiny") if saves else contextlib.nullcontext()
    with LiveTensors() as live, how:
        logits = target_logits(backbone, inputs_of(items), PromptBatch(vectors), cache=cache)
    held = live.now  # what layers were given and will run on again is no tensor that autograd knows of
    (found,) = torch.autograd.grad(torch.logsumexp(logits, dim=-1).sum(), vectors)
    return logits.detach(), found, held


def check_equal(backbone: Backbone, template: str, records: list[Record], **more: Any) -> None:
    items, slots = items_of(backbone, template, records), bound(backbone, template).slots
    logits, found, held = gradient(backbone, items, slots=slots, saves=False, **more)
    again, same, less = gradient(backbone, items, slots=slots, saves=True, **more)
    assert torch.equal(logits, again)
    assert torch.equal(found, same)
    assert float(found.abs().max()) > 0
    assert less < held


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_same_gradients_with_fewer_bytes(name: str) -> None:
    backbone = backbone_of(name)
    for template in (TEMPLATE, TWO_SIDED) if backbone.kind == "encoder-decoder" else (TEMPLATE,):
        check_equal(backbone, template, RECORDS)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_a_shared_prefix_runs_again_in_front_of_its_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys and values are written into a cache, a second time in the backward pass."""
    backbone = backbone_of(name)
    if not backbone.shares_prefix:
        pytest.skip("its cache is more than keys and values")
    monkeypatch.setattr(forward_module, "MIN_SAVED_TOKENS", 1)
    shared = Mock(side_effect=backbone.run_prefix)
    monkeypatch.setattr(backbone, "run_prefix", shared)
    check_equal(backbone, INSTRUCTION, LONG)
    assert shared.call_count == 2


def test_rows_behind_kept_keys_and_values_run_again(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 0)
    cache = PrefixCache(causal, memory_share=0.25)
    assert cache.prepare(inputs_of(items_of(causal, LATE, RECORDS)))
    before = cache.tokens
    check_equal(causal, LATE, RECORDS, cache=cache)
    assert cache.tokens == before


def trained(
    backbone: Backbone, folder: Path | None = None, *, stop_after: int | None = None, **settings: Any
) -> Trainer:
    config = TrainConfig.from_json({"epochs": 2, "batch_size": 3, "lr": 0.01, "dropout": 0.1, **settings})
    found = Trainer(backbone, bound(backbone, TEMPLATE), config=config, checkpoint=folder)
    found.load()
    items = items_of(backbone, TEMPLATE, RECORDS)
    with contextlib.suppress(Interrupted):
        found.fit(items, items[:4], should_stop=lambda: stop_after is not None and found.state.step >= stop_after)
    return found


@pytest.mark.parametrize(
    ("name", "train_backbone"),
    [*((name, "full") for name in ("gpt2", "llama", "bert", "xlnet", "t5", "bart")), ("gpt2", "none"),
     ("t5", "none"), ("llama", "lora"), ("bert", "lora")],
)  # fmt: skip
def test_training_learns_the_same_to_the_bit(name: str, train_backbone: str) -> None:
    """With the dropout that a tuned backbone draws: what is computed again draws it again."""
    if train_backbone == "lora":
        pytest.importorskip("peft")
    plain, saving = (
        trained(own_copy(name), train_backbone=train_backbone, checkpointing=on, epochs=1) for on in (False, True)
    )
    assert torch.equal(plain.best_vectors, saving.best_vectors)
    assert torch.equal(plain.learner.vectors(), saving.learner.vectors())
    assert bool(plain.learner.weights) == (train_backbone != "none")
    for one, other in zip(plain.learner.weights.values(), saving.learner.weights.values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("train_backbone", ["none", "full"])
def test_a_run_goes_on_with_or_without_it(causal: Backbone, tmp_path: Path, train_backbone: str) -> None:
    whole = trained(causal, train_backbone=train_backbone)
    trained(causal, tmp_path, stop_after=2, train_backbone=train_backbone, checkpointing=True)
    resumed = trained(causal, tmp_path, train_backbone=train_backbone)
    assert torch.equal(resumed.best_vectors, whole.best_vectors)
    assert resumed.state.step == whole.state.step == 4


def test_the_model_is_left_as_it_was(causal: Backbone) -> None:
    layer = layers_of(causal.model)[0]
    own = layer.forward = type(layer).forward.__get__(layer)  # as libraries do that move layers between devices
    trained(causal, checkpointing=True)
    assert layer.__dict__["forward"] is own
    assert all("forward" not in vars(other) for other in layers_of(causal.model)[1:])


def test_an_error_in_the_pass_leaves_it_as_well(causal: Backbone) -> None:
    with pytest.raises(RuntimeError, match="in the middle"), recomputing(causal.model, name="tiny"):
        raise RuntimeError("in the middle")
    assert not any("forward" in vars(layer) for layer in layers_of(causal.model))


def test_another_thread_and_a_copy_made_meanwhile_run_as_always(causal: Backbone) -> None:
    ids = torch.tensor([[7, 9, 11]])
    expected = causal.model(input_ids=ids).logits
    found: list[Tensor] = []
    other = copy.deepcopy(causal.model)
    with recomputing(causal.model, name="tiny"):
        thread = threading.Thread(target=lambda: found.append(causal.model(input_ids=ids).logits))
        thread.start()
        thread.join()
        made = copy.deepcopy(causal.model)
        with recomputing(causal.model, name="tiny"):  # two trainings on one backbone
            causal.model(input_ids=ids)
        causal.model(input_ids=ids)
    with torch.no_grad():
        for weight in causal.model.parameters():
            weight.zero_()
    for answer in (found[0], made(input_ids=ids).logits, other(input_ids=ids).logits):
        assert torch.equal(answer, expected)


def test_a_model_without_layers_is_an_error() -> None:
    plain = nn.Linear(2, 2)
    with (
        pytest.raises(TrainingError, match=r"tiny: Linear runs no list of layers .* leave checkpointing out"),
        recomputing(plain, name="tiny"),
    ):
        plain(torch.ones(1, 2))
