"""Shared by the tests of exports: tiny LLaMAs whose tokenizer has reserved tokens, tied and untied."""

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ptuning.backbone.backbone import Backbone
from ptuning.exchange.export import EXPORT_FILE, export_prompt
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.records import Record
from tests.conftest import CONTEXT, RECORDS, make_tokenizer

ANYWHERE = "[P*2] {x} is [P] [Y]"
FIRST = "The [P*2] city [P] {x} is [Y]"
RESERVED = [f"<|reserved_{number}|>" for number in range(5)]


def reserving_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with reserved tokens, and one special token of the chat template."""
    made = make_tokenizer("llama")
    made.add_special_tokens({"extra_special_tokens": ["<|turn|>", *RESERVED]})
    made.chat_template = "{% for message in messages %}<|turn|>{{ message.content }}{% endfor %}"
    return made


@functools.cache
def reserving(*, tied: bool = True, head: type[Any] = LlamaForCausalLM) -> Backbone:
    """Return a tiny model whose table has a row for each token and no more; not to be changed."""
    return Backbone.from_model(reserving_model(tied=tied, head=head), reserving_tokenizer(), name="tiny")


def reserving_model(*, tied: bool = True, head: type[Any] = LlamaForCausalLM) -> PreTrainedModel:
    torch.manual_seed(0)
    config = (LlamaConfig if head is LlamaForCausalLM else head.config_class)(
        vocab_size=len(reserving_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model: PreTrainedModel = head(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.1)
    return model


def loaded_by_peft(folder: Path, model: PreTrainedModel) -> Any:
    """Load an adapter as a stranger would."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of adapters on tied embeddings, and of PEFT's own old calls
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def by_stranger(kind: str, folder: Path, model: PreTrainedModel, example: dict[str, Any]) -> float:
    """Run ``input_ids`` followed by ``target_ids`` as a stranger would, and return the target's log-probability."""
    if kind == "tokens":
        return asked(AutoModelForCausalLM.from_pretrained(folder).eval(), example)
    return asked(loaded_by_peft(folder, model), example)


def exported(prompt: Prompt, backbone: Backbone, out: Path, kind: str, data: Any = RECORDS) -> dict[str, Any]:
    """Export a prompt, and return what its ``export.json`` holds."""
    about = export_prompt(prompt, backbone, data, out, kind=kind)
    written: dict[str, Any] = json.loads((out / EXPORT_FILE).read_text(encoding="utf-8"))
    assert about == written
    return written


def ours(prompt: Prompt, backbone: Backbone, record: Record) -> float:
    """Return the log-probability that we give to a record's target."""
    logits = PromptModel(backbone).target_logits([record], prompt)[0]
    row = prompt.bind(backbone).examples([record])[0]
    return of_targets(logits, list(row.target_ids))


def of_targets(logits: torch.Tensor, target_ids: list[int]) -> float:
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    return float(sum(log_probs[at, token] for at, token in enumerate(target_ids)))


@torch.no_grad()
def asked(model: Any, example: dict[str, Any]) -> float:
    ids = torch.tensor([example["input_ids"] + example["target_ids"]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    return of_targets(logits[-len(example["target_ids"]) - 1 : -1], example["target_ids"])
