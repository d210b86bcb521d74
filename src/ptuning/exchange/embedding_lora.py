"""A prompt as an ordinary LoRA of PEFT on the input embeddings: slots anywhere, tied models exactly.

A (one-hot) picks a slot's token id, and B adds what its row lacks to be the slot's vector. Only the input side is
adapted, so no logit of a slot's token changes.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ptuning.backbone.lora import PREFIX
from ptuning.errors import ExchangeError
from ptuning.exchange.form import Exported, Form, asked_with_ids
from ptuning.exchange.peft_files import check_peft, logits_at, read_adapter, write_adapter
from ptuning.exchange.reserved import as_rows, stored_rows, unused_rows
from ptuning.exchange.rows import Reader, Source, spoken, text_difference
from ptuning.template.encode import Example

# The ranks that vLLM knows (--max-lora-rank).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def write(source: Source, folder: Path) -> Exported:
    """Write the adapter. An ExchangeError if there are too few unused rows, or the model does more than to look rows up
    and to scale them.
    """
    check_peft()
    tokens = unused_rows(source)
    difference = as_rows(source.backbone, source.vectors) - stored_rows(source.backbone, tokens.ids)  # (P, E)
    slots = len(difference)
    chosen = torch.zeros(slots, source.backbone.embedding_rows)  # (P, V)
    chosen[torch.arange(slots), list(tokens.ids)] = 1.0
    module = _embedding_name(source)
    write_adapter(
        source,
        folder,
        {
            "peft_type": "LORA",
            "target_modules": [module.rpartition(".")[2]],
            "r": slots,
            "lora_alpha": slots,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
        },
        {
            f"{PREFIX}{module}.lora_embedding_A": chosen,
            f"{PREFIX}{module}.lora_embedding_B": difference.T,
        },
    )
    named = tokens.named
    apart = None if named is None else text_difference(source, named, tokens.ids, source.backbone.tokenizer.read)
    return Exported(
        tokens,
        lambda: _reader(source, folder, tokens.ids),
        lambda example: spoken(example, tokens.ids),
        text=named if apart is None else None,
        usage=_usage(slots),
        why_no_text="some of the slots' ids have no text" if named is None else apart,
    )


def _embedding_name(source: Source) -> str:
    table = source.backbone.table_of(source.backbone.model)
    modules = source.backbone.model.named_modules()
    name: str | None = next((name for name, module in modules if module is table), None)
    if name is None:
        raise ExchangeError(
            f"'{source.backbone.name}' has no module for its input embeddings, which a LoRA could adapt"
        )
    return name


def _reader(source: Source, folder: Path, ids: tuple[int, ...]) -> Reader:
    model = read_adapter(source, folder)

    def read(example: Example) -> torch.Tensor:
        return logits_at(model, spoken(example, ids), example.logit_positions, source.backbone.device)

    return read


def vllm_rank(slots: int) -> int:
    """Return the least rank that vLLM knows and that is enough."""
    return next((rank for rank in VLLM_RANKS if rank >= slots), slots)


def _usage(slots: int) -> list[str]:
    return [
        "It is an ordinary LoRA on the input embeddings. The slots are the token ids above. Every other token is as it",
        "was, and so are the weights of the logits.",
        "",
        "In vLLM (a model class that takes LoRA on its embeddings, such as Llama, Mistral, Qwen3 and Granite):",
        "",
        "```",
        f"vllm serve MODEL --enable-lora --max-lora-rank {vllm_rank(slots)} --lora-modules my-prompt=THIS_FOLDER",
        "```",
        "",
        *asked_with_ids("my-prompt"),
        "",
        "In PEFT:",
        "",
        "```python",
        "import json",
        "",
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("MODEL"), "THIS_FOLDER")',
        'example = json.load(open("THIS_FOLDER/export.json"))["example"]',
        'ids = torch.tensor([example["input_ids"]])',
        "print(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8))",
        "```",
    ]


FORM = Form("a LoRA of PEFT on the input embeddings; vLLM, PEFT", write)
