"""A copy of the model with the slots as tokens: transformers reads it, and every other text has the answer it had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaForCausalLM

from ptuning.backbone.backbone import Backbone
from ptuning.errors import ExchangeError
from ptuning.prompt.prompt import Prompt
from tests.conftest import RECORDS, learned, plain_logits
from tests.exchange.conftest import ANYWHERE, RESERVED, asked, exported, ours, reserving
from tests.families import backbone_of, model_of, tokenizer_of

MANY = "[P*4] {x} is [P*3] [Y]"


def read(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def test_reserved_tokens_are_overwritten_where_there_are_enough(backbone: Backbone, tmp_path: Path) -> None:
    """Tied or not, the head stays as it is to the last bit, and so does the answer to any other text."""
    prompt = learned(backbone, ANYWHERE)
    about = exported(prompt, backbone, tmp_path / "out", "tokens")
    assert about["slot_tokens"] == RESERVED[:3]
    assert about["largest_log_prob_difference"] < 1e-4
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # safetensors would write for its owner only
    model, tokenizer = read(tmp_path / "out")
    assert asked(model, about["example"]) == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=1e-4)
    assert torch.equal(model.get_output_embeddings().weight, backbone.model.get_output_embeddings().weight)
    assert len(model.get_input_embeddings().weight) == backbone.embedding_rows
    ids = tokenizer("The capital of Kenya is Nairobi")["input_ids"]
    torch.testing.assert_close(model(torch.tensor([ids])).logits[0], plain_logits(backbone, ids))


def test_the_text_of_the_template_is_read_as_the_template(tmp_path: Path) -> None:
    backbone = reserving()
    prompt = learned(backbone, ANYWHERE)
    about = exported(prompt, backbone, tmp_path / "out", "tokens")
    _, tokenizer = read(tmp_path / "out")
    text = f"{RESERVED[0]}{RESERVED[1]} {RECORDS[0]['x']} is{RESERVED[2]}"
    assert tokenizer(text)["input_ids"] == about["example"]["input_ids"]
    assert f"{RESERVED[0]}{RESERVED[1]} {{x}} is{RESERVED[2]}" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_tokens_are_added_where_there_are_too_few(backbone: Backbone, tmp_path: Path) -> None:
    """Model and tokenizer agree on their number, and the new ones are as unlikely as the least likely of the old."""
    prompt = learned(backbone, MANY)
    about = exported(prompt, backbone, tmp_path / "out", "tokens")
    size = backbone.embedding_rows
    assert about["slot_token_ids"] == list(range(size, size + 7))
    model, tokenizer = read(tmp_path / "out")
    assert len(tokenizer) == model.config.vocab_size == len(model.get_input_embeddings().weight) == size + 7
    found = asked(model, about["example"])
    assert found == pytest.approx(about["example"]["log_prob"], abs=1e-4)
    assert found == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=0.1)  # new tokens take a little
    ids = torch.tensor([about["example"]["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
    assert logits[size:].max() <= logits[:size].median()
    assert "of the probability to rows of the table that are no tokens" in (tmp_path / "out" / "README.md").read_text()


def test_names_of_new_tokens_are_the_prompts_own(tmp_path: Path) -> None:
    """The same prompt gives the same names, and another prompt others."""
    backbone = reserving()
    names = [
        exported(learned(backbone, MANY, seed=seed), backbone, tmp_path / str(number), "tokens")["slot_tokens"]
        for number, seed in enumerate((0, 0, 1))
    ]
    assert names[0] == names[1]
    assert not set(names[0]) & set(names[2])


def test_rows_of_a_padded_table_are_named(tmp_path: Path) -> None:
    """A new token takes the next row of the table, which needs no more rows than before."""
    backbone = backbone_of("llama")
    about = exported(learned(backbone, ANYWHERE), backbone, tmp_path / "out", "tokens")
    model, tokenizer = read(tmp_path / "out")
    assert about["slot_token_ids"] == [backbone.vocabulary, backbone.vocabulary + 1, backbone.vocabulary + 2]
    assert tokenizer.convert_tokens_to_ids(about["slot_tokens"]) == about["slot_token_ids"]
    assert model.config.vocab_size == backbone.embedding_rows


def test_a_model_that_scales_its_embeddings(tmp_path: Path) -> None:
    backbone = reserving(head=GemmaForCausalLM)
    prompt = learned(backbone, ANYWHERE)
    about = exported(prompt, backbone, tmp_path / "out", "tokens")
    found = asked(read(tmp_path / "out")[0], about["example"])
    assert found == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "opt", "opt-350m", "gemma-3", "bloom", "phi", "gpt-neox", "falcon"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Tied and untied heads, with a bias, embeddings that are narrower than the layers."""
    backbone = backbone_of(family)
    prompt = learned(backbone, ANYWHERE)
    about = exported(prompt, backbone, tmp_path / "out", "tokens")
    assert asked(read(tmp_path / "out")[0], about["example"]) == pytest.approx(about["example"]["log_prob"], abs=1e-4)


def test_a_text_that_has_other_ids_is_refused(tmp_path: Path) -> None:
    """A tokenizer with a space in front of every text puts one behind special tokens, too."""
    backbone = Backbone.from_model(model_of("llama"), tokenizer_of("t5"), name="unigram")
    prompt: Prompt = learned(backbone, "[P*2], {x} is [P] [Y]")
    with pytest.raises(ExchangeError, match=r"has the ids .* take --as lora or --as embeds"):
        exported(prompt, backbone, tmp_path / "out", "tokens", RECORDS[:1])
    assert list(tmp_path.iterdir()) == []
