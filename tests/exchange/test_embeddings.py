"""A prompt as slot vectors and positions: the snippet of the card, run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptuning.backbone.backbone import Backbone
from ptuning.exchange.embeddings import FILE
from tests.conftest import RECORDS, learned
from tests.exchange.conftest import ANYWHERE, exported, of_targets, ours, reserving_model


def test_the_embeddings_of_the_snippet_give_the_log_probability(backbone: Backbone, tmp_path: Path) -> None:
    prompt = learned(backbone, ANYWHERE)
    about = exported(prompt, backbone, tmp_path / "out", "embeds")
    found = load_file(tmp_path / "out" / FILE)
    example = about["example"]
    assert found["input_ids"].tolist() == example["input_ids"]
    model = reserving_model(tied=bool(backbone.model.config.tie_word_embeddings))
    table, target = model.get_input_embeddings(), example["target_ids"]
    with torch.no_grad():
        embedded = table(found["input_ids"])
        embedded[found["slot_positions"]] = found["slot_vectors"]
        embedded = torch.cat([embedded, table(torch.tensor(target))])
        logits = model(inputs_embeds=embedded[None]).logits[0][-len(target) - 1 : -1]
    assert of_targets(logits, target) == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=1e-4)
