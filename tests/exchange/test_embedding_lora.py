"""A prompt as a LoRA on the input embeddings: PEFT gives its log-probabilities, wherever slots stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GemmaForCausalLM

from ptuning.backbone.backbone import Backbone
from ptuning.errors import ExchangeError
from ptuning.exchange import embedding_lora
from tests.conftest import RECORDS, learned
from tests.exchange.conftest import (
    ANYWHERE,
    RESERVED,
    asked,
    exported,
    loaded_by_peft,
    ours,
    reserving,
    reserving_model,
)
from tests.families import backbone_of, model_of


def test_peft_gives_the_log_probability_of_the_example(backbone: Backbone, tmp_path: Path) -> None:
    """Tied or not: only the input side is adapted, so the slots' tokens have the logits that they had."""
    prompt = learned(backbone, ANYWHERE)
    about = exported(prompt, backbone, tmp_path / "out", "lora")
    assert about["slot_tokens"] == RESERVED[:3]
    assert about["n"] == len(RECORDS)
    assert about["largest_log_prob_difference"] < 1e-4
    tied = bool(backbone.model.config.tie_word_embeddings)
    model = loaded_by_peft(tmp_path / "out", reserving_model(tied=tied))
    example = about["example"]
    assert example["record"] == RECORDS[0]
    assert asked(model, example) == pytest.approx(example["log_prob"], abs=1e-4)
    assert example["log_prob"] == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=1e-4)


def test_a_model_that_scales_its_embeddings(tmp_path: Path) -> None:
    """Gemma multiplies rows, and slot vectors stand behind that."""
    backbone = reserving(head=GemmaForCausalLM)
    prompt = learned(backbone, ANYWHERE)
    about = exported(prompt, backbone, tmp_path / "out", "lora")
    assert about["largest_log_prob_difference"] < 1e-4
    model = loaded_by_peft(tmp_path / "out", reserving_model(head=GemmaForCausalLM))
    assert asked(model, about["example"]) == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3", "gemma-3", "bloom", "gpt-neox"])
def test_rows_without_a_token_are_taken_before_special_tokens_with_a_use(family: str, tmp_path: Path) -> None:
    """A table is often padded to a round size, and the embedding module has another name in each family."""
    backbone = backbone_of(family)
    prompt = learned(backbone, ANYWHERE)
    about = exported(prompt, backbone, tmp_path / "out", "lora")
    first = backbone.vocabulary
    assert about["slot_token_ids"] == [first, first + 1, first + 2]
    assert about["slot_tokens"] == [None, None, None]
    example = about["example"]
    found = asked(loaded_by_peft(tmp_path / "out", model_of(family)), example)
    assert found == pytest.approx(example["log_prob"], abs=1e-4)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "no tokens" in card  # their share of the probability is said
    assert "Give ids, not text" in card


def test_too_many_slots_are_refused_with_what_to_do(tmp_path: Path) -> None:
    backbone = reserving()
    with pytest.raises(ExchangeError, match=r"6 slots, .* has 5 rows that no text uses .*--as tokens"):
        exported(learned(backbone, "[P*6] {x} [Y]"), backbone, tmp_path / "out", "lora")
    assert not (tmp_path / "out").exists()


def test_a_reserved_token_that_the_template_writes_is_no_slot(tmp_path: Path) -> None:
    """Nor is one of the chat template, which a conversation would have."""
    backbone = reserving()
    about = exported(learned(backbone, f"[P] {{x}} {RESERVED[0]} is [Y]"), backbone, tmp_path / "out", "lora")
    assert about["slot_tokens"] == [RESERVED[1]]
    assert "<|turn|>" not in backbone.tokenizer.reserved_ids.values()


def test_the_template_as_text_has_the_ids_of_the_rows(tmp_path: Path) -> None:
    backbone = reserving()
    about = exported(learned(backbone, ANYWHERE), backbone, tmp_path / "out", "lora")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    text = f"{RESERVED[0]}{RESERVED[1]} {{x}} is{RESERVED[2]}"
    assert f"\n{text}\n" in card
    ids = backbone.tokenizer.read(text.replace("{x}", RECORDS[0]["x"]))
    assert ids == about["example"]["input_ids"]


def test_the_rank_is_one_that_vllm_knows() -> None:
    assert [embedding_lora.vllm_rank(slots) for slots in (1, 2, 9, 320)] == [1, 8, 16, 320]
