"""A copy of the model whose embedding table has the slots as rows of reserved or new tokens: for any engine.

The head is untied and keeps the rows that it had, so no logit of another token changes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken
from torch import Tensor, nn

from ptuning.backbone.backbone import Backbone, quiet
from ptuning.errors import ExchangeError
from ptuning.exchange.form import Exported, Form, asked_with_ids
from ptuning.exchange.peft_files import logits_at
from ptuning.exchange.reserved import SlotTokens, as_rows, reserved_tokens
from ptuning.exchange.rows import Reader, Source, spoken, template_text, text_difference
from ptuning.files import check_room, sha256
from ptuning.template.encode import Example
from ptuning.template.segments import Ids

# The longest file of weights; transformers writes several if a model is larger.
SHARD_SIZE = "5GB"


def write(source: Source, folder: Path) -> Exported:
    """Write model and tokenizer. An ExchangeError if the template as text has other ids than the rows, or the model
    does more than to look rows up and to scale them.
    """
    backbone = source.backbone
    if "quantization" in backbone.loaded:
        raise ExchangeError(
            f"'{backbone.name}' is quantised ({backbone.loaded['quantization']}), and a copy of it would not be; load "
            "the model that it was made of, or take --as lora"
        )
    rows = as_rows(backbone, source.vectors)
    table_bytes = backbone.embedding_rows * backbone.width * backbone.dtype.itemsize
    check_room(folder, backbone.parameters * backbone.dtype.itemsize + table_bytes)
    tokens, tokenizer = _write_tokenizer(source, folder)
    assert tokens.named is not None
    apart = text_difference(source, tokens.named, tokens.ids, lambda text: tokenizer(text)["input_ids"])
    if apart is not None:
        raise ExchangeError(
            f"beside the slots' tokens {apart}, so a text would be read differently; take --as lora or --as embeds, "
            "which are given ids"
        )
    model = _untied(backbone, rows=max(backbone.embedding_rows, max(tokens.ids) + 1))
    _put(source, model, tokens, rows)
    with quiet():
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)  # safetensors' files are for their owner only
    return Exported(
        tokens,
        lambda: _reader(source, folder, tokens.ids),
        lambda example: spoken(example, tokens.ids),
        text=tokens.named,
        usage=_usage(template_text(source, tokens.named)),
    )


def _write_tokenizer(source: Source, folder: Path) -> tuple[SlotTokens, Any]:
    """Write the tokenizer with a token for each slot, and return it as it is read from there."""
    source.backbone.tokenizer.save(folder)
    tokens = reserved_tokens(source)
    if tokens is None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        # Nobody writes such a name by chance, and who has not seen the prompt cannot guess it.
        mark = sha256(source.vectors.numpy().tobytes())[:8]
        names = [f"<|slot-{mark}-{number}|>" for number in range(1, len(source.vectors) + 1)]
        tokenizer.add_tokens(
            [AddedToken(name, special=True, normalized=False, lstrip=False, rstrip=False) for name in names],
            special_tokens=True,
        )
        tokenizer.save_pretrained(folder)
        tokens = SlotTokens(tuple(map(tokenizer.get_vocab().__getitem__, names)), tuple(names))
    return tokens, transformers.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def _untied(backbone: Backbone, *, rows: int) -> Any:
    """Return a copy of the model with a head of its own, and so many rows in its table."""
    model = copy.deepcopy(backbone.copy(share=True).model)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ExchangeError(f"'{backbone.name}' has no head that could be untied from its embeddings; take --as lora")
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    if rows > backbone.embedding_rows:
        with quiet():
            model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@torch.no_grad()
def _put(source: Source, model: Any, tokens: SlotTokens, rows: Tensor) -> None:
    """Write the slots' rows into the table. In the head, tokens that are new get the row of the token that is the least
    likely answer: zeros would not be unlikely.
    """
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    table[list(tokens.ids)] = rows.to(table.device, table.dtype)
    new = [index for index in tokens.ids if index >= source.backbone.vocabulary]
    for weight in (head.weight, head.bias):
        if weight is not None and new:
            weight[new] = weight[source.least_likely].clone()


def _reader(source: Source, folder: Path, ids: Ids) -> Reader:
    with quiet():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=source.backbone.dtype, use_safetensors=True
        )
    model.to(source.backbone.device).eval()

    def read(example: Example) -> Tensor:
        return logits_at(model, spoken(example, ids), example.logit_positions, source.backbone.device)

    return read


def _usage(text: str) -> list[str]:
    return [
        "It is the whole model with its tokenizer. The slots are rows of its embedding table, and its head is untied,",
        "so that it answers to every other text as before. In vLLM, and in the same way in other servers:",
        "",
        "```",
        "vllm serve THIS_FOLDER --served-model-name my-prompt",
        "```",
        "",
        *asked_with_ids("my-prompt"),
        "",
        "In transformers:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        f"text = {text!r}  # with the fields filled in",
        'given = tokenizer(text, return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**given, max_new_tokens=8)[0]))",
        "```",
    ]


FORM = Form("a copy of the model with a token for each slot; any engine", write)
