"""Prompts that PEFT trained: ours reads the same vectors at the same places, or says why it cannot."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from ptuning.backbone.backbone import Backbone
from ptuning.engine.forward import target_logits
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import ExchangeError, FileError, PTuningError, TemplateError
from ptuning.exchange.import_peft import import_prompt, read_adapter_folder
from ptuning.prompt.prompt import Prompt
from tests.conftest import RECORDS, learned
from tests.exchange.conftest import FIRST, asked, exported, loaded_by_peft, ours, reserving, reserving_model
from tests.families import model_of, tokenizer_of

TOKENS = 4
CONFIGS: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
    ),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS),
}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated", "ignore:for P-Tuning")


def save_adapter(folder: Path, method: str, model: Any) -> None:
    """Save an adapter with random virtual tokens as PEFT does."""
    torch.manual_seed(3)
    peft.get_peft_model(model, CONFIGS[method]()).save_pretrained(str(folder))


@pytest.mark.parametrize("method", ["prompt tuning", "p-tuning"])
def test_an_adapter_answers_as_in_peft(
    method: str, tmp_path: Path, loaded: Callable[[str], Backbone], model_folder: Callable[[str], Path]
) -> None:
    """GPT-2 begins texts with no token of its own."""
    backbone = loaded("gpt2")

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(model_folder("gpt2")).eval()

    save_adapter(tmp_path, method, model())
    prompt = import_prompt(read_adapter_folder(tmp_path), f"[P*{TOKENS}]{{x}} is [Y]", backbone)
    assert prompt.method == f"{method} of PEFT"
    row = prompt.bind(backbone).examples(RECORDS[:1])[0]
    example = {"input_ids": backbone.tokenizer.read("Kenya is"), "target_ids": list(row.target_ids)}
    theirs = asked(loaded_by_peft(tmp_path, model()), example)
    assert theirs == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=1e-4)


def test_bos_comes_after_the_virtual_tokens(tmp_path: Path) -> None:
    """As PEFT has it; a template with BOS before its slots would be another input."""
    backbone = reserving()
    save_adapter(tmp_path, "prompt tuning", reserving_model())
    adapter = read_adapter_folder(tmp_path)
    prompt = import_prompt(adapter, f"[P*{TOKENS}]<s>{{x}} is [Y]", backbone)
    row = prompt.bind(backbone).examples(RECORDS[:1])[0]
    ids = backbone.tokenizer.read("Kenya is")
    assert list(row.token_ids[: TOKENS + len(ids)]) == [0] * TOKENS + ids
    theirs = asked(loaded_by_peft(tmp_path, reserving_model()), {"input_ids": ids, "target_ids": list(row.target_ids)})
    assert theirs == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=1e-4)


def test_an_export_comes_back(tmp_path: Path) -> None:
    """BOS was its first virtual token, and the tokenizer puts it there again."""
    backbone = reserving()
    prompt = learned(backbone, FIRST)
    exported(prompt, backbone, tmp_path / "out", "peft")
    adapter = read_adapter_folder(tmp_path / "out")
    back = import_prompt(adapter, f"[P*{len(adapter.vectors) - 1}] {{x}} is [Y]", backbone)
    back.save(tmp_path / "back")
    for record in RECORDS:
        theirs = ours(Prompt.load(tmp_path / "back"), backbone, record)
        assert theirs == pytest.approx(ours(prompt, backbone, record), abs=1e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_deep_slots_go_to_peft_and_come_back(tied: bool, tmp_path: Path) -> None:
    backbone = reserving(tied=tied)
    prompt = Prompt.from_token_ids("[D*3] The city {x} is [Y]", [7, 8, 9], backbone)
    assert prompt.deep is not None
    assert prompt.deep.prefix is not None
    block = prompt.deep.prefix.clone()
    slots = block[:, :, :, prompt.deep.bos :]
    slots += torch.randn(slots.shape, generator=torch.Generator().manual_seed(0))
    prompt = replace(prompt, deep=replace(prompt.deep, prefix=block))
    about = exported(prompt, backbone, tmp_path / "out", "peft")
    model = loaded_by_peft(tmp_path / "out", reserving_model(tied=tied))
    assert model.peft_config["default"].num_virtual_tokens == 3 + len(backbone.tokenizer.prefix_ids) > 3
    assert asked(model, about["example"]) == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=1e-4)
    back = import_prompt(read_adapter_folder(tmp_path / "out"), prompt.template, backbone).deep
    assert back is not None
    assert back.prefix is not None
    assert torch.equal(back.prefix, block)
    assert back.bos == prompt.deep.bos == 1  # type: ignore[union-attr]  # deep, as above
    # The tokens that open a text are recognised where a file's numbers were rounded.
    half = replace(prompt, deep=prompt.deep.rounded(torch.bfloat16))  # type: ignore[union-attr]  # deep, as above
    exported(half, backbone, tmp_path / "half", "peft")
    back = import_prompt(read_adapter_folder(tmp_path / "half"), prompt.template, backbone).deep
    assert back is not None
    assert (back.bos, back.prefix_slots) == (1, 3)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix of PEFT's own, as it starts: random."""
    folder = tmp_path_factory.mktemp("prefix")
    save_adapter(folder, "prefix tuning", reserving_model())
    return folder


