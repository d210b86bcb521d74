"""Copies of a model, as a folder or a GGUF file, whose embedding table has the slots as rows: for any engine.

The head is untied and keeps the rows that it had, so no logit of another token changes. In a GGUF file all other
weights keep their bytes; the embedding table is unpacked, and a tied head keeps the packed one as its own.
"""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken
from torch import Tensor, nn

from ptuning.backbone import sources
from ptuning.backbone.backbone import Backbone, quiet
from ptuning.backbone.loading import read_gguf
from ptuning.errors import ConfigError, ExchangeError
from ptuning.exchange.format import SEND_IDS, ExportResult, SlotTokens, as_rows, reader_of, reserved_tokens
from ptuning.exchange.verify import ROUGH, ExportSource, Reader, as_token_ids, text_difference
from ptuning.files import check_room, sha256
from ptuning.template.encode import Example

SHARD_SIZE = "5GB"  # largest file of weights; transformers writes several if a model is larger
GGUF_FILE = "model.gguf"
TABLE, HEAD = "token_embd.weight", "output.weight"
ARCHITECTURE = "general.architecture"
CONVERT = "convert that folder with llama.cpp's convert_hf_to_gguf.py"
FOLDER_USAGE = f"""\
It is the whole model with its tokenizer. The slots are rows of its embedding table, and its head is untied, so that it
answers every other text as before. In vLLM, and in the same way in other servers:

```
vllm serve THIS_FOLDER --served-model-name my-prompt
```

{SEND_IDS}
In transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
text = TEXT  # with the fields filled in
given = tokenizer(text, return_tensors="pt")
print(tokenizer.decode(model.generate(**given, max_new_tokens=8)[0]))
```
"""
GGUF_USAGE = f"""\
`{GGUF_FILE}` is the model's GGUF file with the slots as rows of its table. It was read back by transformers, which
takes packed weights as they are; the backbone has them rounded to 16 bits, and that is most of the difference.
llama.cpp computes on packed weights in its own way.

```
llama-server -m THIS_FOLDER/{GGUF_FILE} --port 8000
```

{SEND_IDS}"""


def write_folder(source: ExportSource, folder: Path) -> ExportResult:
    """Write model and tokenizer, with the slots as reserved or new tokens. Raises ExchangeError if the template as text
    has other ids than the rows, or the model does more to rows than scaling.
    """
    backbone = source.backbone
    if "quantization" in backbone.loaded:
        raise ExchangeError(
            f"'{backbone.name}' is quantised ({backbone.loaded['quantization']}), and a copy of it would not be; load "
            "the model that it was made of, or take the format lora"
        )
    rows = as_rows(backbone, source.vectors)
    table_bytes = backbone.embedding_rows * backbone.width * backbone.dtype.itemsize
    check_room(folder, backbone.parameters * backbone.dtype.itemsize + table_bytes)
    backbone.tokenizer.save(folder)
    tokens = reserved_tokens(source) or _add_tokens(source, folder)
    assert tokens.names is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    difference = text_difference(source, tokens.names, tokens.ids, lambda text: tokenizer(text)["input_ids"])
    if difference is not None:
        raise ExchangeError(
            f"with the slots' tokens {difference}, so a text would be read differently; take lora or embeds, "
            "which are given ids"
        )
    model = _with_slots(source, tokens, rows)
    with quiet():
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)  # safetensors' files are for their owner only

    def load() -> Any:
        with quiet():
            return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=backbone.dtype, use_safetensors=True)

    usage = FOLDER_USAGE.replace("TEXT", repr(source.template_text(tokens.names)))
    return _result(backbone, load, tokens, None, usage=usage)


