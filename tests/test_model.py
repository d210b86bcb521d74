"""The injection site and the invariants that rest on it: identity, and alone or in company."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ptuning
from conftest import RECORDS, bound, learned, plain_logits, spoken
from ptuning.backbone import Backbone
from ptuning.batch import collate
from ptuning.errors import PromptError
from ptuning.model import MAX_BATCH_POSITIONS, MAX_BATCH_TOKENS, batches, inject, target_logits
from ptuning.predict import PromptModel
from ptuning.prompt import Prompt

TEMPLATES = (
    "[P*3] [X] [P*3] [Y]",
    "[P:The capital of] [X] [P:is] [Y]",
    "[X][P][Y]",
    "[X] is [P] located in [P*2] [Y] .",
    "question: [P] {x}? answer: [P*2] [Y]",
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_slots_holding_token_embeddings_give_the_logits_of_the_plain_run(backbone: Backbone, template: str) -> None:
    """Invariant 1, traps 1 and 3."""
    filled = bound(backbone, template)
    ids = random.Random(0).choices(range(5, backbone.vocabulary), k=filled.slots)
    found = PromptModel(backbone).target_logits(RECORDS, Prompt.from_token_ids(template, ids, backbone))
    for example, logits in zip(filled.examples(RECORDS), found, strict=True):
        expected = plain_logits(backbone, spoken(example, ids))[list(example.logit_positions)]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_other_vectors_give_other_logits(backbone: Backbone) -> None:
    """Invariant 1: the slots are read at all."""
    one, two = (
        PromptModel(backbone).target_logits(RECORDS, learned(backbone, TEMPLATES[0], seed=seed)) for seed in (1, 2)
    )
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in zip(one, two, strict=True))


def test_a_prompt_started_from_words_equals_the_manual_prompt(backbone: Backbone) -> None:
    """Invariant 1, traps 1 and 18: the words' own tokens, no special ones among them."""
    template = "[P:The capital of] [X] [P:is] [Y]"
    filled = bound(backbone, template)
    assert not set(filled.slot_start_ids) & set(backbone.tokenizer.special_ids.values())
    warm = Prompt.from_token_ids(template, [i for i in filled.slot_start_ids if i is not None], backbone)
    manual = Prompt.manual("The capital of [X] is [Y]")
    model = PromptModel(backbone)
    for a, b in zip(model.target_logits(RECORDS, warm), model.target_logits(RECORDS, manual), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("segment", [0, 1])
def test_segments_are_those_of_the_plain_run(masked: Backbone, segment: int) -> None:
    """Trap 5: BERT is told the segment that its tokenizer gives a single sentence."""
    assert masked.tokenizer.segment_id == 0
    masked.tokenizer.segment_id = segment
    template = "[X] [P*2] [Y]"
    example = bound(masked, template).examples(RECORDS)[0]
    ids = torch.tensor([spoken(example, [7, 8])])
    with torch.no_grad():
        plain = masked.model(input_ids=ids, token_type_ids=torch.full_like(ids, segment)).logits[0]
    logits = PromptModel(masked).target_logits(RECORDS[:1], Prompt.from_token_ids(template, [7, 8], masked))[0]
    torch.testing.assert_close(logits, plain[list(example.logit_positions)], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_slot_holds_its_vector_and_everything_else_its_token(backbone: Backbone, side: str) -> None:
    """Needs, row 9: position by position, against a slow loop; the given embeddings are left alone."""
    examples = bound(backbone, "[P*2] [X] [P:is] [Y]").examples(RECORDS)
    slots = len(examples[0].slot_positions)
    vectors = torch.randn(slots, backbone.width)
    batch = collate(examples, slots=[slots] * len(examples), pad_side=side)  # type: ignore[arg-type]
    given = backbone.embed(batch.token_ids)
    before = given.clone()
    found = inject(given, vectors, batch)
    assert torch.equal(given, before)
    for row, example in enumerate(examples):
        first = given.shape[1] - len(example.token_ids) if side == "left" else 0
        for position, token in enumerate(example.token_ids):
            expected = backbone.embed(torch.tensor([[token]]))[0, 0]
            if position in example.slot_positions:
                expected = vectors[example.slot_positions.index(position)]
            assert torch.equal(found[row, first + position], expected), (row, position)


def test_vectors_are_cast_where_they_are_written(causal: Backbone) -> None:
    """Traps 12 and 26: the vectors stay float32, the embeddings' dtype wins at the site."""
    examples = bound(causal, "[P*2] [X] [Y]").examples(RECORDS)
    vectors = torch.randn(2, causal.width, requires_grad=True)
    batch = collate(examples, slots=[2] * len(examples))
    found = inject(causal.embed(batch.token_ids).bfloat16(), vectors, batch)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.dtype == torch.float32


def test_a_batch_that_asks_for_a_missing_vector_is_an_error(causal: Backbone) -> None:
    """Style 9: a wrong count is never silent."""
    examples = bound(causal, "[P*3] [X] [Y]").examples(RECORDS)
    batch = collate(examples, slots=[3] * len(examples))
    with pytest.raises(PromptError, match="asks for slot 2, and there are 2 vectors"):
        target_logits(causal, batch, torch.zeros(2, causal.width))


def test_vectors_are_written_in_one_place() -> None:
    """Style 9: the write stands once in the package."""
    sources = sorted(Path(ptuning.__file__).parent.glob("*.py"))
    written = [path.name for path in sources if re.search(r"index_put|masked_scatter|index_copy", path.read_text())]
    assert written == ["model.py"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_alone_equals_the_row_in_company(backbone: Backbone, side: str) -> None:
    """Invariant 2, traps 2, 6 and 7: beside longer and shorter rows, on both sides, in any order."""
    prompt = learned(backbone, "[P*2] [X] [P:is] [Y]")
    alone = [PromptModel(backbone).target_logits([record], prompt)[0] for record in RECORDS]
    order = random.Random(1).sample(range(len(RECORDS)), len(RECORDS))
    model = PromptModel(backbone, pad_side=side)  # type: ignore[arg-type]
    found = model.target_logits([RECORDS[index] for index in order], prompt)
    for index, logits in zip(order, found, strict=True):
        torch.testing.assert_close(logits, alone[index], atol=1e-5, rtol=0)


def test_rows_were_really_padded(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 2: the test above runs all rows in one batch, pads at one side and nowhere else (trap 6)."""
    seen = []

    def spy(embeddings: torch.Tensor, *, mask: torch.Tensor, **inputs: Any) -> object:
        seen.append(mask)
        return run(embeddings, mask=mask, **inputs)

    run = backbone.run
    monkeypatch.setattr(backbone, "run", spy)
    PromptModel(backbone, pad_side="left").target_logits(RECORDS, learned(backbone, "[P*2] [X] [P:is] [Y]"))
    assert len(seen) == 1
    assert seen[0].shape[0] == len(RECORDS)
    assert (seen[0].diff(dim=1) >= 0).all()  # zeros, then ones
    assert (seen[0][:, 0] == 0).any()


def test_a_mixed_batch_equals_single_runs(backbone: Backbone) -> None:
    """Invariants 2 and 8, trap 29: [A, B, none, A] with different templates, lengths and targets in one batch."""
    a, b = learned(backbone, "[P*3] [X] [P*3] [Y]", seed=1), learned(backbone, "[P:about] {x} [P] so [Y]", seed=2)
    none = Prompt.manual("The capital of [X] is [Y]")
    prompts = [a, b, none, a, b]
    model = PromptModel(backbone)
    mixed = model.target_logits(RECORDS, prompts)
    for record, prompt, logits in zip(RECORDS, prompts, mixed, strict=True):
        torch.testing.assert_close(logits, model.target_logits([record], prompt)[0], atol=1e-5, rtol=0)


def test_equal_prompts_of_different_objects_do_not_mix(backbone: Backbone) -> None:
    """Trap 24 in small: vectors are found by prompt, not by template or length."""
    a, b = learned(backbone, "[P*2] [X] [Y]", seed=1), learned(backbone, "[P*2] [X] [Y]", seed=2)
    twin = replace(a)
    model = PromptModel(backbone)
    record = RECORDS[0]
    found = model.target_logits([record] * 3, [a, b, twin])
    torch.testing.assert_close(found[0], found[2], atol=1e-6, rtol=0)
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_rows_with_fields_of_different_length_get_the_same_vectors(causal: Backbone) -> None:
    """Trap 29: slots are in template order, wherever they come to stand."""
    vectors = torch.randn(4, causal.width)
    examples = bound(causal, "[P*2] [X] [P*2] [Y]").examples(RECORDS)
    batch = collate(examples, slots=[4] * len(examples))
    found = inject(causal.embed(batch.token_ids), vectors, batch)
    assert len({example.slot_positions for example in examples}) > 1
    for row, example in enumerate(examples):
        assert torch.equal(found[row, list(example.slot_positions)], vectors)


def test_batches_hold_every_row_once_and_keep_their_bounds(causal: Backbone) -> None:
    """Model: no forward pass grows without bound, and none is empty."""
    texts = [{"x": "a " * (index % 40), "y": "yes"} for index in range(700)]
    examples = bound(causal, "[X] so [Y]").examples(texts)
    found = list(batches([[example] for example in examples]))
    assert sorted(index for chosen in found for index in chosen) == list(range(700))
    for chosen in found:
        assert max(len(examples[i].token_ids) for i in chosen) * len(chosen) <= MAX_BATCH_TOKENS
        assert sum(len(examples[i].logit_positions) for i in chosen) <= MAX_BATCH_POSITIONS
    assert list(batches([])) == []
