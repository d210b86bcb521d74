"""Encoders and optimizers of several prompts as one: what each learns is what it learns by itself, on a device where
that is faster, and nothing of it happens on a processor.

The invariants that tests name are those of docs/invariants.md.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.config import EncoderKind
from ptuning.progress import Interrupted
from ptuning.training import encoders as encoders_module
from ptuning.training import step
from ptuning.training import trainer as loop
from ptuning.training.encoders import BATCHED, PromptEncoder, StackedEncoders, adamw_step
from ptuning.training.fleet import train_fleet
from ptuning.training.run import TrainResult, train
from ptuning.training.spec import FleetPrompt
from ptuning.training.step import Learner
from tests.conftest import small_memory
from tests.live_tensors import LiveTensors
from tests.training.fleets import EVERY, FACTS, FAST, TEXTS
from tests.training.test_encoders import make, shaken

# Of each kind several, with other numbers of slots, rates and batches; and one that draws dropout.
MORE = (
    *EVERY,
    FleetPrompt("free-too", "[P*2] [X] [Y]", FACTS, config=FAST.adapted(encoder="none", lr=0.03, weight_decay=0.1)),
    FleetPrompt("mlp", "[P*4] [X] [P:is] [Y]", TEXTS, config=FAST.adapted(encoder="mlp", max_grad_norm=0.01)),
    FleetPrompt("mlp-too", "[P] [X] [Y]", FACTS, config=FAST.adapted(encoder="mlp", batch_size=2, epochs=3)),
    FleetPrompt("drops", "[P] [X] [Y]", FACTS, config=FAST.adapted(encoder="mlp", dropout=0.3)),
    FleetPrompt("deep", "[P] [X] [D:is] [Y]", FACTS, config=FAST.adapted(encoder="none")),
)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let encoders work together on the processor, too."""
    monkeypatch.setattr(encoders_module, "DEVICES", frozenset({"cpu"}))


def encoders(kind: EncoderKind) -> list[PromptEncoder]:
    return [shaken(make(torch.randn(slots, 12), kind, seed=slots)).train() for slots in (3, 5, 1, 5)]


@pytest.mark.parametrize("kind", BATCHED)
def test_one_product_gives_each_its_vectors_and_gradients(kind: EncoderKind) -> None:
    """Slots do not see each other, so that the slots of the longest template change nothing for the others."""
    own = encoders(kind)
    factors = [torch.randn(one.start.shape) for one in own]
    wanted = [one() for one in own]
    for one, vectors, factor in zip(own, wanted, factors, strict=True):
        (vectors * factor).sum().backward()
        one.wanted = [weight.grad for weight in one.parameters()]  # type: ignore[assignment]
        one.zero_grad()
    stacked = StackedEncoders(own)
    for part, vectors, factor in zip(stacked.parts, wanted, factors, strict=True):
        torch.testing.assert_close(part, vectors, rtol=0, atol=1e-5)
        for _ in range(2):  # several passes of a step
            (part * factor / 2).sum().backward()
    stacked.backward()
    for one in own:
        for weight, gradient in zip(one.parameters(), one.wanted, strict=True):  # type: ignore[arg-type]
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-5, atol=1e-5)


def test_one_step_of_all_is_the_step_of_each() -> None:
    """Rates, decay, norms and numbers of steps differ; a weight without a gradient stays; states are torch's."""
    sides = encoders("mlp"), encoders("mlp")
    for one, other in zip(*sides, strict=True):
        other.load_state_dict(one.state_dict())
    alone, all_of_them = ([optimizer(one, number) for number, one in enumerate(own)] for own in sides)
    norms = [0.1, 1.0, 100.0, 0.5]
    for at in range(4):
        for own in sides:
            set_gradients(own, at)
        for one, by_itself, most in zip(sides[0], alone, norms, strict=True):
            torch.nn.utils.clip_grad_norm_(one.parameters(), most)
            by_itself.step()
        adamw_step(all_of_them, norms)
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(list(other.parameters()), list(one.parameters()), rtol=1e-6, atol=1e-6)
    for by_itself, found in zip(alone, all_of_them, strict=True):
        states = [each.state_dict()["state"] for each in (by_itself, found)]
        torch.testing.assert_close(states[1], states[0], rtol=1e-5, atol=1e-7)


def optimizer(encoder: PromptEncoder, number: int) -> torch.optim.AdamW:
    return torch.optim.AdamW(encoder.parameters(), lr=0.1 / (number + 1), weight_decay=0.1 * number)


def set_gradients(own: list[PromptEncoder], at: int) -> None:
    generator = torch.Generator().manual_seed(at)
    for number, one in enumerate(own):
        for weight in one.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator) if at >= number else None


def vectors(result: TrainResult) -> Tensor:
    assert result.prompt.slot_vectors is not None
    return result.prompt.slot_vectors