@torch.no_grad()
def test_a_prefix_of_peft_gives_its_logits_on_rows_with_pads(prefix: Path) -> None:
    backbone = reserving()
    prompt = import_prompt(read_adapter_folder(prefix), f"[D*{TOKENS}]<s> The city {{x}} is [Y]", backbone)
    assert prompt.deep is not None
    assert (prompt.deep.prefix_slots, prompt.deep.bos, prompt.slots) == (TOKENS, 0, 0)
    rows = prompt.bind(backbone).examples(RECORDS[:3])
    logits = target_logits(backbone, rows, prompt.learned(backbone))
    without = target_logits(backbone, [replace(row, prefix_length=0) for row in rows], PromptBatch.none(32))
    assert not torch.allclose(logits, without)
    width = max(len(row.token_ids) for row in rows)
    ids = torch.tensor([[*row.token_ids, *[0] * (width - len(row.token_ids))] for row in rows])
    mask = torch.tensor([[1] * len(row.token_ids) + [0] * (width - len(row.token_ids)) for row in rows])
    model = loaded_by_peft(prefix, reserving_model())
    theirs = model(input_ids=ids, attention_mask=mask).logits[..., : backbone.vocabulary]
    wanted = torch.cat([theirs[at, list(row.logit_positions)] for at, row in enumerate(rows)])
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("template", ["[D*3]<s> The {x} is [Y]", "[D*4]<s> The {x} [P] is [Y]", "[D*4] The {x} is [Y]"])
def test_templates_that_do_not_read_the_prefix(template: str, prefix: Path) -> None:
    with pytest.raises(ExchangeError, match=r"4 virtual tokens .* begin it with \[D\*4\]<s>"):
        import_prompt(read_adapter_folder(prefix), template, reserving())


@pytest.mark.parametrize(
    ("template", "error", "fact"),
    [
        ("[P*4]{x} is [Y]", ExchangeError, "begin it with [P*4]<s>"),
        ("[P*3]<s>{x} [Y]", ExchangeError, "begin it with [P*4]<s>"),
        ("{x} is [Y]", ExchangeError, "begin it with [P*4]<s>"),
        ("[P*2]<s>{x} is [P*2] [Y]", ExchangeError, "begin it with [P*4]<s>"),
        ("[P*4<s>{x} [Y]", TemplateError, "unknown piece"),
    ],
)
def test_templates_that_do_not_read_the_virtual_tokens(
    template: str, error: type[PTuningError], fact: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        import_prompt(read_adapter_folder(write_folder(tmp_path / "adapter")), template, reserving())
    assert fact in str(caught.value)


def write_folder(folder: Path, *, vectors: Any = None, **changes: Any) -> Path:
    """Write an adapter's folder with some keys of its config changed."""
    folder.mkdir()
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": TOKENS, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {"prompt_embeddings": torch.zeros(TOKENS, 32)} if vectors is None else vectors
    (folder / "adapter_model.safetensors").write_bytes(safetensors.torch.save(tensors))
    return folder


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"peft_type": "CARTRIDGE"}, "keys and values in a format of its own"),
        ({"peft_type": "LORA"}, "adapters on layers"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "a prompt per task"),
        ({"peft_type": 7}, "'peft_type'"),
        ({"num_virtual_tokens": 5}, "5 virtual tokens"),
        ({"num_virtual_tokens": 10**9}, "65536"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "SEQ_2_SEQ_LM"),
        ({"vectors": {"lora_A": torch.zeros(2, 2)}}, "holds lora_A"),
        ({"vectors": {"prompt_embeddings": torch.zeros(TOKENS, 32, dtype=torch.int64)}}, "torch.int64"),
        ({"vectors": {"prompt_embeddings": torch.zeros(TOKENS)}}, "one matrix"),
        ({"vectors": {"prompt_embeddings": torch.full((TOKENS, 32), float("nan"))}}, "NaN"),
        ({"vectors": {"prompt_embeddings": torch.zeros(TOKENS, 8)}}, "8 wide, and 'tiny' needs 32"),
    ],
)
def test_damaged_and_other_adapters_are_refused(changes: dict[str, Any], fact: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "adapter", **changes)
    with pytest.raises(PTuningError) as caught:
        import_prompt(read_adapter_folder(folder), f"[P*{TOKENS}]<s>{{x}} is [Y]", reserving())
    assert fact in str(caught.value)


def test_pickles_missing_and_truncated_files_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ExchangeError, match="truncated or damaged"):
        read_adapter_folder(folder)
    weights.unlink()
    with pytest.raises(FileError, match=r"adapter_model\.safetensors"):
        read_adapter_folder(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ExchangeError, match=r"adapter_model\.bin is a pickle"):
        read_adapter_folder(folder)
    with pytest.raises(FileError, match=r"adapter_config\.json"):
        read_adapter_folder(tmp_path)


def test_a_text_that_peft_reads_differently_is_refused(tmp_path: Path) -> None:
    """A tokenizer that puts a space before every text does so after virtual tokens, too."""
    backbone = Backbone.from_model(model_of("llama"), tokenizer_of("t5"), name="unigram")
    adapter = read_adapter_folder(write_folder(tmp_path / "adapter"))
    with pytest.raises(ExchangeError, match=r"after the slots .* so PEFT reads another text"):
        import_prompt(adapter, f"[P*{TOKENS}], {{x}} is [Y]", backbone)
    assert import_prompt(adapter, f"[P*{TOKENS}]{{x}} is [Y]", backbone).slots == TOKENS


def test_a_masked_model_has_no_virtual_tokens(tmp_path: Path, masked: Backbone) -> None:
    with pytest.raises(ExchangeError, match="kind masked"):
        import_prompt(read_adapter_folder(write_folder(tmp_path / "adapter")), "[P*4]{x} [Y]", masked)
