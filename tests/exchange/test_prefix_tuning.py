"""Deep slots in front as PEFT's prefix tuning, and PEFT's as deep slots."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.engine.forward import target_logits
from ptuning.engine.soft_prompt import DeepParams, PromptBatch
from ptuning.errors import ExchangeError
from ptuning.exchange.imports import import_prompt, read_adapter_folder
from ptuning.exchange.prefix_tuning import check_prefix
from ptuning.prompt.prompt import Prompt
from tests.conftest import RECORDS
from tests.exchange.conftest import asked, exported, loaded_by_peft, ours, reserving, reserving_model


def deep_prompt(backbone: Backbone, template: str = "[D*3] The city {x} is [Y]") -> Prompt:
    """A prompt that has learned."""
    prompt = Prompt.from_token_ids(template, [7, 8, 9], backbone)
    noise = torch.Generator().manual_seed(0)
    assert prompt.deep is not None
    assert prompt.deep.block is not None
    moved = prompt.deep.block.clone()
    learned = moved[:, :, :, prompt.deep.lead :]
    learned += torch.randn(learned.shape, generator=noise)
    return replace(prompt, deep=replace(prompt.deep, block=moved))


def test_peft_gives_the_log_probability_of_the_example(backbone: Backbone, tmp_path: Path) -> None:
    prompt = deep_prompt(backbone)
    about = exported(prompt, backbone, tmp_path / "out", "peft")
    tied = bool(backbone.model.config.tie_word_embeddings)
    model = loaded_by_peft(tmp_path / "out", reserving_model(tied=tied))
    assert model.peft_config["default"].num_virtual_tokens == 3 + len(backbone.tokenizer.prefix_ids) > 3
    assert asked(model, about["example"]) == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=1e-4)
    back = import_prompt(read_adapter_folder(tmp_path / "out"), prompt.template, backbone)
    assert back.deep is not None
    assert prompt.deep is not None
    assert torch.equal(back.deep.block, prompt.deep.block)  # type: ignore[arg-type]
    assert back.deep.lead == prompt.deep.lead == 1
    # The tokens that open a text are known again where a file's numbers were rounded.
    half = replace(prompt, deep=prompt.deep.rounded(torch.bfloat16))
    exported(half, backbone, tmp_path / "half", "peft")
    found = import_prompt(read_adapter_folder(tmp_path / "half"), prompt.template, backbone).deep
    assert found is not None
    assert (found.lead, found.in_front) == (1, 3)


def peft_adapter(folder: Path) -> None:
    """Write a prefix of PEFT's own, as it starts: random."""
    torch.manual_seed(3)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(reserving_model(), config).save_pretrained(str(folder))


@torch.no_grad()
def test_a_prefix_of_peft_gives_its_logits_on_rows_with_pads(tmp_path: Path) -> None:
    backbone = reserving()
    peft_adapter(tmp_path / "adapter")
    prompt = import_prompt(read_adapter_folder(tmp_path / "adapter"), "[D*4]<s> The city {x} is [Y]", backbone)
    assert prompt.deep is not None
    assert (prompt.deep.in_front, prompt.deep.lead, prompt.slots) == (4, 0, 0)
    bound = prompt.bind(backbone)
    rows = bound.examples(RECORDS[:3])
    found = target_logits(backbone, rows, prompt.learned(backbone))
    assert not torch.allclose(
        found, target_logits(backbone, [replace(one, begun=0) for one in rows], PromptBatch.none(32))
    )
    width = max(len(one.token_ids) for one in rows)
    ids = torch.tensor([[*one.token_ids, *[0] * (width - len(one.token_ids))] for one in rows])
    mask = torch.tensor([[1] * len(one.token_ids) + [0] * (width - len(one.token_ids)) for one in rows])
    model = loaded_by_peft(tmp_path / "adapter", reserving_model())
    theirs = model(input_ids=ids, attention_mask=mask).logits[..., : backbone.vocabulary]
    wanted = torch.cat([theirs[row, list(one.logit_positions)] for row, one in enumerate(rows)])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("[D*3]<s> The {x} is [Y]", r"has 4 virtual tokens .* 3 deep slots in front and 0 other slots; begin it with"),
        ("[D*4]<s> The {x} [P] is [Y]", "4 deep slots in front and 1 other slots"),
        ("[D*4] The {x} is [Y]", r"write it behind the slots: \[D\*4\]<s>"),
    ],
)
def test_templates_that_do_not_read_what_peft_reads(tmp_path: Path, template: str, says: str) -> None:
    peft_adapter(tmp_path / "adapter")
    with pytest.raises(ExchangeError, match=says):
        import_prompt(read_adapter_folder(tmp_path / "adapter"), template, reserving())


def test_deep_slots_elsewhere_are_refused(tmp_path: Path) -> None:
    backbone = reserving()
    mixed = Prompt.from_token_ids("[D] {x} is [D] [Y]", [7, 8], backbone)
    with pytest.raises(ExchangeError, match="has other slots as well; train one with"):
        exported(mixed, backbone, tmp_path / "out", "peft")
    front = Prompt.from_token_ids("[D*2] {x} is [Y]", [7, 8], backbone)
    added = DeepParams(None, 0, torch.zeros(2, backbone.deep.layers - 1, backbone.width), (0, 1))
    in_row = replace(front, deep=added, slot_vectors=torch.zeros(2, backbone.width))
    with pytest.raises(ExchangeError, match="are added to what the layers of its model read"):
        check_prefix(in_row)
    for kind in ("lora", "tokens", "gguf", "embeds"):
        with pytest.raises(ExchangeError, match="take --as peft"):
            exported(deep_prompt(backbone), backbone, tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()
