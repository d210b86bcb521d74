"""Adapters of PEFT: written without PEFT, and read back by it.

- PROMPT_TUNING: everything up to the last slot becomes virtual tokens before a text. That is exact if no slot comes
  after a field: what precedes the last slot, BOS and literal words included, is then the same in every row.
- PREFIX_TUNING: deep slots before the text are keys and values of virtual tokens in every layer.
- LORA on the input embeddings: slots anywhere, tied models exactly. A (one-hot) picks a slot's token id, and B adds
  what its row lacks to be the slot's vector. Only the input side is adapted, so no logit of a slot's token changes.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ptuning.backbone.lora import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from ptuning.engine.batch import collate
from ptuning.engine.forward import embed_inputs
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import ConfigError, ExchangeError
from ptuning.exchange.format import (
    SEND_IDS,
    ExportResult,
    as_rows,
    quiet_peft,
    reader_of,
    stored_rows,
    unused_rows,
)
from ptuning.exchange.verify import ExportSource, Reader, as_token_ids, text_difference
from ptuning.files import Json, write_bytes, write_json
from ptuning.prompt.prompt import Prompt
from ptuning.template.encode import Example
from ptuning.template.language import Field, Slots, TextSlots

VECTORS_KEY = "prompt_embeddings"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as --max-lora-rank
VIRTUAL_USAGE = """\
{about}
What follows is tokenised without special tokens: the first token of a text, if the tokenizer has one, is a
virtual token already.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("MODEL")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("MODEL"), "THIS_FOLDER")
text = {text}  # with the fields filled in
given = tokenizer(text, add_special_tokens=False, return_tensors="pt")
print(tokenizer.decode(model.generate(**given, max_new_tokens=8)[0]))
```

lm-eval reads it as `--model hf --model_args pretrained=MODEL,peft=THIS_FOLDER`.
"""
LORA_USAGE = f"""\
It is an ordinary LoRA on the input embeddings. The slots are the token ids above. Every other token and the weights of
the logits are unchanged.

In vLLM (a model class that takes LoRA on its embeddings, such as Llama, Mistral, Qwen3 and Granite):

```
vllm serve MODEL --enable-lora --max-lora-rank RANK --lora-modules my-prompt=THIS_FOLDER
```

{SEND_IDS}
In PEFT:

```python
import json

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("MODEL"), "THIS_FOLDER")
example = json.load(open("THIS_FOLDER/export.json"))["example"]
ids = torch.tensor([example["input_ids"]])
print(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8))
```
"""


def check_virtual_tokens(prompt: Prompt) -> None:
    """Raise an ExchangeError unless PEFT's virtual tokens can hold the slots of a prompt: before the first field, or
    deep slots before the text and no others.
    """
    pieces = prompt.template.pieces
    fields = [at for at, piece in enumerate(pieces) if isinstance(piece, Field)]
    slots = [at for at, piece in enumerate(pieces) if isinstance(piece, Slots | TextSlots)]
    if prompt.deep is not None and slots == [0] and prompt.deep.prefix is None:
        raise ExchangeError(
            f"the deep slots of '{prompt.template}' are added to the inputs of layers, as its model takes no keys and "
            "values as a prefix, and PEFT holds only those; no other template helps"
        )
    if prompt.deep is not None and (prompt.deep.prefix is None or prompt.deep.offset_slots or prompt.slots):
        raise ExchangeError(
            "PEFT holds deep slots only as keys and values before a text, and the template "
            f"'{prompt.template}' has other slots as well; train one with [D] first and no other slots (method "
            "p-tuning-v2)"
        )
    if prompt.deep is None and fields and slots and max(slots) > fields[0]:
        raise ExchangeError(
            f"PEFT puts virtual tokens before a text, and a slot of the template '{prompt.template}' comes after a "
            "field; take the format lora, which keeps slots anywhere"
        )


def write_virtual_tokens(source: ExportSource, folder: Path) -> ExportResult:
    """Write prompt tuning, or for deep slots prefix tuning. Raises ExchangeError if the text after the virtual tokens
    tokenizes differently on its own.
    """
    deep, example = source.prompt.deep, source.rows[0].example
    taken = 0 if deep is not None else max(example.slot_positions) + 1  # the same in every row
    _check_rest(source, taken)
    config: dict[str, Json] = {"num_transformer_submodules": 1}
    if deep is not None:
        assert deep.prefix is not None
        layers, _, heads, columns, width = deep.prefix.shape
        about = (
            f"{columns} virtual tokens in every layer: {deep.prefix_slots} deep slots, and the tokens that open a text."
        )
        vectors = deep.prefix.permute(3, 0, 1, 2, 4).reshape(columns, -1)
        config |= {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": columns,
            "token_dim": heads * width,
            "num_layers": layers,
            "num_attention_heads": heads,
            "encoder_hidden_size": heads * width,
            "prefix_projection": False,
        }
    else:
        about = f"{taken} virtual tokens: {len(source.vectors)} slots, and everything else before the last of them."
        with torch.no_grad():
            words = source.backbone.vectors_of(torch.tensor(example.token_ids)).cpu()  # (T, E)
            batch = collate([example], PromptBatch(source.vectors))
            vectors = embed_inputs(words[None], source.vectors, batch)[0, :taken]
        config |= {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": taken,
            "token_dim": source.backbone.width,
            "prompt_tuning_init": "RANDOM",
        }
    rest = source.bound.texts({name: f"{{{name}}}" for name in source.prompt.template.fields})[-1]

    def input_ids(example: Example) -> Sequence[int]:
        return example.token_ids[taken:]

    load = _write_adapter(source, folder, config, {VECTORS_KEY: vectors}, input_ids)
    return ExportResult(load, input_ids, VIRTUAL_USAGE.format(about=about, text=repr(rest)))


def _check_rest(source: ExportSource, taken: int) -> None:
    for row in source.rows:
        rest = list(row.example.token_ids[taken : row.example.logit_positions[0] + 1])
        if not rest:
            raise ExchangeError(
                f"the template '{source.bound.template}' has nothing after its slots for PEFT; take the format lora"
            )
        text = source.bound.texts(row.record)[-1]
        theirs = source.backbone.tokenizer.read(text, add_special_tokens=False)
        if not row.example.shortened and theirs != rest:
            raise ExchangeError(
                f"after its slots the template has the ids {rest}, and the tokenizer gives the text {text!r} the ids "
                f"{theirs}, so PEFT would read another text; take the format lora, which is given ids"
            )


def write_embedding_lora(source: ExportSource, folder: Path) -> ExportResult:
    """Write a LoRA. Raises ExchangeError if too few rows are unused, or the model does more to rows than scaling."""
    backbone = source.backbone
    tokens = unused_rows(source)
    difference = as_rows(backbone, source.vectors) - stored_rows(backbone, tokens.ids)  # (P, E)
    slots = len(difference)
    chosen = torch.zeros(slots, backbone.embedding_rows)  # (P, V)
    chosen[torch.arange(slots), list(tokens.ids)] = 1.0
    table = backbone.table_of(backbone.model)
    module: str | None = next((name for name, module in backbone.model.named_modules() if module is table), None)
    if module is None:
        raise ExchangeError(f"'{backbone.name}' has no module for its input embeddings, which a LoRA could adapt")
    config: dict[str, Json] = {
        "peft_type": "LORA",
        "target_modules": [module.rpartition(".")[2]],
        "r": slots,
        "lora_alpha": slots,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    tensors = {
        f"{PREFIX}{module}.lora_embedding_A": chosen,
        f"{PREFIX}{module}.lora_embedding_B": difference.T,
    }
    why_no_text: str | None = "some of the slots' ids have no text"
    if tokens.names is not None:
        why_no_text = text_difference(source, tokens.names, tokens.ids, backbone.tokenizer.read)

    def input_ids(example: Example) -> Sequence[int]:
        return as_token_ids(example, tokens.ids)

    load = _write_adapter(source, folder, config, tensors, input_ids)
    text = tokens.names if why_no_text is None else None
    rank = next((rank for rank in VLLM_RANKS if rank >= slots), slots)
    return ExportResult(load, input_ids, LORA_USAGE.replace("RANK", str(rank)), tokens, text, why_no_text)


def _write_adapter(
    source: ExportSource,
    folder: Path,
    config: Mapping[str, Json],
    tensors: Mapping[str, Tensor],
    input_ids: Callable[[Example], Sequence[int]],
) -> Callable[[], Reader]:
    """Write an adapter's config and its tensors as float32; return what loads it with PEFT.
    Raises ConfigError if peft, which reads it back, is not installed.
    """
    if find_spec("peft") is None:
        raise ConfigError("this export is read back by the package peft; install it with: pip install 'ptuning[lora]'")
    backbone = source.backbone
    common: dict[str, Json] = {
        "base_model_name_or_path": backbone.name,
        "revision": backbone.revision,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }
    plain = {name: value.float().contiguous() for name, value in tensors.items()}
    write_json(folder / CONFIG_FILE, {**common, **config})
    write_bytes(folder / WEIGHTS_FILE, safetensors.torch.save(plain, {"format": "pt"}))

    def load() -> Reader:
        model = backbone.copy(share=True).model
        with quiet_peft():
            peft_model = import_module("peft").PeftModel
            adapted = peft_model.from_pretrained(model, str(folder), torch_device=str(backbone.device)).eval()
        return reader_of(adapted, input_ids, backbone.device)

    return load