def _add_tokens(source: ExportSource, folder: Path) -> SlotTokens:
    """Add a token for each slot to the tokenizer of a folder."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    # Nobody writes such a name by chance, and who has not seen the prompt cannot guess it.
    mark = sha256(source.vectors.numpy().tobytes())[:8]
    names = [f"<|slot-{mark}-{number}|>" for number in range(1, len(source.vectors) + 1)]
    tokenizer.add_tokens(
        [AddedToken(name, special=True, normalized=False, lstrip=False, rstrip=False) for name in names],
        special_tokens=True,
    )
    tokenizer.save_pretrained(folder)
    return SlotTokens(tuple(map(tokenizer.get_vocab().__getitem__, names)), tuple(names))


@torch.no_grad()
def _with_slots(source: ExportSource, tokens: SlotTokens, rows: Tensor) -> Any:
    """Return a copy of the model with the slots' rows in its table, and a head of its own. In the head, new tokens get
    the row of the token that is the least likely answer: zeros would not be unlikely.
    """
    backbone = source.backbone
    model: Any = copy.deepcopy(backbone.copy(share=True).model)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ExchangeError(
            f"'{backbone.name}' has no head that could be untied from its embeddings; take the format lora"
        )
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    if (size := max(tokens.ids) + 1) > backbone.embedding_rows:
        with quiet():
            model.resize_token_embeddings(size, mean_resizing=False)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    table[list(tokens.ids)] = rows.to(table.device, table.dtype)
    new = [index for index in tokens.ids if index >= backbone.vocabulary]
    for weight in (head.weight, head.bias):
        if weight is not None and new:
            weight[new] = weight[source.least_likely].clone()
    return model


def write_gguf(source: ExportSource, folder: Path) -> ExportResult:
    """Write a GGUF file. Raises ConfigError if gguf is not installed, and ExchangeError if the backbone is not a GGUF
    file or has too few reserved tokens.
    """
    backbone = source.backbone
    weights = sources.gguf_weights(backbone.name)
    if weights is None:
        raise ExchangeError(f"'{backbone.name}' is not a GGUF file; take the format tokens, and {CONVERT}")
    if find_spec("gguf") is None:
        raise ConfigError("this export needs the package gguf; install it with: pip install gguf")
    tokens = reserved_tokens(source)
    if tokens is None or tokens.names is None:
        raise ExchangeError(
            f"the prompt has {len(source.vectors)} slots, and the tokenizer of '{backbone.name}' has "
            f"{len(backbone.tokenizer.reserved_ids)} reserved tokens; take the format tokens, and {CONVERT}"
        )
    why_no_text = text_difference(source, tokens.names, tokens.ids, backbone.tokenizer.read)
    original = weights.find()
    check_room(folder, original.stat().st_size + 2 * backbone.embedding_rows * backbone.width)
    _copy_gguf(original, folder / GGUF_FILE, tokens, as_rows(backbone, source.vectors))
    return _result(
        backbone,
        lambda: read_gguf(folder / GGUF_FILE, name=backbone.name),
        tokens,
        why_no_text,
        usage=GGUF_USAGE,
        max_difference=ROUGH,
    )


def _copy_gguf(original: Path, to: Path, tokens: SlotTokens, rows: Tensor) -> None:
    """Copy a GGUF file with other rows in its table, which has 16 bits in the copy if it was packed in fewer."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize

    reader = GGUFReader(original)
    writer = GGUFWriter(to, reader.fields[ARCHITECTURE].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != ARCHITECTURE:  # the writer's own
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    is_tied = HEAD not in {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        if tensor.name != TABLE:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        table = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)  # (V, E)
        table[list(tokens.ids)] = rows.numpy()
        is_small = tensor.tensor_type != GGMLQuantizationType.F32 and np.abs(table).max() < np.finfo(np.float16).max
        writer.add_tensor(TABLE, table.astype(np.float16) if is_small else table)
        if is_tied:
            writer.add_tensor(HEAD, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _result(
    backbone: Backbone,
    load: Callable[[], Any],
    tokens: SlotTokens,
    why_no_text: str | None,
    *,
    usage: str,
    max_difference: float | None = None,
) -> ExportResult:
    def input_ids(example: Example) -> list[int]:
        return as_token_ids(example, tokens.ids)

    def reader() -> Reader:
        return reader_of(load().to(backbone.device).eval(), input_ids, backbone.device)

    text = tokens.names if why_no_text is None else None
    return ExportResult(reader, input_ids, usage, tokens, text, why_no_text, max_difference)
