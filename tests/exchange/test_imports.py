"""Prompts that PEFT trained: ours reads the same vectors at the same places, or says why it cannot."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from ptuning.backbone.backbone import Backbone
from ptuning.errors import FileError, PTuningError, TemplateError
from ptuning.exchange.imports import import_prompt, read_adapter_folder
from ptuning.prompt.prompt import Prompt
from tests.conftest import RECORDS, learned
from tests.exchange.conftest import IN_FRONT, exported, loaded_by_peft, of_targets, ours, reserving, reserving_model
from tests.families import model_of, tokenizer_of

TOKENS = 4


@torch.no_grad()
def by_peft(folder: Path, model: Any, ids: list[int], target_ids: list[int]) -> float:
    given = torch.tensor([[*ids, *target_ids]])
    logits = loaded_by_peft(folder, model)(input_ids=given, attention_mask=torch.ones_like(given)).logits[0]
    return of_targets(logits[-len(target_ids) - 1 : -1], target_ids)


def save_adapter(folder: Path, config: Any, model: Any) -> None:
    """Save an adapter with random virtual tokens as PEFT does."""
    torch.manual_seed(3)
    peft.get_peft_model(model, copy.deepcopy(config)).save_pretrained(str(folder))


CONFIGS = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS),
    "p-tuning": peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
    ),
}
quietly = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated", "ignore:for P-Tuning")


@quietly
@pytest.mark.parametrize("method", CONFIGS)
def test_what_peft_trained_answers_as_in_peft(
    method: str, tmp_path: Path, loaded: Callable[[str], Backbone], model_folder: Callable[[str], Path]
) -> None:
    """GPT-2 begins texts with no token of its own."""
    backbone = loaded("gpt2")

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(model_folder("gpt2")).eval()

    save_adapter(tmp_path, CONFIGS[method], model())
    prompt = import_prompt(read_adapter_folder(tmp_path), f"[P*{TOKENS}]{{x}} is [Y]", backbone)
    assert prompt.method == f"{method} of PEFT"
    row = prompt.bind(backbone).examples(RECORDS[:1])[0]
    ids = backbone.tokenizer.read("Kenya is")
    theirs = by_peft(tmp_path, model(), ids, list(row.target_ids))
    assert theirs == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=1e-4)


@quietly
def test_a_first_token_of_the_tokenizer_stands_behind_the_virtual_ones(tmp_path: Path) -> None:
    """As PEFT has it; a template with the tokenizer's first token in front would be another input."""
    backbone = reserving()
    save_adapter(tmp_path, CONFIGS["prompt tuning"], reserving_model())
    adapter = read_adapter_folder(tmp_path)
    prompt = import_prompt(adapter, f"[P*{TOKENS}]<s>{{x}} is [Y]", backbone)
    row = prompt.bind(backbone).examples(RECORDS[:1])[0]
    ids = backbone.tokenizer.read("Kenya is")
    assert list(row.token_ids[: TOKENS + len(ids)]) == [0] * TOKENS + ids
    theirs = by_peft(tmp_path, reserving_model(), ids, list(row.target_ids))
    assert theirs == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=1e-4)
    with pytest.raises(PTuningError, match=r"in front of <s>, .* write it behind them: \[P\*4\]<s>"):
        import_prompt(adapter, f"[P*{TOKENS}]{{x}} is [Y]", backbone)


def test_an_export_comes_back(tmp_path: Path) -> None:
    """The tokenizer's first token was its first virtual one, and the tokenizer puts it there again."""
    backbone = reserving()
    prompt = learned(backbone, IN_FRONT)
    exported(prompt, backbone, tmp_path / "out", "peft")
    number = len(read_adapter_folder(tmp_path / "out").vectors)
    back = import_prompt(read_adapter_folder(tmp_path / "out"), f"[P*{number - 1}] {{x}} is [Y]", backbone)
    back.save(tmp_path / "back")
    for record in RECORDS:
        found = ours(Prompt.load(tmp_path / "back"), backbone, record)
        assert found == pytest.approx(ours(prompt, backbone, record), abs=1e-4)