@pytest.mark.parametrize("at_once", [3, 16])
def test_prompts_learn_what_they_learn_one_by_one(
    at_once: int, causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant *Fast = slow*, with one call of the optimizer for the whole fleet in each round."""
    wanted = train_fleet(MORE, backbone=causal, at_once=at_once)
    monkeypatch.setattr(encoders_module, "DEVICES", frozenset({"cpu"}))
    calls: list[int] = []
    real = encoders_module.adamw_step

    def spy(optimizers: Any, max_norms: Any) -> None:
        calls.append(len(optimizers))
        real(optimizers, max_norms)

    monkeypatch.setattr(step, "adamw_step", spy)
    found = train_fleet(MORE, backbone=causal, at_once=at_once)
    assert max(calls) == min(at_once, len(MORE) + 1)  # one of them trains twice
    assert not found.failed
    for name, one in wanted.results.items():
        other = found.results[name]
        torch.testing.assert_close(vectors(other), vectors(one), rtol=0, atol=1e-5)
        if one.prompt.deep is not None and other.prompt.deep is not None:
            torch.testing.assert_close(other.prompt.deep.tensors, one.prompt.deep.tensors, rtol=0, atol=1e-5)
        assert other.record["chosen_epoch"] == one.record["chosen_epoch"]


def test_a_prompt_trained_together_is_that_trained_alone(causal: Backbone, everywhere: None) -> None:
    """One prompt alone has nothing to be stacked with."""
    found = train_fleet(MORE[-4:-1], backbone=causal)
    for prompt in MORE[-4:-1]:
        one = train(prompt.template, prompt.data, backbone=causal, config=prompt.config)
        torch.testing.assert_close(vectors(found.results[prompt.name]), vectors(one), rtol=0, atol=1e-4)


@pytest.mark.parametrize("stop", [2, 5, 9])
def test_a_stopped_fleet_on_a_gpu_goes_on_exactly(
    stop: int, causal: Backbone, tmp_path: Path, everywhere: None
) -> None:
    """Invariant *Resume is exact*: the same prompts are stacked after it, and the bytes are the same."""
    train_fleet(MORE, backbone=causal, out=tmp_path / "whole", at_once=5)
    asked = iter(range(1, 1000))
    with pytest.raises(Interrupted):
        train_fleet(MORE, backbone=causal, out=tmp_path / "parts", at_once=5, should_stop=lambda: next(asked) >= stop)
    train_fleet(MORE, backbone=causal, out=tmp_path / "parts", at_once=5, resume=True)
    files = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").glob("*/prompt/*.safetensors")}
    assert len(files) == len(MORE)
    for file in files:
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_prompts_on_a_processor_go_one_by_one(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a GPU the bytes are those of every release before."""

    def never(*_: object) -> None:
        raise AssertionError("encoders work together on a processor")

    monkeypatch.setattr(StackedEncoders, "__init__", never)
    monkeypatch.setattr(step, "adamw_step", never)
    assert not train_fleet(MORE[-3:], backbone=causal).failed


@pytest.mark.parametrize("broken", ["loss", "rate"])
def test_one_prompts_failure_does_not_end_the_others(
    broken: str, causal: Backbone, monkeypatch: pytest.MonkeyPatch, everywhere: None
) -> None:
    """A loss that is no number, and a rate that float32 cannot hold."""
    wrong = replace(MORE[-4], config=MORE[-4].settings.adapted(lr=1e38 if broken == "rate" else 0.01, seed=7))
    real = Learner.check_loss

    def check(self: Learner, value: float, what: str) -> None:
        real(self, float("nan") if broken == "loss" and self.config.seed == 7 and self.optimizer.state else value, what)

    monkeypatch.setattr(Learner, "check_loss", check)
    found = train_fleet([MORE[-3], wrong, MORE[-5]], backbone=causal)
    assert list(found.failed) == [wrong.name]
    assert "learning rate" in found.failed[wrong.name]
    whole = train_fleet([MORE[-3], MORE[-5]], backbone=causal)
    for name, one in whole.results.items():
        torch.testing.assert_close(vectors(found.results[name]), vectors(one), rtol=0, atol=1e-5)


def test_passes_that_do_not_fit_are_run_again_with_the_same_result(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch, everywhere: None
) -> None:
    prompts = [replace(one, config=one.settings.adapted(cache_memory=0.0)) for one in (MORE[-5], MORE[-3], MORE[0])]
    wanted = train_fleet(prompts, backbone=causal)
    ran = small_memory(monkeypatch, 30)
    found = train_fleet(prompts, backbone=causal)
    assert not found.failed
    assert max(ran) <= 30
    for name, one in wanted.results.items():
        torch.testing.assert_close(vectors(found.results[name]), vectors(one), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "bytes_per_weight"), [("mlp", 20), ("none", 20), ("lstm", 16)])
def test_the_memory_rule_counts_what_a_step_together_holds(
    kind: EncoderKind, bytes_per_weight: int, causal: Backbone, monkeypatch: pytest.MonkeyPatch, everywhere: None
) -> None:
    """As many prompts at once as fit into their share of the memory, and no more."""
    most: list[int] = []
    real = step.take_steps

    def spy(steps: Any) -> Any:
        most.append(len(steps))
        return real(steps)

    monkeypatch.setattr(loop, "take_steps", spy)
    config = FAST.adapted(encoder=kind, epochs=1)
    prompts = [FleetPrompt(f"seed-{n}", "[P*2] [X] [Y]", FACTS, config=config.adapted(seed=n)) for n in range(6)]
    one = sum(weight.numel() for weight in make(torch.randn(2, causal.width), kind).parameters())
    monkeypatch.setattr(loop, "total_bytes", lambda _: 4.05 * one * bytes_per_weight / loop.STATE_SHARE)
    assert len(train_fleet(prompts, backbone=causal).results) == 6
    assert max(most) == 4


def test_a_step_together_holds_no_more_than_the_rule_says() -> None:
    """Weights and their two moments were there before; a copy of the weights and the gradients come to them."""
    own = [shaken(make(torch.randn(2, 64), "mlp", seed=seed)) for seed in range(8)]
    optimizers = [optimizer(one, 1) for one in own]
    weights = 4 * sum(weight.numel() for one in own for weight in one.parameters())

    def go() -> None:
        stacked = StackedEncoders(own)
        torch.stack([part.square().sum() for part in stacked.parts]).sum().backward()
        stacked.backward()
        del stacked
        adamw_step(optimizers, [1.0] * len(own))
        for one in own:
            one.zero_grad()

    go()  # the moments are made
    with LiveTensors() as live:
        go()
    assert live.peak <= 2.1 * weights
