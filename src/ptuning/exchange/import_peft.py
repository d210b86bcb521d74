"""Import of prompts that PEFT trained: PROMPT_TUNING and P_TUNING save one tensor of virtual tokens, and PREFIX_TUNING
one of their keys and values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.lora import CONFIG_FILE, WEIGHTS_FILE
from ptuning.engine.soft_prompt import DeepParams, prefix_of_tokens
from ptuning.errors import ExchangeError
from ptuning.exchange.format import is_close
from ptuning.exchange.peft import VECTORS_KEY
from ptuning.files import FileModel, read_bytes, read_json, validate
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import BackboneId
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.labels import LabelWords
from ptuning.template.language import Template

MAX_CONFIG_BYTES, MAX_WEIGHTS_BYTES = 2**20, 2**31
MAX_VIRTUAL_TOKENS = 2**16
PREFIX_TUNING = "prefix tuning"
METHODS = {"PROMPT_TUNING": "prompt tuning", "P_TUNING": "p-tuning", "PREFIX_TUNING": PREFIX_TUNING}
# Reasons why what other methods hold is no prompt.
ADAPTERS = "holds adapters on layers and no virtual tokens; merge it into the model, and load that as a backbone"
OTHERS: Mapping[str, str] = {
    "CARTRIDGE": "holds keys and values in a format of its own; save them as PREFIX_TUNING",
    "MULTITASK_PROMPT_TUNING": "holds a prompt per task in factors; save the product for one task as PROMPT_TUNING",
    "CPT": "projects its vectors anew in every step; save its final vectors as PROMPT_TUNING",
    "ADAPTION_PROMPT": "holds prompts for single layers, and a prompt holds vectors of the input alone",
    "TRAINABLE_TOKENS": "changes tokens wherever they are, also as answers",
}


class AdapterConfig(FileModel):
    """Keys of PEFT's ``adapter_config.json`` that matter here."""

    peft_type: str
    task_type: str | None = "CAUSAL_LM"
    num_transformer_submodules: int | None = 1
    num_virtual_tokens: int = Field(default=0, ge=0)
    base_model_name_or_path: str | None = None


@dataclass(frozen=True)
class Adapter:
    """Content of a PEFT folder: the names of its method and model, and (N, E) float32 vectors, or for prefix tuning the
    numbers of all layers.
    """

    method: str
    base_model: str | None
    vectors: Tensor


def read_adapter_folder(folder: str | Path) -> Adapter:
    """Read a PEFT folder. Raises FileError if a file is missing, and ExchangeError if it is damaged, a pickle, or of a
    method that trains something else than virtual tokens.
    """
    path = Path(folder)
    config = validate(
        AdapterConfig,
        read_json(path / CONFIG_FILE, at_most=MAX_CONFIG_BYTES),
        str(path / CONFIG_FILE),
        error=ExchangeError,
    )
    number = config.num_virtual_tokens
    if config.peft_type not in METHODS:
        why = OTHERS.get(config.peft_type, ADAPTERS)
        raise ExchangeError(f"{path} is {config.peft_type} of PEFT, which {why}; imported are {', '.join(METHODS)}")
    if config.num_transformer_submodules not in (1, None) or config.task_type not in (
        *("CAUSAL_LM", "FEATURE_EXTRACTION", None),
    ):
        raise ExchangeError(f"{path} was trained for the task type {config.task_type}; only CAUSAL_LM is imported")
    if number > MAX_VIRTUAL_TOKENS:
        raise ExchangeError(f"{path / CONFIG_FILE} has {number} virtual tokens; the limit is {MAX_VIRTUAL_TOKENS}")
    file = path / WEIGHTS_FILE
    if not file.exists() and file.with_suffix(".bin").exists():
        raise ExchangeError(
            f"{file.with_suffix('.bin')} is a pickle, which could run code and is not read; save the adapter with "
            "safe_serialization=True (PEFT's default)"
        )
    try:
        tensors = safetensors.torch.load(read_bytes(file, at_most=MAX_WEIGHTS_BYTES))
    except (safetensors.SafetensorError, ValueError) as error:
        raise ExchangeError(f"{file} is not a whole safetensors file ({error}); it is truncated or damaged") from error
    vectors = tensors.get(VECTORS_KEY)
    if vectors is None or len(tensors) > 1 or not vectors.is_floating_point() or vectors.ndim != 2:
        held = ", ".join(f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in sorted(tensors.items()))
        raise ExchangeError(f"{file} must hold one matrix '{VECTORS_KEY}', and holds {held or 'nothing'}")
    if len(vectors) != number:
        raise ExchangeError(f"{file} holds {len(vectors)} vectors, and {CONFIG_FILE} says {number} virtual tokens")
    return Adapter(METHODS[config.peft_type], config.base_model_name_or_path, vectors.float())


