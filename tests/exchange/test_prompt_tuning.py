"""A prompt as PEFT's prompt tuning: what stands in front of the last slot becomes virtual tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.errors import ExchangeError
from ptuning.prompt.predict import PromptModel
from tests.conftest import RECORDS, learned
from tests.exchange.conftest import (
    ANYWHERE,
    IN_FRONT,
    asked,
    exported,
    loaded_by_peft,
    ours,
    reserving,
    reserving_model,
)
from tests.families import model_of as family_model
from tests.families import tokenizer_of


def test_peft_gives_the_log_probability_of_the_example(backbone: Backbone, tmp_path: Path) -> None:
    """BOS and literal words in front of the slots are virtual tokens, too."""
    prompt = learned(backbone, IN_FRONT)
    about = exported(prompt, backbone, tmp_path / "out", "peft")
    assert about["slot_token_ids"] == about["slot_tokens"] == []
    tied = bool(backbone.model.config.tie_word_embeddings)
    model = loaded_by_peft(tmp_path / "out", reserving_model(tied=tied))
    row = prompt.bind(backbone).examples(RECORDS[:1])[0]
    assert model.peft_config["default"].num_virtual_tokens == row.slot_positions[-1] + 1 > prompt.slots + 1
    assert asked(model, about["example"]) == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=1e-4)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # of PEFT; they count from the first virtual token
def test_peft_writes_the_same_answer(tmp_path: Path) -> None:
    """Given the text behind the slots as a user gives it."""
    backbone = reserving()
    prompt = learned(backbone, IN_FRONT)
    exported(prompt, backbone, tmp_path / "out", "peft")
    model = loaded_by_peft(tmp_path / "out", reserving_model())
    ids = backbone.tokenizer.read(" Kenya is", add_special_tokens=False)
    given = torch.tensor([ids])
    written = model.generate(input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=5, do_sample=False)[
        0
    ]
    expected = PromptModel(backbone).predict([{"x": "Kenya"}], prompt, generation={"max_new_tokens": 5})[0].text
    text = backbone.tokenizer.decode(written[len(ids) :].tolist())
    assert text.strip().startswith(expected)
    assert expected


def test_a_slot_behind_a_field_is_refused(tmp_path: Path) -> None:
    backbone = reserving()
    with pytest.raises(ExchangeError, match=r"stands behind a field; take --as lora"):
        exported(learned(backbone, ANYWHERE), backbone, tmp_path / "out", "peft")
    with pytest.raises(ExchangeError, match=r"nothing behind its slots"):
        exported(learned(backbone, "is it [P] [Y]"), backbone, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_a_text_with_other_ids_at_its_beginning_is_refused(tmp_path: Path) -> None:
    """A tokenizer that puts a space in front of every text reads a word glued to slots in another way."""
    backbone = Backbone.from_model(family_model("llama"), tokenizer_of("t5"), name="unigram")
    prompt = learned(backbone, "[P*2], {x} is [Y]")
    with pytest.raises(ExchangeError, match=r"behind its slots the template has the ids .* another text"):
        exported(prompt, backbone, tmp_path / "out", "peft", RECORDS[:1])
