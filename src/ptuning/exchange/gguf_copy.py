"""A copy of the model's GGUF file with the slots as rows of reserved tokens: for llama.cpp and what builds on it.

All other weights keep their bytes. The embedding table is unpacked, and a tied head keeps the packed one as its own.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ptuning.backbone import sources
from ptuning.backbone.loading import read_gguf
from ptuning.errors import ConfigError, ExchangeError
from ptuning.exchange.form import Exported, Form, asked_with_ids
from ptuning.exchange.peft_files import logits_at
from ptuning.exchange.reserved import SlotTokens, as_rows, reserved_tokens
from ptuning.exchange.rows import ROUGH, Reader, Source, spoken, text_difference
from ptuning.files import check_room
from ptuning.template.encode import Example
from ptuning.template.segments import Ids

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

FILE = "model.gguf"
TABLE, HEAD = "token_embd.weight", "output.weight"
ARCHITECTURE = "general.architecture"


def write(source: Source, folder: Path) -> Exported:
    """Write the file. A ConfigError if gguf is not installed; an ExchangeError if the backbone is not a GGUF file, has
    too few reserved tokens, or reads the template as text in another way.
    """
    backbone = source.backbone
    weights = sources.gguf_weights(backbone.name)
    if weights is None:
        raise ExchangeError(
            f"'{backbone.name}' is not a GGUF file, whose copy is written; take --as tokens, and convert that folder "
            "with llama.cpp's convert_hf_to_gguf.py"
        )
    _check_gguf()
    tokens = reserved_tokens(source)
    if tokens is None or tokens.named is None:
        raise ExchangeError(
            f"the prompt has {len(source.vectors)} slots, and the tokenizer of '{backbone.name}' keeps "
            f"{len(backbone.tokenizer.reserved_ids)} tokens in reserve; take --as tokens, which adds tokens, and "
            "convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    apart = text_difference(source, tokens.named, tokens.ids, backbone.tokenizer.read)
    original = weights.find()
    check_room(folder, original.stat().st_size + 2 * backbone.embedding_rows * backbone.width)
    _copy(original, folder / FILE, tokens, as_rows(backbone, source.vectors))
    return Exported(
        tokens,
        lambda: _reader(source, folder, tokens.ids),
        lambda example: spoken(example, tokens.ids),
        text=tokens.named if apart is None else None,
        why_no_text=apart,
        usage=_usage(),
        max_difference=ROUGH,
    )


def _check_gguf() -> None:
    try:
        version("gguf")
    except PackageNotFoundError as error:
        raise ConfigError("this export needs the package gguf; install it with: pip install gguf") from error


def _copy(original: Path, to: Path, tokens: SlotTokens, rows: Tensor) -> None:
    """Copy a GGUF file with other rows in its table."""
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(original)
    writer = GGUFWriter(to, reader.fields[ARCHITECTURE].contents())
    _copy_fields(reader, writer)
    names = {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        if tensor.name != TABLE:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        writer.add_tensor(TABLE, _with_rows(tensor, tokens.ids, rows))
        if HEAD not in names:
            writer.add_tensor(HEAD, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_fields(reader: GGUFReader, writer: GGUFWriter) -> None:
    from gguf import GGUFValueType

    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == ARCHITECTURE:
            continue  # the writer's own
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)


def _with_rows(tensor: Any, ids: Ids, rows: Tensor) -> Any:
    """Return the table unpacked, (V, E), with rows at some ids; in 16 bits if it was packed in fewer."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    table = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    table[list(ids)] = rows.numpy()
    is_small = tensor.tensor_type != GGMLQuantizationType.F32 and np.abs(table).max() < np.finfo(np.float16).max
    return table.astype(np.float16) if is_small else table


def _reader(source: Source, folder: Path, ids: Ids) -> Reader:
    model: Any = read_gguf(folder / FILE, name=source.backbone.name)
    model.to(source.backbone.device).eval()

    def read(example: Example) -> torch.Tensor:
        return logits_at(model, spoken(example, ids), example.logit_positions, source.backbone.device)

    return read


def _usage() -> list[str]:
    return [
        f"`{FILE}` is the model's GGUF file with the slots as rows of its table. It was read back by transformers,",
        "which takes packed weights as they are; the backbone has them rounded to 16 bits, and that is most of the",
        "difference. llama.cpp computes on packed weights in its own way.",
        "",
        "```",
        f"llama-server -m THIS_FOLDER/{FILE} --port 8000",
        "```",
        "",
        *asked_with_ids("my-prompt"),
    ]


FORM = Form("a copy of the GGUF file with the slots as tokens; llama.cpp", write)