def import_prompt(
    adapter: Adapter, template: str | Template, backbone: Backbone, *, label_words: LabelWords | None = None
) -> Prompt:
    """Return a prompt that reads what PEFT reads: the virtual tokens, and then the text of the template.

    Args:
        adapter: Result of :func:`read_adapter_folder`.
        template: Begins with a slot for each virtual token, ``[P*n]`` (``[D*n]`` for prefix tuning), and goes on with
            the text that the adapter was trained on. With a tokenizer that begins texts with BOS, PEFT puts virtual
            tokens before it: ``[P*n]<s>``. If BOS is the first virtual token, as in our exports, it has no slot.
        backbone: The model that it was trained on.
        label_words: Label -> words, for classification.

    Raises:
        ExchangeError: If the width is another one, the slots do not match, or the text would be read differently.
        TemplateError: If the template is malformed.
    """
    parsed = Template.parse(template) if isinstance(template, str) else template
    if backbone.kind != "causal":
        raise ExchangeError(
            f"'{backbone.name}' is a model of the kind {backbone.kind}; virtual tokens of causal models are imported"
        )
    bos, number = backbone.tokenizer.prefix_ids, len(adapter.vectors)
    deep = _deep_params(adapter.vectors, backbone) if adapter.method == PREFIX_TUNING else None
    if deep is None:
        _check_width(adapter.vectors, backbone.width, backbone)
    bound = TokenizedTemplate(parsed, tokenizer=backbone.tokenizer, kind=backbone.kind, block=deep is not None)
    record = {name: name for name in parsed.fields}
    row = bound.contexts([record])[0]
    if deep is not None:
        has_bos, rest, vectors = bool(deep.bos), row.token_ids, torch.zeros(0, backbone.width)
        layout = bound.layout
        is_same = (layout.prefix.slots, len(layout.slot_start_ids), layout.prefix.bos) == (
            deep.prefix_slots,
            0,
            deep.bos,
        )
    else:
        has_bos = bound.slots == number - len(bos) and _begins_with_bos(adapter.vectors, backbone)
        skipped = len(bos) if has_bos else 0
        rest, vectors = row.token_ids[number:], adapter.vectors[skipped:].clone()
        is_same = row.slot_positions == tuple(range(skipped, number))
    if not is_same:
        names = [text for text, index in backbone.tokenizer.special_ids.items() if index in bos and not has_bos]
        start = f"[{'P' if deep is None else 'D'}*{number - (len(bos) if has_bos else 0)}]{''.join(names)}"
        raise ExchangeError(
            f"the adapter has {number} virtual tokens before all text, and the template '{parsed}' does not have as "
            f"many slots there, and no others; begin it with {start}"
        )
    text = bound.texts(record)[-1]
    theirs = backbone.tokenizer.read(text, add_special_tokens=False)
    if theirs != list(rest):
        raise ExchangeError(
            f"after the slots the template '{parsed}' has the ids {list(rest)}, and the tokenizer gives the text "
            f"{text!r} the ids {theirs}, so PEFT reads another text; remove the space after the slots, or add one"
        )
    method = f"{adapter.method} of PEFT"
    return Prompt(parsed, vectors, BackboneId.of(backbone), label_words, method=method, deep=deep)


def _check_width(vectors: Tensor, width: int, backbone: Backbone) -> None:
    if vectors.shape[1] != width:
        raise ExchangeError(
            f"a virtual token is {vectors.shape[1]} wide, and '{backbone.name}' needs {width}; name the model that it "
            "was trained on (backbone)"
        )


def _begins_with_bos(vectors: Tensor, backbone: Backbone) -> bool:
    bos = backbone.tokenizer.prefix_ids
    return bool(bos) and is_close(vectors[: len(bos)], backbone.vectors_of(torch.tensor(bos)).cpu(), backbone.dtype)


def _deep_params(vectors: Tensor, backbone: Backbone) -> DeepParams:
    """Return the deep slots that PEFT's (N, L * 2 * K * D) numbers are; the first of them are no slots if they are the
    tokens that open a text. Raises ExchangeError if they are of another model.
    """
    if not backbone.reads_blocks:
        raise ExchangeError(f"'{backbone.name}' takes no keys and values as a prefix, which prefix tuning needs")
    bos = backbone.tokenizer.prefix_ids
    opening = prefix_of_tokens(backbone, bos or [0])
    layers, two, heads, _, width = opening.shape
    _check_width(vectors, layers * two * heads * width, backbone)
    block = vectors.view(-1, layers, two, heads, width).permute(1, 2, 3, 0, 4).contiguous()  # (L, 2, K, N, D)
    is_rounded = torch.equal(block.bfloat16().float(), block)
    has_bos = 0 < len(bos) < len(vectors) and is_close(
        block[:, :, :, : len(bos)], opening, torch.bfloat16 if is_rounded else backbone.dtype
    )
    return DeepParams(block, len(bos) if has_bos else 0)
