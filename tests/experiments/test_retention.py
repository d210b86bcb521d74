"""What a prompt costs on plain sentences: the slots in front of them, against nothing in front."""

import math
from dataclasses import replace

import pytest
import torch
from experiments.retention import retention

from ptuning.backbone.backbone import Backbone
from ptuning.errors import PromptError
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from tests.conftest import learned

SENTENCES = [
    "The movie was great.",
    "Kenya is in 1999 a good film and a bad one.",
    "People live in cities, all in all.",
]
TEMPLATE = "[P*2] [X] [P:is the] [Y]"


@torch.no_grad()
def nats(backbone: Backbone, vectors: torch.Tensor, text: str) -> tuple[float, int]:
    """Return the nats of a sentence behind vectors, but for its first word, and its tokens, as a plain loop."""
    tokenizer, (ids,) = backbone.tokenizer, backbone.tokenizer.encode([text])
    (first,) = tokenizer.encode([text.partition(" ")[0]])
    slots = torch.cat([vectors, backbone.embed(torch.tensor([ids]))[0]])[None]  # (1, P + T, E)
    opening = list(Prompt.manual("{x} [Y]").bind(backbone).contexts([{"x": ""}], target_tokens=1)[0].token_ids)
    if opening:
        slots = torch.cat([backbone.embed(torch.tensor([opening])), slots], dim=1)
    logits = backbone.model(inputs_embeds=slots).logits[0].log_softmax(-1)
    start = slots.shape[1] - len(ids)
    scored = range(len(first), len(ids))
    return -sum(float(logits[start + at - 1, ids[at]]) for at in scored), len(scored)


def test_the_cost_equals_a_plain_loop(causal: Backbone) -> None:
    """All slots of the template in a row, in their order, without its words; nats over tokens of all sentences."""
    prompt = learned(causal, TEMPLATE)
    assert prompt.slot_vectors is not None
    cost = retention(PromptModel(causal), prompt, sentences=SENTENCES)
    on = [nats(causal, prompt.slot_vectors, text) for text in SENTENCES]
    off = [nats(causal, torch.zeros(0, causal.width), text) for text in SENTENCES]
    tokens = sum(count for _, count in on)
    assert math.isclose(cost.with_prompt, sum(total for total, _ in on) / tokens, rel_tol=1e-4)
    assert math.isclose(cost.without, sum(total for total, _ in off) / tokens, rel_tol=1e-4)
    assert cost.score.value == pytest.approx(cost.with_prompt - cost.without)
    assert cost.score.n == 3


@pytest.mark.parametrize("template", ["[D*2] [X] [D] [P] so [Y]", "[X] [D*4] so [Y]", "[D*4] [X] is [Y]"])
def test_deep_slots_stand_in_front_as_others_do(causal: Backbone, template: str) -> None:
    """Slots that hold tokens cost what these tokens in front cost, in a block or in the row."""
    prompt = Prompt.from_token_ids(template, [5, 6, 7, 8], causal)
    cost = retention(PromptModel(causal), prompt, sentences=SENTENCES)
    on = [nats(causal, causal.embed(torch.tensor([[5, 6, 7, 8]]))[0], text) for text in SENTENCES]
    assert math.isclose(cost.with_prompt, sum(total for total, _ in on) / sum(count for _, count in on), rel_tol=1e-4)


def test_a_prompt_that_costs_nothing_is_not_asked(causal: Backbone, masked: Backbone) -> None:
    with pytest.raises(PromptError, match="neither"):
        retention(PromptModel(causal), Prompt.manual("{x} is [Y]"))
    with pytest.raises(PromptError, match="fills masks"):
        retention(PromptModel(masked), learned(masked, TEMPLATE))
    other = replace(learned(causal, TEMPLATE), backbone=replace(learned(causal, TEMPLATE).backbone, fingerprint="a-b"))  # type: ignore[type-var]
    with pytest.raises(PromptError, match="was trained on the backbone"):
        retention(PromptModel(causal), other)