def write_folder(folder: Path, *, vectors: Any = None, **changes: Any) -> Path:
    """Write an adapter's folder with some keys of its config changed."""
    folder.mkdir()
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": TOKENS, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {"prompt_embeddings": torch.zeros(TOKENS, 32)} if vectors is None else vectors
    (folder / "adapter_model.safetensors").write_bytes(safetensors.torch.save(tensors))
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "CARTRIDGE"}, "keys and values in a form of its own"),
        ({"peft_type": "LORA"}, "adapters on layers of the model"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "a prompt for each of its tasks"),
        ({"peft_type": 7}, "'peft_type' must be text"),
        ({"num_virtual_tokens": 5}, "says 5 virtual tokens"),
        ({"num_virtual_tokens": 10**9}, "at most 65536"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task type SEQ_2_SEQ_LM"),
        ({"vectors": {"lora_A": torch.zeros(2, 2)}}, "holds lora_A"),
        ({"vectors": {"prompt_embeddings": torch.zeros(TOKENS, dtype=torch.int64)}}, "holds torch.int64"),
        ({"vectors": {"prompt_embeddings": torch.full((TOKENS, 32), float("nan"))}}, "NaN"),
        ({"vectors": {"prompt_embeddings": torch.zeros(TOKENS, 8)}}, "8 wide, and the embeddings of 'tiny' 32"),
    ],
)
def test_what_cannot_be_read_says_what_is_missing(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "adapter", **changes)
    with pytest.raises(PTuningError) as caught:
        import_prompt(read_adapter_folder(folder), f"[P*{TOKENS}]<s>{{x}} is [Y]", reserving())
    assert says in str(caught.value)


def test_pickles_are_not_read_and_damage_is_said(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(PTuningError, match="cut off or damaged"):
        read_adapter_folder(folder)
    weights.unlink()
    with pytest.raises(FileError, match=r"adapter_model\.safetensors"):
        read_adapter_folder(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(PTuningError, match=r"adapter_model\.bin is a pickle"):
        read_adapter_folder(folder)
    with pytest.raises(FileError, match=r"adapter_config\.json"):
        read_adapter_folder(tmp_path)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("[P*3]<s>{x} [Y]", r"has 4 virtual tokens in front of all text, .* has 3 slots; begin it with \[P\*4\]"),
        ("{x} is [Y]", "has 0 slots"),
        ("[P*2]<s>{x} is [P*2] [Y]", "has 4 slots, not all in front"),
        ("[P*4<s>{x} [Y]", "unknown piece"),
    ],
)
def test_a_template_whose_slots_are_others_is_refused(template: str, says: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "adapter")
    with pytest.raises(PTuningError, match=says) as caught:
        import_prompt(read_adapter_folder(folder), template, reserving())
    assert isinstance(caught.value, TemplateError) == ("unknown" in says)


def test_a_text_that_peft_reads_differently_is_refused(tmp_path: Path) -> None:
    """A tokenizer that puts a space in front of every text does so behind virtual tokens, too."""
    backbone = Backbone.from_model(model_of("llama"), tokenizer_of("t5"), name="unigram")
    adapter = read_adapter_folder(write_folder(tmp_path / "adapter"))
    with pytest.raises(PTuningError, match=r"behind the slots .* so PEFT reads another text"):
        import_prompt(adapter, f"[P*{TOKENS}], {{x}} is [Y]", backbone)
    assert import_prompt(adapter, f"[P*{TOKENS}]{{x}} is [Y]", backbone).slots == TOKENS


def test_a_masked_model_has_no_virtual_tokens(tmp_path: Path, masked: Backbone) -> None:
    with pytest.raises(PTuningError, match="of the kind masked"):
        import_prompt(read_adapter_folder(write_folder(tmp_path / "adapter")), "[P*4]{x} [Y]", masked)
