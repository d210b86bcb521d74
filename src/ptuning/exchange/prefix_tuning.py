"""A prompt of deep slots in front as PEFT's PREFIX_TUNING: keys and values of virtual tokens for every layer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine.soft_prompt import DeepParams, prefix_of_tokens
from ptuning.errors import ExchangeError
from ptuning.exchange.form import Exported, Form
from ptuning.exchange.peft_files import check_peft, logits_at, read_adapter, write_adapter
from ptuning.exchange.prompt_tuning import VECTORS_KEY, check_rest, usage_of
from ptuning.exchange.reserved import SlotTokens
from ptuning.exchange.rows import Reader, Source
from ptuning.prompt.prompt import Prompt
from ptuning.template.encode import Example
from ptuning.template.language import Slots, TextSlots
from ptuning.template.segments import Ids


def check_prefix(prompt: Prompt) -> None:
    """Raise an ExchangeError unless all of a prompt's slots are deep ones in front, and keys and values."""
    assert prompt.deep is not None
    first, *rest = prompt.template.pieces
    in_front = isinstance(first, Slots | TextSlots) and not any(isinstance(one, Slots | TextSlots) for one in rest)
    if in_front and prompt.deep.block is None:
        raise ExchangeError(
            f"the deep slots of '{prompt.template}' are added to what the layers of its model read, as this one takes "
            "no keys and values in front of a row, and these alone are what PEFT holds; no other template helps"
        )
    if prompt.deep.block is None or prompt.deep.slots or prompt.slots:
        raise ExchangeError(
            f"of deep slots, PEFT holds keys and values in front of a text alone, and the template '{prompt.template}' "
            "has other slots as well; train one with [D] at its front and no other slots (method p-tuning-v2)"
        )


def write(source: Source, folder: Path) -> Exported:
    """Write the adapter. An ExchangeError if what stands behind the slots has other ids as a text."""
    check_peft()
    check_rest(source, 0)
    deep = source.prompt.deep
    assert deep is not None
    assert deep.block is not None
    layers, _, heads, columns, width = deep.block.shape
    write_adapter(
        source,
        folder,
        {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": columns,
            "token_dim": heads * width,
            "num_layers": layers,
            "num_attention_heads": heads,
            "encoder_hidden_size": heads * width,
            "prefix_projection": False,
            "num_transformer_submodules": 1,
        },
        {VECTORS_KEY: deep.block.permute(3, 0, 1, 2, 4).reshape(columns, -1)},
    )
    about = f"{columns} virtual tokens in every layer: {deep.in_front} deep slots, and the tokens that open a text."
    return Exported(
        SlotTokens(),
        lambda: _reader(source, folder),
        lambda example: example.token_ids,
        usage=usage_of(source, about),
    )


def _reader(source: Source, folder: Path) -> Reader:
    model = read_adapter(source, folder)

    def read(example: Example) -> Tensor:
        return logits_at(model, list(example.token_ids), example.logit_positions, source.backbone.device)

    return read


def deep_of(vectors: Tensor, backbone: Backbone, *, opening: Ids) -> DeepParams:
    """Return the deep slots that PEFT's (N, L * 2 * K * D) numbers are; the first of them are no slots if they are the
    tokens that open a text (``opening``). An ExchangeError if they are of another model.
    """
    if not backbone.reads_blocks:
        raise ExchangeError(f"'{backbone.name}' reads no keys and values in front of a row, which prefix tuning brings")
    some = prefix_of_tokens(backbone, opening or [0])
    layers, two, heads, _, width = some.shape
    if vectors.shape[1] != layers * two * heads * width:
        raise ExchangeError(
            f"the prefix has {vectors.shape[1]} numbers for a virtual token, and keys and values of '{backbone.name}' "
            f"are {layers * two * heads * width}; name the model that it was trained on with --backbone"
        )
    block = vectors.view(-1, layers, two, heads, width).permute(1, 2, 3, 0, 4).contiguous()  # (L, 2, K, N, D)
    lead = len(opening)
    is_rounded = backbone.dtype != torch.float32 or torch.equal(block.bfloat16().float(), block)
    rounding = 2e-2 if is_rounded else 1e-5
    is_given = lead and block.shape[3] > lead
    if is_given:
        is_given = bool((block[:, :, :, :lead] - some).abs().max() <= rounding * some.abs().max())
    return DeepParams(block, lead if is_given else 0)


FORM = Form("prefix tuning of PEFT; for templates whose slots are deep ones in front", write)
